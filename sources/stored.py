"""Images inside larger files, by index: what all kinds share, and those that are a range of a file's bytes."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loading.images import Names, damaged
from run.errors import DamagedImage, InputError
from sources.files import Files
from sources.table import Table


@dataclass(frozen=True)
class Entry:
    """An image of a source."""

    source: "Source"
    index: int

    def read(self) -> bytes:
        """Its bytes; DamagedImage where they cannot be read."""
        return self.source.read(self.index)

    def __str__(self) -> str:
        return self.source.name(self.index)


class Source(Sequence):
    """Images inside `files`, as an index of them says: `source[i]` is an `Entry`.

    The index has a row per image; its column `name` is what the image is called there, `file` which of the files holds it."""

    def __init__(self, files: Files, index: Table):
        self.files = files
        self.names = Names.of_columns(index.columns, "name")
        self.file = index["file"]

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> Entry:
        return Entry(self, range(len(self))[index])

    def name(self, i: int) -> str:
        """The file and what the image is called there."""
        return f"{self.files[int(self.file[i])].path}: {self.names[i]}"

    def read(self, i: int) -> bytes:
        """The bytes of image `i`; DamagedImage where they cannot be read."""
        raise NotImplementedError

    def sizes(self) -> np.ndarray:
        """Bytes of each image."""
        raise NotImplementedError

    def storage_order(self) -> np.ndarray:
        """Indices in the order in which reading all of them is cheapest."""
        raise NotImplementedError


PLAIN, DEFLATED = 0, 8  # as zip numbers them


class Ranges(Source):
    """Images that are each a range of a file's bytes: members of tars and zips, and of packed files.

    Columns `offset` and `stored` say where, `size` how many bytes the image has, `method` how they are compressed."""

    def __init__(self, files: Files, index: Table):
        super().__init__(files, index)
        self.offset, self.stored, self.size, self.method = (index[name] for name in ("offset", "stored", "size", "method"))

    def read(self, i: int) -> bytes:
        stored = int(self.stored[i])
        try:
            data = self.files.pread(int(self.file[i]), stored, int(self.offset[i]))
            if len(data) < stored:
                raise DamagedImage(self.name(i), f"the file ends {stored - len(data)} bytes before the image does")
            return zlib.decompress(data, -zlib.MAX_WBITS) if self.method[i] == DEFLATED else data
        except (OSError, zlib.error) as error:
            raise damaged(self.name(i), error) from error

    def sizes(self) -> np.ndarray:
        return self.size

    def storage_order(self) -> np.ndarray:
        return np.lexsort([self.offset, self.file])


@dataclass(frozen=True)
class Row:
    """What an index is to say of an image.

    `name`: what it is called in its file; `label`: its class, by name or by number; `key`: what orders the images of a class, in the
    way in which a class folder's files are ordered; `values`: a number per column of the source."""

    name: str
    label: str | int
    key: tuple[str, str]
    values: tuple[int, ...]


def key_of(name: str) -> tuple[str, str]:
    """What orders images by their path below the class's folder: folder, then file."""
    folder, _, base = name.rpartition("/")
    return folder, base


def columns_of(rows: list[Row], columns: dict[str, type], *, where: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Facts and columns of an index, a line per image, by class and then by key. InputError where classes are named here and numbered there."""
    are_names = {isinstance(row.label, str) for row in rows}
    if len(are_names) > 1:
        raise InputError(f"{where}: some labels are names and others numbers: make them alike")
    classes = sorted({row.label for row in rows}) if True in are_names else None
    number = {name: i for i, name in enumerate(classes)} if classes is not None else None
    labels = [row.label if number is None else number[row.label] for row in rows]
    if min(labels, default=0) < 0:
        raise InputError(f"{where}: {sum(label < 0 for label in labels)} of {len(labels)} images have a negative label, as images without one do")
    order = sorted(range(len(rows)), key=lambda i: (labels[i], rows[i].key))
    found = {"label": np.array([labels[i] for i in order], np.int32), **Names(rows[i].name for i in order).columns("name")}
    for position, (name, dtype) in enumerate(columns.items()):
        found[name] = np.array([rows[i].values[position] for i in order], dtype)
    return {"classes": classes}, found


RANGE_COLUMNS = {"file": np.int32, "offset": np.int64, "stored": np.int64, "size": np.int64, "method": np.uint8}
