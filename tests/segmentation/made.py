"""A made data set of pictures and label images, small enough to be read at once: a bright square and a dark stripe on plain ground."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(96, 64), (64, 96), (80, 80), (100, 40)]  # width, height
COLOURS = np.array([[120, 130, 140], [250, 240, 60], [10, 20, 90]], np.uint8)  # ground, square, stripe


def labels_of(width: int, height: int) -> np.ndarray:
    """(H, W) uint8: class 1 in a square of 20, class 2 in the last eight rows, class 0 elsewhere."""
    labels = np.zeros((height, width), np.uint8)
    labels[4:24, 8:28] = 1
    labels[-8:] = 2
    return labels


def write(root: Path, *, offset: int = 0, sizes: list[tuple[int, int]] = SIZES) -> Path:
    """Both splits in ADE20K's layout below `root`; `offset` is added to the labels, whose values are then those of a set without class for 0."""
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i, (width, height) in enumerate(sizes):
            labels = labels_of(width, height)
            Image.fromarray(COLOURS[labels]).save(root / "images" / split / f"{i}.jpg", quality=95)
            Image.fromarray(labels + np.uint8(offset)).save(root / "annotations" / split / f"{i}.png")
    return root


def folders(root: Path, split: str = "training") -> tuple[Path, Path]:
    return root / "images" / split, root / "annotations" / split
