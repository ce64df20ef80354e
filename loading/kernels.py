"""The operations of RandAugment on uint8 arrays (H, W, 3): Pillow's results, sooner."""

import functools
import math
import random

import numpy as np
import torch
from PIL import Image

try:
    import cv2
except ImportError:  # said by `pixels.require`, where the fast loader is asked for
    cv2 = None

_LEVELS = np.arange(256)


def _apply_table(array: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Array with each value replaced by its entry in `table`, (256,)."""
    return cv2.LUT(array, table.astype(np.uint8))


def _apply_tables(channels: tuple[np.ndarray, ...], tables: np.ndarray) -> np.ndarray:
    """Array (H, W, 3) of channels (H, W), with each value replaced by its entry in the channel's row of `tables`, (3, 256)."""
    return cv2.merge([_apply_table(channel, table) for channel, table in zip(channels, tables, strict=True)])


def _blended_levels(degenerate: int, factor: float) -> np.ndarray:
    """Table of Pillow's blend of a constant with every level: clipped, then cut off towards zero, in single precision."""
    blend = np.float32(degenerate) + np.float32(factor) * (_LEVELS - degenerate).astype(np.float32)
    return blend.clip(0, 255).astype(np.uint8)


def blend(degenerate: np.ndarray, array: np.ndarray, factor: float) -> np.ndarray:
    """Pillow's blend of two arrays: clipped, then cut off towards zero (OpenCV rounds, hence the shift)."""
    return cv2.addWeighted(degenerate, 1 - factor, array, factor, -0.499)


def auto_contrast(array: np.ndarray) -> np.ndarray:
    channels, tables = cv2.split(array), []
    for channel in channels:
        low, high, _, _ = cv2.minMaxLoc(channel)
        scale = 255.0 / (high - low) if high > low else 1.0
        tables.append((_LEVELS * scale - low * scale).clip(0, 255) if high > low else _LEVELS)
    return _apply_tables(channels, tables)


def equalize(array: np.ndarray) -> np.ndarray:
    channels, tables = cv2.split(array), []
    for channel in channels:
        counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        up_to = np.cumsum(counts)
        step = (up_to[-1] - counts[np.flatnonzero(counts)[-1]]) // 255
        tables.append(((step // 2 + up_to - counts) // step).clip(0, 255) if step else _LEVELS)
    return _apply_tables(channels, tables)


def invert(array: np.ndarray) -> np.ndarray:
    return cv2.bitwise_not(array)


def solarize(array: np.ndarray, threshold: int) -> np.ndarray:
    return array ^ np.uint8(255) * (array >= threshold)


def solarize_add(array: np.ndarray, add: int) -> np.ndarray:
    return cv2.add(array, np.uint8(min(add, 255)) * (array < 128))


def posterize(array: np.ndarray, num_bits: int) -> np.ndarray:
    """Keeps the highest `num_bits` bits; none: black."""
    return array & np.uint8(256 - 2 ** (8 - max(0, min(num_bits, 8))))


def brightness(array: np.ndarray, factor: float) -> np.ndarray:
    return _apply_table(array, _blended_levels(0, factor))


def contrast(array: np.ndarray, factor: float) -> np.ndarray:
    mean = int(cv2.mean(cv2.cvtColor(array, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _apply_table(array, _blended_levels(mean, factor))


def color(array: np.ndarray, factor: float) -> np.ndarray:
    gray = cv2.cvtColor(array, cv2.COLOR_RGB2GRAY)
    return blend(cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), array, factor)


def desaturate(array: np.ndarray, factor: float) -> np.ndarray:
    return color(array, min(1.0, max(0.0, 1.0 - factor)))


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def sharpness(array: np.ndarray, factor: float) -> np.ndarray:
    smooth = cv2.filter2D(array, -1, _SMOOTH)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):  # Pillow's filter leaves the outermost pixels
        smooth[edge] = array[edge]
    return blend(smooth, array, factor)


def _warp(array: np.ndarray, matrix: tuple, *, resample, fillcolor: tuple[int, int, int]) -> np.ndarray:
    """Pillow's affine transform: output pixel (x, y) shows input point (a x + b y + c, d x + e y + f).

    Pillow's points have their pixels' centres at halves, OpenCV's at whole numbers."""
    a, b, c, d, e, f = matrix
    inverse = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    kernel = cv2.INTER_LINEAR if resample == Image.Resampling.BILINEAR else cv2.INTER_CUBIC
    size = (array.shape[1], array.shape[0])
    return cv2.warpAffine(array, inverse, size, flags=kernel | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_CONSTANT, borderValue=fillcolor)


def _taps(offset, resample) -> list:
    """Weights of the pixels at -1, 0, 1, 2 for points `offset` right of pixel 0: Pillow's bilinear, or its bicubic with slope -1."""
    if resample == Image.Resampling.BILINEAR:
        return [0 * offset, 1 - offset, offset, 0 * offset]
    square, cube = offset**2, offset**3
    return [-offset + 2 * square - cube, 1 - 2 * square + cube, offset + square - cube, cube - square]


@functools.cache
def _filled(shape: tuple[int, int, int], color: tuple[int, int, int]) -> np.ndarray:
    """Array of one colour; not to be written to."""
    return np.full(shape, color, np.uint8)


NUM_TAPS = 4
EDGE = NUM_TAPS - 1  # pixels to a row's sides that a filter of so many taps may see


def shear_x(array: np.ndarray, factor: float, *, resample, fillcolor: tuple[int, int, int]) -> np.ndarray:
    """Each row to the left, the lower the further: a filter along the rows, exactly as Pillow warps.

    Shifted rows are cut out of the whole image's pixels in a line; what they find beyond the edges is filled afterwards."""
    height, width, _ = array.shape
    shifts = factor * (np.arange(height) + 0.5)
    whole = np.floor(shifts).astype(np.int64)
    full_width = width + 2 * EDGE
    spare_rows = 1 + int(np.abs(whole).max()) // full_width
    padded = torch.from_numpy(cv2.copyMakeBorder(array, spare_rows, spare_rows, EDGE, EDGE, cv2.BORDER_REPLICATE)).view(-1)
    starts = 3 * ((spare_rows + np.arange(height)) * full_width + EDGE + whole - 1)
    length = 3 * (width + NUM_TAPS - 1)
    rows = padded.as_strided((len(padded) - length + 1, length), (1, 1)).index_select(0, torch.from_numpy(starts)).float()
    weights = torch.from_numpy(np.stack(_taps(shifts - whole, resample)).astype(np.float32)).unsqueeze(2)
    out = rows[:, : 3 * width] * weights[0]
    for i in range(1, NUM_TAPS):
        out.addcmul_(rows[:, 3 * i : 3 * (i + width)], weights[i])
    out = cv2.add(out.numpy(), -0.499, dtype=cv2.CV_8U).reshape(array.shape)
    start, stop = (np.ceil(edge - 0.5 - shifts).clip(0, width).astype(np.int16)[:, None] for edge in (0, width))
    columns = np.arange(width, dtype=np.int16)
    is_outside = ((columns < start) | (columns >= stop)).view(np.uint8)
    return cv2.copyTo(_filled(array.shape, fillcolor), is_outside, out)


def shear_y(array: np.ndarray, factor: float, **how) -> np.ndarray:
    """Each column upwards, the further right the further."""
    return cv2.transpose(shear_x(cv2.transpose(array), factor, **how))


def translate_x(array: np.ndarray, num_pixels: float, *, resample, fillcolor: tuple[int, int, int]) -> np.ndarray:
    """To the left. All rows move alike, so one filter does what a warp would, and exactly as Pillow."""
    width = array.shape[1]
    whole = math.floor(num_pixels)
    kernel = np.array([_taps(num_pixels - whole, resample)], np.float32)
    padded = cv2.copyMakeBorder(array, 0, 0, 1, 1, cv2.BORDER_REPLICATE)
    between = cv2.filter2D(padded, -1, kernel, anchor=(1, 0), delta=-0.499, borderType=cv2.BORDER_REPLICATE)
    start, stop = (min(width, max(0, math.ceil(edge - 0.5 - num_pixels))) for edge in (0, width))
    out = _filled(array.shape, fillcolor).copy()
    out[:, start:stop] = between[:, start + whole + 1 : stop + whole + 1]
    return out


def translate_y(array: np.ndarray, num_pixels: float, **how) -> np.ndarray:
    """Upwards."""
    return cv2.transpose(translate_x(cv2.transpose(array), num_pixels, **how))


def translate_x_relative(array: np.ndarray, fraction: float, **how) -> np.ndarray:
    return translate_x(array, fraction * array.shape[1], **how)


def translate_y_relative(array: np.ndarray, fraction: float, **how) -> np.ndarray:
    return translate_y(array, fraction * array.shape[0], **how)


def rotate(array: np.ndarray, degrees: float, **how) -> np.ndarray:
    """About the centre, counter-clockwise."""
    height, width, _ = array.shape
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return _warp(array, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y), **how)


POINT_KERNELS = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "PosterizeIncreasing": posterize,
    "PosterizeOriginal": posterize,
    "Solarize": solarize,
    "SolarizeIncreasing": solarize,
    "SolarizeAdd": solarize_add,
    "Color": color,
    "ColorIncreasing": color,
    "Contrast": contrast,
    "ContrastIncreasing": contrast,
    "Brightness": brightness,
    "BrightnessIncreasing": brightness,
    "Sharpness": sharpness,
    "SharpnessIncreasing": sharpness,
    "Desaturate": desaturate,
}
WARP_KERNELS = {
    "Rotate": rotate,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "TranslateXRel": translate_x_relative,
    "TranslateYRel": translate_y_relative,
}


def kernel_for(name: str, pil_kernel):
    """What RandAugment's op `name` does to an image: (image, *arguments, fillcolor=, resample=) -> image.

    Ops without a kernel here run timm's own `pil_kernel`."""
    if name in POINT_KERNELS:
        return functools.partial(_apply_point_kernel, POINT_KERNELS[name])
    if name in WARP_KERNELS:
        return functools.partial(_apply_warp_kernel, WARP_KERNELS[name])
    return ThroughPil(pil_kernel)


def _apply_point_kernel(kernel, image: np.ndarray, *args, fillcolor, resample) -> np.ndarray:
    return kernel(image, *args)


def _apply_warp_kernel(kernel, image: np.ndarray, *args, fillcolor, resample) -> np.ndarray:
    if isinstance(resample, tuple | list):  # drawn where timm draws it
        resample = random.choice(resample)
    return kernel(image, *args, fillcolor=fillcolor, resample=resample)


class ThroughPil:
    """A transform or kernel of PIL images, for images as this module has them."""

    def __init__(self, part):
        self.part = part

    @property
    def ops(self) -> list:
        """RandAugment ops inside, if any."""
        return self.part.ops

    def __call__(self, image: np.ndarray, *args, **kwargs) -> np.ndarray:
        return np.array(self.part(Image.fromarray(image), *args, **kwargs))
