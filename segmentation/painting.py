"""What a segmenter finds in pictures, as label images and as colours over the picture."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from deployment.prediction import Report
from loading import decoding
from loading.sized import normalised, opened, to_size, written
from run.disk import writing
from run.errors import DamagedImage, InputError, first_line
from segmentation.batches import tested_size
from segmentation.evaluation import predicted
from segmentation.saved import Saved

OPACITY = 0.5  # of the colours over a picture


@torch.inference_mode()
def find_labels(net: nn.Module, path: str, max_size: tuple[int, int], device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """The picture in a file (H, W, 3), and the number of the most probable class of each of its pixels (H, W). DamagedImage where it cannot be read,
    InputError where the network gives no finite numbers."""
    image = opened(path)
    original_size = tuple(image.shape[:2])
    picture = decoding.top(image, original_size[0])
    size = tested_size(*original_size, max_size)
    logits = net(normalised(written([to_size(picture, size)], size).to(device), [size]))
    if not logits.isfinite().all():
        raise InputError(f"{path}: the network's output is not finite; its training has diverged or the checkpoint is damaged: use an earlier one")
    return picture, predicted(logits, size, original_size).cpu().numpy()


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
    """(H, W, 3) uint8, the picture under the colours (C, 3) of its labels."""
    return (picture * (1 - OPACITY) + palette[labels] * OPACITY + 0.5).astype(np.uint8)


def targets(files: list[str], out: Path) -> list[Path]:
    """Where the label image of each picture goes: below `out` as the pictures lie below the folder that all are in. InputError where two would be one."""
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    found = [out / Path(os.path.relpath(os.path.abspath(file), root)).with_suffix(".png") for file in files]
    taken: dict[Path, str] = {}
    for file, target in zip(files, found, strict=True):
        if target in taken:
            raise InputError(f"{file} and {taken[target]} would both be {target}: give them apart, each with an --out of its own")
        taken[target] = file
    return found


def write_images(target: Path, picture: np.ndarray, labels: np.ndarray, saved: Saved) -> None:
    """Write the label image `target` and, beside it with `_overlay.jpg` for its ending, the picture with its colours."""
    with writing(f"--out {target.parent}", "choose another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        label_image(labels, saved).save(target)
        Image.fromarray(overlay(picture, labels, saved.classes.palette)).save(target.with_name(f"{target.stem}_overlay.jpg"), quality=90)


SHEET_ENDINGS = (".png", ".jpg", ".jpeg")  # of an --out that is one sheet for all pictures
COLUMNS_OF_SHEET = 4


def sheet(views: list[np.ndarray]) -> Image.Image:
    """Views (H, W, 3) of several sizes in rows of four, white between them."""
    gap = 4
    height, width = (max(view.shape[side] for view in views) + gap for side in (0, 1))
    columns = min(COLUMNS_OF_SHEET, len(views))
    whole = np.full((-(-len(views) // columns) * height - gap, columns * width - gap, 3), 255, np.uint8)
    for i, view in enumerate(views):
        top, left = i // columns * height, i % columns * width
        whole[top : top + view.shape[0], left : left + view.shape[1]] = view
    return Image.fromarray(whole)


class Painter:
    """Where what is seen goes: into a folder, as label images and overlays, or as overlays on one sheet, written once all are there."""

    def __init__(self, saved: Saved, files: list[str], out: Path):
        self.saved, self.out, self.views = saved, out, []
        self.is_sheet = out.suffix.lower() in SHEET_ENDINGS
        self.targets = {} if self.is_sheet else dict(zip(files, targets(files, out), strict=True))

    def add(self, file: str, picture: np.ndarray, labels: np.ndarray) -> None:
        """Write what was found in a picture (H, W, 3), or keep it for the sheet."""
        if self.is_sheet:
            self.views.append(overlay(picture, labels, self.saved.classes.palette))
        else:
            write_images(self.targets[file], picture, labels, self.saved)

    def end(self) -> None:
        """Write the sheet, if that is what is asked for; as PNG in 256 colours."""
        if self.is_sheet and self.views:
            whole = sheet(self.views)
            with writing(f"--out {self.out}", "choose another place"):
                self.out.parent.mkdir(parents=True, exist_ok=True)
                (whole.quantize(256) if self.out.suffix.lower() == ".png" else whole).save(self.out)


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


def predict_files(saved: Saved, files: list[str], device: torch.device, *, out: Path | None, write: Callable) -> int:
    """Hand every picture's classes, each with its part of the pixels and its number, to `write`, and with `out` write label image and overlay there;
    how many pictures could be read. InputError where none could."""
    painter = Painter(saved, files, out) if out is not None else None
    net, report = saved.net.to(device), Report(len(files))
    for file in files:
        try:
            picture, labels = find_labels(net, file, saved.max_size, device)
        except DamagedImage as error:
            report.add(first_line(error))
            continue
        if painter is not None:
            painter.add(file, picture, labels)
        write(file, [(saved.classes.names[index], share, index) for index, share in shares(labels, len(saved.classes))])
        report.add(None)
    if painter is not None:
        painter.end()
    return report.end()
