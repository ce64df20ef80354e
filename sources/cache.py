"""The local folder of indexes and fetched blocks, which all processes of a node share."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils import log

try:
    import fcntl
except ImportError:  # Windows: what two processes do at once is done twice
    fcntl = None


@dataclass(frozen=True)
class Cache:
    """A folder, and the bytes that fetched blocks may take in it."""

    folder: Path
    limit_bytes: int

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Run a block while no other process of the node runs one under the same name."""
        if fcntl is None:
            yield
            return
        with (self.made("locks") / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def made(self, name: str) -> Path:
        """The folder's part of that name, made if need be; OSError where it cannot be."""
        part = self.folder / name
        part.mkdir(parents=True, exist_ok=True)
        return part

    def is_writable(self) -> bool:
        """Whether the folder can be written; a warning where not."""
        try:
            os.utime(self.made("locks"))
        except OSError as error:
            log.warning("%s cannot be written (%s): indexes are built anew at each start; name another folder with --data-cache", self.folder, error.strerror)
            return False
        return True


def write_whole(path: Path, chunks: Iterator[bytes]) -> None:
    """Write a file aside and rename it, so that it is whole or not there, also after a loss of power."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def default_folder() -> Path:
    """Where caches go unless told: `understudy` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "understudy"
