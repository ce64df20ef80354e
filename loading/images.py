"""Labelled images by index, wherever they lie: names that processes share without copying, files read and decoded."""

import functools
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError, features
from torchvision.datasets.folder import IMG_EXTENSIONS

from loading import decoding
from loading.turning import UPRIGHT, orientation, turned
from run.errors import DamagedImage, InputError

ENDINGS = IMG_EXTENSIONS + ((".avif",) if features.check("avif") else ())  # of the files that are taken for images


def is_image_name(name: str) -> bool:
    """Whether a file of that name, with or without folders, is taken for an image: hidden ones are not."""
    return name.lower().endswith(ENDINGS) and not name.rpartition("/")[2].startswith(".")


class Names(Sequence):
    """Texts in two buffers. A list of a million strings would be copied, page by page, into every loader process that counts
    references to them."""

    def __init__(self, texts: Iterable[str]):
        encoded = [os.fsencode(text) for text in texts]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def columns(self, name: str) -> dict[str, np.ndarray]:
        """The two columns of a table that hold the texts."""
        return {f"{name}.bytes": np.frombuffer(self._bytes, np.uint8), f"{name}.ends": self._ends}

    @classmethod
    def of_columns(cls, columns: dict[str, np.ndarray], name: str) -> "Names":
        """The texts in two columns of a table, whose memory they share."""
        names = cls.__new__(cls)
        names._bytes, names._ends = columns[f"{name}.bytes"], columns[f"{name}.ends"]
        return names

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return os.fsdecode(bytes(self._bytes[self._ends[index] : self._ends[index + 1]]))


class Paths(Names):
    """Image files, by path."""

    def sizes(self) -> np.ndarray:
        """Bytes of each file; InputError naming one that is not there."""
        names, num_threads = list(self), 32  # a network's file system takes its time for each, and for many at once hardly more
        sizes = np.empty(len(names), np.int64)

        def look(first: int) -> None:
            sizes[first::num_threads] = [os.stat(name).st_size for name in names[first::num_threads]]

        with ThreadPoolExecutor(num_threads) as pool:
            try:
                list(pool.map(look, range(num_threads)))
            except OSError as error:
                raise InputError(f"{error.filename} cannot be read as an image ({error.strerror}): replace or remove it") from error
        return sizes

    def storage_order(self) -> np.ndarray:
        """Indices in the order in which reading all of them is cheapest."""
        return np.arange(len(self))


class Stored(Protocol):
    """An image inside a larger file; its text names it."""

    def read(self) -> bytes:
        """Its bytes; DamagedImage where they cannot be read."""


class Selected(Sequence):
    """Samples at `indices` of others, in that order."""

    def __init__(self, samples: Sequence, indices: Sequence[int]):
        self._samples, self.indices = samples, np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        return self._samples[int(self.indices[index])]

    def sizes(self) -> np.ndarray:
        """Bytes of each sample."""
        return self._samples.sizes()[self.indices]

    def storage_order(self) -> np.ndarray:
        """Indices in the order in which reading all of them is cheapest."""
        rank = np.empty(len(self._samples), np.int64)
        rank[self._samples.storage_order()] = np.arange(len(rank))
        return np.argsort(rank[self.indices], kind="stable")


class Joined(Sequence):
    """The samples of several parts, one part after the other."""

    def __init__(self, parts: Sequence[Sequence]):
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int):
        index = range(len(self))[index]
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]

    def sizes(self) -> np.ndarray:
        """Bytes of each sample."""
        return np.concatenate([part.sizes() for part in self._parts])

    def storage_order(self) -> np.ndarray:
        """Indices in the order in which reading all of them is cheapest."""
        return np.concatenate([part.storage_order() + start for part, start in zip(self._parts, self._starts, strict=False)])


class Images(Sequence):
    """Labelled images: `images[i]` is (RGB PIL image, class index).

    `open_image` makes the PIL image of a sample; `read_bytes`, where samples are files, reads one for a decoder of its own. `turns`: they are
    turned as their EXIF orientation says; `turned` gives such images."""

    def __init__(
        self,
        samples: Sequence,
        targets: Sequence[int],
        classes: list[str],
        open_image: Callable,
        read_bytes: Callable | None = None,
        *,
        turns: bool = False,
    ):
        self.samples = samples
        self.targets = np.asarray(targets, dtype=np.int32)
        self.classes = classes
        self._open_image = open_image
        self._read_bytes = read_bytes
        self.turns = turns

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._open_image(self.samples[index]), int(self.targets[index])

    def name(self, index: int) -> str:
        """What to call an image: its file, or its place among images that are in no files."""
        sample = self.samples[index]
        return f"image {index}" if isinstance(sample, np.ndarray | Image.Image) else str(sample)

    def open(self, index: int, *, is_fast: bool) -> decoding.AnyImage:
        """The image as the loaders' transforms take it."""
        if not is_fast:
            return self[index][0]
        sample = self.samples[index]
        if self._read_bytes is None:
            return np.array(self._open_image(sample))
        return decoding.Encoded(self._read_bytes(sample), lambda: self._open_image(sample), turns=self.turns)

    def part(self, indices: Sequence[int]) -> "Images":
        """The images at `indices`, in that order, with all classes."""
        chosen = Selected(self.samples, indices) if hasattr(self.samples, "sizes") else [self.samples[i] for i in indices]
        return Images(chosen, self.targets[np.asarray(indices)], self.classes, self._open_image, self._read_bytes, turns=self.turns)

    def turned(self) -> "Images":
        """The same images, those of files turned as their EXIF orientation says."""
        if self._read_bytes is None or self.turns:
            return self
        return Images(self.samples, self.targets, self.classes, functools.partial(self._open_image, turns=True), self._read_bytes, turns=True)


# What Pillow raises for files that are no images, or damaged ones (RuntimeError: AVIF).
UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)


def decode(file, *, turns: bool = False) -> Image.Image:
    """The RGB image in an open file, whatever its mode there (grayscale, CMYK, palette, 16 bit); `turns`: as its EXIF orientation says. ValueError
    where the range of its pixels is unknown."""
    with Image.open(file) as opened:
        image = _in_colour(opened)
        way = orientation(opened) if turns else UPRIGHT  # asked for after decoding, in which Pillow turns some formats itself
    return image if way == UPRIGHT else Image.fromarray(turned(np.asarray(image), way))


def _in_colour(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # those two give 16 bits as mode I
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {kind}, of a range that it does not tell: save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):  # PIL would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


NO_IMAGE = "it begins like no image format that Pillow knows"


def damaged(name: str, error: Exception) -> DamagedImage:
    """The error that names an image which cannot be read, and says why."""
    reason = {UnidentifiedImageError: NO_IMAGE}.get(type(error)) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DamagedImage(name, reason)


def open_file(path: str, *, turns: bool = False) -> Image.Image:
    """The RGB image in a file; DamagedImage if it cannot be read or decoded. `turns`: see `decode`."""
    try:
        return decode(path, turns=turns)
    except UNREADABLE as error:
        raise damaged(path, error) from error


def read_file(path: str) -> bytes:
    """Content of a file; DamagedImage if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise damaged(path, error) from error


def open_stored(stored: Stored, *, turns: bool = False) -> Image.Image:
    """The RGB image in a part of a larger file; DamagedImage if it cannot be read or decoded. `turns`: see `decode`."""
    data = stored.read()
    try:
        return decode(io.BytesIO(data), turns=turns)
    except UNREADABLE as error:
        raise damaged(str(stored), error) from error


def open_sample(sample: str | Stored, *, turns: bool = False) -> Image.Image:
    """The RGB image in a file or in a part of one; DamagedImage if it cannot be read or decoded. `turns`: see `decode`."""
    return open_file(sample, turns=turns) if isinstance(sample, str) else open_stored(sample, turns=turns)


def read_sample(sample: str | Stored) -> bytes:
    """The bytes of an image, a file or a part of one; DamagedImage if they cannot be read."""
    return read_file(sample) if isinstance(sample, str) else sample.read()
