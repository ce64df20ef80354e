"""Built-in data sets and their splits: ImageNet's layouts (read by `sources`), CIFAR-100, iNaturalist, scikit-learn's digits."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR100

from loading.images import Images, Paths, open_file, read_file
from run.config import Config
from run.errors import InputError
from sources.finding import missing, open_splits
from sources.folders import class_folders
from sources.parts import settle


def open_folder(path: Path) -> Images:
    """Images in one sub-folder per class, classes in alphabetical order; InputError where there are none."""
    return settle(class_folders(path), None, None, splits=("train", "val"))[1][0]


def open_folders(cfg: Config, val_name: str = "val") -> tuple[Images | None, Images]:
    """Training and validation images at --data-path, whatever they lie in; no training images are fine for an evaluation."""
    root = cfg.data_path
    train, val = open_splits(cfg, val_name)
    if train is None and (val is None or not cfg.eval):
        raise missing(cfg, "train")
    if cfg.val_split is not None:
        if val is not None:
            raise InputError(f"--val-split holds images out of train/, but there are images of {val_name} at {root}: drop one of them")
        kept, held_out = stratified_split(train.targets, max(1, round(cfg.val_split * len(train))))
        train, val = train.part(kept), train.part(held_out)
    if val is None:
        raise InputError(f"--data-path {root} has no {val_name}/: add it, or hold out a tenth of train/ with --val-split 0.1")
    return train, val


def open_cifar(cfg: Config) -> tuple[Images, Images]:
    """CIFAR-100 from its local files."""
    try:
        parts = [CIFAR100(str(Path(cfg.data_path).expanduser()), train=is_training) for is_training in (True, False)]
    except (RuntimeError, OSError) as error:
        raise InputError(f"--data-path {cfg.data_path} holds no complete cifar-100-python/ ({error}): unpack cifar-100-python.tar.gz there") from error
    return tuple(Images(part.data, part.targets, part.classes, Image.fromarray) for part in parts)


def open_inat(cfg: Config, year: int) -> tuple[Images, Images]:
    """iNaturalist 2018 or 2019: images listed in train<year>.json and val<year>.json, classes from categories.json.

    Classes are the values of --inat-category, numbered as they first appear among the training annotations (as in DeiT)."""
    root = Path(cfg.data_path).expanduser()
    try:
        train, val, categories = (json.loads((root / name).read_text()) for name in (f"train{year}.json", f"val{year}.json", "categories.json"))
        labels = {entry.get("id", i): entry[cfg.inat_category] for i, entry in enumerate(categories)}
        classes = list(dict.fromkeys(labels[annotation["category_id"]] for annotation in train["annotations"]))
        return tuple(_inat_part(root, listing, labels, classes) for listing in (train, val))
    except (OSError, ValueError) as error:
        raise InputError(f"--data-path {root}: {error}; --data-set {cfg.data_set} needs train{year}.json, val{year}.json and categories.json there") from error
    except KeyError as error:
        raise InputError(f"--data-path {root}: the iNaturalist listings have no entry {error}; check --inat-category {cfg.inat_category}") from error


def _inat_part(root: Path, listing: dict, labels: dict, classes: list[str]) -> Images:
    files = {image["id"]: image["file_name"] for image in listing["images"]}
    index = {name: i for i, name in enumerate(classes)}
    samples = [_inat_path(root, files[annotation["image_id"]]) for annotation in listing["annotations"]]
    return Images(Paths(samples), [index[labels[annotation["category_id"]]] for annotation in listing["annotations"]], classes, open_file, read_file)


def _inat_path(root: Path, name: str) -> str:
    """Path of a listed image; published copies often leave out the second folder, the supercategory."""
    path = root / name
    if path.is_file() or name.count("/") < 3:
        return str(path)
    first, _, *rest = name.split("/")
    return str(Path(root, first, *rest))


def stratified_split(targets: list[int], num_held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a fixed split, (kept, held out), both sorted: every class gives the same share, up to rounding."""
    targets = np.asarray(targets)
    rng = np.random.RandomState(0)  # legacy generator: its stream never changes
    quantile = np.empty(len(targets))
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        quantile[members] = (rng.permutation(len(members)) + 0.5) / len(members)
    order = np.argsort(quantile, kind="stable")
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


DIGITS_HELD_OUT = 360


def load_digits() -> tuple[Images, Images]:
    """scikit-learn's 1797 handwritten digits, 8x8, as 32x32 RGB images: 1437 for training, 360 for validation."""
    from sklearn.datasets import load_digits as load

    digits = load()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    samples = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for image in pixels]
    every = Images(samples, digits.target, [str(name) for name in digits.target_names], lambda image: image)
    kept, held_out = stratified_split(every.targets, DIGITS_HELD_OUT)
    return every.part(kept), every.part(held_out)
