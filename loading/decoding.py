"""JPEGs decoded as far down as their pixels are wanted, strictly, with Pillow for what the decoder does not take."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from loading.turning import UPRIGHT, orientation_in, turned, turned_shape

try:
    import simplejpeg
except ImportError:  # said by `pixels.require`, where the fast loader is asked for
    simplejpeg = None

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that start a frame
_BASELINE = 0xC0
_SCAN = 0xDA
_RESTARTS = 0xDD


@dataclass(frozen=True)
class _Frame:
    """Where a JPEG's bytes tell of its frame: offset of the frame's marker, and what is in it.

    `is_one_pass`: all components are coded together, from top to bottom and without restart markers."""

    offset: int
    height: int
    width: int
    is_one_pass: bool


def _find_frame(data: bytes) -> _Frame | None:
    """The frame of a JPEG in colour or grayscale; None where `data` is none, or is for Pillow: a CMYK one, whose colours it converts its own
    way, or one so large that it refuses it."""
    if data[:2] != b"\xff\xd8":
        return None
    offset, start, has_restarts = 2, None, False
    while offset + 12 < len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker in _FRAMES:
            start = offset
        elif marker == _RESTARTS:
            has_restarts = True
        elif marker == _SCAN:
            break
        offset += 2 + (data[offset + 2] << 8 | data[offset + 3])
    else:
        return None
    if start is None or data[start + 9] not in (1, 3):
        return None
    height, width = data[start + 5] << 8 | data[start + 6], data[start + 7] << 8 | data[start + 8]
    if Image.MAX_IMAGE_PIXELS is not None and height * width > 2 * Image.MAX_IMAGE_PIXELS:  # a decompression bomb, which Pillow refuses
        return None
    is_one_pass = data[start + 1] == _BASELINE and data[offset + 4] == data[start + 9] and not has_restarts
    return _Frame(start, height, width, is_one_pass) if height and width else None


NO_FRAME = "it is no JPEG in colour or grayscale"
MARGIN = 1  # rows below the last one wanted that its colours are interpolated from, whatever the subsampling
_LEFT_OVER = " extraneous bytes before marker 0xd9"  # all that libjpeg-turbo has to say where it left a sound scan early: the next marker is the end's


def decode_jpeg(data: bytes, frame: _Frame, num_rows: int) -> np.ndarray:
    """The image in a JPEG, or so much of its top that the first `num_rows` rows are all there; ValueError where it is damaged.

    Where possible the decoder is told of a lower image than there is, and stops early: most of its time goes into unpacking
    codes row by row. It then finds bytes left over; for anything else that it finds, the whole image is decoded."""
    num_rows += MARGIN
    if num_rows < frame.height and frame.is_one_pass:
        lower = bytearray(data)
        lower[frame.offset + 5 : frame.offset + 7] = num_rows.to_bytes(2, "big")
        image = np.empty((num_rows, frame.width, 3), np.uint8)
        try:
            return simplejpeg.decode_jpeg(lower, colorspace="RGB", buffer=image)
        except ValueError as error:  # the rows are there nevertheless
            if str(error).endswith(_LEFT_OVER):
                return image
    return simplejpeg.decode_jpeg(data, colorspace="RGB")


class Encoded:
    """An image file's content, decoded when its pixels are asked for.

    Where it is no JPEG, or a CMYK, damaged or very odd one, Pillow decodes it, through `open_image`, which raises DamagedImage where Pillow
    cannot either; `fallback_reason` is why, else None. `turns`: as its EXIF orientation says, which `open_image` then does too."""

    def __init__(self, data: bytes, open_image: Callable[[], Image.Image], *, turns: bool = False):
        self._data, self._open_image = data, open_image
        self._frame = _find_frame(data)
        self._way = orientation_in(data) if turns and self._frame is not None else UPRIGHT
        self.fallback_reason: str | None = None
        self.shape = self._fall_back(NO_FRAME).shape if self._frame is None else (*turned_shape(self._frame.height, self._frame.width, self._way), 3)

    @property
    def is_fallback(self) -> bool:
        """Whether Pillow had to decode it."""
        return self.fallback_reason is not None

    def _fall_back(self, reason: str) -> np.ndarray:
        self.fallback_reason, self._frame = reason, None
        self._image = np.array(self._open_image())
        return self._image

    def top(self, num_rows: int) -> np.ndarray:
        """The first `num_rows` rows, (num_rows, W, 3)."""
        if self._frame is None:
            return self._image[:num_rows]
        try:
            if self._way != UPRIGHT:  # its first rows may lie anywhere in the file
                return turned(decode_jpeg(self._data, self._frame, self._frame.height), self._way)[:num_rows]
            return decode_jpeg(self._data, self._frame, num_rows)[:num_rows]
        except ValueError as error:
            return self._fall_back(str(error))[:num_rows]


def top(image: np.ndarray | Encoded, num_rows: int) -> np.ndarray:
    """The first `num_rows` rows of an image, (num_rows, W, 3)."""
    return image.top(num_rows) if isinstance(image, Encoded) else image[:num_rows]


AnyImage = Image.Image | np.ndarray | Encoded
