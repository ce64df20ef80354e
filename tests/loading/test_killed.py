"""A loader process that is killed from outside: the run ends at once, with one line that says why and what to change."""

import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest

from loading import loaders
from run import command
from run.errors import InputError
from tests.conftest import ROOT, TINY_RUN, run_forked, start, wait_for

TOLD = r"a loader process was killed from outside \((Killed|it is gone)\); .*give the job more, or lower --num-workers or --batch-size\. Then start again"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "killed from outside (Killed); the system does so where memory runs out"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that", "(Bus error); shared memory ran out: enlarge /dev/shm"),
        ("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ", "(Segmentation fault); memory may have run out"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "(it is gone); memory may have run out"),
    ],
)
def test_the_cause_and_the_flags_are_named(text, words):
    told = str(command.killed_loader(RuntimeError(text)))
    assert words in told and "lower --num-workers or --batch-size" in told and "--resume auto" in told


def test_the_loss_is_named_wherever_it_was_raised():
    """As while a checkpoint is written, which takes it for its own failure."""
    try:
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        except RuntimeError as error:
            raise InputError("not saved (the file could not be written)") from error
    except InputError as error:
        assert str(command.killed_loader(error)).startswith("a loader process was killed")
    assert command.killed_loader(RuntimeError("DataLoader timed out")) is None and command.killed_loader(InputError("x")) is None


def test_a_batch_whose_process_died_before_it_was_fetched_names_that():
    def fetch(error):
        yield 1
        raise error

    for error in (ConnectionResetError(), ConnectionRefusedError(), EOFError(), FileNotFoundError()):
        batches = loaders.received(fetch(error))
        assert next(batches) == 1
        with pytest.raises(RuntimeError) as caught:
            next(batches)
        assert re.match(TOLD, str(command.killed_loader(caught.value)))


def test_loader_processes_are_silent_when_their_parent_stops_fetching(capsys):
    loaders._tell_unless_parent_left(ConnectionResetError, ConnectionResetError(), None)
    assert capsys.readouterr().err == ""
    loaders._tell_unless_parent_left(ZeroDivisionError, ZeroDivisionError("as planned"), None)
    assert "as planned" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_run_ends_with_one_line(digits_folder, tmp_path):
    flags = [*TINY_RUN, "--epochs=1000", "--num_workers=2", "--checkpoint-steps=1"]
    process = start("main.py", *flags, f"--data-path={digits_folder}", f"--output_dir={tmp_path}")
    wait_for(tmp_path / "log.txt", process)  # so all loader processes are there, those of evaluation too
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) == 4
    os.kill(workers[-1], signal.SIGKILL)
    out, _ = process.communicate()
    assert process.returncode == 1 and re.match(f"error: {TOLD}", out.splitlines()[-1]) and "Traceback" not in out, out
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def _start_without_parent() -> None:
    os.getppid = lambda: 1  # as it is once the parent is gone
    loaders._end_with_killed_parent()
    os._exit(0)


def test_a_loader_process_whose_run_was_killed_while_it_started_ends():
    process = multiprocessing.get_context("fork").Process(target=_start_without_parent)
    process.start()
    process.join()
    assert process.exitcode == 1


@pytest.mark.slow
def test_a_killed_run_leaves_no_loader_process_behind(digits_folder, tmp_path):
    """Not even one that waits for ever, as on a lost disk, and so cannot look whether the run still lives."""
    flags = [*TINY_RUN, "--epochs=1000", "--num_workers=1"]
    process = start("main.py", *flags, f"--data-path={digits_folder}", f"--output_dir={tmp_path}")
    wait_for(tmp_path / "log.txt", process)
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(pid), signal.SIGSTOP)
    process.kill()
    process.communicate()  # ends when the last that writes to the run's output does
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_one_of_two_processes_that_loses_a_loader_process_while_evaluating_says_so(digits_folder, tmp_path):
    script = tmp_path / "kill.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport json, os, signal, engine, main\nfrom tests.programs import processes\nreal = engine.evaluate\n"
        "def evaluate_then_kill(net, loader, parts, *rest):\n    result = real(net, loader, parts, *rest)\n"
        "    if parts.rank.index == 1: os.kill(loader.loader._iterator._workers[0].pid, signal.SIGKILL)\n    return real(net, loader, parts, *rest)\n"
        "engine.evaluate = evaluate_then_kill\nprint(json.dumps(processes.launch(2, 'main', sys.argv[1:])))\n"
    )
    flags = [*TINY_RUN, "--batch-size=8", "--num_workers=1", f"--data-path={digits_folder}", f"--output_dir={tmp_path / 'run'}"]
    done = run_forked(str(script), *flags)
    assert done.returncode == 0, done.stderr
    codes, errors, _ = json.loads(done.stdout)
    assert 0 not in codes and len(re.findall(rf"^\[rank 1\] error: {TOLD}", errors, re.M)) == errors.count("a loader process was killed") == 1, errors
