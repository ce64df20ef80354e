"""A made data set in COCO's format, small enough to be read at once: rectangles and a triangle on plain ground, crowds, odd ones."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(96, 64), (100, 60), (64, 96), (80, 48), (90, 70), (50, 90), (40, 31), (64, 64)]  # width, height; the seventh is too small to learn from
CATEGORIES = [{"id": 7, "name": "triangle"}, {"id": 3, "name": "square"}]


def rectangle(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def content() -> dict:
    """Images with ids from 10 on; each has a square and a triangle, but for the last, which has a crowd alone."""
    images = [{"id": 10 + i, "file_name": f"{i}.jpg", "width": width, "height": height} for i, (width, height) in enumerate(SIZES)]
    annotations = []
    for image in images[:-1]:
        annotations.append({"image_id": image["id"], "category_id": 3, "bbox": [4, 8, 20, 16], "segmentation": rectangle(4, 8, 20, 16)})
        annotations.append({"image_id": image["id"], "category_id": 7, "bbox": [10, 10, 16, 16], "segmentation": [[10, 26, 26, 26, 18, 10]]})
    height, width = SIZES[-1][1], SIZES[-1][0]
    crowd = {"size": [height, width], "counts": [0, height * 8, height * (width - 8)]}  # the first eight columns
    annotations.append({"image_id": images[-1]["id"], "category_id": 3, "bbox": [0, 0, 8, height], "iscrowd": 1, "segmentation": crowd})
    for number, one in enumerate(annotations, 1):
        one.update({"iscrowd": 0, **one, "id": number, "area": one["bbox"][2] * one["bbox"][3]})
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write(folder: Path, changed: dict | None = None) -> Path:
    """Images and annotation file, `content` or `changed`, in `folder`; returns the file's path."""
    made = changed if changed is not None else content()
    rng = np.random.RandomState(0)
    for i, (width, height) in enumerate(SIZES):
        pixels = np.full((height, width, 3), rng.randint(0, 255, 3), np.uint8)
        pixels[8:24, 4:24] = 255
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
    path = folder / "annotations.json"
    path.write_text(json.dumps(made))
    return path
