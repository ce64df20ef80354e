"""From files to batches: image folders and built-in sets, keyed training loader, exact evaluation loader.

Run from the project's root, this file hides the Hugging Face package of the same name."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

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


def open_file(path: str) -> Image.Image:
    """The RGB image in a file, whatever its mode there; InputError naming the file if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}): replace or remove it") from error


def open_folder(path: Path) -> Images:
    """Images in one sub-folder per class, classes in alphabetical order; InputError where there are none."""
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: --data-path needs one holding train/ and val/, each with a folder per class")
    try:
        folder = ImageFolder(str(path))
    except FileNotFoundError as error:
        if not any(child.is_dir() for child in path.iterdir()):
            raise InputError(f"{path} holds no class folders: put each class's images into a folder named after the class") from error
        empty = re.search(r"for the classes (.*?)\. Supported", str(error))
        raise InputError(f"{path}: no image in the class folders {empty[1] if empty else ''}: fill or remove them") from error
    return Images([file for file, _ in folder.samples], list(folder.targets), folder.classes, open_file)


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


def open_validation(cfg: Config) -> Images:
    """The images that evaluation counts."""
    return load_digits()[1] if cfg.data_set == "DIGITS" else open_folder(Path(cfg.data_path) / "val")


def open_training(cfg: Config) -> Images:
    """The images that training sees."""
    return load_digits()[0] if cfg.data_set == "DIGITS" else open_folder(Path(cfg.data_path) / "train")


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
    return min(10, max(1, len(os.sched_getaffinity(0)) // rank.local_world_size))


def _loader_settings(cfg: Config, rank: Rank, num_items: int) -> dict:
    num_workers = count_workers(cfg, rank) if num_items else 0
    return {"num_workers": num_workers, "persistent_workers": num_workers > 0, "pin_memory": cfg.pin_mem and rank.device.type == "cuda"}


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
