"""What befalls one process: it is killed, its terminal closes, someone presses Ctrl-C, its numbers are not finite."""

import os
import re
import signal
import subprocess
import time

import pytest
import torch

import engine
import main
from run import checkpoint, command, signals
from tests.conftest import ROOT, TINY_RUN, finish, read_log, start, wait_for
from tests.programs.processes import free_port
from tests.run.test_watch import assert_same_run
from tests.test_main import states_equal
from tests.test_processes import TORCHRUN


def flags_of(digits_folder, folder, *more: str) -> list[str]:
    return [*TINY_RUN, f"--data-path={digits_folder}", f"--output_dir={folder}", *more]


def write_program(path, body: str) -> str:
    """A program that is main.py but for `body`, which may replace parts of engine."""
    start_of_all = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport os, signal, time\nimport torch, engine, main, utils\nfrom run import command\n"
    path.write_text(start_of_all + body + "command.run_process(main.main, sys.argv[1:])\n")
    return str(path)


def start_two(*args: str) -> list[subprocess.Popen]:
    """Two processes of one run without a launcher, which would end one after the other."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(*args, **shared, RANK=str(i), LOCAL_RANK=str(i)) for i in range(2)]


@pytest.fixture
def own_signals():
    """Puts the signal handlers back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals.StopRequest.is_made, signals.StopRequest.interrupted_at = False, None


def test_signals_that_ask_to_stop_are_remembered_but_not_those_that_nohup_ignores(own_signals):
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        stop = signals.StopRequest()
        assert not stop.is_made
        os.kill(os.getpid(), number)
        assert stop.is_made
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = signals.StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.is_made


def test_under_a_launcher_one_ctrl_c_that_arrives_twice_is_one(own_signals, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    now, killed = [100.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    stop = signals.StopRequest()
    for now[0] in (100.0, 100.2):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.is_made and capfd.readouterr().err.count("Ctrl-C again stops at once") == 1
    monkeypatch.setattr(signals.os, "kill", lambda pid, number: killed.append(number))
    now[0] = 101.5
    stop._interrupt(signal.SIGINT, None)
    assert killed == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, command.STOPPED), (signal.SIGINT, command.INTERRUPTED)])
def test_closed_terminal_and_ctrl_c_save_and_end_with_a_code_of_their_own(digits_folder, tmp_path, own_signals, monkeypatch, capfd, number, code):
    real = engine.train_step

    def step_then_ask(*args, epoch, step):
        if step == 2:
            os.kill(os.getpid(), number)
        return real(*args, epoch=epoch, step=step)

    monkeypatch.setattr(engine, "train_step", step_then_ask)
    with pytest.raises(SystemExit) as end:
        command.run_process(main.main, flags_of(digits_folder, tmp_path))
    assert end.value.code == code
    saved = checkpoint.read(str(tmp_path / "checkpoint_last.pth"))
    assert (saved["epoch"], saved["step"]) == (-1, 3)
    out, err = capfd.readouterr()
    assert "told to stop: saved after step 3 of epoch 0" in out and ("Ctrl-C again stops at once" in err) == (number == signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_twice_stops_at_once(digits_folder, tmp_path):
    body = f"def hang(*args, **kwargs):\n    open({str(tmp_path / 'hangs')!r}, 'w').close()\n    time.sleep(600)\nengine.train_step = hang\n"
    process = start(write_program(tmp_path / "hang.py", body), *flags_of(digits_folder, tmp_path / "run"))
    wait_for(tmp_path / "hangs", process)
    process.send_signal(signal.SIGINT)
    for line in process.stdout:
        if "Ctrl-C again stops at once" in line:
            break
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_says_so_and_ends(digits_folder, tmp_path):
    flags = flags_of(digits_folder, tmp_path, "--batch-size=8", "--epochs=1000", "--checkpoint-steps=1", "--num_workers=1")
    first, second = start_two("main.py", *flags)
    wait_for(tmp_path / "checkpoint_last.pth", first)
    second.kill()
    killed = time.monotonic()
    out = finish(first, 1)
    assert time.monotonic() - killed < 60
    assert out.count("error: another process of the run is gone") == 1 and "Traceback" not in out
    second.communicate()


@pytest.mark.slow
def test_a_launcher_starts_all_again_after_one_was_killed_and_the_run_ends_as_if_nothing_had_been(digits_folder, tmp_path):
    flags = ["--batch-size=8", "--resume=auto", "--checkpoint-steps=2"]
    for process in start_two("main.py", *flags_of(digits_folder, tmp_path / "whole", *flags)):
        finish(process, 0)
    body = (
        "real = engine.train_step\n"
        "def step_then_die(parts, *args, epoch, step):\n    loss = real(parts, *args, epoch=epoch, step=step)\n"
        "    is_first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "    if is_first and parts.rank.index == 1 and (epoch, step) == (1, 3): os.kill(os.getpid(), signal.SIGKILL)\n    return loss\n"
        "engine.train_step = step_then_die\n"
    )
    program = write_program(tmp_path / "die.py", body)
    out = finish(start(*TORCHRUN, "--nproc_per_node=2", "--max-restarts=3", program, *flags_of(digits_folder, tmp_path / "cut", *flags)), 0)
    assert "with epoch 1, step 2" in out
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_what_is_not_finite_in_one_process_is_left_out_of_both(digits_folder, tmp_path):
    """The second process's images are spoilt in the first of two micro-batches of one step, then in all of epoch 1."""
    body = (
        "engine.REPORT_EVERY_S = -1\nreal_step, real_mixed, bad = engine.train_step, engine.mixed, []\n"
        "def mixed(parts, batch, epoch):\n    images, targets = real_mixed(parts, batch, epoch)\n"
        "    is_bad = parts.rank.index == 1 and (epoch == 1 or (bad and bad.pop()))\n    return images * (float('nan') if is_bad else 1), targets\n"
        "def train_step(parts, state, micro_batches, *, epoch, step):\n"
        "    bad[:] = [True] if (epoch, step) == (0, 2) else []\n"
        f"    folder = {str(tmp_path)!r}\n"
        "    if (epoch, step) in ((0, 2), (0, 3), (1, 0)):\n"
        "        found = {'net': utils.unwrap(state.net).state_dict(), 'ema': state.ema.module.state_dict(), 'optimizer': state.optimizer.state_dict()}\n"
        "        torch.save(found, f'{folder}/{parts.rank.index}_{epoch}_{step}.pt')\n"
        "    return real_step(parts, state, micro_batches, epoch=epoch, step=step)\n"
        "engine.train_step, engine.mixed = train_step, mixed\n"
    )
    flags = ["--batch-size=4", "--grad-accum-steps=2", "--max-skipped-steps=3"]
    processes = start_two(write_program(tmp_path / "spoil.py", body), *flags_of(digits_folder, tmp_path / "run", *flags))
    out, _ = [finish(process, 1) for process in processes]
    load = lambda name: torch.load(tmp_path / f"{name}.pt", weights_only=True)  # noqa: E731
    for rank in (0, 1):
        assert states_equal(load(f"{rank}_0_2"), load(f"{rank}_0_3"))  # the spoilt step changed nothing
    first, second = load("0_1_0"), load("1_1_0")
    assert states_equal(first, second)
    assert all(tensor.isfinite().all() for part in ("net", "ema") for tensor in first[part].values())
    assert [record["skipped_steps"] for record in read_log(tmp_path / "run")] == [1]
    assert out.count("Going back to") == 1
    # Processes agree to stop every so many steps, up to the epoch's end: so it is the third bad step or a later one.
    told = re.search(r"(\d) steps in a row, the last was step (\d) of epoch 1 \(.*, precision float32\): in process 1, its images are not finite", out)
    assert told and int(told[1]) == int(told[2]) + 1 >= 3, out
