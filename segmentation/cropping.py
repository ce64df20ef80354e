"""The keyed augmentation of a picture and its labels: scale, crop, flip, photometric distortion.

All that is drawn comes from the generator in the argument; numpy's legacy one, whose stream is frozen."""

import numpy as np

from loading import kernels
from loading.decoding import Encoded
from loading.sized import fitted, to_size
from run.errors import InputError
from segmentation.networks import IGNORED

MAX_SIZE = (2048, 512)  # long and short side, in pixels
SCALES = (0.5, 2.0)  # a picture is made larger or smaller by a factor between them
MAX_SHARE = 0.75  # of a crop's labelled pixels that one class may cover
NUM_TRIES = 10  # of crops, of which the last is taken as it is
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 18  # hue in OpenCV's 180 steps around the circle
_NUM_HUES = 180


def nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels (H, W) resized to `size` (height, width): each pixel is the one its centre falls on, as in `nearest-exact`."""
    rows, columns = (((np.arange(new) + 0.5) * (old / new)).astype(np.int64) for old, new in zip(labels.shape, size, strict=True))
    return labels[rows[:, None], columns]


def scaled_size(height: int, width: int, max_size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Height and width of a picture fitted into `max_size` (long side, short side) times `factor`, its ratio kept."""
    return fitted(height, width, (int(max_size[0] * factor), int(max_size[1] * factor)))


def is_varied(labels: np.ndarray) -> bool:
    """Whether no class covers more than three quarters of the labelled pixels, of which there must be some."""
    counts = np.unique(labels[labels != IGNORED], return_counts=True)[1]
    return len(counts) > 0 and bool(counts.max() <= MAX_SHARE * counts.sum())


def draw_crop(labels: np.ndarray, crop_size: int, rng: np.random.RandomState) -> tuple[slice, slice]:
    """Rows and columns of a square crop, or of what there is of it: the first of ten draws that `is_varied`, else the tenth."""
    height, width = labels.shape
    for _ in range(NUM_TRIES):
        top, left = rng.randint(0, max(height - crop_size, 0) + 1), rng.randint(0, max(width - crop_size, 0) + 1)
        crop = slice(top, min(top + crop_size, height)), slice(left, min(left + crop_size, width))
        if is_varied(labels[crop]):
            break
    return crop


def _stretched(values: np.ndarray, factor: float, shift: float = 0.0) -> np.ndarray:
    """uint8 `values` times `factor` plus `shift`: clipped, then cut off towards zero."""
    table = (np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(shift)).clip(0, 255).astype(np.uint8)
    return kernels.cv2.LUT(np.ascontiguousarray(values), table)


def _toned(image: np.ndarray, saturation: float | None, hue: int | None) -> np.ndarray:
    """The image (H, W, 3) with its saturation stretched and its hue turned; None: left alone."""
    if saturation is None and hue is None:
        return image
    hsv = kernels.cv2.cvtColor(image, kernels.cv2.COLOR_RGB2HSV)
    if saturation is not None:
        hsv[..., 1] = _stretched(hsv[..., 1], saturation)
    if hue is not None:
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + hue) % _NUM_HUES
    return kernels.cv2.cvtColor(hsv, kernels.cv2.COLOR_HSV2RGB)


def distort(image: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """The image (H, W, 3) uint8 after photometric distortion: brightness, contrast, saturation and hue, each with probability 1/2.

    Brightness comes first; contrast follows it, or comes last, at random. InputError where OpenCV is missing."""
    if kernels.cv2 is None:
        raise InputError("photometric distortion needs opencv-python-headless: pip install -r requirements.txt")
    shift = rng.uniform(-BRIGHTNESS, BRIGHTNESS) if rng.randint(2) else None
    contrast_is_last = bool(rng.randint(2))
    contrast = rng.uniform(*CONTRAST) if rng.randint(2) else None
    saturation = rng.uniform(*SATURATION) if rng.randint(2) else None
    hue = int(rng.randint(-HUE, HUE + 1)) if rng.randint(2) else None
    if shift is not None:
        image = _stretched(image, 1.0, shift)
    if contrast is not None and not contrast_is_last:
        image = _stretched(image, contrast)
    image = _toned(image, saturation, hue)
    return _stretched(image, contrast) if contrast is not None and contrast_is_last else image


def augmented(
    image: Encoded | np.ndarray,
    labels: np.ndarray,
    rng: np.random.RandomState,
    *,
    crop_size: int,
    max_size: tuple[int, int] = MAX_SIZE,
    scales: tuple[float, float] = SCALES,
) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 3) and its labels (H, W), scaled, cropped to at most `crop_size` a side, flipped and distorted."""
    size = scaled_size(*labels.shape, max_size, rng.uniform(*scales))
    labels = nearest(labels, size)
    crop = draw_crop(labels, crop_size, rng)
    view, labels = to_size(image, size)[crop], labels[crop]
    if rng.randint(2):
        view, labels = view[:, ::-1], labels[:, ::-1]
    return distort(np.ascontiguousarray(view), rng), labels
