"""Fast pixels for `--loader fast`: resizing, cropping and colours on uint8 arrays.

An image here is a uint8 array (H, W, 3), which OpenCV, torch and simplejpeg share without a copy. What is drawn at random is left to
timm and torchvision; only the kernels that touch pixels are exchanged: simplejpeg for Pillow's decoder (`decoding.py`), torch's antialiased
resize for Pillow's, OpenCV for Pillow's point operations and warps (`kernels.py`)."""

import ctypes
import functools
import math
import random
import sys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import transforms as timm_transforms
from timm.data.auto_augment import AugMixAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from loading import decoding, kernels
from loading.decoding import Encoded, top
from loading.kernels import brightness, color, contrast
from run.errors import InputError


def require() -> None:
    """InputError naming --loader reference where this machine cannot run the fast loader."""
    missing = [name for name, package in (("opencv-python-headless", kernels.cv2), ("simplejpeg", decoding.simplejpeg)) if package is None]
    if missing:
        raise InputError(
            f"--loader fast needs {' and '.join(missing)}: pip install -r requirements.txt, or train with --loader reference (Pillow: slower, other pixels)"
        )
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith(("AVX2", "AVX512")):
        raise InputError(
            f"--loader fast needs a CPU with AVX2 (torch finds {capability} here), without which its resizing is slower than Pillow's: use --loader reference"
        )


def prepare_process() -> None:
    """One thread for OpenCV; the loader's processes are its parallelism."""
    if kernels.cv2 is not None:
        kernels.cv2.setNumThreads(0)


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


def stand_in(image: np.ndarray | Encoded | Image.Image) -> Tensor | Image.Image:
    """What timm and torchvision take for the image where they only ask for its size."""
    return image if isinstance(image, Image.Image) else _stand_in(*image.shape[:2])


def _drawn(interpolation: InterpolationMode | Sequence[InterpolationMode]) -> InterpolationMode:
    """The one of several that is drawn, where timm draws it."""
    return random.choice(interpolation) if isinstance(interpolation, tuple | list) else interpolation


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's, of an image as this module has them."""

    @staticmethod
    def get_params(image: np.ndarray | Encoded, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[int, int, int, int]:
        return RandomResizedCropAndInterpolation.get_params(stand_in(image), scale, ratio)

    def __call__(self, image: np.ndarray | Encoded) -> np.ndarray:
        top_row, left, height, width = self.get_params(image, self.scale, self.ratio)
        interpolation = _drawn(self.interpolation)
        if not (height and width):  # drawn for images of a pixel or two; Pillow makes them black
            return np.zeros((*self.size, 3), np.uint8)
        crop = top(image, top_row + height)[top_row:, left : left + width]
        return resized(crop, self.size, _MODE_OF_PIL.get(interpolation, interpolation))


_MODE_OF_PIL = {Image.Resampling.BICUBIC: InterpolationMode.BICUBIC, Image.Resampling.BILINEAR: InterpolationMode.BILINEAR}


class ResizeKeepRatio(timm_transforms.ResizeKeepRatio):
    """timm's, of an image as this module has them; a short side of less than a pixel becomes one."""

    @staticmethod
    def get_params(image: Tensor, *settings) -> list[int]:
        return [max(1, side) for side in timm_transforms.ResizeKeepRatio.get_params(image, *settings)]

    def __call__(self, image: np.ndarray | Encoded) -> np.ndarray:
        settings = (self.random_scale_prob, self.random_scale_range, self.random_scale_area, self.random_aspect_prob, self.random_aspect_range)
        size = tuple(self.get_params(stand_in(image), self.size, self.longest, *settings))
        interpolation = _drawn(self.interpolation)
        whole = top(image, image.shape[0])
        return whole if size == whole.shape[:2] else resized(whole, size, interpolation)


def _cut_or_padded(image: np.ndarray, start: tuple[int, int], size: tuple[int, int], *, fill, padding_mode: str) -> np.ndarray:
    """The part of the image from `start` (top, left) on, of `size` (height, width); what lies beyond its edges is filled or reflected."""
    before = [max(0, -first) for first in start]
    after = [max(0, first + length - side) for first, length, side in zip(start, size, image.shape[:2], strict=True)]
    if any(before) or any(after):
        border = kernels.cv2.BORDER_REFLECT_101 if padding_mode == "reflect" else kernels.cv2.BORDER_CONSTANT
        image = kernels.cv2.copyMakeBorder(image, before[0], after[0], before[1], after[1], border, value=fill)
    first_row, first_column = (max(0, first) for first in start)
    return np.ascontiguousarray(image[first_row : first_row + size[0], first_column : first_column + size[1]])


def centred(sides: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Top and left of timm's central part of that `size` of an image with these `sides`; negative where it is larger."""
    return tuple(round((side - length) / 2) if side >= length else -((length - side) // 2) for side, length in zip(sides, size, strict=True))


class CenterCropOrPad(timm_transforms.CenterCropOrPad):
    """timm's, of an image as this module has them."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return _cut_or_padded(image, centred(image.shape[:2], self.size), self.size, fill=self.fill, padding_mode=self.padding_mode)


class RandomCropOrPad(timm_transforms.RandomCropOrPad):
    """timm's, of an image as this module has them."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        start = self.get_params(stand_in(image), self.size)
        return _cut_or_padded(image, start, self.size, fill=self.fill, padding_mode=self.padding_mode)


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
    """torchvision's Resize to the short side `size`, then CenterCrop to `crop_size`; skips what is neither needed nor costs
    exactness to skip: what is below and right of the crop."""

    def __init__(self, size: int, crop_size: int, interpolation: InterpolationMode = InterpolationMode.BICUBIC):
        self.size, self.crop_size, self.interpolation = size, crop_size, interpolation
        self._resize = Resize(size, interpolation=interpolation)
        self._crop = ThroughTensor(transforms.CenterCrop(crop_size))

    def __call__(self, image: np.ndarray | Encoded) -> np.ndarray:
        centre = _centre(*image.shape[:2], self.size, self.crop_size)
        if centre is None:
            return self._crop(self._resize(image))
        num_rows, size, scales, square = centre
        part = _canonical(top(image, num_rows))  # columns that are not needed stay, for leaving them out would be a copy
        return _first(_RESIZE[self.interpolation](part, size, False, *scales))[square]


class SquashedCenterCrop:
    """torchvision's Resize of both sides to `size`, then CenterCrop to `crop_size`, which is no larger."""

    def __init__(self, size: int, crop_size: int, interpolation: InterpolationMode):
        self.size, self.crop_size, self.interpolation = (size, size), crop_size, interpolation

    def __call__(self, image: np.ndarray | Encoded) -> np.ndarray:
        whole = top(image, image.shape[0])
        squashed = whole if whole.shape[:2] == self.size else resized(whole, self.size, self.interpolation)
        return _cut_or_padded(squashed, centred(self.size, (self.crop_size,) * 2), (self.crop_size,) * 2, fill=0, padding_mode="constant")


class CenterCrop:
    """torchvision's CenterCrop of images whose sides are at least `size`; smaller ones are enlarged to it, bicubic, instead of padded."""

    def __init__(self, size: int):
        self.size = size
        self._enlarge = ResizedCenterCrop(size, size)

    def __call__(self, image: np.ndarray | Encoded) -> np.ndarray:
        height, width, _ = image.shape
        if min(height, width) < self.size:
            return self._enlarge(image)
        start_y, start_x = (round((side - self.size) / 2) for side in (height, width))
        return np.ascontiguousarray(top(image, start_y + self.size)[start_y:, start_x : start_x + self.size])


class RandomHorizontalFlip(transforms.RandomHorizontalFlip):
    """torchvision's, with OpenCV's kernel."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        # in single precision, as torch compares a tensor with a number
        return kernels.cv2.flip(image, 1) if torch.rand(1).item() < np.float32(self.p).item() else image


class RandomVerticalFlip(transforms.RandomVerticalFlip):
    """torchvision's, with OpenCV's kernel."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return kernels.cv2.flip(image, 0) if torch.rand(1).item() < np.float32(self.p).item() else image


class AugMix(AugMixAugment):
    """timm's, of an image as this module has them."""

    def _apply_basic(self, image: np.ndarray, mixing_weights: np.ndarray, m: np.float32) -> np.ndarray:
        mixed = np.zeros(image.shape, np.float32)
        for weight in mixing_weights:
            mixed += weight * self._chain(image).astype(np.float32)
        return kernels.blend(image, mixed.clip(0, 255).astype(np.uint8), float(m))

    def _apply_blended(self, image: np.ndarray, mixing_weights: np.ndarray, m: np.float32) -> np.ndarray:
        blended = image
        for weight in self._calc_blended_weights(mixing_weights, m):
            blended = kernels.blend(blended, self._chain(image), float(weight))
        return blended

    def _chain(self, image: np.ndarray) -> np.ndarray:
        """The image after the ops of one drawn chain."""
        depth = self.depth if self.depth > 0 else np.random.randint(1, 4)
        for op in np.random.choice(self.ops, depth, replace=True):
            image = op(image)
        return image


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
