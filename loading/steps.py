"""Keyed steps, whose images are a function of their number alone: who computes which part of one, and loaders of such parts and of images one by one.

What is in a batch is each task's own: a tuple with `indices` of its images, `replaced`, the places of those that stand in for others, and
`damaged`, names of files that cannot be read and why."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

from loading.damage import TrainingDamage, ValidationDamage
from loading.loaders import SHARE_EVERY, received
from run.errors import DamagedImage, InputError
from utils import Rank

T = TypeVar("T")
Prepare = Callable[[Iterator], Iterator]  # takes a loader's batches to the device, and finishes them


@dataclass(frozen=True)
class Part:
    """What the sampler hands to a worker: a process's part of a step. `positions` in the epoch, the `images` there, their padded `size`."""

    epoch: int
    positions: list[int]
    images: list[int]
    size: tuple[int, int]


class StepPlan(Protocol):
    """The order of a data set under one recipe, in epochs of `num_steps` steps of `batch_size` images over all processes."""

    batch_size: int
    num_steps: int

    def steps(self, epoch: int) -> np.ndarray:
        """(num_steps, batch_size) indices of the images of each step of `epoch`."""

    def size(self, images: np.ndarray) -> tuple[int, int]:
        """Padded height and width of a step's images."""


class StepSampler:
    """Yields one process's parts of an epoch's steps, `accum_steps` of each, from any step on."""

    def __init__(self, plan: StepPlan, *, accum_steps: int, rank: int, world_size: int):
        num_parts = accum_steps * world_size
        if plan.batch_size % num_parts:
            raise InputError(f"a step of {plan.batch_size} images cannot be shared by {num_parts} micro-batches (processes x accumulation): use a divisor")
        self.plan = plan
        self.accum_steps, self.rank, self.world_size = accum_steps, rank, world_size
        self.start(epoch=0)

    def start(self, *, epoch: int, step: int = 0) -> None:
        """Choose what the next iteration yields: `epoch`, from its step `step` on."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return (self.plan.num_steps - self.first_step) * self.accum_steps

    def __iter__(self) -> Iterator[Part]:
        steps = self.plan.steps(self.epoch)
        length = self.plan.batch_size // (self.accum_steps * self.world_size)
        for step in range(self.first_step, len(steps)):
            size = self.plan.size(steps[step])
            for micro_step in range(self.accum_steps):
                start = (micro_step * self.world_size + self.rank) * length
                positions = range(step * self.plan.batch_size + start, step * self.plan.batch_size + start + length)
                yield Part(self.epoch, list(positions), steps[step, start : start + length].tolist(), size)


def first_sound(index: int, others: Iterable[int], load: Callable[[int], T], *, replaces: bool) -> tuple[int, T, list[tuple[str, str]]]:
    """The first image of `index` and the `others` that `load` can load: its index, what was loaded, and names and reasons of those before it.

    DamagedImage where it is not `index` and nothing `replaces` that; InputError where none can be loaded."""
    damaged = []
    for one in itertools.chain([index], others):
        try:
            return one, load(one), damaged
        except DamagedImage as error:
            if not replaces:
                raise
            damaged.append((error.name, error.reason))
    raise InputError(f"no image can stand in for {damaged[0][0]}, which is damaged ({damaged[0][1]}): restore it, or take it out of the data")


@dataclass(frozen=True)
class StepLoader:
    """A process's parts of any epoch's steps, from any step on, on the device; what is damaged among their images is in `damage`."""

    loader: DataLoader
    sampler: StepSampler
    damage: TrainingDamage
    prepare: Prepare

    @property
    def num_steps(self) -> int:
        """Optimiser steps per epoch."""
        return self.sampler.plan.num_steps

    @property
    def global_batch(self) -> int:
        """Images per optimiser step, over all processes."""
        return self.sampler.plan.batch_size

    def batches(self, epoch: int, first_step: int = 0) -> Iterator:
        """The process's micro-batches of `epoch` from step `first_step` on. DamagedImages, in every process, where too many are."""
        self.sampler.start(epoch=epoch, step=first_step)
        return self._watched(self.prepare(received(iter(self.loader))), num_batches=len(self.sampler))

    def _watched(self, batches: Iterator, *, num_batches: int) -> Iterator:
        is_alone = self.damage.rank.world_size == 1
        for i, batch in enumerate(batches, 1):
            self.damage.add(batch.damaged)
            if is_alone or i % SHARE_EVERY == 0 or i == num_batches:
                self.damage.report()
            yield batch


@dataclass(frozen=True)
class ImageLoader:
    """Each image of the process's share, in a batch of its own, on the device; those that are damaged are in `damage`."""

    loader: DataLoader
    damage: ValidationDamage
    prepare: Prepare

    def __iter__(self) -> Iterator:
        """A pass. Every process takes part to its end, where DamagedImages names what is damaged unless it is to be left out."""
        num_damaged = 0
        for batch in self.prepare(received(iter(self.loader))):
            self.damage.add(batch.damaged)
            num_damaged += len(batch.damaged)
            if batch.indices:
                yield batch
        self.damage.end_pass(num_damaged)

    def __len__(self) -> int:
        return len(self.loader)


class ImageShare(Dataset):
    """One process's share of `num_images`, each in one process alone and in a batch of its own, so that nothing depends on its neighbours.

    `load` gives the batch of an image, by its index; of one that cannot be read, the batch is `nothing`, and names it."""

    def __init__(self, num_images: int, rank: Rank, load: Callable, *, nothing):
        self.num_images, self.load, self.nothing = num_images, load, nothing
        self.indices = range(rank.index, num_images, rank.world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, places: list[int]):
        (index,) = (self.indices[place] for place in places)
        try:
            return self.load(index)
        except DamagedImage as error:
            return self.nothing._replace(damaged=((error.name, error.reason),))


def build_step_loader(
    plan: StepPlan,
    dataset: Dataset,
    rank: Rank,
    *,
    settings: dict,
    accum_steps: int,
    max_bad_images: int,
    list_path: Path | None,
    others: str,
    prepare: Prepare,
) -> StepLoader:
    """Parts of the steps of `plan`, which `dataset` loads; `settings` of the DataLoader are those of `loading.loaders.loader_settings`.

    `max_bad_images`: so many that are damaged are borne, `others` standing in for them; `list_path` gets the list of them where it is long."""
    sampler = StepSampler(plan, accum_steps=accum_steps, rank=rank.index, world_size=rank.world_size)
    damage = TrainingDamage(rank, list_path, limit=max_bad_images, others=others)
    return StepLoader(DataLoader(dataset, batch_sampler=sampler, **settings), sampler, damage, prepare)


def build_image_loader(dataset: ImageShare, rank: Rank, *, settings: dict, skips_damaged: bool, list_path: Path | None, prepare: Prepare) -> ImageLoader:
    """Each image once, over all processes; `skips_damaged`: without those that cannot be read, else that is an error."""
    damage = ValidationDamage(rank, list_path, num_images=dataset.num_images, is_skipped=skips_damaged)
    return ImageLoader(DataLoader(dataset, batch_size=1, **settings), damage, prepare)
