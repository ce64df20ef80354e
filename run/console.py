"""Standard output and standard error, which may be closed or full, or whose reader may be gone; and a bar below what is said on a terminal."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm

from run.signals import StopRequest

WIDE, NARROW = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}  {text}", "{desc} {n_fmt}/{total_fmt} {text}"
AROUND_TEXT = len(" 100%|") + 20 + len("| /  ")  # letters of the wide one, besides title, text and numbers of steps


class _Line(tqdm):
    """tqdm's bar, without the thread and the lock between processes that it would bring into a run."""

    monitor_interval = 0
    _lock = threading.RLock()
    text = ""

    @property
    def format_dict(self) -> dict:
        """What its format may name, and the format: on a terminal too narrow for all of it, without what is there for the eye."""
        values = super().format_dict
        is_wide = AROUND_TEXT + len(self.desc) + 2 * len(str(self.total)) + len(self.text) <= (values["ncols"] or 80)
        text = self.text if is_wide else self.text.replace("  ", " ").replace("images/s", "img/s")
        return {**values, "text": text, "bar_format": WIDE if is_wide else NARROW}


DRAW_EVERY_S = 0.2  # a bar, at most


class NoBar:
    """What there is where the output is no terminal: progress is told in lines."""

    is_live = False

    def show(self, num_done: int, text: str) -> None:
        pass


NO_BAR = NoBar()


class Bar:
    """A line at the bottom of a terminal: how much of `total` is done, and a text. It is gone once it is closed, or the run is told to stop."""

    def __init__(self, title: str, total: int, num_done: int):
        how = {"mininterval": DRAW_EVERY_S, "miniters": 1}
        has_size = all(os.get_terminal_size(sys.stdout.fileno()))  # under some recorders a terminal has none
        how |= {"dynamic_ncols": True} if has_size else {"ncols": 80, "nrows": 24}
        self._line = _Line(desc=title, total=total, initial=num_done, file=sys.stdout, leave=False, **how)

    @property
    def is_live(self) -> bool:
        """Whether it is to be seen; after a Ctrl-C not, for a second one ends the process in the middle of whatever it draws."""
        if StopRequest.is_made:
            self.close()
        return not self._line.disable

    def show(self, num_done: int, text: str) -> None:
        """Draw, but not many times a second."""
        if self.is_live:
            self._line.text = text
            self._line.update(num_done - self._line.n)

    def close(self) -> None:
        self._line.close()


def _is_terminal() -> bool:
    """Whether standard output is one on which a line can be drawn again."""
    try:
        return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


@contextlib.contextmanager
def progress_bar(title: str, *, total: int, num_done: int, is_main: bool) -> Iterator[Bar | NoBar]:
    """A bar on the terminal of the run's first process, for as long as the block takes; elsewhere none."""
    if not (is_main and _is_terminal()):
        yield NO_BAR
        return
    with contextlib.closing(Bar(title, total, num_done)) as bar:
        yield bar


def tell(text: str) -> None:
    """Write to standard error, if there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError), _Line.external_write_mode(sys.stderr):
        sys.stderr.write(text)
        sys.stderr.flush()


def discard(stream: TextIO | None) -> None:
    """Let what `stream` still holds, and what else is written to it, vanish instead of failing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


def flush_output() -> None:
    """Write out what standard output still holds, or discard it: a reader such as `head` may be gone."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        discard(sys.stdout)


def reserve_standard_streams() -> None:
    """Point closed standard streams at nothing: else the next files to be opened get their numbers, and what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


class Console(logging.StreamHandler):
    """Standard output for as long as it can be written; then one line on standard error, and silence."""

    def __init__(self):
        super().__init__(sys.stdout)
        if sys.stdout is None:  # it was closed from the start
            self._fall_silent("it is closed")

    def emit(self, record: logging.LogRecord) -> None:
        with _Line.external_write_mode(self.stream):  # the bar steps aside
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError) or self.stream.closed:
            discard(self.stream)
            self._fall_silent(getattr(error, "strerror", None) or "it is closed")
        else:
            super().handleError(record)

    def _fall_silent(self, reason: str) -> None:
        self.setLevel(logging.CRITICAL + 1)
        tell(f"standard output cannot be written ({reason}): the run goes on without it, and writes its files\n")
