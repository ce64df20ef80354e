"""How a photograph is to be held: the orientation in its EXIF block, and pixels turned as it says."""

import io
import struct
import warnings

import numpy as np
from PIL import ExifTags, Image

UPRIGHT = 1
_SIDEWAYS = 5  # and above: height and width change places
# What Pillow raises for EXIF blocks and files that make no sense.
_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, struct.error, Image.DecompressionBombError)


def orientation(image: Image.Image) -> int:
    """EXIF's orientation of an open image, 1 to 8; 1, upright, also where there is none, or none that can be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged blocks
        try:
            found = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
            return int(found) if found in range(1, 9) else UPRIGHT
        except _UNREADABLE:
            return UPRIGHT


def orientation_in(data: bytes) -> int:
    """The orientation in which Pillow and simplejpeg give the image in a file's bytes, of which no more is read than its head."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
    except _UNREADABLE:
        return UPRIGHT  # for the decoder to judge
    with image:
        return UPRIGHT if image.format == "TIFF" else orientation(image)  # which Pillow turns whenever it decodes one


def exif_of(way: int) -> Image.Exif:
    """An EXIF block that says this orientation, and nothing else."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = way
    return exif


def turned_shape(height: int, width: int, way: int) -> tuple[int, int]:
    """Height and width of an image once it is turned from the orientation `way`."""
    return (width, height) if way >= _SIDEWAYS else (height, width)


def turned(image: np.ndarray, way: int) -> np.ndarray:
    """The image (H, W, C), stored in the orientation `way`, upright: (H, W, C), or (W, H, C) where it lay on its side."""
    if way >= _SIDEWAYS:
        image = image.swapaxes(0, 1)
    rows = -1 if way in (3, 4, 7, 8) else 1
    columns = -1 if way in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(image[::rows, ::columns])
