"""Fast pixels for `--loader fast`: JPEG decoding, resizing and RandAugment's kernels on uint8 arrays.

An image here is a uint8 array (H, W, 3), which OpenCV, torch and simplejpeg share without a copy. What is drawn at random is left to
timm and torchvision; only the kernels that touch pixels are exchanged: simplejpeg for Pillow's decoder, torch's antialiased resize for
Pillow's, OpenCV for Pillow's point operations and warps."""

import ctypes
import functools
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from run.errors import InputError

try:
    import cv2
    import simplejpeg
except ImportError as error:  # said by `require`, where the fast loader is asked for
    cv2 = simplejpeg = None
    _missing = error.name


def require() -> None:
    """InputError naming --loader reference where this machine cannot run the fast loader."""
    if cv2 is None:
        raise InputError(f"--loader fast needs {_missing}: pip install -r requirements.txt, or train with --loader reference (Pillow: slower, other pixels)")
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith(("AVX2", "AVX512")):
        raise InputError(
            f"--loader fast needs a CPU with AVX2 (torch finds {capability} here), without which its resizing is slower than Pillow's: use --loader reference"
        )


def prepare_process() -> None:
    """One thread for OpenCV; the loader's processes are its parallelism."""
    if cv2 is not None:
        cv2.setNumThreads(0)


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of decoded images instead of returning it to the system after each; elsewhere nothing changes."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 512 << 20)
        libc.mallopt(mmap_threshold, 32 << 20)  # the largest that glibc takes


def to_tensor(image: np.ndarray) -> Tensor:
    """The image as a tensor (3, H, W); shares its memory."""
    return torch.from_numpy(image).permute(2, 0, 1)


def from_tensor(image: Tensor) -> np.ndarray:
    """The image in a uint8 tensor (3, H, W); shares its memory where that is laid out (H, W, 3)."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


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
    """The frame of a JPEG in colour or grayscale; None where `data` is none, or a CMYK one, whose colours Pillow converts its own way."""
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
    is_one_pass = data[start + 1] == _BASELINE and data[offset + 4] == data[start + 9] and not has_restarts
    return _Frame(start, height, width, is_one_pass) if height and width else None


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

    `is_fallback` tells whether Pillow had to decode it, for it is no JPEG, or a CMYK, damaged or very odd one."""

    def __init__(self, data: bytes, open_image: Callable[[], Image.Image]):
        self._data, self._open_image = data, open_image
        self._frame = _find_frame(data)
        self.is_fallback = False
        self.shape = (self._frame.height, self._frame.width, 3) if self._frame is not None else self._fall_back().shape

    def _fall_back(self) -> np.ndarray:
        self.is_fallback, self._frame = True, None
        self._image = np.array(self._open_image())
        return self._image

    def top(self, num_rows: int) -> np.ndarray:
        """The first `num_rows` rows, (num_rows, W, 3)."""
        if self._frame is None:
            return self._image[:num_rows]
        try:
            return decode_jpeg(self._data, self._frame, num_rows)[:num_rows]
        except ValueError:
            return self._fall_back()[:num_rows]


def top(image: np.ndarray | Encoded, num_rows: int) -> np.ndarray:
    """The first `num_rows` rows of an image, (num_rows, W, 3)."""
    return image.top(num_rows) if isinstance(image, Encoded) else image[:num_rows]


def _canonical(image: np.ndarray) -> Tensor:
    """The image as a batch of one with the strides that torch's fast resizing asks for, and a batch of one need not have."""
    height, width, _ = image.shape
    return torch.from_numpy(np.ascontiguousarray(image)).as_strided((1, 3, height, width), (3 * height * width, 1, 3 * width, 3))


def _first(batch: Tensor) -> np.ndarray:
    """The image that is alone in a batch laid out like `_canonical`'s."""
    return batch.numpy()[0].transpose(1, 2, 0)


# what torch.nn.functional.interpolate calls: (images, size, align_corners, vertical scale, horizontal scale)
_RESIZE = {InterpolationMode.BICUBIC: torch._C._nn._upsample_bicubic2d_aa, InterpolationMode.BILINEAR: torch._C._nn._upsample_bilinear2d_aa}


def resized(image: np.ndarray, size: tuple[int, int], interpolation: InterpolationMode) -> np.ndarray:
    """The image at `size` (height, width), resampled with antialiasing as Pillow does."""
    return _first(_RESIZE[interpolation](_canonical(image), size, False, None, None))


@functools.lru_cache(maxsize=4096)
def _stand_in(height: int, width: int) -> Tensor:
    """What timm and torchvision take for an image of this size where they only ask for its size."""
    return torch.empty(height, width, device="meta")


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's, of an image as this module has them."""

    @staticmethod
    def get_params(image: np.ndarray | Encoded, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[int, int, int, int]:
        return RandomResizedCropAndInterpolation.get_params(_stand_in(*image.shape[:2]), scale, ratio)

    def __call__(self, image: np.ndarray | Encoded) -> np.ndarray:
        top_row, left, height, width = self.get_params(image, self.scale, self.ratio)
        interpolation = random.choice(self.interpolation) if isinstance(self.interpolation, tuple | list) else self.interpolation
        if not (height and width):  # drawn for images of a pixel or two; Pillow makes them black
            return np.zeros((*self.size, 3), np.uint8)
        crop = top(image, top_row + height)[top_row:, left : left + width]
        return resized(crop, self.size, _MODE_OF_PIL.get(interpolation, interpolation))


_MODE_OF_PIL = {Image.Resampling.BICUBIC: InterpolationMode.BICUBIC, Image.Resampling.BILINEAR: InterpolationMode.BILINEAR}


def _short_side_to(short: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of an image of this size once its short side is `short`, as torchvision rounds them."""
    long = int(short * max(height, width) / min(height, width))
    return (short, long) if height <= width else (long, short)


class Resize(transforms.Resize):
    """torchvision's, to a given short side."""

    def forward(self, image: np.ndarray | Encoded) -> np.ndarray:
        height, width, _ = image.shape
        size = _short_side_to(self.size, height, width)
        image = top(image, height)
        return image if size == (height, width) else resized(image, size, self.interpolation)


@functools.lru_cache(maxsize=4096)
def _centre(height: int, width: int, short_side: int, crop_size: int) -> tuple[int, tuple[int, int], tuple[float, float], tuple[slice, slice]] | None:
    """How the central square of an image of this size is resized alone: rows that it is made of, size of the resized part, its
    scales, and where in it the square lies; None where the whole image has to be resized."""
    resized_height, resized_width = _short_side_to(short_side, height, width)
    if short_side < crop_size or (resized_height, resized_width) == (height, width):
        return None
    start_y, start_x = (round((side - crop_size) / 2) for side in (resized_height, resized_width))
    size = start_y + crop_size, start_x + crop_size
    scale = height / resized_height
    num_rows = min(height, math.floor(scale * (size[0] - 0.5) + 2 * max(scale, 1) + 0.5 + 1e-6))  # where torch's last filter ends
    num_rows += num_rows == size[0]
    if num_rows > height or width == size[1]:  # torch takes equal sizes to mean: nothing to resample
        return None
    return num_rows, size, (resized_height / height, resized_width / width), (slice(start_y, None), slice(start_x, None))


class ResizedCenterCrop:
    """torchvision's Resize to the short side `size`, bicubic, then CenterCrop to `crop_size`; skips what is neither needed nor costs
    exactness to skip: what is below and right of the crop."""

    def __init__(self, size: int, crop_size: int):
        self.size, self.crop_size = size, crop_size
        self._resize = Resize(size, interpolation=InterpolationMode.BICUBIC)
        self._crop = ThroughTensor(transforms.CenterCrop(crop_size))

    def __call__(self, image: np.ndarray | Encoded) -> np.ndarray:
        centre = _centre(*image.shape[:2], self.size, self.crop_size)
        if centre is None:
            return self._crop(self._resize(image))
        num_rows, size, scales, square = centre
        part = _canonical(top(image, num_rows))  # columns that are not needed stay, for leaving them out would be a copy
        return _first(_RESIZE[InterpolationMode.BICUBIC](part, size, False, *scales))[square]


class RandomHorizontalFlip(transforms.RandomHorizontalFlip):
    """torchvision's, with OpenCV's kernel."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        # in single precision, as torch compares a tensor with a number
        return cv2.flip(image, 1) if torch.rand(1).item() < np.float32(self.p).item() else image


class ColorJitter(transforms.ColorJitter):
    """torchvision's of brightness, contrast and saturation, with this module's kernels."""

    def forward(self, image: np.ndarray) -> np.ndarray:
        order, brightness_factor, contrast_factor, saturation_factor, _ = self.get_params(self.brightness, self.contrast, self.saturation, self.hue)
        steps = ((brightness, brightness_factor), (contrast, contrast_factor), (color, saturation_factor))
        for i in order.tolist():
            if i < len(steps) and steps[i][1] is not None:
                adjust, factor = steps[i]
                image = adjust(image, factor)
        return image


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


class ThroughTensor:
    """A transform of tensors (3, H, W), for images as this module has them."""

    def __init__(self, part):
        self.part = part

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return from_tensor(self.part(to_tensor(image)))


class RandomCrop(transforms.RandomCrop):
    """torchvision's, of an image as this module has them."""

    def forward(self, image: np.ndarray) -> np.ndarray:
        return from_tensor(super().forward(to_tensor(image)))


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


def _blend(degenerate: np.ndarray, array: np.ndarray, factor: float) -> np.ndarray:
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
    return _blend(cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), array, factor)


def desaturate(array: np.ndarray, factor: float) -> np.ndarray:
    return color(array, min(1.0, max(0.0, 1.0 - factor)))


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def sharpness(array: np.ndarray, factor: float) -> np.ndarray:
    smooth = cv2.filter2D(array, -1, _SMOOTH)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):  # Pillow's filter leaves the outermost pixels
        smooth[edge] = array[edge]
    return _blend(smooth, array, factor)


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


@functools.cache
def _hash_weights(num_words: int) -> np.ndarray:
    """Fixed odd 64-bit numbers, (num_words,)."""
    return np.random.RandomState(0).randint(0, 2**63 - 1, num_words, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def pixel_hash(image: np.ndarray) -> int:
    """Hash of the bytes of an image (H, W, 3): a signed 64-bit integer.

    Weighted sum modulo 2**64 of 8-byte words with odd weights: any changed word changes it, and so, but for one chance in 2**64,
    does anything else. Takes microseconds, where cryptographic hashes take as long as decoding."""
    data = image.reshape(-1)
    if data.size % 8:
        data = np.concatenate([data, np.zeros(-data.size % 8, np.uint8)])
    words = data.view(np.uint64)
    return int(np.einsum("i,i", words, _hash_weights(len(words))).astype(np.int64))
