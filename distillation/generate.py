"""A teacher's labels, stored without training a student."""

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

import datasets
import engine
import utils
from distillation import labelling
from loading import augment
from loading.damage import TrainingDamage
from loading.images import Images
from loading.keys import Key, KeyedBatchSampler, Plan
from loading.loaders import TrainLoader
from run import compiling, config, signals
from run.command import STOPPED

REPORT_EVERY_S = 10.0


class GroupSampler(KeyedBatchSampler):
    """Yields mix groups of an epoch, whole, as lists of keys: those in `chosen`."""

    def __init__(self, plan: Plan):
        super().__init__(plan, batch_size=plan.group_size, accum_steps=1, rank=0, world_size=1)
        self.chosen = []

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[list[Key]]:
        size, permutation = self.plan.group_size, self.plan.permutation(self.epoch).numpy()
        for group in self.chosen:
            yield self.plan.keys(self.epoch, self.plan.positions(group * size, (group + 1) * size), permutation)


def build_loader(cfg: config.Config, images: Images, rank: utils.Rank) -> TrainLoader:
    """The recipe's training data in whole mix groups."""
    whole = datasets.build_train_loader(cfg, images, dataclasses.replace(rank, index=0, world_size=1))
    sampler = GroupSampler(whole.plan)
    names = ("num_workers", "persistent_workers", "worker_init_fn", "collate_fn", "multiprocessing_context", "pin_memory")
    settings = {name: getattr(whole.loader, name) for name in names}
    loader = DataLoader(whole.loader.dataset, batch_sampler=sampler, **settings)
    damage = TrainingDamage(rank, None, limit=cfg.max_bad_images)
    return dataclasses.replace(whole, loader=loader, sampler=sampler, damage=damage, is_in_step=False)


class Progress:
    """Says now and then how far all epochs are, and when they will be done."""

    def __init__(self, num_labels: int):
        self.num_left = num_labels
        self.num_done = 0
        self.start = self.last_report = time.perf_counter()

    def add(self, epoch: int, num_labels: int) -> None:
        self.num_done += num_labels
        now = time.perf_counter()
        if now - self.last_report > REPORT_EVERY_S:
            rate = self.num_done / (now - self.start)
            left_s = max(0, self.num_left - self.num_done) / rate
            log_line = "epoch %d  %d of %d labels  %.0f labels/s  all done in %s"
            utils.log.info(log_line, epoch, self.num_done, self.num_left, rate, engine.clock(left_s))
            self.last_report = now


def missing_groups(store, groups: np.ndarray, epoch: int) -> np.ndarray:
    """The mix groups of `epoch` that lack a label."""
    page = store.read(epoch)
    return np.unique(groups if page is None else groups[~page.is_filled])


def make_epoch(labels: labelling.StoredLabels, loader: TrainLoader, epoch: int, *, mix, stop: signals.StopRequest, progress: Progress) -> None:
    """Have the teacher label what `epoch` lacks, and store it; if told to stop, what there is by then."""
    rank = labels.rank
    missing = labelling.from_main(lambda: missing_groups(labels.store, labels.groups, epoch), rank)
    if not len(missing):
        return
    loader.sampler.chosen = missing[rank.index :: rank.world_size].tolist()
    labels.start_epoch(epoch)
    for batch in loader.batches(epoch):
        images = batch.images.to(rank.device, memory_format=torch.channels_last, non_blocking=True)
        mixed, _ = mix(images, batch.targets.to(rank.device, non_blocking=True), epoch, batch.positions)
        labels(mixed, batch, epoch)
        progress.add(epoch, rank.world_size * len(batch.positions))
        if stop.is_made:
            break
    labels.end_epoch(epoch)
    loader.damage.report()


def count_missing(store, epochs: range) -> int:
    """Labels that the epochs lack."""
    stored = [store.status(epoch) for epoch in epochs]
    return sum(store.num_positions - (status["num_filled"] if status else 0) for status in stored)


def make(cfg: config.Config, epochs: range, rank: utils.Rank) -> int:
    """Have the teacher label what the epochs lack. The exit code."""
    stop = signals.StopRequest()
    train_images, val_images = datasets.open_images(cfg)
    num_classes = len(train_images.classes)
    loader = build_loader(dataclasses.replace(cfg, batch_size=cfg.mix_group_size, grad_accum_steps=1), train_images, rank)
    labels = labelling.build_teacher(cfg, loader, rank, num_classes=num_classes, epochs=epochs)
    if labels.net is None:
        return 0
    if cfg.teacher_min_acc1 != 0:
        labelling.check_teacher(cfg, labels.net, val_images, rank)
    compiler = compiling.build_compiler(cfg, rank)
    for size in cfg.train_sizes:
        labels.prepare(compiler, loader.shape(size))
    mix = augment.build_mixing(cfg, loader.plan, num_classes)
    progress = Progress(labelling.from_main(lambda: count_missing(labels.store, epochs), rank))
    for epoch in epochs:
        make_epoch(labels, loader, epoch, mix=mix, stop=stop, progress=progress)
        if utils.any_process([stop.is_made], rank)[0]:
            utils.log.warning("told to stop: stored what was made by epoch %d; start again to go on", epoch)
            return STOPPED
        utils.log.info("epoch %d stored", epoch)
    return 0
