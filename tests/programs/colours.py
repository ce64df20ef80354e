"""A network of ImageNet's 1000 classes whose predictions are known: it reads class numbers from colours. And images of such colours.

Class 405 has the colour whose red, green and blue say 4, 0 and 5; an image's class is the one whose colour is nearest to its mean."""

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import register_model
from torch import Tensor, nn

from loading.augment import MEAN, STD

SPACING, OFFSET = 25, 15  # in pixel values: a digit d is written as 25 d + 15


def colour(number: int) -> tuple[int, int, int]:
    return tuple(SPACING * int(digit) + OFFSET for digit in f"{number:03d}")


class ColourReader(nn.Module):
    """Logits: minus half the squared distance of colours, but for a term that all classes share."""

    def __init__(self, num_classes: int):
        super().__init__()
        codes = torch.tensor([colour(number) for number in range(num_classes)]) / 255
        self.fc = nn.Linear(3, num_classes)
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        with torch.no_grad():
            self.fc.weight.copy_(codes * std)
            self.fc.bias.copy_(codes @ mean - 0.5 * (codes**2).sum(dim=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.mean(dim=(2, 3)))


@register_model
def colour_reader(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, num_classes: int = 1000) -> ColourReader:
    return ColourReader(num_classes)


def save_weights(path: Path, num_classes: int = 1000) -> Path:
    torch.save({"model": timm.create_model("colour_reader", num_classes=num_classes).state_dict()}, path)
    return path


def write_image(path: Path, number: int, *, size: int = 40, frame: int = 0) -> None:
    """An image of the class's colour; with a frame, so many pixels wide, that is white."""
    pixels = np.full((size, size, 3), 255, np.uint8)
    pixels[frame : size - frame, frame : size - frame] = colour(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
