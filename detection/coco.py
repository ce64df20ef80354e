"""Annotation files in COCO's format: categories, images and objects, checked as they are read.

Format: https://cocodataset.org/#format-data. Any data set may bring categories of its own; labels follow the order of their ids."""

import json
import math
import os
import pickle
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loading.images import Names
from run.errors import InputError, first_line

MIN_SIDE = 32  # pixels; training leaves out images with a shorter one
TOLERANCE = 1.0  # pixels by which a box may leave its image, for files round


def mask_api():
    """faster-coco-eval's functions on run-length encoded masks. InputError where it is not installed."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise InputError("masks and COCO's metrics need faster-coco-eval: pip install -r requirements-detection.txt") from error
    return mask


class _Packed(Sequence):
    """Python values in one buffer, for the reason that `Names` has for texts."""

    def __init__(self, values: Iterable):
        packed = [pickle.dumps(value) for value in values]
        self._bytes = b"".join(packed)
        self._ends = array("q", np.cumsum([0, *map(len, packed)], dtype=np.int64).tobytes())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int):
        return pickle.loads(self._bytes[self._ends[index] : self._ends[index + 1]])


@dataclass(frozen=True)
class CocoData:
    """Images and objects of one annotation file. Image i has the objects `starts[i]` to `starts[i + 1]`.

    image_ids (n,) and category_ids are the file's; sizes (n, 2) height and width; boxes (m, 4) float32 as x1, y1, x2, y2 in pixels;
    labels (m,) places in `class_names`; is_target (m,) whether an object is one to learn: no crowd, at least a pixel wide and high."""

    path: Path
    folder: Path
    image_ids: np.ndarray
    file_names: Names
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    is_target: np.ndarray
    segmentations: _Packed
    category_ids: list[int]
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.image_ids)

    def file(self, index: int) -> str:
        """Path of an image."""
        return str(self.folder / self.file_names[index])

    def num_objects(self, index: int) -> np.ndarray:
        """(num classes,) objects of an image that are no crowd, by class."""
        places = slice(self.starts[index], self.starts[index + 1])
        return np.bincount(self.labels[places][self.is_target[places]], minlength=len(self.class_names))

    def training_images(self) -> np.ndarray:
        """Indices of the images to learn from: those with objects, and no side under 32 pixels. InputError where there are none."""
        counts = np.bincount(np.repeat(np.arange(len(self)), np.diff(self.starts))[self.is_target], minlength=len(self))
        found = np.flatnonzero((counts > 0) & (self.sizes.min(1) >= MIN_SIDE))
        if not len(found):
            raise InputError(f"{self.path} has no image to learn from: none has an object that is no crowd, and sides of {MIN_SIDE} pixels or more")
        return found

    def target(self, index: int, *, has_masks: bool) -> dict[str, Tensor]:
        """The objects to learn of an image: boxes (N, 4) in pixels of the file's image, labels (N,) and, with `has_masks`, masks (N, H, W) uint8."""
        places = np.arange(self.starts[index], self.starts[index + 1])
        places = places[self.is_target[places]]
        target = {"boxes": torch.from_numpy(self.boxes[places]), "labels": torch.from_numpy(self.labels[places])}
        if has_masks:
            height, width = self.sizes[index].tolist()
            masks = [decode_mask(self.segmentations[place], height, width) for place in places]
            target["masks"] = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.uint8)
        return target


def decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """(height, width) uint8, 0 or 1, of polygons or of a run-length encoding, compressed or not."""
    api = mask_api()
    if isinstance(segmentation, list):
        rle = api.merge(api.frPyObjects(segmentation, height, width))
    else:
        rle = api.frPyObjects(segmentation, height, width) if isinstance(segmentation["counts"], list) else segmentation
    return np.ascontiguousarray(api.decode(rle))


def read(path: str | Path, folder: str | Path, *, has_masks: bool) -> CocoData:
    """The data set of the annotation file `path`, whose images lie in `folder`; with `has_masks` every object needs a segmentation.

    InputError, saying which entry and what to do, where the file or an image is missing, or an entry is not what the format asks for."""
    path, folder = Path(path).expanduser(), Path(folder).expanduser()
    content = parse(path)
    categories = _categories(content["categories"], path)
    images = {_whole_number(image, "id", f"{path}, images"): image for image in content["images"]}
    if len(images) != len(content["images"]):
        raise InputError(f"{path} lists {len(content['images']) - len(images)} images with the id of another: give each its own id")
    if not images:
        raise InputError(f"{path} lists no images: its list 'images' is empty")
    sizes = np.array([[_whole_number(image, side, f"{path}, image {key}") for side in ("height", "width")] for key, image in images.items()])
    if not sizes.all():
        raise InputError(f"{path} lists images of no pixels: correct their 'height' and 'width'")
    _require_files(path, folder, [image.get("file_name") for image in images.values()])
    objects = _objects(content["annotations"], images, categories, path=path, has_masks=has_masks)
    place_of = {key: i for i, key in enumerate(images)}
    order = np.argsort([place_of[one["image_id"]] for one in objects], kind="stable")
    objects = [objects[i] for i in order]
    counts = np.bincount([place_of[one["image_id"]] for one in objects], minlength=len(images))
    corners, sides = np.split(np.array([one["bbox"] for one in objects], dtype=np.float64), 2, axis=1)
    limits = np.repeat(sizes[:, ::-1], counts, axis=0)
    boxes = np.hstack([np.clip(corners, 0, limits), np.clip(corners + sides, 0, limits)]).astype(np.float32)
    areas = np.array([one.get("area", one["bbox"][2] * one["bbox"][3]) for one in objects], dtype=np.float64)
    is_crowd = np.array([bool(one.get("iscrowd", 0)) for one in objects])
    return CocoData(
        path=path,
        folder=folder,
        image_ids=np.array(list(images)),
        file_names=Names(image["file_name"] for image in images.values()),
        sizes=sizes,
        starts=np.concatenate([[0], np.cumsum(counts)]),
        boxes=boxes,
        labels=np.array([categories[one["category_id"]][0] for one in objects], dtype=np.int64),
        is_target=~is_crowd & (sides >= 1).all(1) & (areas > 0) & (boxes[:, 2:] > boxes[:, :2]).all(1),
        segmentations=_Packed(one.get("segmentation") if has_masks else None for one in objects),
        category_ids=list(categories),
        class_names=[name for _, name in categories.values()],
    )


def parse(path: Path) -> dict:
    """Content of an annotation file, as it is. InputError where it is missing, no JSON, or not of COCO's format."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: the annotation file cannot be read ({error.strerror}): give the path of a file in COCO's format") from error
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON ({first_line(error)}): it is damaged or incomplete; fetch or write it again") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list) or not all(isinstance(one, dict) for one in content[name]):
            raise InputError(f"{path} has no list '{name}' of entries: it must be an annotation file in COCO's format, with images, annotations, categories")
    return content


def _whole_number(entry: dict, name: str, where: str) -> int:
    value = entry.get(name)
    if not isinstance(value, int) or value < 0:
        raise InputError(f"{where}: '{name}' is {json.dumps(value)}, it must be a whole number")
    return value


def _categories(entries: list[dict], path: Path) -> dict[int, tuple[int, str]]:
    """Label and name by category id, in the order of the ids; no two names alike."""
    names = {_whole_number(entry, "id", f"{path}, categories"): str(entry.get("name", entry["id"])) for entry in entries}
    if not names or len(names) != len(entries):
        raise InputError(f"{path} has {len(entries)} categories with {len(names)} different ids: it needs at least one, each with its own id")
    words = list(names.values())
    names = {key: f"{name} ({key})" if words.count(name) > 1 else name for key, name in names.items()}
    return {key: (label, names[key]) for label, key in enumerate(sorted(names))}


def _require_files(path: Path, folder: Path, names: list) -> None:
    """InputError where listed images are not in the folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: it must hold the images that {path} lists")
    if not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{path} lists images without 'file_name'")
    present = {entry.name for entry in os.scandir(folder)}  # one look, where asking for each file would take minutes on a network drive
    absent = [name for name in names if name not in present and not (folder / name).is_file()]
    if absent:
        raise InputError(f"{len(absent)} of {len(names)} images that {path} lists are not in {folder}, first {absent[0]}: put them there or take them out")


def _objects(entries: list[dict], images: dict, categories: dict, *, path: Path, has_masks: bool) -> list[dict]:
    """The annotations, each of which is sound. InputError says how many are not, and what is wrong with the first."""
    problems = [(place, text) for place, entry in enumerate(entries) if (text := _problem(entry, images, categories, has_masks=has_masks))]
    if problems:
        place, text = problems[0]
        key = entries[place].get("id", f"number {place}")
        raise InputError(f"{path}: {len(problems)} of {len(entries)} annotations cannot be used, first that with id {key}: {text}")
    if not entries:
        raise InputError(f"{path} has no objects at all: its list 'annotations' is empty")
    return entries


def _problem(entry: dict, images: dict, categories: dict, *, has_masks: bool) -> str | None:
    """What is wrong with an annotation, and what to do; None where nothing is."""
    image = images.get(entry.get("image_id")) if isinstance(entry.get("image_id"), int) else None
    if image is None:
        return f"image_id {entry.get('image_id')} is not among the images: add the image or remove the annotation"
    if not isinstance(entry.get("category_id"), int) or entry["category_id"] not in categories:
        known = ", ".join(map(str, list(categories)[:10]))
        return f"category_id {entry.get('category_id')} is not among the categories ({known}{', ...' if len(categories) > 10 else ''}): add it or correct it"
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(one, int | float) and math.isfinite(one) for one in box)):
        return f"bbox is {json.dumps(box)}, it must be [x, y, width, height] in pixels"
    (x, y, width, height), image_size = box, (image["width"], image["height"])
    if min(x, y, width, height) < -TOLERANCE or x + width > image_size[0] + TOLERANCE or y + height > image_size[1] + TOLERANCE:
        return f"bbox {box} lies outside its image {image.get('file_name')}, {image_size[0]}x{image_size[1]}: clip it (it must be [x, y, width, height])"
    return _segmentation_problem(entry.get("segmentation"), image) if has_masks else None


def _segmentation_problem(segmentation, image: dict) -> str | None:
    is_rle = isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list | str)
    if is_rle and segmentation.get("size") != [image["height"], image["width"]]:
        return f"its run-length encoded mask has size {segmentation.get('size')}, its image [{image['height']}, {image['width']}] (height, width)"
    is_polygons = isinstance(segmentation, list) and bool(segmentation)
    if is_polygons and not all(isinstance(one, list) and len(one) >= 6 and len(one) % 2 == 0 for one in segmentation):
        return "a polygon of its segmentation is no list of at least three points [x1, y1, x2, y2, x3, y3, ...]"
    if not is_rle and not is_polygons:
        return "it has no segmentation, polygons or run-length encoded: add one, or train a detector without masks"
    return None
