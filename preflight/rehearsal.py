"""A dry run: everything that stands between a recipe and its first step is looked at, in the order of `main.py`, and left as it was."""

import contextlib
import dataclasses
import itertools
import os
from pathlib import Path

import torch
from torch import nn

import datasets
import engine
import losses
from distillation import labelling
from distillation.labelling import StoredLabels
from distillation.teacher import NoTeacher, Teacher, no_teacher, read_weights
from loading import augment
from loading.images import Images
from loading.loaders import TrainLoader
from preflight import cost, images, room
from run import checkpoint, hardware, network, optim, trackers
from run.checkpoint import TrainState
from run.compiling import no_compiler
from run.config import Config
from run.errors import Faults
from run.folder import choose_folder, claim_folder, find_checkpoint
from run.state import build_state
from utils import Rank, log

NUM_TEACHER_IMAGES = 32  # validation images that the teacher is tried on without a GPU
STAND_IN_CLASSES = 1000  # where the data cannot be read


def rehearse(cfg: Config, rank: Rank) -> int:
    """Look at all that the run of `cfg` needs, and say what it will cost. The exit code, 0; InputError with every fault that there is.

    Of several processes, which do not meet, the first does it for all."""
    if not rank.is_main:
        return 0
    faults = Faults()
    with faults.looking():
        rank = dataclasses.replace(rank, device=hardware.pick_device(cfg.device, rank.local_index))
    if cfg.compile:
        log.info("--compile is not tried here: what a step costs is said without it")
        cfg = dataclasses.replace(cfg, compile=False)
    (_Evaluation if cfg.eval else _Training)(cfg, rank, faults).look()
    faults.refuse()
    log.info("dry run: nothing stands in the way of this run")
    return 0


class _Rehearsal:
    """What both kinds of run need. `alone` is this process without the others, which the run will have and this look has not."""

    def __init__(self, cfg: Config, rank: Rank, faults: Faults):
        self.cfg, self.rank, self.faults = cfg, rank, faults
        self.alone = dataclasses.replace(rank, world_size=1, local_world_size=1)
        self.train: Images | None = None
        self.val: Images | None = None

    def look_at_images(self) -> None:
        cfg = self.cfg
        with self.faults.looking():
            self.train, self.val = datasets.open_images(cfg)
        borne = {"train": cfg.max_bad_images > 0, "val": cfg.skip_bad_images}
        for split, found in (("train", self.train if not cfg.eval else None), ("val", self.val)):
            if found is not None:
                images.count(found, split)
                images.open_some(found, split, self.faults, is_fast=cfg.loader == "fast", is_borne=borne[split])

    @property
    def num_classes(self) -> int:
        return len(self.val.classes) if self.val is not None else STAND_IN_CLASSES

    def laid_out(self, net: nn.Module) -> nn.Module:
        """The network on the run's device."""
        amp_dtype = hardware.pick_amp(self.cfg.amp, self.rank.device)
        return net.to(self.rank.device, memory_format=hardware.pick_memory_format(self.cfg.memory_format, self.rank.device, amp_dtype))


class _Training(_Rehearsal):
    """A training run."""

    def look(self) -> None:
        self.look_at_images()
        folder = choose_folder(self.cfg)
        labels_folder = [Path(self.cfg.teacher_labels).expanduser()] if self.cfg.labels_mode != "off" else []
        with room.untouched(folder, *labels_folder):
            source = self.look_at_folder(folder)
            loader = self.build_loader()
            state = self.build_state(loader, source)
            teacher = self.look_at_teacher(loader, state)
        view_s = None
        if loader is not None:
            with self.faults.looking():
                view_s = images.view_s(loader)
        if state is not None:
            self.measure(folder, loader, state, teacher, view_s)

    def look_at_folder(self, folder: Path) -> str | None:
        """The checkpoint that the run would continue."""
        cfg = dataclasses.replace(self.cfg, output_dir=str(folder))
        with self.faults.looking(), contextlib.ExitStack() as held:
            claim_folder(cfg, self.alone, held)
        with self.faults.looking():
            trackers.require_package(cfg)
        with self.faults.looking():
            return find_checkpoint(cfg, folder, self.alone)
        return None

    def build_loader(self) -> TrainLoader | None:
        with self.faults.looking():
            if self.train is not None:
                return datasets.build_train_loader(self.cfg, self.train, self.rank)
            augment.train_transforms(self.cfg)
        return None

    def build_state(self, loader: TrainLoader | None, source: str | None) -> TrainState | None:
        """What would be trained, as it would begin; None where it cannot be built."""
        cfg, net, state = self.cfg, None, None
        with self.faults.looking():
            net = network.build(cfg, self.num_classes, distillation=cfg.distillation != "none")
        if net is not None and cfg.finetune:
            with self.faults.looking():
                checkpoint.load_finetune(net, cfg.finetune)
        with self.faults.looking():
            if net is None:
                optim.build_optimizer(dataclasses.replace(cfg, layer_decay=None), nn.Linear(1, 1), cfg.batch_size)
            else:
                sizes = {"global_batch": loader.global_batch, "num_steps": loader.num_steps} if loader else {"global_batch": cfg.recipe_batch, "num_steps": 1}
                state = build_state(cfg, self.laid_out(net), self.alone, no_compiler, **sizes, bests=engine.Parts.bests)
        with self.faults.looking():
            if source and state is not None and loader is not None:
                run = {"global_batch": loader.global_batch, "num_images": len(self.train), "class_names": self.train.classes}
                checkpoint.resume(cfg, state, source, run=run, rank=self.alone)
            elif source:
                checkpoint.position(source)
        if state is not None and loader is not None:
            engine.announce(cfg, state, loader, self.rank)
        losses.build_criterion(cfg)
        return state

    def look_at_teacher(self, loader: TrainLoader | None, state: TrainState | None) -> NoTeacher | Teacher | StoredLabels:
        """Who answers for the teacher, once its file, its accuracy and the stored labels were looked at."""
        cfg, found = self.cfg, no_teacher
        if cfg.distillation == "none":
            return found
        if loader is None:
            if cfg.teacher_path is not None and cfg.labels_mode != "read":
                with self.faults.looking():
                    read_weights(cfg)
            return found
        epochs = range(state.epoch if state is not None else cfg.start_epoch, cfg.num_epochs)
        with self.faults.looking():
            found = labelling.build_teacher(cfg, loader, self.alone, num_classes=self.num_classes, epochs=epochs)
        if isinstance(found, StoredLabels):
            self.look_at_labels(found, epochs)
        if found.net is not None and cfg.teacher_min_acc1 != 0 and self.val is not None:
            self.try_teacher(found.net)
        return found

    def look_at_labels(self, labels: StoredLabels, epochs: range) -> None:
        """Read every epoch that is stored, checksums and all."""
        store, num_whole, num_part = labels.store, 0, 0
        for epoch in epochs:
            with self.faults.looking():
                page = store.read(epoch)
                num_whole += page is not None and bool(page.is_filled.all())
                num_part += page is not None and not page.is_filled.all()
        self.num_missing = len(epochs) - num_whole - num_part
        log.info("teacher labels of %d epochs in %s: %d whole, %d in part, %d missing", len(epochs), store.folder, num_whole, num_part, self.num_missing)

    num_missing = 0  # epochs whose labels are yet to be made

    def try_teacher(self, net: nn.Module) -> None:
        """Its accuracy on validation images; without a GPU on few, of which chance may take three standard errors."""
        cfg, num_images = dataclasses.replace(self.cfg, num_workers=0), datasets.NUM_TEACHER_IMAGES
        if self.rank.device.type == "cpu":
            num_images = min(NUM_TEACHER_IMAGES, len(self.val))
            if cfg.teacher_min_acc1 is not None:
                least = cfg.teacher_min_acc1 / 100
                least = max(0.0, least - 3 * (least * (1 - least) / num_images) ** 0.5)
                cfg = dataclasses.replace(cfg, teacher_min_acc1=100 * least)
        with self.faults.looking():
            labelling.check_teacher(cfg, net, self.val, self.alone, num_images)

    def measure(self, folder: Path, loader: TrainLoader | None, state: TrainState, teacher, view_s: float | None) -> None:
        """What a step and the run cost, and whether the disks have room for what it writes."""
        cfg = self.cfg
        batch_size = loader.sampler.batch_size if loader is not None else cfg.batch_size
        asked = teacher.teacher if isinstance(teacher, StoredLabels) else teacher
        num_epochs = max(0, cfg.num_epochs - state.epoch)
        num_asked = (self.num_missing if isinstance(teacher, StoredLabels) else num_epochs) if asked not in (None, no_teacher) else 0
        kinds = [(num_asked, asked)] if num_asked else []
        kinds += [(num_epochs - num_asked, no_teacher)] if num_asked < num_epochs or not kinds else []
        costs = []
        sizes = cost.epochs_by_size(cfg, state.epoch)
        for (count, answers), (size, num_sized) in itertools.product(kinds, sizes.items()):
            with self.faults.looking():
                found = cost.measure(cfg, state, self.alone, answers, self.faults, num_classes=self.num_classes, batch_size=batch_size, size=size)
                costs += [(count * num_sized / max(1, num_epochs), found)] if found is not None else []
        if costs and loader is not None and view_s is not None and self.val is not None:
            cost.say_hours(cfg, loader, self.rank, costs, view_s=view_s, num_val=len(self.val), has_ema=state.ema is not None)
        self.look_for_room(folder, state, teacher)

    def look_for_room(self, folder: Path, state: TrainState, teacher) -> None:
        wanted = room.Room()
        wanted.add_checkpoints(folder, state, checkpoint.collect(self.cfg, state, facts={}, run={}, metrics={}, rank=self.alone))
        if isinstance(teacher, StoredLabels) and self.num_missing:
            wanted.add(teacher.store.folder, self.num_missing * teacher.store.num_bytes, f"teacher labels of {self.num_missing} epochs")
        wanted.compare(self.faults)


class _Evaluation(_Rehearsal):
    """A run with --eval."""

    def look(self) -> None:
        self.look_at_images()
        cfg, saved, net = self.cfg, None, None
        with self.faults.looking():
            source = find_checkpoint(cfg, choose_folder(cfg), self.alone)
            facts = datasets.facts(cfg, self.val.classes) if self.val is not None else {}
            saved = checkpoint.read_for_evaluation(cfg, source, facts) if source else None
        has_dist_head = any("dist" in name for name in saved) if saved else cfg.distillation != "none"
        with self.faults.looking():
            net = network.build(cfg, self.num_classes, distillation=has_dist_head)
            if saved and self.val is not None:
                checkpoint.load_weights(net, saved, where=cfg.resume)
        if cfg.report and not os.access(Path(cfg.report).absolute().parent, os.W_OK):
            self.faults.add(f"--report {cfg.report} cannot be written: {Path(cfg.report).absolute().parent} is no folder to write in; name another file")
        if net is not None and self.val is not None:
            self.say_minutes(net)

    def say_minutes(self, net: nn.Module) -> None:
        """Say how long the network's part of the evaluation takes."""
        size = self.cfg.input_size
        amp_dtype = hardware.pick_amp(self.cfg.amp, self.rank.device)
        with torch.no_grad(), torch.autocast(self.rank.device.type, amp_dtype, enabled=amp_dtype is not None):
            seconds = cost.forward_s(self.laid_out(net).eval(), torch.zeros(cost.SMALL[1], 3, size, size, device=self.rank.device))
        took = engine.clock(seconds * len(self.val) / self.rank.world_size)
        log.info("about %s (h:mm:ss) for the network on %d images on %s", took, len(self.val), self.rank.device)
