"""Who computes which part of a keyed step, whose images are a function of its number alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from run.errors import InputError


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
