"""What a segmenter finds in pictures, as label images and as colours over the picture."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from features import pictures
from loading.sized import normalised, to_size, written
from run.errors import InputError
from segmentation.batches import tested_size
from segmentation.evaluation import predicted
from segmentation.networks import IGNORED
from segmentation.saved import Saved

OPACITY = 0.5  # of the colours over a picture


def find_labels(net: nn.Module, path: str, max_size: tuple[int, int], device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """The picture in a file (H, W, 3), and the number of the most probable class of each of its pixels (H, W). DamagedImage where it cannot be read,
    InputError where the network gives no finite numbers."""
    picture = pictures.read_picture(path)
    return picture, labelled(net, picture, max_size, device, where=path)


@torch.inference_mode()
def labelled(net: nn.Module, picture: np.ndarray, max_size: tuple[int, int], device: torch.device, *, where: str) -> np.ndarray:
    """The labels of a picture (H, W, 3) from the file `where`, as `find_labels` gives them."""
    original_size = tuple(picture.shape[:2])
    size = tested_size(*original_size, max_size)
    logits = net(normalised(written([to_size(picture, size)], size).to(device), [size]))
    if not logits.isfinite().all():
        raise InputError(f"{where}: the network's output is not finite; its training has diverged or the checkpoint is damaged: use an earlier one")
    return predicted(logits, size, original_size).cpu().numpy()


def shares(labels: np.ndarray, num_classes: int) -> Iterator[tuple[int, float]]:
    """(class, part of the pixels) of the classes that occur, the largest first."""
    counts = np.bincount(labels.reshape(-1), minlength=num_classes)
    for index in np.argsort(-counts, kind="stable").tolist():
        if counts[index]:
            yield index, float(counts[index] / labels.size)


def label_image(labels: np.ndarray, saved: Saved) -> Image.Image:
    """A label image as the segmenter's data has them: of 8 bits with its colours for a palette, or of 16 where there are more classes."""
    values = labels + (1 if saved.skips_zero else 0)
    highest = len(saved.classes) - 1 + saved.skips_zero
    if highest >= np.iinfo(np.uint8).max:
        return Image.fromarray(values.astype(np.uint16))
    image = Image.fromarray(values.astype(np.uint8))
    palette = np.zeros((256, 3), np.uint8)
    palette[int(saved.skips_zero) : highest + 1] = saved.classes.palette
    image.putpalette(palette.tobytes())
    return image


def overlay(picture: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, the picture under the colours (C, 3) of its labels; as it is where these are `IGNORED`."""
    painted = (picture * (1 - OPACITY) + palette[labels] * OPACITY + 0.5).astype(np.uint8)
    return np.where((labels == IGNORED)[..., None], picture, painted)


# ---- what predict.py does with it

COLUMNS = ("file", "class", "share", "index")


def show_shares(path: str, found: list[tuple[str, float, int]]) -> None:
    """Print the classes of a picture, each with its part of the pixels."""
    print(os.fsencode(path).decode(errors="replace"))
    for name, share, _ in found:
        print(f"  {100 * share:6.2f} %  {name}")


def share_rows(path: str, found: list[tuple[str, float, int]]) -> Iterator[tuple]:
    """The rows, of `COLUMNS`, that tell the classes of a picture."""
    return ((path, name, f"{share:.6f}", index) for name, share, index in found)


def look(saved: Saved, net: nn.Module, device: torch.device, file: str) -> tuple[list[tuple[str, float, int]], Callable[[], tuple]]:
    """The classes of a picture, each with its part of the pixels and its number, and a function for the overlay and the label image."""
    picture, labels = find_labels(net, file, saved.max_size, device)
    found = [(saved.classes.names[index], share, index) for index, share in shares(labels, len(saved.classes))]
    return found, lambda: (overlay(picture, labels, saved.classes.palette), label_image(labels, saved))


def predict_files(saved: Saved, files: list[str], device: torch.device, *, out: Path | None, write: Callable) -> int:
    """Hand every picture's classes to `write`, and with `out` write label image and overlay there; see `features.pictures.predict_files`."""
    return pictures.predict_files(functools.partial(look, saved, saved.net.to(device), device), files, out=out, write=write)
