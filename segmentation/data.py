"""Pairs of pictures and label images, in ADE20K's layout or any two folders whose files have the same names but for their endings.

A label image has one channel whose values are numbers of classes, of 8 or 16 bits, or a palette that they point into. Its highest value,
255 or 65535, marks pixels to be ignored; where `skips_zero`, as in ADE20K, so does 0, and class k has the value k + 1."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from loading.decoding import Encoded
from loading.images import UNREADABLE, Names, damaged, is_image_name
from loading.sized import opened
from run.errors import InputError
from segmentation.classes import MAX_CLASSES, Classes
from segmentation.networks import IGNORED
from sources.progress import Progress
from utils import Rank, log, max_over_processes

LABEL_ENDINGS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")  # of formats that keep numbers as they are
_DTYPE_OF_MODE = {"1": np.uint8, "L": np.uint8, "P": np.uint8, "I;16": np.uint16, "I;16B": np.uint16, "I;16L": np.uint16, "I;16N": np.uint16}


def read_values(path: str) -> np.ndarray:
    """The values (H, W) of a label image, uint8 or uint16. DamagedImage where it cannot be read, InputError where it holds no numbers of classes."""
    try:
        with Image.open(path) as image:
            dtype = _DTYPE_OF_MODE.get(image.mode)
            if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, as older Pillow gives them
                dtype = np.uint16
            if dtype is None:
                raise InputError(
                    f"{path} is no label image, its pixels are {image.mode}: it needs one channel of 8 or 16 bits whose values are numbers of classes; "
                    "convert colours into such numbers"
                )
            return np.asarray(image).astype(dtype)
    except UNREADABLE as error:
        if isinstance(error, InputError):
            raise
        raise damaged(path, error) from error


def to_labels(values: np.ndarray, *, skips_zero: bool) -> np.ndarray:
    """Labels (H, W) int32 of a label image's `values`: numbers of classes, or `IGNORED`."""
    labels = values.astype(np.int32) - (1 if skips_zero else 0)
    labels[values == np.iinfo(values.dtype).max] = IGNORED
    return labels  # 0 is IGNORED by now where it is skipped


@dataclass(frozen=True)
class SegData:
    """Pictures and label images of one split, in the order of their names."""

    image_folder: Path
    label_folder: Path
    image_names: Names
    label_names: Names
    classes: Classes
    skips_zero: bool

    def __len__(self) -> int:
        return len(self.image_names)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes by number."""
        return self.classes.names

    def image_file(self, index: int) -> str:
        """Path of a picture."""
        return str(self.image_folder / self.image_names[index])

    def label_file(self, index: int) -> str:
        """Path of a label image."""
        return str(self.label_folder / self.label_names[index])

    def labels(self, index: int) -> np.ndarray:
        """(H, W) int32 numbers of classes, or `IGNORED`. InputError naming the file where a value belongs to no class."""
        path = self.label_file(index)
        labels = to_labels(read_values(path), skips_zero=self.skips_zero)
        if labels.size and labels.max() >= len(self.classes):
            value = int(labels.max()) + self.skips_zero
            raise InputError(
                f"{path} has pixels of value {value}, beyond the {len(self.classes)} classes (values {int(self.skips_zero)} to "
                f"{len(self.classes) - 1 + self.skips_zero}): correct the file, or --classes, --num-classes or --reduce-zero-label"
            )
        return labels

    def read(self, index: int) -> tuple[Encoded | np.ndarray, np.ndarray]:
        """A picture (H, W, 3) uint8, and its labels (H, W) int32; InputError where their sizes differ."""
        image, labels = opened(self.image_file(index)), self.labels(index)
        if image.shape[:2] != labels.shape:
            sizes = [f"{width}x{height}" for height, width in (labels.shape, image.shape[:2])]
            raise InputError(f"{self.label_file(index)} is {sizes[0]} pixels, its picture {self.image_file(index)} {sizes[1]}: make them the same size")
        return image, labels


def _listed(folder: Path, is_wanted: Callable[[str], bool], *, what: str) -> dict[str, str]:
    """Names of the files below `folder` that are wanted, with their folders, by the name without its ending."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: it must hold the {what}")
    found = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.relpath(os.path.join(parent, name), folder)
            stem = os.path.splitext(path)[0]
            if not is_wanted(name):
                continue
            if stem in found:
                raise InputError(f"{folder} holds both {found[stem]} and {path}: each of the {what} needs a name of its own; remove one of the two")
            found[stem] = path
    if not found:
        raise InputError(f"{folder} holds none of the {what}: check the path")
    return found


def _is_label_name(name: str) -> bool:
    return name.lower().endswith(LABEL_ENDINGS) and not name.startswith(".")


def pairs(image_folder: str | Path, label_folder: str | Path) -> tuple[Path, Path, Names, Names]:
    """The two folders, and the names of pictures and label images in them, in the same order. InputError where one has no partner."""
    image_folder, label_folder = Path(image_folder).expanduser(), Path(label_folder).expanduser()
    images = _listed(image_folder, is_image_name, what="pictures")
    labels = _listed(label_folder, _is_label_name, what=f"label images ({', '.join(LABEL_ENDINGS)})")
    for own, other, folder, what, where in (
        (images, labels, image_folder, "pictures", label_folder),
        (labels, images, label_folder, "label images", image_folder),
    ):
        alone = sorted(own.keys() - other.keys())
        if alone:
            partner = "label image" if own is images else "picture"
            raise InputError(
                f"{len(alone)} of {len(own)} {what} in {folder} have no {partner} of that name in {where}, first {own[alone[0]]}: add it, or remove the {what}"
            )
    stems = sorted(images)
    return image_folder, label_folder, Names(images[stem] for stem in stems), Names(labels[stem] for stem in stems)


def read(image_folder: str | Path, label_folder: str | Path, classes: Classes, *, skips_zero: bool) -> SegData:
    """The split of pictures in the one folder and label images in the other. InputError where there are none, or one has no partner."""
    return SegData(*pairs(image_folder, label_folder), classes, skips_zero)


def find_num_classes(folders: list[tuple[str | Path, str | Path]], rank: Rank, *, skips_zero: bool) -> int:
    """One more than the highest label of all label images of the splits `folders`, each read by one of the processes, with a warning that
    only what occurs is found. InputError where they hold no label at all."""
    files = []
    for image_folder, label_folder in folders:
        _, label_folder, _, label_names = pairs(image_folder, label_folder)
        files += [str(label_folder / name) for name in label_names]
    own = files[rank.index :: rank.world_size]
    highest, progress = IGNORED, Progress(len(own), log.info, what="label images")
    for path in own:
        highest = max(highest, int(to_labels(read_values(path), skips_zero=skips_zero).max(initial=IGNORED)))
        progress.add()
    (highest,) = max_over_processes([highest], rank)
    found = int(highest) + 1
    if found > MAX_CLASSES:
        raise InputError(f"the label images have values up to {found - 1 + skips_zero}, and at most {MAX_CLASSES} classes are possible: check them")
    if found < 1:
        raise InputError(f"none of the {len(files)} label images, first {files[0]}, has a pixel with a class: check them, and --reduce-zero-label")
    log.warning(
        "%d classes, from the highest value in %d label images: give --num-classes or --classes if there are more, or if it is a mistake", found, len(files)
    )
    return found
