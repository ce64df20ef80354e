"""What commands share: a console that is closed or full, and standard streams that are not there."""

import os
import subprocess
import sys

import pytest
import torch

import main
import utils
from run import process
from tests.conftest import ROOT, TINY_RUN, read_log

CPU = utils.Rank(0, 1, 0, 1, torch.device("cpu"))
LINE = "standard output cannot be written ({}): the run goes on without it, and writes its files\n"


def full():
    return open("/dev/full", "w")


def without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def closed():
    with open(os.devnull, "w") as stream:
        return stream


@pytest.mark.parametrize(
    ("make", "reason"),
    [(full, "No space left on device"), (without_reader, "Broken pipe"), (closed, "it is closed"), (lambda: None, "it is closed")],
    ids=["full", "without reader", "closed", "none"],
)
def test_a_run_whose_console_is_gone_says_so_once_and_writes_its_files(make, reason, digits_folder, tmp_path, capsys, monkeypatch):
    stream = make()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main.main([*TINY_RUN, f"--data-path={digits_folder}", "--epochs=1", f"--output_dir={tmp_path}"]) == 0
    assert capsys.readouterr().err == LINE.format(reason)
    assert len(read_log(tmp_path)) == 1 and (tmp_path / "checkpoint_0.pth").exists()
    if stream is not None:
        stream.close()  # what it still held is no error either


def test_faults_of_messages_are_still_told(capsys):
    process.start_logging(CPU)
    utils.log.info("%d", "no number")
    assert "Logging error" in capsys.readouterr().err
    utils.log.info("goes on")
    assert capsys.readouterr().out == "goes on\n"


@pytest.mark.slow
def test_a_reader_that_leaves_ends_nothing(digits_folder, tmp_path):
    """`| head -1`: exit code 0 and one line on standard error, with standard input closed besides."""
    flags = [*TINY_RUN, f"--data-path={digits_folder}", "--epochs=1", f"--output_dir={tmp_path}"]
    script = 'exec <&-; "$@" | head -1; exit ${PIPESTATUS[0]}'
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", script, "bash", sys.executable, "main.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=200, env=env)
    assert (done.returncode, done.stderr) == (0, LINE.format("Broken pipe")) and done.stdout.startswith("train: 96 images of 4 classes")
    assert len(read_log(tmp_path)) == 1


def test_help_without_a_reader_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "main.py", "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_closed_standard_streams_are_not_taken_by_files():
    """Else what a library prints would go into a checkpoint."""
    code = (
        "import os\nfrom run import command\ncommand.reserve_standard_streams()\nnumber = os.open('main.py', os.O_RDONLY)\nos.write(number_out, b'%d' % number)"
    )
    reader, writer = os.pipe()
    code = code.replace("number_out", str(writer))
    done = subprocess.run(["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code], cwd=ROOT, pass_fds=[writer])
    os.close(writer)
    with os.fdopen(reader) as answers:
        assert done.returncode == 0 and int(answers.read()) > 2


def test_errors_without_standard_error_keep_their_exit_code(tmp_path):
    done = subprocess.run(["bash", "-c", 'exec "$@" >&- 2>&-', "bash", sys.executable, "main.py", "--epoch=3"], cwd=ROOT)
    assert done.returncode == 1
