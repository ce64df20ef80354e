"""The keyed order of a segmenter's run, and its batches.

A step's batch is a function of (data seed, iteration) alone, whatever the processes, the accumulation and the workers: iteration i shows
positions i * batch size and following of an endless sequence, each pass over the data in an order of its own; augmentation and dropout of
each image come from its position. A stretch of iterations between two evaluations is called an epoch."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from loading.keys import draw_words
from loading.sized import DIVISOR, fitted, normalised, padded, to_size, written
from loading.steps import ImageLoader, ImageShare, Part, StepLoader, build_image_loader, build_step_loader, first_sound
from loading.transfer import prefetched
from run.errors import InputError
from segmentation.cropping import MAX_SIZE, SCALES, augmented
from segmentation.data import SegData
from segmentation.networks import IGNORED
from utils import Rank, log

CROP_SIZE = 512  # pixels


class Batch(NamedTuple):
    """Images of a step, or of a part of it, as a segmenter takes them; of an evaluation without words.

    images (B, 3, H, W), normalised, zero in the padding; sizes (height, width) without it; labels (B, H, W), of an evaluation of the picture's
    own size; indices in the data set; words of each image's dropout. `replaced` are the places of those that stand in for others; `damaged` names files that
    cannot be read, and why."""

    images: Tensor
    labels: Tensor
    sizes: list[tuple[int, int]]
    indices: list[int]
    words: list[int] | None = None
    replaced: tuple[int, ...] = ()
    damaged: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class IterationPlan:
    """The order of a data set under one recipe, in epochs of `num_steps` iterations."""

    data: SegData
    batch_size: int  # images per iteration, over all processes
    num_steps: int
    crop_size: int
    max_size: tuple[int, int]
    scales: tuple[float, float]
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

    def replacements(self, epoch: int, place: int, image: int) -> Iterator[int]:
        """The other images in keyed order, as they may stand in for `image`."""
        generator = torch.Generator().manual_seed(draw_words("segmentation replacement", self.data_seed, self.position(epoch, place))[0])
        for other in torch.randperm(len(self.data), generator=generator).tolist():
            if other != image:
                yield other

    def size(self, images: np.ndarray) -> tuple[int, int]:
        """Height and width of every step's images."""
        return self.crop_size, self.crop_size


def build_plan(
    data: SegData,
    *,
    batch_size: int,
    num_steps: int,
    crop_size: int = CROP_SIZE,
    max_size: tuple[int, int] = MAX_SIZE,
    scales: tuple[float, float] = SCALES,
    data_seed: int = 0,
) -> IterationPlan:
    """Plan of a data set for iterations of `batch_size` images over all processes. InputError where the crop is no multiple of 32."""
    if crop_size % DIVISOR:
        raise InputError(f"--crop-size {crop_size} is no multiple of {DIVISOR}: use {max(1, crop_size // DIVISOR) * DIVISOR}")
    return IterationPlan(data, batch_size, num_steps, crop_size, max_size, scales, data_seed)


def tested_size(height: int, width: int, max_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width at which a picture is looked at in evaluation: fitted into `max_size`, then each side up to a multiple of 32."""
    return padded([fitted(height, width, max_size)])


class TrainingSet(Dataset):
    """Batches by `Part`, with uint8 images that `finished` is for.

    `replaces_damaged`: another picture stands in for one that cannot be read, or whose label image cannot; else that is an error."""

    def __init__(self, plan: IterationPlan, *, replaces_damaged: bool = False):
        self.plan = plan
        self.replaces_damaged = replaces_damaged

    def __len__(self) -> int:
        return len(self.plan.data)

    def __getitems__(self, part: Part) -> Batch:
        plan, labels = self.plan, torch.full((len(part.images), *part.size), IGNORED, dtype=torch.int32)
        views, words, indices, replaced, damaged = [], [], [], [], []
        for place, (own, index) in enumerate(zip(labels.numpy(), part.images, strict=True)):
            position = part.positions[place]
            rng, word = plan.draws(part.epoch, position)
            others = plan.replacements(part.epoch, position, index)
            index, (image, whole), found = first_sound(index, others, plan.data.read, replaces=self.replaces_damaged)
            view, cropped = augmented(image, whole, rng, crop_size=plan.crop_size, max_size=plan.max_size, scales=plan.scales)
            own[: cropped.shape[0], : cropped.shape[1]] = cropped
            views.append(view)
            words.append(word)
            indices.append(index)
            replaced += [place] if found else []
            damaged += found
        sizes = [view.shape[:2] for view in views]
        return Batch(written(views, part.size), labels, sizes, indices, words, tuple(replaced), tuple(damaged))


def load_alone(index: int, *, data: SegData, max_size: tuple[int, int]) -> Batch:
    """Picture `index` of an evaluation, in a batch of its own and with labels of its own size. DamagedImage where it cannot be read."""
    image, labels = data.read(index)
    size = tested_size(*labels.shape, max_size)
    return Batch(written([to_size(image, size)], size), torch.from_numpy(labels)[None], [size], [index])


_NO_PIXELS = torch.zeros(0, 3, DIVISOR, DIVISOR, dtype=torch.uint8)
NOTHING = Batch(_NO_PIXELS, _NO_PIXELS[:, 0], [], [])


def finished(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, its images normalised, and zero in the padding."""
    images, labels = (values.to(device, non_blocking=True) for values in (batch.images, batch.labels))
    return batch._replace(images=normalised(images, batch.sizes), labels=labels)


def _ready(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device` and finished, the next one while the last is in use."""
    return prefetched(batches, functools.partial(finished, device=device), device)


def build_train_loader(
    plan: IterationPlan, rank: Rank, *, settings: dict, accum_steps: int = 1, max_bad_images: int = 0, list_path: Path | None = None
) -> StepLoader:
    """The training data in keyed order: `loading.steps.build_step_loader`."""
    log.info("training pictures %d  iterations of %d", len(plan.data), plan.batch_size)
    dataset = TrainingSet(plan, replaces_damaged=max_bad_images > 0)
    damage = {"max_bad_images": max_bad_images, "list_path": list_path, "others": "others"}
    return build_step_loader(plan, dataset, rank, settings=settings, accum_steps=accum_steps, prepare=functools.partial(_ready, device=rank.device), **damage)


def build_val_loader(
    data: SegData,
    rank: Rank,
    *,
    settings: dict,
    max_size: tuple[int, int] = MAX_SIZE,
    skips_damaged: bool = False,
    list_path: Path | None = None,
) -> ImageLoader:
    """Each picture once, over all processes: `loading.steps.build_image_loader`."""
    dataset = ImageShare(len(data), rank, functools.partial(load_alone, data=data, max_size=max_size), nothing=NOTHING)
    prepare = functools.partial(_ready, device=rank.device)
    return build_image_loader(dataset, rank, settings=settings, skips_damaged=skips_damaged, list_path=list_path, prepare=prepare)
