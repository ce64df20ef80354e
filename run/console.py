"""Standard output and standard error, which may be closed or full, or whose reader may be gone."""

import contextlib
import logging
import os
import sys
from typing import TextIO


def tell(text: str) -> None:
    """Write to standard error, if there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
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
