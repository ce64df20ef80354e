"""The keyed order of a segmenter's run, and its batches.

A step's batch is a function of (data seed, iteration) alone, whatever the processes, the accumulation and the workers: iteration i shows
positions i * batch size and following of an endless sequence, each pass over the data in an order of its own; augmentation and dropout of
each image come from its position. A stretch of iterations between two evaluations is called an epoch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from loading.keys import draw_words
from loading.sized import DIVISOR, fitted, normalised, padded, to_size, written
from loading.steps import Part, StepSampler
from loading.transfer import prefetched
from run.errors import InputError
from segmentation.cropping import MAX_SIZE, augmented
from segmentation.data import SegData
from segmentation.networks import IGNORED
from utils import Rank, log

CROP_SIZE = 512  # pixels


class Batch(NamedTuple):
    """Images of a step, or of a part of it, as a segmenter takes them; of an evaluation without words.

    images (B, 3, H, W), normalised, zero in the padding; sizes (height, width) without it; labels (B, H, W), of an evaluation of the picture's
    own size; indices in the data set; words of each image's dropout."""

    images: Tensor
    labels: Tensor
    sizes: list[tuple[int, int]]
    indices: list[int]
    words: list[int] | None = None
    replaced: tuple[int, ...] = ()  # images that others stand in for: none


@dataclass(frozen=True)
class IterationPlan:
    """The order of a data set under one recipe, in epochs of `num_steps` iterations."""

    data: SegData
    batch_size: int  # images per iteration, over all processes
    num_steps: int
    crop_size: int
    max_size: tuple[int, int]
    data_seed: int

    def steps(self, epoch: int) -> np.ndarray:
        """(num_steps, batch_size) indices of the images of each iteration of `epoch`."""
        first = self.position(epoch, 0)
        passes, places = np.divmod(np.arange(first, first + self.num_steps * self.batch_size), len(self.data))
        images = np.empty(len(places), np.int64)
        for number in np.unique(passes).tolist():
            is_here = passes == number
            images[is_here] = self._order(number)[places[is_here]]
        return images.reshape(self.num_steps, self.batch_size)

    def _order(self, number: int) -> np.ndarray:
        """The images in the order of pass `number` over the data."""
        generator = torch.Generator().manual_seed(draw_words("segmentation order", self.data_seed, number)[0])
        return torch.randperm(len(self.data), generator=generator).numpy()

    def position(self, epoch: int, place: int) -> int:
        """Position in the endless sequence of the image at `place` among those of `epoch`."""
        return epoch * self.num_steps * self.batch_size + place

    def draws(self, epoch: int, place: int) -> tuple[np.random.RandomState, int]:
        """The generator of an image's augmentation, and the word of its dropout."""
        *seeds, word, _ = draw_words("segmentation image", self.data_seed, self.position(epoch, place))
        return np.random.RandomState([half for seed in seeds for half in divmod(seed, 2**32)]), word

    def size(self, images: np.ndarray) -> tuple[int, int]:
        """Height and width of every step's images."""
        return self.crop_size, self.crop_size


def build_plan(
    data: SegData, *, batch_size: int, num_steps: int, crop_size: int = CROP_SIZE, max_size: tuple[int, int] = MAX_SIZE, data_seed: int = 0
) -> IterationPlan:
    """Plan of a data set for iterations of `batch_size` images over all processes. InputError where the crop is no multiple of 32."""
    if crop_size % DIVISOR:
        raise InputError(f"--crop-size {crop_size} is no multiple of {DIVISOR}: use {max(1, crop_size // DIVISOR) * DIVISOR}")
    return IterationPlan(data, batch_size, num_steps, crop_size, max_size, data_seed)


def tested_size(height: int, width: int, max_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width at which a picture is looked at in evaluation: fitted into `max_size`, then each side up to a multiple of 32."""
    return padded([fitted(height, width, max_size)])


class TrainingSet(Dataset):
    """Batches by `Part`, with uint8 images that `finished` is for."""

    def __init__(self, plan: IterationPlan):
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan.data)

    def __getitems__(self, part: Part) -> Batch:
        labels = torch.full((len(part.images), *part.size), IGNORED, dtype=torch.int32)
        views, words = [], []
        for own, index, place in zip(labels.numpy(), part.images, part.positions, strict=True):
            rng, word = self.plan.draws(part.epoch, place)
            view, cropped = augmented(*self.plan.data.read(index), rng, crop_size=self.plan.crop_size, max_size=self.plan.max_size)
            own[: cropped.shape[0], : cropped.shape[1]] = cropped
            views.append(view)
            words.append(word)
        return Batch(written(views, part.size), labels, [view.shape[:2] for view in views], part.images, words)


class ValidationSet(Dataset):
    """One process's share of the pictures, each in a batch of its own and with labels of its own size."""

    def __init__(self, data: SegData, rank: Rank, *, max_size: tuple[int, int]):
        self.data = data
        self.max_size = max_size
        self.indices = range(rank.index, len(data), rank.world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, places: list[int]) -> Batch:
        (index,) = (self.indices[place] for place in places)
        image, labels = self.data.read(index)
        size = tested_size(*labels.shape, self.max_size)
        return Batch(written([to_size(image, size)], size), torch.from_numpy(labels)[None], [size], [index])


def finished(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, its images normalised, and zero in the padding."""
    images, labels = (values.to(device, non_blocking=True) for values in (batch.images, batch.labels))
    return batch._replace(images=normalised(images, batch.sizes), labels=labels)


@dataclass(frozen=True)
class TrainLoader:
    """Parts of any epoch's iterations, from any of them on, on the device."""

    loader: DataLoader
    sampler: StepSampler
    device: torch.device

    @property
    def num_steps(self) -> int:
        """Iterations per epoch."""
        return self.sampler.plan.num_steps

    @property
    def global_batch(self) -> int:
        """Images per iteration, over all processes."""
        return self.sampler.plan.batch_size

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The process's micro-batches of `epoch` from its iteration `first_step` on."""
        self.sampler.start(epoch=epoch, step=first_step)
        return prefetched(iter(self.loader), lambda batch: finished(batch, self.device), self.device)


@dataclass(frozen=True)
class ValLoader:
    """Each picture of the process's share, on the device."""

    loader: DataLoader
    device: torch.device

    def __iter__(self) -> Iterator[Batch]:
        return prefetched(iter(self.loader), lambda batch: finished(batch, self.device), self.device)

    def __len__(self) -> int:
        return len(self.loader)


def build_train_loader(plan: IterationPlan, rank: Rank, *, settings: dict, accum_steps: int = 1) -> TrainLoader:
    """The training data in keyed order; `settings` of the DataLoader are those of `loading.loaders.loader_settings`."""
    sampler = StepSampler(plan, accum_steps=accum_steps, rank=rank.index, world_size=rank.world_size)
    log.info("training pictures %d  iterations of %d", len(plan.data), plan.batch_size)
    return TrainLoader(DataLoader(TrainingSet(plan), batch_sampler=sampler, **settings), sampler, rank.device)


def build_val_loader(data: SegData, rank: Rank, *, settings: dict, max_size: tuple[int, int] = MAX_SIZE) -> ValLoader:
    """Each picture once, over all processes."""
    return ValLoader(DataLoader(ValidationSet(data, rank, max_size=max_size), batch_size=1, **settings), rank.device)
