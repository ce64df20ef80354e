"""Store a teacher's labels without training a student.

    python tools/make_teacher_labels.py --config recipes/recnext_300e.yaml --data-path ~/imagenet --teacher-labels labels --epochs 0:300
    torchrun --nproc_per_node=8 tools/make_teacher_labels.py ...        the same, each process with its share of every epoch's mix groups

Takes main.py's settings, of which those of the student do not matter; --epochs A:B are the epochs from A on, before B. Writes what a run with
--teacher-labels-mode auto would, and goes on where it was stopped: what is stored is left alone. Several of these may fill one folder.
Ends with code 0 when all is stored, 85 when told to stop before: start it again."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from torch.utils.data import DataLoader

import datasets
import engine
import main as training
import utils
from distillation import labelling
from loading import augment
from loading.images import Images
from loading.keys import Key, KeyedBatchSampler, Plan
from loading.loaders import TrainLoader
from run import config
from run.errors import InputError

REPORT_EVERY_S = 10.0


def split_epochs(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments without --epochs, and its value."""
    rest, value = [], None
    arguments = iter(argv)
    for argument in arguments:
        name, separator, given = argument.partition("=")
        if name == "--epochs":
            value = given if separator else next(arguments, "")
        else:
            rest.append(argument)
    return rest, value


def parse(argv: list[str]) -> tuple[config.Config, range, list[str]]:
    """Settings under which the labels are made, the epochs to make, and notes for the user. InputError where they make no sense."""
    rest, text = split_epochs(argv)
    cfg, notes = config.parse([*rest, "--teacher-labels-mode", "auto"])
    first, separator, stop = (f"0:{cfg.epochs}" if text is None else text).partition(":")
    if not (separator and first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise InputError(f"--epochs '{text}': write the first epoch, a colon, and the one to stop before, such as 0:300")
    if not cfg.teacher_labels:
        raise InputError("--teacher-labels is missing: name the folder to store labels in")
    if cfg.distillation == "none":
        raise InputError("this recipe does not distil: add --distillation-type hard, or soft with --teacher-topk")
    return cfg, range(int(first), int(stop)), notes


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
    return dataclasses.replace(whole, loader=DataLoader(whole.loader.dataset, batch_sampler=sampler, **settings), sampler=sampler)


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


def make_epoch(labels: labelling.StoredLabels, loader: TrainLoader, epoch: int, *, mix, stop: utils.StopRequest, progress: Progress) -> None:
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


def count_missing(store, epochs: range) -> int:
    """Labels that the epochs lack."""
    stored = [store.status(epoch) for epoch in epochs]
    return sum(store.num_positions - (status["num_filled"] if status else 0) for status in stored)


def make(cfg: config.Config, epochs: range, rank: utils.Rank) -> int:
    """Have the teacher label what the epochs lack. The exit code."""
    stop = utils.StopRequest()
    train_images, val_images = datasets.open_images(cfg)
    num_classes = len(train_images.classes)
    loader = build_loader(dataclasses.replace(cfg, batch_size=cfg.mix_group_size, grad_accum_steps=1), train_images, rank)
    labels = labelling.build_teacher(cfg, loader, rank, num_classes=num_classes, epochs=epochs)
    if labels.net is None:
        return 0
    if cfg.teacher_min_acc1 != 0:
        parts = engine.EvalParts(rank=rank, memory_format=torch.channels_last)
        engine.check_teacher(labels.net, datasets.build_teacher_loader(cfg, val_images, rank), parts, num_classes=num_classes, min_acc1=cfg.teacher_min_acc1)
    mix = augment.build_mixing(cfg, loader.plan, num_classes)
    progress = Progress(labelling.from_main(lambda: count_missing(labels.store, epochs), rank))
    for epoch in epochs:
        make_epoch(labels, loader, epoch, mix=mix, stop=stop, progress=progress)
        if utils.any_process([stop.is_made], rank)[0]:
            utils.log.warning("told to stop: stored what was made by epoch %d; start again to go on", epoch)
            return training.STOPPED
        utils.log.info("epoch %d stored", epoch)
    return 0


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    cfg, epochs, notes = parse(argv)
    rank = utils.start_process(cfg.device, cfg.seed)
    for note in notes:
        utils.log.info(note)
    exit_code = make(cfg, epochs, rank)
    utils.stop_process()
    return exit_code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (Exception, KeyboardInterrupt) as failure:
        training.leave(training.explain(failure))
