"""Images that keep their ratio: read, resized to fit, written into batches of one size, normalised."""

import functools

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from loading import augment, decoding, pixels
from loading.images import open_file, read_file

DIVISOR = 32  # of padded and aligned sizes


def fitted(height: int, width: int, max_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image resized, its ratio kept, to fit into `max_size` (long side, short side), either way round."""
    scale = min(max_size[0] / max(height, width), max_size[1] / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def padded(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The least height and width, both multiples of 32, that all `sizes` fit into."""
    height, width = (-(-max(sides) // DIVISOR) * DIVISOR for sides in zip(*sizes, strict=True))
    return height, width


def opened(path: str, *, turns: bool = False) -> decoding.Encoded | np.ndarray:
    """The image in a file, (H, W, 3) uint8, decoded when its pixels are asked for; `turns`: as its EXIF orientation says. DamagedImage where it
    cannot be read."""
    open_image = functools.partial(open_file, path, turns=turns)
    return decoding.Encoded(read_file(path), open_image, turns=turns) if decoding.simplejpeg else np.array(open_image())


def to_size(image: decoding.Encoded | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The image resized to `size` (height, width), bilinear and antialiased; as it is where it has that size."""
    height, width = image.shape[:2]
    view = decoding.top(image, height)
    return view if size == (height, width) else pixels.resized(view, size, InterpolationMode.BILINEAR)


def written(views: list[np.ndarray], size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) uint8 of `size`, each view in the top left corner, zeros around."""
    images = torch.zeros(len(views), *size, 3, dtype=torch.uint8)
    for image, view in zip(images.numpy(), views, strict=True):
        image[: view.shape[0], : view.shape[1]] = view
    return images.permute(0, 3, 1, 2)


def normalised(images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    """float32 images (B, 3, H, W) of uint8 ones, on their device: normalised, and zero beyond their `sizes` (height, width)."""
    finished = augment.finish(images, augment.gather_erased([]))
    for image, (height, width) in zip(finished, sizes, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return finished
