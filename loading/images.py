"""Labelled images by index, wherever they lie: names that processes share without copying, files read and decoded."""

import os
from array import array
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from loading import decoding
from run.errors import DamagedImage


class Names(Sequence):
    """Texts in two buffers. A list of a million strings would be copied, page by page, into every loader process that counts
    references to them."""

    def __init__(self, texts: Iterable[str]):
        encoded = [os.fsencode(text) for text in texts]
        self._bytes = b"".join(encoded)
        self._ends = array("q", np.cumsum([0, *map(len, encoded)], dtype=np.int64).tobytes())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


class Images(Sequence):
    """Labelled images: `images[i]` is (RGB PIL image, class index).

    `open_image` makes the PIL image of a sample; `read_bytes`, where samples are files, reads one for a decoder of its own."""

    def __init__(self, samples: Sequence, targets: Sequence[int], classes: list[str], open_image: Callable, read_bytes: Callable | None = None):
        self.samples = samples
        self.targets = np.asarray(targets, dtype=np.int32)
        self.classes = classes
        self._open_image = open_image
        self._read_bytes = read_bytes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._open_image(self.samples[index]), int(self.targets[index])

    def open(self, index: int, *, is_fast: bool) -> decoding.AnyImage:
        """The image as the loaders' transforms take it."""
        if not is_fast:
            return self[index][0]
        sample = self.samples[index]
        if self._read_bytes is None:
            return np.array(self._open_image(sample))
        return decoding.Encoded(self._read_bytes(sample), lambda: self._open_image(sample))

    def part(self, indices: Sequence[int]) -> "Images":
        """The images at `indices`, in that order, with all classes."""
        chosen = [self.samples[i] for i in indices]
        samples = Names(chosen) if isinstance(self.samples, Names) else chosen
        return Images(samples, self.targets[np.asarray(indices)], self.classes, self._open_image, self._read_bytes)


# What Pillow raises for files that are no images, or damaged ones (RuntimeError: AVIF).
UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)


def decode(file) -> Image.Image:
    """The RGB image in an open file, whatever its mode there (grayscale, CMYK, palette, 16 bit)."""
    with Image.open(file) as image:
        if image.mode == "I" or image.mode.startswith("I;16"):  # PIL would clip 16 bits at 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


NO_IMAGE = "it begins like no image format that Pillow knows"


def damaged(name: str, error: Exception) -> DamagedImage:
    """The error that names an image which cannot be read, and says why."""
    reason = {UnidentifiedImageError: NO_IMAGE}.get(type(error)) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DamagedImage(name, reason)


def open_file(path: str) -> Image.Image:
    """The RGB image in a file; DamagedImage if it cannot be read or decoded."""
    try:
        return decode(path)
    except UNREADABLE as error:
        raise damaged(path, error) from error


def read_file(path: str) -> bytes:
    """Content of a file; DamagedImage if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise damaged(path, error) from error
