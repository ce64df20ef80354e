"""The sets of images that a network is tried on, as they lie at the paths that are given; what of them is missing.

A folder holds a folder per class, named as the network's classes are, by WordNet ids for ImageNet's, or, in ImageNet-V2, by their numbers."""

import copy
import functools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo

import datasets
from loading.images import Images, open_sample, read_sample
from robustness.scores import ALEXNET, CLEAN, CORRUPTIONS, SEVERITIES
from run.config import Config
from run.errors import InputError
from sources.folders import class_folders
from utils import log

V2_VARIANTS = {"matched-frequency": "matched-frequency", "threshold0.7": "threshold-?0.7", "top-images": "top-images"}  # names, and what folders have in theirs
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True)
class TestSet:
    """Images whose `targets` are their places in the set, and what is true of them.

    `truth` (N, K): numbers of the classes that are right for each image, -1 where there are fewer than K; `kept`: the classes that the
    network chooses among, None for all; `num_classes`: how many of these there are images of."""

    __test__ = False  # no test of pytest's

    name: str
    path: str
    images: Images
    truth: np.ndarray
    kept: list[int] | None
    num_classes: int


@dataclass(frozen=True)
class Corrupted:
    """The folders of corrupted images, by corruption and severity; `relative_to`: what their errors are (`scores.ALEXNET` or `CLEAN`)."""

    name: str
    path: str
    folders: dict[str, dict[int, Path]]
    relative_to: str

    @property
    def missing(self) -> dict[str, list[int]]:
        """The severities that each corruption lacks, of those that lack any."""
        lacking = {name: [severity for severity in SEVERITIES if severity not in self.folders.get(name, {})] for name in CORRUPTIONS}
        return {name: severities for name, severities in lacking.items() if severities}


@dataclass(frozen=True)
class Suite:
    """All that a network is to be tried on: the usual validation images, the sets, the corruptions. Any may be missing."""

    classes: list[str]
    clean: Images | None
    sets: list[TestSet]
    corrupted: Corrupted | None


def open_suite(cfg: Config) -> Suite:
    """What the settings of an evaluation ask for. InputError where a path holds something else, or a set is of other classes than the network."""
    clean = datasets.open_images(cfg)[1] if cfg.has_validation else None
    classes = imagenet_classes() if clean is None else clean.classes
    named = [
        (cfg.ina_path, lambda path: _open_restricted("ImageNet-A", "--ina-path", path, classes, "imagenet_a_indices.txt")),
        (cfg.inr_path, lambda path: _open_restricted("ImageNet-R", "--inr-path", path, classes, "imagenet_r_indices.txt")),
        (cfg.insk_path, lambda path: _open_set("ImageNet-Sketch", "--insk-path", path, classes, imagenet_classes())),
    ]
    sets = [opened(path) for path, opened in named if path]
    sets += _open_v2(cfg.inv2_path, classes) if cfg.inv2_path else []
    sets += [_open_real(cfg, clean)] if cfg.real_labels else []
    if cfg.exif_transpose:
        sets = [replace(one, images=one.images.turned()) for one in sets]
    return Suite(classes, clean, sets, open_corrupted(cfg.inc_path, classes) if cfg.inc_path else None)


# ---- classes


@functools.cache
def imagenet_classes() -> list[str]:
    """The WordNet ids of ImageNet's 1000 classes, in order."""
    return ImageNetInfo("imagenet-1k").label_names()


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether these are ImageNet's 1000 classes, by their WordNet ids or by other names that are taken to stand in their order."""
    return len(classes) == 1000 and (list(classes) == imagenet_classes() or not any(re.fullmatch(r"n\d{8}", name) for name in classes))


def readable_classes(classes: Sequence[str]) -> list[str]:
    """The classes' names for people, no two alike: ImageNet's folders with their first word."""
    info = ImageNetInfo("imagenet-1k")
    words = dict(zip(info.label_names(), info.label_descriptions(), strict=True))
    return [f"{words[name].partition(',')[0]} ({name})" if name in words else name for name in classes]


def _numbers(classes: Sequence[str]) -> dict[str, int]:
    """The network's number of each class that a folder may be named after."""
    names = {name: i for i, name in enumerate(imagenet_classes())} if is_imagenet(classes) else {}
    return {**names, **{name: i for i, name in enumerate(classes)}}


def _require_imagenet(name: str, flag: str, classes: Sequence[str]) -> None:
    if not is_imagenet(classes):
        raise InputError(f"{flag}: {name} is for networks of ImageNet's 1000 classes, and this one has {len(classes)} others: drop it")


# ---- folders of classes


def by_place(images: Images) -> Images:
    """The same images with their places as targets, so that batches tell which image is which."""
    found = copy.copy(images)
    found.targets = np.arange(len(images), dtype=np.int32)
    return found


def single_truth(images: Images) -> np.ndarray:
    """The one right class of each image, (N, 1)."""
    return images.targets.astype(np.int64)[:, None]


def _open_folder(flag: str, path: Path, numbers: dict[str, int]) -> Images:
    """The images in class folders with the network's numbers. InputError where a folder is named after no class in `numbers`."""
    if not path.is_dir():
        raise InputError(f"{flag} {path} is no folder: name one that holds a folder of images per class")
    part = class_folders(path)
    _require_known(flag, path, part.classes, numbers)
    order = np.array([numbers[name] for name in part.classes], np.int32)
    return Images(part.samples, order[part.labels], part.classes, open_sample, read_sample)


def _require_known(flag: str, path: Path, names: Sequence[str], numbers: dict[str, int]) -> None:
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise InputError(
            f"{flag} {path}: {len(unknown)} of its {len(names)} folders, such as {', '.join(unknown[:3])}, are named after none of the {len(numbers)} classes "
            f"there are, such as {', '.join(list(numbers)[:3])}: name the folder of the class folders"
        )


def _open_set(name: str, flag: str, path: str, classes: Sequence[str], among: Sequence[str], kept: list[int] | None = None) -> TestSet:
    """A set for networks of ImageNet's classes, with folders named after those in `among`."""
    _require_imagenet(name, flag, classes)
    numbers = _numbers(classes)
    return _as_set(name, path, _open_folder(flag, Path(path).expanduser(), {one: numbers[one] for one in among}), len(among), kept)


def _as_set(name: str, path: str, images: Images, num_expected: int, kept: list[int] | None = None) -> TestSet:
    num_classes = len(images.classes)
    if num_classes < num_expected:
        log.warning("%s: %s holds images of %d of its %d classes: accuracy is that on these", name, path, num_classes, num_expected)
    return TestSet(name, path, by_place(images), single_truth(images), kept, num_classes)


def _open_restricted(name: str, flag: str, path: str, classes: Sequence[str], file: str) -> TestSet:
    """A set of 200 of ImageNet's classes, among which alone the network is to choose; `file` is timm's list of them."""
    text = (resources.files("timm") / "data" / "_info" / file).read_text()
    kept = [int(line) for line in text.split()]
    return _open_set(name, flag, path, classes, [imagenet_classes()[i] for i in kept], kept)


def _open_v2(path: str, classes: Sequence[str]) -> list[TestSet]:
    """The variants of ImageNet-V2 in a folder, or the one that the folder is. Its class folders are numbered."""
    _require_imagenet("ImageNet-V2", "--inv2-path", classes)
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"--inv2-path {path} is no folder: name that of ImageNet-V2, or of one of its variants")
    numbers = {**_numbers(classes), **{str(i): i for i in range(1000)}}
    variants = {name: [one for one in sorted(root.iterdir()) if one.is_dir() and re.search(pattern, one.name)] for name, pattern in V2_VARIANTS.items()}
    found = [(f"ImageNet-V2 {name}", one) for name, folders in variants.items() for one in folders]
    if not found:
        own = next((f" {name}" for name, pattern in V2_VARIANTS.items() if re.search(pattern, root.name)), "")
        found = [(f"ImageNet-V2{own}", root)]
    if len({name for name, _ in found}) < len(found):
        raise InputError(f"--inv2-path {path} holds a variant twice ({', '.join(one.name for _, one in found)}): leave one of each")
    return [_as_set(name, str(folder), _open_folder("--inv2-path", folder, numbers), 1000) for name, folder in found]


# ---- ReaL


def _read_real(file: str) -> list[list[int]]:
    """The labels of each of ImageNet's validation images, in order. InputError where a file is no such list."""
    path = resources.files("timm") / "data" / "_info" / "imagenet_real_labels.json" if file == "timm" else Path(file).expanduser()
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--real-labels {file} cannot be read ({error.strerror}): name the JSON file of ReaL's labels, or none for timm's") from error
    except ValueError as error:
        raise InputError(f"--real-labels {file} is not JSON ({error}): name the JSON file of ReaL's labels, or none for timm's") from error
    if not isinstance(labels, list) or not all(isinstance(one, list) and all(isinstance(i, int) and 0 <= i < 1000 for i in one) for one in labels):
        raise InputError(f"--real-labels {file} must be a list of lists of class numbers from 0 to 999, one for each of the validation images")
    return labels


def _open_real(cfg: Config, images: Images) -> TestSet:
    """The validation images with the labels of ReaL (arXiv:2006.07159), without those that have none there."""
    _require_imagenet("ReaL", "--real-labels", images.classes)
    labels = _read_real(cfg.real_labels)
    matches = [VALIDATION_NAME.search(str(sample).rpartition("/")[2]) for sample in images.samples]
    if None in matches:
        name = str(images.samples[matches.index(None)])
        raise InputError(
            f"--real-labels: {matches.count(None)} of {len(matches)} validation images, such as {name}, are not named like ILSVRC2012_val_00000001.JPEG, "
            "by which ReaL knows them: restore the names, or drop the flag"
        )
    numbers = [int(match[1]) for match in matches]
    if max(numbers) > len(labels) or min(numbers) < 1:
        raise InputError(f"--real-labels {cfg.real_labels} has labels for {len(labels)} images, and there is one of number {max(numbers)}: take all of them")
    found = [labels[number - 1] for number in numbers]
    labelled = [i for i, one in enumerate(found) if one]
    if not labelled:
        raise InputError(f"--real-labels: none of the {len(images)} validation images has a label there: measure more of them")
    truth = np.full((len(labelled), max(len(one) for one in found)), -1, np.int64)
    for row, i in enumerate(labelled):
        truth[row, : len(found[i])] = found[i]
    log.info("ImageNet-ReaL: %d of %d validation images have labels", len(labelled), len(images))
    return TestSet("ImageNet-ReaL", cfg.data_path, by_place(images.part(labelled)), truth, None, len(np.unique(truth[truth >= 0])))


# ---- corruptions


def open_corrupted(path: str, classes: Sequence[str]) -> Corrupted:
    """The corruptions and severities in a folder; says what it lacks. InputError where there are none, or they are of other classes."""
    root = Path(path).expanduser()
    folders = {name: {severity: root / name / str(severity) for severity in SEVERITIES if (root / name / str(severity)).is_dir()} for name in CORRUPTIONS}
    folders = {name: found for name, found in folders.items() if found}
    if not folders:
        raise InputError(f"--inc-path {path} holds none of the folders <corruption>/<1 to 5>, such as fog/3: name the folder in which they lie")
    numbers = _numbers(classes)
    seen = set()
    for folder in [folder for found in folders.values() for folder in found.values()]:  # now, and not after an hour
        names = sorted(one.name for one in os.scandir(folder) if one.is_dir() and not one.name.startswith("."))
        _require_known("--inc-path", folder, names, numbers)
        seen |= {numbers[name] for name in names}
    if len(seen) < len(classes):
        log.warning("--inc-path %s holds images of %d of the %d classes: accuracy is that on these", path, len(seen), len(classes))
    imagenet = is_imagenet(classes)
    corrupted = Corrupted("ImageNet-C" if imagenet else "corrupted images", path, folders, ALEXNET if imagenet else CLEAN)
    if corrupted.missing:
        log.warning("--inc-path %s lacks %s: there will be no mCE", path, describe_missing(corrupted.missing))
    others = sorted(one.name for one in root.iterdir() if one.is_dir() and one.name not in CORRUPTIONS and not one.name.startswith("."))
    if others:
        log.info("--inc-path %s: %s are none of the fifteen corruptions and are passed over", path, ", ".join(others))
    return corrupted


def describe_missing(missing: dict[str, Sequence[int]]) -> str:
    """`snow; fog 4 5`, of the corruptions' missing severities."""
    return "; ".join(name if len(lacking) == len(SEVERITIES) else f"{name} {' '.join(map(str, lacking))}" for name, lacking in missing.items())


def open_severity(corrupted: Corrupted, corruption: str, severity: int, classes: Sequence[str]) -> Images:
    """The images of a corruption at a severity, with the network's numbers."""
    return _open_folder("--inc-path", corrupted.folders[corruption][severity], _numbers(classes))
