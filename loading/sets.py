"""Where images come from: class folders, tars of class folders, CIFAR-100, iNaturalist, scikit-learn's digits."""

import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from loading.images import UNREADABLE, Images, Names, damaged, decode, open_file, read_file
from run.config import Config
from run.errors import InputError
from utils import log


class ClassFolders(ImageFolder):
    """torchvision's, without the hidden folders that notebooks and file managers leave behind."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError(directory)
        return classes, {name: i for i, name in enumerate(classes)}


def open_folder(path: Path) -> Images:
    """Images in one sub-folder per class, classes in alphabetical order; InputError where there are none."""
    try:
        folder = ClassFolders(str(path))
    except FileNotFoundError as error:
        if not any(child.is_dir() and not child.name.startswith(".") for child in path.iterdir()):
            raise InputError(
                f"{path} holds no class folders: put each class's images into a folder named after the class "
                "(tools/extract_imagenet.py does so for ImageNet's archives)"
            ) from error
        empty = re.search(r"for the classes (.*?)\. Supported", str(error))
        raise InputError(f"{path}: no image in the class folders {empty[1] if empty else ''}: fill or remove them") from error
    return Images(Names(file for file, _ in folder.samples), folder.targets, folder.classes, open_file, read_file)


@dataclass(frozen=True)
class TarMember:
    """Where an image's bytes lie inside a tar."""

    tar: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}: {self.name}"


class TarMembers(Sequence):
    """Members of a tar, in arrays (see `Names`)."""

    def __init__(self, members: Sequence[TarMember]):
        self._tar = members[0].tar
        self._names = Names(member.name for member in members)
        self._offsets = np.array([member.offset for member in members])
        self._sizes = np.array([member.size for member in members])

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> TarMember:
        return TarMember(self._tar, self._names[index], int(self._offsets[index]), int(self._sizes[index]))


def read_tar_member(member: TarMember) -> bytes:
    """Bytes of `member`; DamagedImage if they cannot be read."""
    try:
        with open(member.tar, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)
    except OSError as error:
        raise damaged(str(member), error) from error


def open_tar_member(member: TarMember) -> Image.Image:
    """The RGB image at `member`; DamagedImage if it cannot be read or decoded."""
    data = read_tar_member(member)
    try:
        return decode(io.BytesIO(data))
    except UNREADABLE as error:
        raise damaged(str(member), error) from error


def list_tar(path: Path) -> list[TarMember]:
    """The images in a tar by name, as their names' ends tell; InputError where it cannot be read."""
    log.info("reading the index of %s", path)
    try:
        with tarfile.open(path, "r:") as tar:
            return sorted(
                (TarMember(str(path), item.name, item.offset_data, item.size) for item in tar if item.isfile() and item.name.lower().endswith(IMG_EXTENSIONS)),
                key=lambda member: member.name,
            )
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path} is no plain, complete tar ({error}): it must be an uncompressed tar of class folders") from error


def open_tar(path: Path) -> Images:
    """Images in a tar of class folders, classes in alphabetical order; InputError where there are none."""
    members = list_tar(path)
    names = [Path(member.name).parent.name for member in members]
    classes = sorted(set(names))
    if not members or "" in classes:
        raise InputError(f"{path} holds no images in class folders: it must be a tar of class folders")
    index = {name: i for i, name in enumerate(classes)}
    return Images(TarMembers(members), [index[name] for name in names], classes, open_tar_member, read_tar_member)


def open_part(root: Path, name: str) -> Images | None:
    """The images of `root/name`, a folder or a tar; None where there is neither."""
    if (root / name).is_dir():
        return open_folder(root / name)
    return open_tar(root / f"{name}.tar") if (root / f"{name}.tar").is_file() else None


def open_folders(cfg: Config, val_name: str = "val") -> tuple[Images | None, Images]:
    """Training and validation images below --data-path; no training images are fine for an evaluation."""
    root = Path(cfg.data_path).expanduser()
    if not root.is_dir():
        raise InputError(f"--data-path {root} is no folder: it must hold train/ and {val_name}/, each with a folder per class, or tars of the same names")
    train, val = open_part(root, "train"), open_part(root, val_name)
    if train is None and (val is None or not cfg.eval):
        raise InputError(f"--data-path {root} holds neither train/ nor train.tar: put the training images there, in a folder per class")
    if cfg.val_split is not None:
        if val is not None:
            raise InputError(f"--val-split holds images out of train/, but {root / val_name} exists: drop one of them")
        kept, held_out = stratified_split(train.targets, max(1, round(cfg.val_split * len(train))))
        return train.part(kept), train.part(held_out)
    if val is None:
        raise InputError(f"--data-path {root} has no {val_name}/: add it, or hold out a tenth of train/ with --val-split 0.1")
    if train is not None and train.classes != val.classes:
        _refuse_classes(root, train.classes, val.classes, val_name)
    return train, val


def _refuse_classes(root: Path, train: list[str], val: list[str], val_name: str) -> None:
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    raise InputError(
        f"{root}: train/ has {len(train)} classes, {val_name}/ has {len(val)}, and their folders must have the same names, for classes are numbered by name. "
        f"Only in train/: {', '.join(only_train[:3]) or 'none'}; only in {val_name}/: {', '.join(only_val[:3]) or 'none'}"
    )


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
    return Images(Names(samples), [index[labels[annotation["category_id"]]] for annotation in listing["annotations"]], classes, open_file, read_file)


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
