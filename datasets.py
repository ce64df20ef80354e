"""From files to batches: image folders and built-in sets, keyed training loader, exact evaluation loader.

Run from the project's root, this file hides the Hugging Face package of the same name."""

from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from loading import augment, pixels
from loading.batches import TrainingSet, ValidationSet
from loading.damage import TrainingDamage, ValidationDamage
from loading.images import Images
from loading.keys import KeyedBatchSampler, build_plan, draw_words, fit_batch_size
from loading.loaders import TrainLoader, ValLoader, loader_settings
from run.config import Config
from sources.parts import fraction_of, only_classes
from sources.sets import load_digits, open_cifar, open_folders, open_inat
from utils import Rank, log


def open_images(cfg: Config) -> tuple[Images | None, Images]:
    """Training and validation images of --data-set; for an evaluation the former may be missing.

    InputError where there are none, or where --loader cannot run here."""
    if cfg.loader == "fast":
        pixels.require()
        pixels.prepare_process()
    opened = {
        "DIGITS": load_digits,
        "IMNET": lambda: open_folders(cfg),
        "FLOWERS": lambda: open_folders(cfg, val_name="test"),
        "CIFAR": lambda: open_cifar(cfg),
        "INAT": lambda: open_inat(cfg, 2018),
        "INAT19": lambda: open_inat(cfg, 2019),
    }[cfg.data_set]()
    if cfg.classes:
        opened = tuple(images if images is None else only_classes(images, cfg.classes) for images in opened)
    if cfg.exif_transpose:
        opened = tuple(images if images is None else images.turned() for images in opened)
    return _fraction(cfg, opened[0]), opened[1]


def _fraction(cfg: Config, train: Images | None) -> Images | None:
    """The training images that --train-fraction leaves."""
    if train is None or cfg.train_fraction == 1:
        return train
    rng = np.random.RandomState(draw_words("train fraction", cfg.data_seed)[0] % 2**32)  # legacy generator: its stream never changes
    return train.part(fraction_of(train.targets, cfg.train_fraction, rng))


def build_train_loader(cfg: Config, images: Images, rank: Rank, folder: Path | None = None) -> TrainLoader:
    """The recipe's training data, in keyed order. `folder` gets the list of damaged images, where there are many."""
    plan = build_plan(len(images), repeated_aug=cfg.repeated_aug, group_size=cfg.mix_group_size, lanes=cfg.mix_lanes, data_seed=cfg.data_seed)
    num_shares = rank.world_size * cfg.grad_accum_steps
    batch_size = fit_batch_size(plan, cfg.batch_size, num_shares=num_shares, group_size=cfg.mix_group_size, is_mixing=cfg.is_mixing)
    sampler = KeyedBatchSampler(plan, batch_size=batch_size, accum_steps=cfg.grad_accum_steps, rank=rank.index, world_size=rank.world_size)
    first, *later = sorted(augment.train_transforms(cfg).items())
    dataset = TrainingSet(
        images,
        first[1],
        plan,
        is_finished_here=rank.device.type == "cpu",
        reuses_memory=True,
        is_hashed=cfg.labels_mode != "off",
        replaces_damaged=cfg.max_bad_images > 0,
        later=dict(later),
    )
    settings = loader_settings(cfg, rank, len(images))
    log.info(
        "training images %d  views per epoch %d in mix groups of %d, %d lanes  steps %d (%d views left over)  %s loader, processes %d",
        len(images),
        plan.num_positions,
        plan.group_size,
        plan.lanes,
        sampler.num_steps,
        plan.num_positions - sampler.num_steps * batch_size * num_shares,
        cfg.loader,
        settings["num_workers"],
    )
    if batch_size < cfg.batch_size:
        log.warning("the training set does not fill --batch-size %d: using %d", cfg.batch_size, batch_size)
    damage = TrainingDamage(rank, folder and folder / "bad_images_train.txt", limit=cfg.max_bad_images)
    return TrainLoader(DataLoader(dataset, batch_sampler=sampler, **settings), sampler, plan, damage)


def build_val_loader(cfg: Config, images: Images, rank: Rank, folder: Path | None = None, *, transform: augment.Transform | None = None) -> ValLoader:
    """Each validation image once, over all processes; the last batch may be smaller. `folder` gets the list of damaged images, where
    there are many; `transform` takes the place of the usual one."""
    transform = transform or augment.recipe_eval_transform(cfg)
    dataset = ValidationSet(images, transform, rank, is_finished_here=rank.device.type == "cpu", reuses_memory=True)
    damage = ValidationDamage(rank, folder and folder / "bad_images_val.txt", num_images=len(images), is_skipped=cfg.skip_bad_images)
    return ValLoader(DataLoader(dataset, batch_size=cfg.batch_size, **loader_settings(cfg, rank, len(dataset))), damage)


NUM_TEACHER_IMAGES = 512


def build_teacher_loader(cfg: Config, images: Images, rank: Rank, num_images: int = NUM_TEACHER_IMAGES) -> ValLoader:
    """At least so many validation images, evenly spaced (so of many classes), or all of fewer."""
    stride = max(1, len(images) // num_images)
    return build_val_loader(cfg, images.part(np.arange(0, len(images), stride)), rank)


def facts(cfg: Config, classes: list[str]) -> dict:
    """What a checkpoint's user must know of the images: class names, size, normalisation, crop."""
    mean, std = augment.statistics(cfg)
    crop = {"crop_pct": augment.crop_pct(cfg), "crop_mode": cfg.crop_mode, "interpolation": cfg.interpolation}
    return {"class_names": classes, "input_size": cfg.input_size, "mean": mean, "std": std, **crop}
