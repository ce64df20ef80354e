"""Writing so that a killed job or a full disk leaves each file whole: old or new, with the last record or without it."""

import contextlib
import csv
import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from run.config import RunConfig
from run.errors import DiskFull, InputError
from utils import Rank, any_process, log

Result = TypeVar("Result")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the last: a limit on the size of files
RETRY_EVERY_S, REPORT_EVERY_S = 5.0, 60.0


def refusal(error: OSError, fact: str, cure: str) -> InputError:
    """The exception to raise in place of `error`: `DiskFull` where that is what it means."""
    return (DiskFull if error.errno in FULL else InputError)(fact, cure)


@contextlib.contextmanager
def writing(what: str, cure: str):
    """For a block that writes `what`: InputError in place of OSError, `DiskFull` where there is no room."""
    try:
        yield
    except OSError as error:
        raise refusal(error, f"{what} cannot be written ({error.strerror or error})", cure) from error


def append_whole(path: Path, data: bytes) -> None:
    """Append `data` to a file, all of it or nothing. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def write_whole(path: Path, text: str) -> None:
    """Write a file, or leave what was there before. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path, *, flag: str) -> None:
    """InputError, which names the `flag` that the path came from, where the file cannot be written; one that is there is left as it is."""
    with writing(f"{flag} {path}", "name another file"):
        if path.exists():
            path.open("ab").close()
        else:
            path.touch()
            path.unlink()


@contextlib.contextmanager
def writing_csv(path: Path, columns: Iterable[str], *, flag: str) -> Iterator:
    """The csv writer of a file with a first row of `columns`, which appears once the block is left without an error.

    InputError, which names the `flag` that the path came from, where it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            yield writer
        os.replace(temporary, path)
    except OSError as error:
        raise refusal(error, f"{flag} {path} cannot be written ({error.strerror or error})", "name another file") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class FullDisk:
    """What a run does where the disk is full: stop (`DiskFull`), or with `--on-full-disk wait` try again until there is room or
    `--full-disk-minutes` are over, and say so every minute."""

    def __init__(self, cfg: RunConfig, rank: Rank):
        self.rank = rank
        self.patience_s = 60 * cfg.full_disk_minutes if cfg.on_full_disk == "wait" else 0.0

    def write(self, action: Callable[[], Result]) -> Result:
        """What `action` returns, once it returns in all processes: each takes part with one of its own, that can be repeated, so
        that none waits for another longer than a try takes."""
        start = time.monotonic()
        reported = float("-inf")
        while True:
            try:
                result, full = action(), None
            except DiskFull as error:
                result, full = None, error
            now = time.monotonic()
            if full is not None and now - start >= self.patience_s:
                raise full
            if full is not None and now - reported >= REPORT_EVERY_S:
                minutes = (start + self.patience_s - now) / 60
                log.warning("%s. Waiting for room, %.3g minutes at most (--full-disk-minutes)", full.fact, minutes)
                reported = now
            if not any_process([full is not None], self.rank)[0]:
                return result
            time.sleep(RETRY_EVERY_S)
