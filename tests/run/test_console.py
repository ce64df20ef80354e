"""The bar of a run on a terminal: what it tells, and what is left on the screen when it is gone."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading

import pytest
import torch

import engine
import main
from detection import __main__ as detection
from run import console, process
from run.signals import StopRequest
from tests.conftest import TINY_RUN, read_log
from tests.detection.conftest import SHORT_RUN as DETECTION_RUN
from tools import make_shapes
from utils import Rank, log

CPU = Rank(0, 1, 0, 1, torch.device("cpu"))
COLUMNS = 150


class Terminal:
    """What was written to a terminal."""

    def __init__(self):
        self.text = ""

    def screen(self) -> list[str]:
        """Its lines, as they are to be seen in the end."""
        lines, column = [[]], 0
        for part in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]", self.text):
            if part == "\r":
                column = 0
            elif part == "\n":
                lines.append([])
            else:
                assert part != "\x1b[A"  # one line is all that is drawn again
                lines[-1] += [" "] * (column + 1 - len(lines[-1]))
                lines[-1][column] = part
                column += 1
                assert column <= COLUMNS or not "".join(lines[-1]).startswith("epoch"), "the bar is wider than the terminal"
        return ["".join(line).rstrip() for line in lines]

    def bars(self) -> list[str]:
        """Each drawing of the bar."""
        return re.findall(r"\r(epoch \d+/\d+ (?: *\d+%\||\d+/\d+ )[^\r\n]+)", self.text)


@pytest.fixture
def terminal(monkeypatch):
    """Standard output and standard error on a terminal inside the block, where the bar is drawn as often as it can be."""
    monkeypatch.setattr(console, "DRAW_EVERY_S", 0.0)
    monkeypatch.setattr(engine, "BAR_EVERY_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(StopRequest, "is_made", False)  # of the process, whatever other tests left

    @contextlib.contextmanager
    def opened(columns: int = COLUMNS):
        found, (ours, theirs) = Terminal(), pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50 if columns else 0, columns, 0, 0))
        reader = threading.Thread(target=_read, args=(ours, found))
        reader.start()
        kept = os.dup(2)
        try:
            with monkeypatch.context() as patch, contextlib.ExitStack() as streams:
                os.dup2(theirs, 2)
                for name in ("stdout", "stderr"):
                    stream = os.fdopen(os.dup(theirs), "w", buffering=1, encoding="utf-8")
                    patch.setattr(sys, name, streams.enter_context(stream))
                yield found
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(theirs)
            reader.join(10)
            os.close(ours)

    return opened


def _read(ours: int, found: Terminal) -> None:
    data = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while part := os.read(ours, 4096):
            data += part
    found.text = data.decode()


def told(lines: list[str]) -> list[str]:
    """Lines with what differs between two runs taken out: numbers, and the folder."""
    return [re.sub(r"\d[\d.:e+-]*", "#", line.partition("done: ")[1] or line) for line in lines if line]


def test_a_terminal_shows_a_bar_and_keeps_the_lines_that_files_get(digits_folder, tmp_path, terminal, capsys):
    argv = [*TINY_RUN, f"--data-path={digits_folder}", "--epochs=2"]
    with terminal() as found:
        assert main.main([*argv, f"--output_dir={tmp_path / 'a'}"]) == 0
    bars = found.bars()
    steps = [int(re.search(r"\| (\d+)/", bar)[1]) for bar in bars if bar.startswith("epoch 1/2")]
    assert steps == sorted(steps) and set(steps) == set(range(7))
    assert re.fullmatch(r"epoch 1/2 +67%\|.+\| 4/6  loss \d\.\d{4}  \d+ images/s  data \d+ %  ends in 0:00:\d\d, run in 0:00:\d\d", bars[-4].rstrip()), bars
    assert len({re.search(r"loss (\S+)", bar)[1] for bar in bars if "loss" in bar}) > 4
    assert main.main([*argv, f"--output_dir={tmp_path / 'b'}"]) == 0
    plain = capsys.readouterr().out
    assert "%|" not in plain and "\r" not in plain
    assert told(found.screen()) == told(plain.splitlines())
    assert [line["train_loss"] for line in read_log(tmp_path / "a")] == [line["train_loss"] for line in read_log(tmp_path / "b")]


def test_ctrl_c_leaves_whole_lines(digits_folder, tmp_path, terminal, monkeypatch):
    real = engine.train_step

    def interrupted(*args, epoch: int, step: int):
        if (epoch, step) == (0, 2):
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, epoch=epoch, step=step)

    monkeypatch.setattr(engine, "train_step", interrupted)
    with terminal() as found:
        assert main.main([*TINY_RUN, f"--data-path={digits_folder}", f"--output_dir={tmp_path}"]) == main.STOPPED
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert found.screen()[-3:] == [
        "stopping: saves after this step; Ctrl-C again stops at once",
        "told to stop: saved after step 3 of epoch 0; continue with --resume auto",
        "",
    ]
    assert found.screen()[-4].startswith("epoch 0/2") and "| 2/6" in found.bars()[-1]  # the bar as it was


def test_detectors_have_it_too(tmp_path, terminal):
    make_shapes.make(tmp_path / "shapes", num_train=8, num_val=2)
    with terminal() as found:
        assert detection.main([*DETECTION_RUN, f"--data-path={tmp_path / 'shapes'}", "--epochs=1", f"--output_dir={tmp_path / 'run'}"]) == 0
    assert re.search(r"\| 2/3  loss \d+\.\d{4}  \d+ images/s", "\n".join(found.bars())), found.bars()
    assert not [line for line in found.screen() if "%|" in line]


@pytest.mark.parametrize("columns", [COLUMNS, 40, 0])  # the last: it does not tell
def test_messages_do_not_tear_the_bar(terminal, columns):
    with terminal(columns) as found:
        process.start_logging(CPU)
        with console.progress_bar("epoch 0/1", total=3, num_done=0, is_main=True) as bar:
            bar.show(1, "one")
            log.warning("damaged: a.jpg")
            bar.show(2, "two")
            console.tell("by standard error\n")
            bar.show(3, "three")
    assert found.screen() == ["damaged: a.jpg", "by standard error", ""]
    shown = [bar.split()[-1] for bar in found.bars() if bar.split()[-1].isalpha()]
    assert shown == ["one", "one", "two", "two", "three"]


@pytest.mark.parametrize(("columns", "expected"), [(120, "| 2/3  loss 1.5000  300 images/s"), (60, "epoch 0/1 2/3 loss 1.5000 300 img/s data 25 % ends in 0:")])
def test_a_narrow_terminal_shows_numbers_in_place_of_the_bar(terminal, columns, expected):
    with terminal(columns) as found, console.progress_bar("epoch 0/1", total=3, num_done=0, is_main=True) as bar:
        bar.show(2, "loss 1.5000  300 images/s  data 25 %  ends in 0:00:25, run in 0:02:06")
    assert expected in found.bars()[-1] and ("%|" in found.bars()[-1]) == (columns == 120)
    assert len(found.bars()[-1]) <= columns


@pytest.mark.parametrize(("is_main", "term"), [(False, "xterm"), (True, "dumb")])
def test_other_processes_and_dumb_terminals_have_none(terminal, is_main, term, monkeypatch):
    with terminal() as found:
        monkeypatch.setenv("TERM", term)
        with console.progress_bar("epoch 0/1", total=3, num_done=0, is_main=is_main) as bar:
            bar.show(1, "one")
    assert found.text == "" and bar is console.NO_BAR


def test_ends_are_told_with_what_lies_between_epochs(monkeypatch):
    """10 s for 2 of 8 steps, 5 left, in the third of five epochs: 25 s, then two epochs of 40 s, and 7 s after each of the three."""
    now = [100.0]
    monkeypatch.setattr(engine.time, "perf_counter", lambda: now[0])
    meter = engine.Meter(8, 16, 2, 5, 1, bar=console.NO_BAR, device=torch.device("cpu"), pause_s=7.0)
    now[0] += 10
    meter.data_wait_s = 2.5
    meter.advance(3)
    meter.report(1.5, 0.1)
    assert meter.left_s() == (25.0, 25.0 + 7 + 2 * (40 + 7))
    assert meter.status() == "loss 1.5000  3 images/s  data 25 %  ends in 0:00:25, run in 0:02:06"
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29 if device == meter.device else 0)
    meter.device = torch.device("cuda", 1)
    assert meter.status().endswith("run in 0:02:06  1.5 GiB")
