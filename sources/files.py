"""The files that a data set's images lie in, on a disk or in a store: listed, and read at any place."""

import io
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from run.errors import InputError
from sources import remote
from sources.cache import Cache


@dataclass(frozen=True)
class DataFile:
    """A file's path or URL, bytes, and a text that changes when its content does."""

    path: str
    size: int
    stamp: str

    @property
    def is_remote(self) -> bool:
        return remote.is_url(self.path)

    @property
    def base(self) -> str:
        """The name without folders."""
        return self.path.rstrip("/").rpartition("/")[2]

    def listed(self) -> list:
        """What an index remembers of the file, plain JSON."""
        return [self.path, self.size, self.stamp]


def _local_file(path: str) -> DataFile:
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the file and its permissions") from error
    return DataFile(path, found.st_size, str(found.st_mtime_ns))


def list_folder(root: str) -> list[str]:
    """Paths or URLs of the files in `root`, a folder or a URL, by name; InputError where it cannot be listed."""
    if remote.is_url(root):
        return remote.list_folder(root)
    try:
        return sorted(entry.path for entry in os.scandir(root) if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{root} cannot be listed ({error.strerror}): check the folder and its permissions") from error


def describe(paths: Sequence[str]) -> list[DataFile]:
    """The files at `paths`; InputError naming the first that cannot be reached."""
    return [DataFile(*remote.describe(path)) if remote.is_url(path) else _local_file(os.path.abspath(path)) for path in paths]


KEPT_OPEN = 256  # local files; further ones are opened for each read


class Files(Sequence):
    """Files that can be read at any place, by any number of processes that fork from this one and by any number of threads."""

    def __init__(self, files: Sequence[DataFile], cache: Cache):
        self._files, self.cache = list(files), cache
        self._kept: dict[int, int] = {}
        weakref.finalize(self, _close_all, self._kept).atexit = False

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> DataFile:
        return self._files[i]

    def __getstate__(self) -> dict:
        return {"_files": self._files, "cache": self.cache}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["_files"], state["cache"])

    def pread(self, i: int, size: int, offset: int) -> bytes:
        """`size` bytes at `offset` of file `i`, or what there is of them. OSError where a local file cannot be read, InputError where a
        store does not answer."""
        file = self._files[i]
        if file.is_remote:
            return remote.read(file.path, file.size, file.stamp, size=size, offset=offset, cache=self.cache)
        kept = self._kept.get(i)
        if kept is not None:
            return _pread_all(kept, size, offset)
        opened = os.open(file.path, os.O_RDONLY)
        if len(self._kept) < KEPT_OPEN and self._kept.setdefault(i, opened) == opened:
            return _pread_all(opened, size, offset)
        try:
            return _pread_all(opened, size, offset)
        finally:
            os.close(opened)

    def open(self, i: int) -> BinaryIO:
        """File `i`, for reading and seeking."""
        if self._files[i].is_remote:
            return io.BufferedReader(_Positioned(self, i), remote.BLOCK)
        return Path(self._files[i].path).open("rb")


def _pread_all(opened: int, size: int, offset: int) -> bytes:
    data = os.pread(opened, size, offset)
    while len(data) < size and (more := os.pread(opened, size - len(data), offset + len(data))):  # a call gives 2 GiB at most
        data += more
    return data


def _close_all(kept: dict[int, int]) -> None:
    for opened in kept.values():
        os.close(opened)


class _Positioned(io.RawIOBase):
    """A file of `Files` as an open file of Python's."""

    def __init__(self, files: Files, i: int):
        self._files, self._i, self._at = files, i, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._files[self._i].size}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        data = self._files.pread(self._i, len(buffer), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
