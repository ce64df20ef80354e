"""A table of columns in one file, mapped into memory: processes that open it share its pages.

Layout: `MAGIC`, header length and CRC-32 of all that follows (two little-endian uint32), header (JSON), columns, each from a multiple
of 8 bytes on."""

import json
import mmap
import struct
import zlib
from pathlib import Path

import numpy as np

MAGIC = b"undrstdy"
_HEAD = struct.Struct("<8sII")
_ALIGN = 8


class Table:
    """`facts` (plain JSON) and `columns` (one-dimensional arrays by name, not to be written to)."""

    def __init__(self, facts: dict, columns: dict[str, np.ndarray]):
        self.facts, self.columns = facts, columns

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def encode(facts: dict, columns: dict[str, np.ndarray]) -> list[bytes]:
    """The table's bytes, in parts."""
    described, offset = [], 0
    for name, column in columns.items():
        described.append([name, column.dtype.str, len(column), offset])
        offset += _aligned(column.nbytes)
    header = json.dumps({"facts": facts, "columns": described}).encode()
    header += b" " * (_aligned(_HEAD.size + len(header)) - _HEAD.size - len(header))
    body = [header]
    for column in columns.values():
        body += [np.ascontiguousarray(column).tobytes(), bytes(_aligned(column.nbytes) - column.nbytes)]
    crc = 0
    for part in body:
        crc = zlib.crc32(part, crc)
    return [_HEAD.pack(MAGIC, len(header), crc), *body]


def decode(buffer) -> Table:
    """The table in `buffer`, whose memory its columns share. ValueError where it is none, or damaged."""
    view = memoryview(buffer)
    if len(view) < _HEAD.size:
        raise ValueError("it is cut off")
    magic, header_size, crc = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise ValueError("it is no table")
    if zlib.crc32(view[_HEAD.size :]) != crc:
        raise ValueError("its checksum is wrong")
    header = json.loads(bytes(view[_HEAD.size : _HEAD.size + header_size]))
    start = _HEAD.size + header_size
    columns = {name: np.frombuffer(view, dtype, count, start + offset) for name, dtype, count, offset in header["columns"]}
    return Table(header["facts"], columns)


def read(path: Path) -> Table:
    """The table in a file. OSError or ValueError where there is none, or it is damaged."""
    how = {"access": mmap.ACCESS_READ}
    if hasattr(mmap, "MAP_POPULATE"):  # Linux: mapped here once, its pages count for no loader process as its own, whichever reads which
        how = {"flags": mmap.MAP_SHARED | mmap.MAP_POPULATE, "prot": mmap.PROT_READ}
    with path.open("rb") as file:
        return decode(mmap.mmap(file.fileno(), 0, **how))
