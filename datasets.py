"""From files to batches: image folders and built-in sets, keyed training loader, exact evaluation loader.

Run from the project's root, this file hides the Hugging Face package of the same name."""

import io
import json
import os
import re
import signal
import tarfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

import augment
from config import Config
from errors import InputError
from keys import Key, KeyedBatchSampler, Plan, build_plan, fit_batch_size, seeded
from utils import Rank, log


class Images(Sequence):
    """Labelled images: `images[i]` is (RGB PIL image, class index)."""

    def __init__(self, samples: list, targets: list[int], classes: list[str], open_image):
        self.samples = samples
        self.targets = targets
        self.classes = classes
        self._open_image = open_image

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._open_image(self.samples[index]), self.targets[index]

    def part(self, indices: np.ndarray) -> "Images":
        """The images at `indices`, in that order, with all classes."""
        return Images([self.samples[i] for i in indices], [self.targets[i] for i in indices], self.classes, self._open_image)


UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for files that are no images


def decode(file) -> Image.Image:
    """The RGB image in an open file, whatever its mode there (grayscale, CMYK, palette, 16 bit)."""
    with Image.open(file) as image:
        if image.mode == "I" or image.mode.startswith("I;16"):  # PIL would clip 16 bits at 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def open_file(path: str) -> Image.Image:
    """The RGB image in a file; InputError naming the file if it cannot be decoded."""
    try:
        return decode(path)
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read as an image ({error}): replace or remove it") from error


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
    return Images([file for file, _ in folder.samples], list(folder.targets), folder.classes, open_file)


@dataclass(frozen=True)
class TarMember:
    """Where an image's bytes lie inside a tar."""

    tar: str
    name: str
    offset: int
    size: int


def open_tar_member(member: TarMember) -> Image.Image:
    """The RGB image at `member`; InputError naming it if it cannot be decoded."""
    try:
        with open(member.tar, "rb") as file:
            file.seek(member.offset)
            return decode(io.BytesIO(file.read(member.size)))
    except UNREADABLE as error:
        raise InputError(f"{member.tar}: {member.name} cannot be read as an image ({error}): replace or remove it") from error


def open_tar(path: Path) -> Images:
    """Images in a tar of class folders, classes in alphabetical order; InputError where there are none."""
    log.info("reading the index of %s", path)
    try:
        with tarfile.open(path, "r:") as tar:
            members = sorted(
                (TarMember(str(path), item.name, item.offset_data, item.size) for item in tar if item.isfile() and item.name.lower().endswith(IMG_EXTENSIONS)),
                key=lambda member: member.name,
            )
    except tarfile.TarError as error:
        raise InputError(f"{path} is no plain, complete tar ({error}): it must be an uncompressed tar of class folders") from error
    names = [Path(member.name).parent.name for member in members]
    classes = sorted(set(names))
    if not members or "" in classes:
        raise InputError(f"{path} holds no images in class folders: it must be a tar of class folders")
    index = {name: i for i, name in enumerate(classes)}
    return Images(members, [index[name] for name in names], classes, open_tar_member)


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
    return tuple(Images(list(part.data), part.targets, part.classes, Image.fromarray) for part in parts)


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
    return Images(samples, [index[labels[annotation["category_id"]]] for annotation in listing["annotations"]], classes, open_file)


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
    every = Images(samples, digits.target.tolist(), [str(name) for name in digits.target_names], lambda image: image)
    kept, held_out = stratified_split(every.targets, DIGITS_HELD_OUT)
    return every.part(kept), every.part(held_out)


def open_images(cfg: Config) -> tuple[Images | None, Images]:
    """Training and validation images of --data-set; for an evaluation the former may be missing."""
    return {
        "DIGITS": load_digits,
        "IMNET": lambda: open_folders(cfg),
        "FLOWERS": lambda: open_folders(cfg, val_name="test"),
        "CIFAR": lambda: open_cifar(cfg),
        "INAT": lambda: open_inat(cfg, 2018),
        "INAT19": lambda: open_inat(cfg, 2019),
    }[cfg.data_set]()


class TrainingSet(Dataset):
    """Augmented images by key: (normalised float32 (3, H, W), class index, position)."""

    def __init__(self, images: Images, transform, plan: Plan):
        self.images = images
        self.transform = transform
        self.plan = plan

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key):
        image, target = self.images[key.sample]
        with seeded(self.plan.sample_words(key.epoch, key.sample, key.repeat)):
            return self.transform(image), target, key.position


class ValidationSet(Dataset):
    """One process's share of the images, each in one process alone: (normalised float32 (3, H, W), class index)."""

    def __init__(self, images: Images, transform, rank: Rank):
        self.images = images
        self.transform = transform
        self.indices = range(rank.index, len(images), rank.world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        image, target = self.images[self.indices[index]]
        return self.transform(image), target


@dataclass(frozen=True)
class TrainLoader:
    """Micro-batches (images, class indices, positions) of any epoch, from any step on."""

    loader: DataLoader
    sampler: KeyedBatchSampler
    plan: Plan

    @property
    def num_steps(self) -> int:
        """Optimiser steps per epoch."""
        return self.sampler.num_steps

    @property
    def global_batch(self) -> int:
        """Images per optimiser step, over all processes."""
        return self.sampler.batch_size * self.sampler.accum_steps * self.sampler.world_size

    def batches(self, epoch: int, first_step: int = 0):
        """Iterator over the micro-batches of `epoch` from optimiser step `first_step` on."""
        self.sampler.start(epoch=epoch, step=first_step)
        return iter(self.loader)


def count_workers(cfg: Config, rank: Rank) -> int:
    """Loader processes of this process: as asked for, else one per core that it has to itself, at most 10."""
    if cfg.num_workers is not None:
        return cfg.num_workers
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(10, max(1, num_cores // rank.local_world_size))


def _obey_parent_alone(worker_id: int) -> None:
    """Make a loader's worker ignore what asks a whole process group to stop, but for its own parent's SIGTERM.

    The training process still needs its workers to reach the next checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _loader_settings(cfg: Config, rank: Rank, num_items: int) -> dict:
    num_workers = count_workers(cfg, rank) if num_items else 0
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0, "worker_init_fn": _obey_parent_alone}
    return {**workers, "pin_memory": cfg.pin_mem and rank.device.type == "cuda"}


def build_train_loader(cfg: Config, images: Images, rank: Rank) -> TrainLoader:
    """The recipe's training data, in keyed order."""
    plan = build_plan(len(images), repeated_aug=cfg.repeated_aug, group_size=cfg.mix_group_size, lanes=cfg.mix_lanes, data_seed=cfg.data_seed)
    num_shares = rank.world_size * cfg.grad_accum_steps
    batch_size = fit_batch_size(plan, cfg.batch_size, num_shares=num_shares, group_size=cfg.mix_group_size, is_mixing=cfg.is_mixing)
    sampler = KeyedBatchSampler(plan, batch_size=batch_size, accum_steps=cfg.grad_accum_steps, rank=rank.index, world_size=rank.world_size)
    dataset = TrainingSet(images, augment.train_transform(cfg), plan)
    settings = _loader_settings(cfg, rank, len(images))
    log.info(
        "training images %d  views per epoch %d in mix groups of %d, %d lanes  steps %d (%d views left over)  loader processes %d",
        len(images),
        plan.num_positions,
        plan.group_size,
        plan.lanes,
        sampler.num_steps,
        plan.num_positions - sampler.num_steps * batch_size * num_shares,
        settings["num_workers"],
    )
    if batch_size < cfg.batch_size:
        log.warning("the training set does not fill --batch-size %d: using %d", cfg.batch_size, batch_size)
    return TrainLoader(DataLoader(dataset, batch_sampler=sampler, **settings), sampler, plan)


def build_val_loader(cfg: Config, images: Images, rank: Rank) -> DataLoader:
    """Each validation image once, over all processes; the last batch may be smaller."""
    dataset = ValidationSet(images, augment.eval_transform(cfg.input_size, augment.crop_pct(cfg)), rank)
    return DataLoader(dataset, batch_size=cfg.batch_size, **_loader_settings(cfg, rank, len(dataset)))


NUM_TEACHER_IMAGES = 512


def build_teacher_loader(cfg: Config, images: Images, rank: Rank) -> DataLoader:
    """At least 512 validation images, evenly spaced (so of many classes), or all of fewer."""
    stride = max(1, len(images) // NUM_TEACHER_IMAGES)
    return build_val_loader(cfg, images.part(np.arange(0, len(images), stride)), rank)


def facts(cfg: Config, classes: list[str]) -> dict:
    """What a checkpoint's user must know of the images: class names, size, normalisation, crop."""
    return {"class_names": classes, "input_size": cfg.input_size, "mean": augment.MEAN, "std": augment.STD, "crop_pct": augment.crop_pct(cfg)}
