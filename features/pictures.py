"""Looking at pictures with a trained network: made colours, where overlays go, one sheet of them, and the loop of predict.py over files."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from deployment.prediction import Report
from loading import decoding
from loading.sized import opened
from run.disk import writing
from run.errors import DamagedImage, InputError, first_line

OVERLAY = "_overlay.jpg"  # ending of a picture with what was found over it
SHEET_ENDINGS = (".png", ".jpg", ".jpeg")  # of an --out that is one sheet for all pictures
COLUMNS_OF_SHEET = 4


def made_palette(num_classes: int) -> np.ndarray:
    """(num_classes, 3) uint8 colours, far apart for neighbours: each channel goes round 255 in a large step of its own."""
    steps = np.array([2**25 - 1, 2**15 - 1, 2**21 - 1], np.int64)
    return (np.arange(1, num_classes + 1)[:, None] * steps % 255).astype(np.uint8)


def read_picture(path: str, *, turns: bool = True) -> np.ndarray:
    """The picture in a file (H, W, 3), uint8, turned as its EXIF orientation says, unless it is to be as it lies. DamagedImage where it cannot be read."""
    image = opened(path, turns=turns)
    return decoding.top(image, image.shape[0])


def targets(files: list[str], out: Path) -> list[Path]:
    """Where what is seen in each picture goes: below `out` as the pictures lie below the folder that all are in, with `.png` for their ending.

    InputError where two would be one."""
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    found = [out / Path(os.path.relpath(os.path.abspath(file), root)).with_suffix(".png") for file in files]
    taken: dict[Path, str] = {}
    for file, target in zip(files, found, strict=True):
        if target in taken:
            raise InputError(f"{file} and {taken[target]} would both be {target}: give them apart, each with an --out of its own")
        taken[target] = file
    return found


def write_images(target: Path, overlay: np.ndarray, labels: Image.Image | None) -> None:
    """Write the overlay (H, W, 3) beside `target`, with `_overlay.jpg` for its ending, and the label image there, if there is one."""
    with writing(f"--out {target.parent}", "choose another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if labels is not None:
            labels.save(target)
        Image.fromarray(overlay).save(target.with_name(f"{target.stem}{OVERLAY}"), quality=90)


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
    """Where what is seen goes: into a folder, a picture at a time, or as overlays on one sheet, written once all are there."""

    def __init__(self, files: list[str], out: Path):
        self.out, self.views = out, []
        self.is_sheet = out.suffix.lower() in SHEET_ENDINGS
        self.targets = {} if self.is_sheet else dict(zip(files, targets(files, out), strict=True))

    def add(self, file: str, overlay: np.ndarray, labels: Image.Image | None = None) -> None:
        """Write what was found in a picture, or keep its overlay (H, W, 3) for the sheet."""
        if self.is_sheet:
            self.views.append(overlay)
        else:
            write_images(self.targets[file], overlay, labels)

    def end(self) -> None:
        """Write the sheet, if that is what is asked for; as PNG in 256 colours."""
        if self.is_sheet and self.views:
            whole = sheet(self.views)
            with writing(f"--out {self.out}", "choose another place"):
                self.out.parent.mkdir(parents=True, exist_ok=True)
                (whole.quantize(256) if self.out.suffix.lower() == ".png" else whole).save(self.out)


def predict_files(look: Callable[[str], tuple[list, Callable[[], tuple]]], files: list[str], *, out: Path | None, write: Callable[[str, list], None]) -> int:
    """Hand what `look` finds in every picture to `write`, and with `out` its overlay there; how many pictures could be read. InputError where none could.

    `look` gives what it found, and a function for the overlay (H, W, 3) and the label image, or None; DamagedImage where there is no picture."""
    painter = Painter(files, out) if out is not None else None
    report = Report(len(files))
    for file in files:
        try:
            found, draw = look(file)
        except DamagedImage as error:
            report.add(first_line(error))
            continue
        if painter is not None:
            painter.add(file, *draw())
        write(file, found)
        report.add(None)
    if painter is not None:
        painter.end()
    return report.end()
