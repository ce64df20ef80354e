"""Packed files written: images in the order in which their source lies, so that one pass over it is enough, and a table in the order of
a run. What was written before a stop is kept beside the file, and gone on with."""

import contextlib
import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from loading.images import Images, Names, open_sample, read_sample
from loading.loaders import loader_settings
from loading.turning import UPRIGHT, exif_of, orientation_in
from run.config import Config
from run.errors import DamagedImage, InputError
from sources.cache import Cache
from sources.files import Files, describe
from sources.packed import MAGIC, Packed, encode_end
from sources.parts import Part
from sources.progress import Progress
from utils import Rank, log

BATCH_SIZE = 64
FLUSH_BYTES = 256 << 20  # between moments from which a stopped run can go on


@dataclass(frozen=True)
class Recipe:
    """What is done to each image: nothing, or where its longer side has more than `max_side` pixels, it is made smaller and written as a
    JPEG of that quality."""

    max_side: int | None = None
    quality: int = 90

    def apply(self, sample) -> bytes:
        """The bytes that are packed for a sample; DamagedImage where its own cannot be read."""
        data = read_sample(sample)
        if self.max_side is None:
            return data
        try:
            image = open_sample(sample)
        except DamagedImage:
            return data  # for the run to judge, as it would from the source
        if max(image.size) <= self.max_side:
            return data
        scale = self.max_side / max(image.size)
        file = io.BytesIO()
        size = tuple(max(1, round(side * scale)) for side in image.size)
        kept = {} if (way := orientation_in(data)) == UPRIGHT else {"exif": exif_of(way)}  # for a run to judge, as it would from the source
        image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=self.quality, subsampling=0, **kept)
        return file.getvalue()

    def described(self) -> dict | None:
        """What the packed file says of it; None: its images are the source's, to the last bit."""
        return None if self.max_side is None else {"max_side": self.max_side, "quality": self.quality, "Pillow": PIL.__version__}


class _Packing(Dataset):
    """Images as they are packed, each with its checksum, by their place in the file; or why one cannot be read."""

    def __init__(self, images: Images, order: np.ndarray, recipe: Recipe):
        self.images, self.order, self.recipe = images, order, recipe

    def __len__(self) -> int:
        return len(self.order)

    def __getitems__(self, places: list[int]) -> list[tuple[bytes, int] | str]:
        return [self._packed(place) for place in places]

    def _packed(self, place: int) -> tuple[bytes, int] | str:
        try:
            data = self.recipe.apply(self.images.samples[int(self.order[place])])
        except DamagedImage as error:
            return str(error)
        return data, zlib.crc32(data)


def _packed_images(images: Images, order: np.ndarray, recipe: Recipe, *, num_workers: int) -> Iterator[tuple[bytes, int]]:
    """Bytes and checksum of each image, in `order`. InputError where one cannot be read."""
    settings = loader_settings(Config(num_workers=num_workers), Rank(0, 1, 0, 1, torch.device("cpu")), len(order))
    for batch in DataLoader(_Packing(images, order, recipe), batch_size=BATCH_SIZE, **settings):
        for found in batch:
            if isinstance(found, str):
                raise InputError(f"{found}, then start again: packing goes on from here")
            yield found


class _Record(NamedTuple):
    """An image that is in the unfinished file."""

    size: int
    crc: int


_RECORD = struct.Struct("<QI")


class Unfinished:
    """A packed file on its way: `<file>.partial` has images, `<file>.journal` says which, and of what.

    A record is written once its image's bytes have reached the disk."""

    def __init__(self, path: Path, identity: str):
        self.data_path, self.journal_path = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.journal")
        self.identity = identity
        self.records = self._read()
        self._pending: list[_Record] = []
        self._pending_bytes = 0

    def _read(self) -> list[_Record]:
        """The images that are there; none where they are not of this source and recipe."""
        try:
            head, _, tail = self.journal_path.read_bytes().partition(b"\n")
            size = self.data_path.stat().st_size
        except OSError:
            return []
        if head.decode("ascii", "replace") != self.identity:
            log.warning("%s was begun from other images or with other settings: it is begun anew", self.data_path)
            return []
        records = [_Record(*found) for found in _RECORD.iter_unpack(tail[: len(tail) // _RECORD.size * _RECORD.size])]
        while records and len(MAGIC) + sum(record.size for record in records) > size:
            records.pop()
        return records

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open both files for what is to come."""
        num_bytes = len(MAGIC) + sum(record.size for record in self.records)
        with self.data_path.open("r+b" if self.records else "wb") as self._data, self.journal_path.open("r+b" if self.records else "wb") as self._journal:
            if not self.records:
                self._data.write(MAGIC)
                self._journal.write(self.identity.encode() + b"\n")
            self._data.truncate(num_bytes)
            self._data.seek(num_bytes)
            end = len(self.identity) + 1 + len(self.records) * _RECORD.size
            self._journal.truncate(end)
            self._journal.seek(end)
            try:
                yield
            finally:
                self.flush()

    def add(self, data: bytes, crc: int) -> None:
        """Append an image."""
        self._data.write(data)
        self._pending.append(_Record(len(data), crc))
        self._pending_bytes += len(data)
        if self._pending_bytes >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Bring what was appended to the disk, and then note it."""
        self._data.flush()
        os.fsync(self._data.fileno())
        self._journal.write(b"".join(_RECORD.pack(*record) for record in self._pending))
        self._journal.flush()
        self.records += self._pending
        self._pending, self._pending_bytes = [], 0

    def finish(self, end: list[bytes], path: Path) -> None:
        """Append the end, and give the file its name."""
        with self.data_path.open("ab") as file:
            file.writelines(end)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.data_path, path)
        self.journal_path.unlink()


def identity_of(images: Images, recipe: Recipe) -> str:
    """What a packed file is made of: a hash of the images' names and classes, of the files' sizes and times, and of what is done to them."""
    digest = hashlib.blake2b(json.dumps([recipe.described(), images.classes]).encode(), digest_size=16)
    digest.update(images.targets.astype("<i4").tobytes())
    sources = set()
    for sample in images.samples:
        digest.update(os.fsencode(str(sample)) + b"\0")
        if isinstance(sample, str):
            digest.update(_state(sample))
        elif sample.source not in sources:
            sources.add(sample.source)
            digest.update(json.dumps([file.listed() for file in sample.source.files]).encode())
    return digest.hexdigest()


def _state(path: str) -> bytes:
    """Size and time of a file; nothing where there is none, which reading it will tell."""
    try:
        found = os.stat(path)
    except OSError:
        return b""
    return struct.pack("<qq", found.st_size, found.st_mtime_ns)


def pack(part: Part, images: Images, path: Path, recipe: Recipe, *, num_workers: int, say: Callable[[str], object]) -> None:
    """Write `images`, whose source is `part`, into a packed file. InputError where an image cannot be read or the file cannot be written."""
    order = images.samples.storage_order()
    try:
        unfinished = Unfinished(path, identity_of(images, recipe))
        num_there = len(unfinished.records)
        if num_there:
            say(f"{path}: {num_there:,} of {len(images):,} images are there already")
        progress = Progress(len(images) - num_there, say)
        with unfinished.opened():
            for data, crc in _packed_images(images, order[num_there:], recipe, num_workers=num_workers):
                unfinished.add(data, crc)
                progress.add()
        unfinished.finish(_end(part, images, order, unfinished.records, recipe), path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): make room, or choose another folder; started again, it goes on from here") from error


def _end(part: Part, images: Images, order: np.ndarray, records: list[_Record], recipe: Recipe) -> list[bytes]:
    """What follows the images: their table, in the order of a run."""
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    sizes = np.array([record.size for record in records], np.int64)
    offsets = len(MAGIC) + np.cumsum(sizes) - sizes
    crcs = np.array([record.crc for record in records], np.uint32)
    columns = {
        "offset": offsets[place],
        "size": sizes[place],
        "crc": crcs[place],
        "label": images.targets,
        **Names("/".join(filter(None, part.key(i))) for i in range(len(images))).columns("name"),
    }
    facts = {"classes": None if part.is_numbered else images.classes, "names": images.classes, "recoded": recipe.described(), "source": part.what}
    return encode_end(facts, columns, len(MAGIC) + int(sizes.sum()))


def check(images: Images, path: Path, recipe: Recipe, cache: Cache, *, num_workers: int, say: Callable[[str], object]) -> int:
    """How many images of a packed file are not those of its source, packed by `recipe`; each is said, the first twenty of many."""
    found = Packed(Files(describe([str(path)]), cache))
    if found.facts["names"] != images.classes or not np.array_equal(found.labels, images.targets):
        counts = f"{len(found)} images of {len(found.facts['names'])} classes, its source {len(images)} of {len(images.classes)}"
        raise InputError(f"{path} has {counts}, or not the same: pack the source anew")
    if found.facts["recoded"] != recipe.described():
        raise InputError(f"{path} was made with {found.facts['recoded'] or 'the original bytes'}: check it with the same --max-side, --quality and Pillow")
    order, num_wrong, progress = images.samples.storage_order(), 0, Progress(len(images), say)
    for place, (data, _) in enumerate(_packed_images(images, order, recipe, num_workers=num_workers)):
        i = int(order[place])
        kept = found.read(i)
        if kept != data or zlib.crc32(kept) != found.checksums[i]:
            num_wrong += 1
            if num_wrong <= 20:
                say(f"{found.name(i)} is not what {images.samples[i]} gives")
        progress.add()
    return num_wrong
