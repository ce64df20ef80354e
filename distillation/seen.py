"""What a student sees of a training step: images of some of its slots, made as training makes them, with all that was drawn for them.

They are a function of (data seed, epoch, position), so that no network has to train for them to be known. Runs on the CPU."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor

import datasets
from distillation import labelling, teacher
from loading import augment
from loading.batches import Batch, TrainingSet
from loading.keys import Key, Plan, fit_batch_size
from loading.loaders import TrainLoader
from run.config import Config
from run.errors import DamagedImage, InputError
from utils import Rank, log

Shares = list[tuple[str, float]]  # classes with their parts of a whole, the largest first
NUM_SHARES = 3  # of a distribution that are told
LEAST_SHARE = 0.01


@dataclass(frozen=True)
class Mix:
    """How an image was mixed: its share `lam` of itself, and the number of the image that the rest is of; `box` (top, bottom, left, right) is
    what that fills in CutMix, None in mixup."""

    lam: float
    partner: int
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Seen:
    """An image of a step, by its `number` among those shown, from 0.

    `pixels`: uint8 (H, W, 3), as the student sees it; `source`: the picture as it is stored; `drawn`: as `loading.augment.describe` gives it, with
    the crop in pixels of `source` if `crops_source`, else of what that is resized or padded to; `target`: what is to be learnt where it is a distribution;
    `teacher`: what the teacher says, its classes with probabilities or one class alone (NaN), nothing where none is asked; `damaged`: file and
    reason, where another image of its class stands in for it; `further`: pixels of the further views of --aug-splits."""

    number: int
    position: int
    name: str
    label: str
    pixels: np.ndarray
    source: Image.Image
    drawn: dict
    crops_source: bool
    mix: Mix | None
    target: Shares
    teacher: Shares
    damaged: str | None
    further: Sequence[np.ndarray]


@dataclass(frozen=True)
class Step:
    """Where a step stands in a run, for who reads of its images: steps per epoch, images per step, mix groups; who answered for the teacher."""

    epoch: int
    step: int
    num_steps: int
    global_batch: int
    group_size: int
    teacher: str


def see(cfg: Config, rank: Rank, *, epoch: int, step: int, num_images: int, num_processes: int = 1, asks: bool = True) -> tuple[Step, list[Seen]]:
    """The first `num_images` images of a step of a run of `num_processes`; `asks`: with the teacher's labels, where the recipe has a teacher.

    While mixing, partners are shown together, so that an odd number becomes the next even one. InputError where there is no such step."""
    images, _ = datasets.open_images(cfg)
    loader = datasets.build_train_loader(cfg, images, rank)
    dataset, plan = loader.loader.dataset, loader.plan
    num_shares = num_processes * cfg.grad_accum_steps
    batch_size = fit_batch_size(plan, cfg.batch_size, num_shares=num_shares, group_size=cfg.mix_group_size, is_mixing=cfg.is_mixing)
    global_batch = batch_size * num_shares
    num_steps = plan.num_positions // global_batch
    if not (0 <= epoch < cfg.num_epochs and 0 <= step < num_steps):
        raise InputError(
            f"--epoch {epoch} --step {step}: the run has epochs 0 to {cfg.num_epochs - 1} of steps 0 to {num_steps - 1} ({global_batch} images each)"
        )
    count = min(num_images + num_images % 2 if cfg.is_mixing else num_images, global_batch)
    keys = plan.keys(epoch, plan.positions(step * global_batch, step * global_batch + count), plan.permutation(epoch).numpy())
    batch = dataset.__getitems__(keys)
    mixing = augment.build_mixing(cfg, plan, len(images.classes))
    mixed, targets = mixing(batch.images.clone(), batch.targets, epoch, batch.positions)
    who, said = _ask(cfg, loader, rank, mixed, batch, epoch) if asks and cfg.distillation != "none" else ("", [[] for _ in keys])
    mixes = _mixes(mixing, plan, batch, mixed, epoch)
    seen = [
        _seen(
            i,
            key,
            dataset,
            batch,
            views=mixed[i :: len(keys)],
            mix=mixes[i],
            target=_shares(targets[i], images.classes) if targets.ndim == 2 else [],
            said=said[i],
        )
        for i, key in enumerate(keys)
    ]
    return Step(epoch, step, num_steps, global_batch, plan.group_size, who), seen


def _seen(i: int, key: Key, dataset: TrainingSet, batch: Batch, *, views: Tensor, mix: Mix | None, target: Shares, said: Shares) -> Seen:
    images, transform = dataset.images, dataset.transform_at(key.epoch)
    sample, drawn, damaged = _drawn(key, dataset)
    mean, std = augment.tensors_of(transform.statistics, views.device)
    first, *further = ((views * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    label = images.classes[int(batch.targets[i])]
    crops_source = isinstance(transform.parts.transforms[0], RandomResizedCropAndInterpolation)
    return Seen(i, key.position, images.name(sample), label, first, images[sample][0], drawn, crops_source, mix, target, said, damaged, further)


def _drawn(key: Key, dataset: TrainingSet) -> tuple[int, dict, str | None]:
    """The image that stands for `key`, what was drawn for it, and which damaged file it stands in for, and why."""
    members = np.flatnonzero(dataset.images.targets == dataset.images.targets[key.sample])
    transform, damaged = dataset.transform_at(key.epoch), None
    for sample in [key.sample, *dataset.plan.replacements(key, members)]:
        try:
            image = dataset.images.open(sample, is_fast=transform.is_fast)
            return sample, augment.describe(key, plan=dataset.plan, transform=transform, image=image), damaged
        except DamagedImage as error:
            damaged = damaged or f"{error.name}: {error.reason}"
    raise InputError(f"{damaged}: no other image of the class can be read either")  # the batch would have said so before


def _mixes(mixing, plan: Plan, batch: Batch, mixed: Tensor, epoch: int) -> list[Mix | None]:
    """How each image of a batch was mixed; None of those that stayed as they were."""
    found = [None] * len(batch.positions)
    if not isinstance(mixing, augment.KeyedMixing):
        return found
    _, members = plan.groups_and_members(batch.positions.numpy())
    for group, start, stop in plan.group_parts(batch.positions.numpy()):
        draw = mixing.mixer.draw(plan.group_generator(epoch, group), plan.group_size, *mixed.shape[-2:])
        for i in range(start, stop):
            if not torch.equal(mixed[i], batch.images[i]):
                member = members[i]
                box = tuple(draw.boxes[member].tolist()) if draw.is_cutmix[member] else None
                found[i] = Mix(float(draw.lam[member]), start + stop - 1 - i, box)
    return found


def _shares(distribution: Tensor, classes: Sequence[str]) -> Shares:
    """The largest parts of a distribution (C,)."""
    top = distribution.float().topk(min(NUM_SHARES, len(classes)))
    return [(classes[i], value) for value, i in zip(top.values.tolist(), top.indices.tolist(), strict=True) if value >= LEAST_SHARE]


# --- the teacher's labels


def _ask(cfg: Config, loader: TrainLoader, rank: Rank, images: Tensor, batch: Batch, epoch: int) -> tuple[str, list[Shares]]:
    """Who answered, and what the teacher says of mixed images: its stored labels where the folder has the epoch's, else the teacher itself.
    Nothing is stored."""
    classes = loader.loader.dataset.images.classes
    if cfg.labels_mode != "off" and labelling.open_store(cfg, loader.plan, len(classes)).status(epoch) is not None:
        who, cfg = f"labels stored in {cfg.teacher_labels}", dataclasses.replace(cfg, teacher_labels_mode="read")
    else:
        if cfg.labels_mode != "off":
            log.info("%s has no labels of epoch %d: the teacher is asked", cfg.teacher_labels, epoch)
        who, cfg = f"{cfg.teacher_model}, asked now", dataclasses.replace(cfg, teacher_labels=None)
    answering = labelling.build_teacher(cfg, loader, rank, num_classes=len(classes), epochs=range(epoch, epoch + 1))
    answer = answering(images, batch, epoch)
    if isinstance(teacher.pick_answer(cfg, len(classes)), teacher.HardLabels):
        return who, [[(classes[number], float("nan"))] for number in answer.tolist()]
    return who, [_shares(one, classes) for one in answer.softmax(dim=1)]
