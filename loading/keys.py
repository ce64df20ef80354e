"""The keyed order of a run: which image, augmentation and mix group stands at each position of each epoch.

Everything here is a function of (data seed, epoch, position) alone: not of workers, processes, batch size or what was drawn
before. An epoch has `num_positions` positions p. Position p shows view `p % repeats` of image `permutation[p // repeats]`.
Positions fall into blocks of `lanes * group_size`; those of one block with equal `p % lanes` form a mix group. A group's images
share one draw of mixup or CutMix, each with its mirror image in the group (member i with group_size - 1 - i) as partner.

A run takes *slots* in order. Slot s belongs to group `s // group_size`; inside a group, mirror pairs follow each other, so that
any even number of slots from an even start is closed under mirroring.
"""

import contextlib
import hashlib
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import get_worker_info

from run.errors import InputError

VERSION = b"understudy-keys1"  # changes whenever the same key would draw something else


def draw_words(purpose: str, *key: int) -> tuple[int, int, int, int]:
    """Four independent 64-bit words that depend on `purpose` and the integers of `key` alone."""
    packed = purpose.encode() + struct.pack(f"<{len(key)}q", *key)
    return struct.unpack("<4Q", hashlib.blake2b(packed, digest_size=32, person=VERSION).digest())


def seed_generators(words: tuple[int, ...]) -> None:
    """Seed the three generators that timm's and torchvision's transforms draw from."""
    random.seed(words[0])
    np.random.seed(words[1] % 2**32)
    torch.default_generator.manual_seed(words[2])  # not torch.manual_seed: that also visits the GPUs, ten times slower


@contextlib.contextmanager
def restored_generators():
    """Run a block and put the states of the three generators back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def borrowed_generators():
    """Run a block that seeds the three generators: `restored_generators`, but in a loader's worker, where nothing else draws from them."""
    return restored_generators() if get_worker_info() is None else contextlib.nullcontext()


@contextlib.contextmanager
def seeded(words: tuple[int, ...]):
    """Run a block with the three generators seeded; outside of a loader's worker, put their states back afterwards."""
    with borrowed_generators():
        seed_generators(words)
        yield


@dataclass(frozen=True)
class Key:
    """What the sampler hands to a worker: all that one training image depends on."""

    epoch: int
    position: int
    sample: int
    repeat: int


@dataclass(frozen=True)
class Plan:
    """The order of one data set under one recipe; see the module's text."""

    num_images: int
    repeats: int
    group_size: int
    lanes: int
    num_positions: int
    data_seed: int

    def permutation(self, epoch: int) -> torch.Tensor:
        """(num_images,) order of the images in `epoch`."""
        generator = torch.Generator().manual_seed(draw_words("order", self.data_seed, epoch)[0])
        return torch.randperm(self.num_images, generator=generator)

    def groups_and_members(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mix group of each position, and its place in that group; both of the shape of `positions`."""
        block, offset = np.divmod(positions, self.lanes * self.group_size)
        return block * self.lanes + offset % self.lanes, offset // self.lanes

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Positions of the slots from `start` to `stop`, group after group, each group's by member: partners are mirror images."""
        group, slot = np.divmod(np.arange(start, stop), self.group_size)
        pair, is_mirror = np.divmod(slot, 2)
        member = np.where(is_mirror, self.group_size - 1 - pair, pair)
        order = np.lexsort((member, group))
        group, member = group[order], member[order]
        block, lane = np.divmod(group, self.lanes)
        return block * self.lanes * self.group_size + member * self.lanes + lane

    def keys(self, epoch: int, positions: np.ndarray, permutation: np.ndarray) -> list["Key"]:
        """The keys of `positions` (n,) in `epoch`, whose permutation is given."""
        samples, repeats = permutation[positions // self.repeats], positions % self.repeats
        return [Key(epoch, *key) for key in zip(positions.tolist(), samples.tolist(), repeats.tolist(), strict=True)]

    def group_parts(self, positions: np.ndarray) -> list[tuple[int, int, int]]:
        """(group, start, stop) of the mix groups, or parts of them, in a micro-batch at `positions` (n,)."""
        groups, _ = self.groups_and_members(positions)
        starts = np.flatnonzero(np.diff(groups, prepend=-1)).tolist()
        return [(int(groups[start]), start, stop) for start, stop in zip(starts, [*starts[1:], len(groups)], strict=True)]

    def sample_words(self, epoch: int, sample: int, repeat: int) -> tuple[int, ...]:
        """Seeds of the augmentation of view `repeat` of image `sample`."""
        return draw_words("sample", self.data_seed, epoch, sample, repeat)

    def replacements(self, key: Key, members: np.ndarray) -> Iterator[int]:
        """The other images of `members` (n,), each once, in the order in which they are to stand in for that of `key`."""
        left = [member for member in members.tolist() if member != key.sample]
        for attempt in range(len(left)):
            yield left.pop(draw_words("replacement", self.data_seed, key.epoch, key.sample, key.repeat, attempt)[0] % len(left))

    def group_generator(self, epoch: int, group: int) -> np.random.RandomState:
        """Generator of a mix group's draw; numpy's legacy generator, whose stream is frozen."""
        return np.random.RandomState(draw_words("mix", self.data_seed, epoch, group)[0] % 2**32)


def build_plan(num_images: int, *, repeated_aug: bool, group_size: int, lanes: int, data_seed: int) -> Plan:
    """Plan of a data set of `num_images` images; groups and lanes shrink to what a small one can fill.

    Raises InputError for fewer than two images."""
    if num_images < 2:
        raise InputError(f"the training set has {num_images} image: training needs at least two")
    usable = num_images // 256 * 256 if repeated_aug and num_images >= 256 else num_images
    if usable < group_size:
        group_size, lanes = usable // 2 * 2, 1
    lanes = min(lanes, usable // group_size)
    block = lanes * group_size
    return Plan(num_images, 3 if repeated_aug else 1, group_size, lanes, usable // block * block, data_seed)


class KeyedBatchSampler:
    """Yields one process's micro-batches of an epoch as lists of `Key`, from any optimiser step on.

    A step takes the next `world_size * accum_steps * batch_size` slots; which process takes which of them changes nothing."""

    def __init__(self, plan: Plan, *, batch_size: int, accum_steps: int, rank: int, world_size: int):
        self.plan = plan
        self.batch_size = batch_size
        self.accum_steps = accum_steps
        self.rank = rank
        self.world_size = world_size
        self.num_steps = plan.num_positions // (batch_size * accum_steps * world_size)
        self.start(epoch=0)

    def start(self, *, epoch: int, step: int = 0) -> None:
        """Choose what the next iteration yields: `epoch`, from its optimiser step `step` on."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return (self.num_steps - self.first_step) * self.accum_steps

    def __iter__(self):
        permutation = self.plan.permutation(self.epoch).numpy()
        for micro_step in range(self.first_step * self.accum_steps, self.num_steps * self.accum_steps):
            start = (micro_step * self.world_size + self.rank) * self.batch_size
            yield self.plan.keys(self.epoch, self.plan.positions(start, start + self.batch_size), permutation)


def fit_batch_size(plan: Plan, batch_size: int, *, num_shares: int, group_size: int, is_mixing: bool) -> int:
    """Micro-batch size to use: `batch_size`, or less where an epoch cannot fill `num_shares` (processes x accumulation) of them.

    While mixing, a micro-batch holds whole groups or an equal part of one; InputError names the sizes that do."""
    if plan.num_positions < batch_size * num_shares:
        batch_size = plan.num_positions // num_shares
        batch_size -= batch_size % 2 if is_mixing else 0
        if batch_size < 1:
            raise InputError(f"an epoch has {plan.num_positions} images for {num_shares} micro-batches (processes x accumulation): use fewer")
        return batch_size
    is_shrunk = plan.group_size < group_size
    if is_mixing and not is_shrunk and batch_size % group_size and group_size % batch_size:
        fitting = [size for size in range(2, group_size + 1, 2) if group_size % size == 0]
        raise InputError(
            f"--batch-size {batch_size} does not fit --mix-group-size {group_size}, the images that share one draw of mixup or CutMix: "
            f"use {', '.join(map(str, fitting))} or a multiple of {group_size}, or set --mix-group-size {batch_size}"
        )
    return batch_size
