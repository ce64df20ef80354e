"""What a detector finds in pictures: in words, and as boxes and masks over the picture."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from detection.networks import pasted, restored
from detection.saved import Saved
from features import pictures
from loading.sized import fitted, normalised, padded, to_size, written
from run.errors import InputError

MIN_SCORE = 0.5  # of what is told and drawn, unless another is asked for
OPACITY = 0.5  # of masks over a picture
LINE_PART = 400  # of the picture's long side, the width of a box's lines is one


class Find(NamedTuple):
    """An object found: its class by name and number, its score, and its box x1, y1, x2, y2 in pixels of the picture."""

    name: str
    index: int
    score: float
    box: tuple[float, ...]


def find_objects(
    net: nn.Module, path: str, max_size: tuple[int, int], device: torch.device, *, min_score: float = MIN_SCORE
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """The picture in a file (H, W, 3), and the objects found in it with that score or a higher one, best first, in its own pixels, as
    `detection.networks.restored` gives them, on the CPU. DamagedImage where the picture cannot be read."""
    picture = pictures.read_picture(path)
    return picture, found_in(net, picture, max_size, device, min_score=min_score)


@torch.inference_mode()
def found_in(net: nn.Module, picture: np.ndarray, max_size: tuple[int, int], device: torch.device, *, min_score: float = MIN_SCORE) -> dict[str, Tensor]:
    """The objects in a picture (H, W, 3), as `find_objects` gives them."""
    size = fitted(*picture.shape[:2], max_size)
    image = normalised(written([to_size(picture, size)], padded([size])).to(device), [size])
    (found,) = net(image, [size])
    found = {name: value[found["scores"] >= min_score].cpu() for name, value in found.items()}
    return restored(found, size, picture.shape[:2])


def overlay(picture: np.ndarray, found: dict[str, Tensor], class_names: list[str]) -> np.ndarray:
    """(H, W, 3) uint8, the picture (H, W, 3) with each object's box and class, its score and its mask where there are such, in its class's colour."""
    colours = [tuple(colour) for colour in pictures.made_palette(len(class_names)).tolist()]
    image = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
    order = range(len(found["labels"]) - 1, -1, -1)  # the best one last, on top
    own = [colours[label] for label in found["labels"].tolist()]
    masks = list(pasted(found, picture.shape[:2])) if "masks" in found else []
    for i in order if masks else ():
        image = draw_segmentation_masks(image, masks[i], alpha=OPACITY, colors=[own[i]])
    if own:
        scores = [f" {score:.2f}" for score in found["scores"].tolist()] if "scores" in found else [""] * len(own)
        texts = [f"{class_names[label]}{score}" for label, score in zip(found["labels"].tolist(), scores, strict=True)]
        width = max(1, round(max(picture.shape[:2]) / LINE_PART))
        places = list(order)
        labels = {"labels": [texts[i] for i in places], "label_colors": "white", "label_background_colors": "black", "fill_labels": True}
        image = draw_bounding_boxes(image, found["boxes"][places], **labels, colors=[own[i] for i in places], width=width)
    return image.permute(1, 2, 0).contiguous().numpy()


# ---- what predict.py does with it

COLUMNS = ("file", "rank", "class", "score", "x1", "y1", "x2", "y2", "index")


def show_objects(path: str, found: list[Find]) -> None:
    """Print the objects of a picture, best first: class, score, and box from its upper left to its lower right corner."""
    print(os.fsencode(path).decode(errors="replace"))
    for one in found:
        x1, y1, x2, y2 = one.box
        print(f"  {100 * one.score:6.2f} %  {one.name}  box {x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f}")


def object_rows(path: str, found: list[Find]) -> Iterator[tuple]:
    """The rows, of `COLUMNS`, that tell the objects of a picture."""
    for rank, one in enumerate(found, 1):
        yield path, rank, one.name, f"{one.score:.6f}", *(f"{side:.2f}" for side in one.box), one.index


def look(saved: Saved, net: nn.Module, device: torch.device, min_score: float, file: str) -> tuple[list[Find], Callable[[], tuple]]:
    """The objects of a picture, and a function for the overlay, beside which there is no label image."""
    picture, found = find_objects(net, file, saved.max_size, device, min_score=min_score)
    labels, boxes = found["labels"].tolist(), found["boxes"].tolist()
    finds = [Find(saved.class_names[label], label, score, tuple(box)) for label, score, box in zip(labels, found["scores"].tolist(), boxes, strict=True)]
    return finds, lambda: (overlay(picture, found, saved.class_names), None)


def predict_files(saved: Saved, files: list[str], device: torch.device, *, min_score: float, out: Path | None, write: Callable) -> int:
    """Hand every picture's objects to `write`, and with `out` draw them there; see `features.pictures.predict_files`.

    InputError also where the network's weights are not finite: such a one would find nothing, and not say why."""
    if not all(value.isfinite().all() for value in saved.net.state_dict().values()):
        raise InputError("the detector's weights are not finite; its training has diverged or the checkpoint is damaged: use an earlier one")
    return pictures.predict_files(functools.partial(look, saved, saved.net.to(device), device, min_score), files, out=out, write=write)
