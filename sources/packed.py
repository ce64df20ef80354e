"""Packed files: the images of a split one after the other, and a table of them at the end.

Layout: `MAGIC`, the images' bytes, a table (`table.py`: classes, names, places, sizes, checksums), and a footer that says where the table is."""

import struct

import numpy as np

from run.errors import InputError
from sources import index, table
from sources.files import Files
from sources.stored import PLAIN, Ranges

ENDING = ".pack"
MAGIC = b"understudy pack\n"
FOOTER = struct.Struct("<QQ16s")
_ALIGN = 8


def read_table(files: Files) -> table.Table:
    """The table of a packed file: a copy in the cache, as a file that may shrink under a run must not be mapped. InputError where it is not whole."""
    file = files[0]
    try:
        first = files.pread(0, len(MAGIC), 0)
        offset, length, magic = FOOTER.unpack(files.pread(0, FOOTER.size, file.size - FOOTER.size))
        if first != MAGIC or magic != MAGIC or offset + length + FOOTER.size != file.size:
            raise ValueError("its end is missing")
        return index.cached("packed", files, lambda: _read(files, offset, length))
    except (OSError, ValueError, struct.error) as error:
        raise InputError(f"{file.path} is no complete packed file ({error}): copy it again, or make it anew with tools/pack_dataset.py") from error


def _read(files: Files, offset: int, length: int) -> index.Built:
    found = table.decode(files.pread(0, length, offset))
    return found.facts, found.columns


def encode_end(facts: dict, columns: dict[str, np.ndarray], num_bytes: int) -> list[bytes]:
    """What follows the images of a packed file that has `num_bytes` so far."""
    padding = bytes(-num_bytes % _ALIGN)
    parts = table.encode(facts, columns)
    return [padding, *parts, FOOTER.pack(num_bytes + len(padding), sum(map(len, parts)), MAGIC)]


class Packed(Ranges):
    """The images of a packed file; `checksums`: the CRC-32 of each one's bytes; `facts`: classes and how it was made."""

    def __init__(self, files: Files):
        found = read_table(files)
        count = len(found["size"])
        zeros = np.broadcast_to(np.zeros(1, np.int32), count)
        columns = {**found.columns, "file": zeros, "stored": found["size"], "method": np.broadcast_to(np.uint8(PLAIN), count)}
        super().__init__(files, table.Table(found.facts, columns))
        self.labels, self.checksums, self.facts = found["label"], found["crc"], found.facts
