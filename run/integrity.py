"""Checksums inside checkpoints, so that any bit that changed since it was written is noticed.

What torch writes is a zip archive, whose last record may end in a comment that readers skip. Ours is `MAGIC` and the SHA-256 of all
bytes before it. A sealed file is still one that `torch.load`, `torch.jit.load` and `zipfile` read, is replaced at once with its
checksum, and no bit of it is left out, comment and padding included."""

import hashlib
import os
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

from run.errors import InputError, first_line

USE_ANOTHER = "use another one, or fetch it again"
MAGIC = b"Understudy, SHA-256:"
DIGEST_SIZE = hashlib.sha256().digest_size
COMMENT_SIZE = len(MAGIC) + DIGEST_SIZE
_LENGTH = COMMENT_SIZE.to_bytes(2, "little")
_SEALED_END = re.compile(rb"PK\x05\x06.{16}" + re.escape(_LENGTH), re.DOTALL)  # the zip's last record, announcing a comment of that length
_END_SIZE = 4096  # bytes looked at for the seal, also where some were appended to the file
_CHUNK_SIZE = 2**20


def seal(file: BinaryIO) -> None:
    """Give the zip archive in `file`, which is open for reading and writing, its checksum."""
    file.seek(-len(_LENGTH), os.SEEK_END)
    file.write(_LENGTH + MAGIC)
    file.write(_digest(file, file.tell()))


def is_sealed(file: BinaryIO) -> bool:
    """Whether `file` was given a checksum, as far as what is left of its end tells: one damaged place does not hide it."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - _END_SIZE))
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


def require_intact(path: Path) -> bool:
    """Whether the file carries a checksum of ours. InputError where it does, and holds something else than was written."""
    try:
        with path.open("rb") as file:
            has_seal = is_sealed(file)
            if has_seal and not is_intact(file):
                raise InputError(f"{path} is damaged (it is not what was written: its checksum differs)", USE_ANOTHER)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})", USE_ANOTHER) from error
    return has_seal


def fault(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch could not read. Never torch's advice, which is to run what is in it."""
    with path.open("rb") as file:
        head = file.read(_END_SIZE)
    if not any(head):
        return "it starts with zeros" if head else "it is empty"
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return "it is cut off: the end of the archive is missing"
    text = f"{type(error).__name__}: {first_line(error)}"
    return "its content makes no sense" if re.search("weights.only", text, re.IGNORECASE) else text
