"""Checksums inside checkpoints, so that any bit that changed since it was written is noticed.

What torch writes is a zip archive, whose last record may end in a comment that readers skip. Ours is `MAGIC` and the SHA-256 of all
bytes before it. A sealed file is still one that `torch.load`, `torch.jit.load` and `zipfile` read, is replaced at once with its
checksum, and no bit of it is left out, comment and padding included."""

import hashlib
import os
import re
from typing import BinaryIO

MAGIC = b"Understudy, SHA-256:"
DIGEST_SIZE = hashlib.sha256().digest_size
COMMENT_SIZE = len(MAGIC) + DIGEST_SIZE
_LENGTH = COMMENT_SIZE.to_bytes(2, "little")
_SEALED_END = re.compile(rb"PK\x05\x06.{16}" + re.escape(_LENGTH), re.DOTALL)  # the zip's last record, announcing a comment of that length
_TAIL_SIZE = 4096  # enough to find the seal also where bytes were appended to the file
_CHUNK_SIZE = 2**20


def seal(file: BinaryIO) -> None:
    """Give the zip archive in `file`, which is open for reading and writing, its checksum."""
    file.seek(-len(_LENGTH), os.SEEK_END)
    file.write(_LENGTH + MAGIC)
    file.write(_digest(file, file.tell()))


def is_sealed(file: BinaryIO) -> bool:
    """Whether `file` was given a checksum, as far as what is left of its end tells: one damaged place does not hide it."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_SIZE))
    tail = file.read()
    return MAGIC in tail or _SEALED_END.search(tail) is not None


def is_intact(file: BinaryIO) -> bool:
    """Whether a sealed file holds what was written, to the last bit."""
    num_bytes = file.seek(0, os.SEEK_END) - DIGEST_SIZE
    return num_bytes > 0 and _digest(file, num_bytes) == file.read()


def _digest(file: BinaryIO, num_bytes: int) -> bytes:
    """SHA-256 of the first bytes of `file`, which is left behind them."""
    digest = hashlib.sha256()
    file.seek(0)
    while num_bytes:
        chunk = file.read(min(num_bytes, _CHUNK_SIZE))
        if not chunk:
            break
        digest.update(chunk)
        num_bytes -= len(chunk)
    return digest.digest()
