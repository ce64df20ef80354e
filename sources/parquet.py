"""Images in the parquet files of Hugging Face data sets: columns `image` ({bytes, path}, or bytes) and `label`.

A row is read with the row group it lies in, for that is the least that parquet gives out: each process keeps the last few."""

import json
import os
import re
from collections import OrderedDict

import numpy as np

from loading.images import damaged
from run.errors import DamagedImage, InputError, first_line
from sources import index
from sources.files import Files
from sources.progress import Progress
from sources.stored import Row, Source, columns_of, key_of
from sources.table import Table
from utils import log

COLUMNS = {"file": np.int32, "group": np.int32, "row": np.int32}
KEPT_BYTES = 4 << 20  # of decoded row groups, per process, besides the last one; in random order more would hardly ever serve
KEPT_OPEN = 16  # files, per process
_SYNSET_SUFFIX = re.compile(r"_n\d{8}(?=\.\w+$)")  # that Hugging Face's copy of ImageNet adds to file names


def _pyarrow():
    """pyarrow and its parquet reader. InputError naming what to install."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError("parquet files need pyarrow: pip install -r requirements-sources.txt") from error
    return pyarrow, parquet


def _open(files: Files, i: int):
    """The parquet file, its footer read. InputError where it is no whole one."""
    pyarrow, parquet = _pyarrow()
    try:
        return parquet.ParquetFile(files.open(i) if files[i].is_remote else files[i].path, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{files[i].path} is no complete parquet file ({first_line(error)}): fetch it again") from error


def _require_whole(metadata, file) -> None:
    """InputError where row groups that the footer lists cannot all be there."""
    listed = sum(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
    ends = [0]
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for column in (group.column(c) for c in range(group.num_columns)):
            start = column.data_page_offset if not column.has_dictionary_page else min(column.dictionary_page_offset, column.data_page_offset)
            ends.append(start + column.total_compressed_size)
    if listed != metadata.num_rows or max(ends) > file.size - metadata.serialized_size - 8:
        raise InputError(f"{file.path} lacks rows that its footer lists ({metadata.num_rows} in {metadata.num_row_groups} row groups): fetch it again")


def _columns(schema, path: str) -> tuple[str, str | None, str]:
    """The names of the columns of image bytes, of their paths (None: none) and of labels. InputError where one is missing."""
    leaves = [column.path for column in schema]
    image = next((name for name in ("image.bytes", "img.bytes", "image", "img") if name in leaves), None)
    label = next((name for name in ("label", "labels", "fine_label") if name in leaves), None)
    if image is None or label is None:
        missing = "image of bytes and path" if image is None else "label"
        raise InputError(f"{path} has no column {missing}: its columns are {', '.join(leaves)}; write it with 'image' and 'label', as Hugging Face's are")
    where = image.removesuffix(".bytes") + ".path"
    return image, where if where in leaves else None, label


def _class_names(metadata, label: str) -> list[str] | None:
    """The names of the classes in a file's metadata, as Hugging Face's library writes them; None where there are none."""
    try:
        features = json.loads((metadata.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label].get("names")
    except (KeyError, ValueError, TypeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def key_of_row(name: str) -> tuple[str, str]:
    """What orders images by the names that rows give them."""
    return key_of(_SYNSET_SUFFIX.sub("", name))


def _rows(files: Files, i: int, opened, columns: tuple[str, str | None, str]) -> list[Row]:
    _, where, label = columns
    path, stem = files[i].path, files[i].base.removesuffix(".parquet")
    rows = []
    for group in range(opened.num_row_groups):
        part = opened.read_row_group(group, columns=[label, *([where] if where else [])], use_threads=False)
        labels = part.column(label).to_pylist()
        names = part.column(where.partition(".")[0]).to_pylist() if where else [None] * len(labels)
        if any(isinstance(value, bool) or not isinstance(value, int | str) for value in labels):
            raise InputError(f"{path}: row group {group} has rows without a label, or with one that is no class: write it again")
        for row, (value, name) in enumerate(zip(labels, names, strict=True)):
            name = (name or {}).get("path") or f"{stem}-{group:05}-{row:05}"
            rows.append(Row(name, value, key_of_row(name), (i, group, row)))
    return rows


def list_rows(files: Files) -> index.Built:
    """Index of parquet files. InputError naming a file that is not whole, or lacks a column."""
    pyarrow, _ = _pyarrow()
    log.info("reading the index of %d parquet files in %s", len(files), files[0].path.rpartition("/")[0])
    progress, rows, names, image = Progress(len(files), log.info, what="files"), [], None, None
    for i, file in enumerate(files):
        opened = _open(files, i)
        _require_whole(opened.metadata, file)
        columns = _columns(opened.schema, file.path)
        if image not in (None, columns[0]):
            raise InputError(f"{file.path} keeps images in column {columns[0]}, the files before it in {image}: they belong to different data sets")
        image, names = columns[0], names or _class_names(opened.metadata, columns[2])
        try:
            rows += _rows(files, i, opened, columns)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{file.path} cannot be read ({first_line(error)}): fetch it again") from error
        progress.add()
    if not rows:
        raise InputError(f"{files[0].path} and the other parquet files hold no rows")
    facts, found = columns_of(rows, COLUMNS, where=files[0].path)
    return {"classes": facts["classes"], "names": names, "image": image}, found


class Rows(Source):
    """Images in rows of parquet files."""

    def __init__(self, files: Files, found: Table):
        super().__init__(files, found)
        self.group, self.row, self.column = found["group"], found["row"], found.facts["image"]
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._opened, self._groups, self._bytes = OrderedDict(), OrderedDict(), 0

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_opened", "_groups", "_bytes", "_pid")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._forget()

    def read(self, i: int) -> bytes:
        pyarrow, _ = _pyarrow()
        try:
            data = self._group(int(self.file[i]), int(self.group[i]))[int(self.row[i])].as_py()
        except (pyarrow.ArrowException, OSError, IndexError) as error:
            raise damaged(self.name(i), error) from error
        if data is None:
            raise DamagedImage(self.name(i), "the row has no bytes")
        return data

    def _group(self, file: int, group: int):
        """The image bytes of a row group, an array of pyarrow's: kept, or read."""
        if self._pid != os.getpid():  # a fork shares its parent's file positions
            self._forget()
        key = file, group
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        array = self._read_group(file, group)
        self._groups[key] = array
        self._bytes += array.nbytes
        while self._bytes > KEPT_BYTES and len(self._groups) > 1:
            self._bytes -= self._groups.popitem(last=False)[1].nbytes
        return array

    def _read_group(self, file: int, group: int):
        pyarrow, _ = _pyarrow()
        if file not in self._opened:
            self._opened[file] = _open(self.files, file)
            if len(self._opened) > KEPT_OPEN:
                self._opened.popitem(last=False)[1].close(force=True)
        self._opened.move_to_end(file)
        column = self._opened[file].read_row_group(group, columns=[self.column], use_threads=False).column(0).combine_chunks()
        if isinstance(column, pyarrow.ChunkedArray):
            column = column.chunk(0)
        return column.field("bytes") if isinstance(column, pyarrow.StructArray) else column

    def rows_per_group(self) -> float:
        """Rows that are read, on average, for one of them."""
        return len(self) / len(np.unique(np.stack([self.file, self.group]), axis=1).T)

    def sizes(self) -> np.ndarray:
        """Bytes of each image; the first time all files are read for it."""
        return index.cached("parquet-sizes", self.files, self._measure)["size"]

    def _measure(self) -> index.Built:
        from pyarrow import compute

        log.info("reading the sizes of %d images in %d parquet files, once", len(self), len(self.files))
        sizes, progress = np.zeros(len(self), np.int64), Progress(len(self), log.info)
        order = self.storage_order()
        groups = np.stack([self.file[order], self.group[order]], axis=1)
        starts = np.flatnonzero(np.any(np.diff(groups, axis=0, prepend=-1), axis=1))
        for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
            members = order[start:stop]
            lengths = compute.binary_length(self._group(*groups[start].tolist())).fill_null(0)
            sizes[members] = lengths.to_numpy(zero_copy_only=False)[self.row[members]]
            progress.add(len(members))
        return {}, {"size": sizes}

    def storage_order(self) -> np.ndarray:
        return np.lexsort([self.row, self.group, self.file])
