"""The keyed order of a detector's run, and its batches: images read, resized, flipped and padded with their objects.

A step's batch is a function of (data seed, epoch, step) alone, whatever the processes, the accumulation and the workers: its images have one
orientation and are padded to one size, and the random words of each, which also choose among its anchors and proposals, come from its
position in the epoch. Processes and accumulation decide only who computes which part of it."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detection.coco import CocoData
from loading.keys import draw_words
from loading.sized import DIVISOR, fitted, normalised, opened, padded, to_size, written
from loading.steps import ImageLoader, ImageShare, Part, StepLoader, build_image_loader, build_step_loader, first_sound
from loading.transfer import prefetched
from run.errors import InputError
from utils import Rank, log

MAX_SIZE = (1333, 800)  # long and short side, in pixels


class Batch(NamedTuple):
    """Images of a step, or of a part of it, as a detector takes them; of an evaluation without targets and words.

    images (B, 3, H, W), normalised, zero in the padding; sizes (height, width) without it, and as the files are; indices in the data set.
    `replaced` are the places of those that stand in for others; `damaged` names files that cannot be read, and why."""

    images: Tensor
    sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]
    indices: list[int]
    targets: list[dict[str, Tensor]] | None = None
    words: list[tuple[int, ...]] | None = None
    replaced: tuple[int, ...] = ()
    damaged: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class StepPlan:
    """The order of a data set under one recipe: an epoch shows each training image once, and the first few of each orientation again
    where they do not fill their last step."""

    data: CocoData
    images: np.ndarray  # indices of the training images
    batch_size: int  # images per step, over all processes
    max_size: tuple[int, int]
    data_seed: int

    @property
    def num_steps(self) -> int:
        """Steps per epoch."""
        return sum(-(-int(count) // self.batch_size) for count in np.bincount(self._is_tall(self.images)))

    def _is_tall(self, images: np.ndarray) -> np.ndarray:
        return self.data.sizes[images, 0] >= self.data.sizes[images, 1]

    def steps(self, epoch: int) -> np.ndarray:
        """(num_steps, batch_size) indices of the images of each step of `epoch`; step s has positions s * batch_size and following."""
        generator = torch.Generator().manual_seed(draw_words("detection order", self.data_seed, epoch)[0])
        images = self.images[torch.randperm(len(self.images), generator=generator).numpy()]
        is_tall = self._is_tall(images)
        groups = [group for group in (images[~is_tall], images[is_tall]) if len(group)]
        steps = np.concatenate([np.resize(group, (-(-len(group) // self.batch_size), self.batch_size)) for group in groups])
        return steps[torch.randperm(len(steps), generator=generator).numpy()]

    def words(self, epoch: int, position: int) -> tuple[int, ...]:
        """Random words of the image at `position`: for its anchors, its proposals, its flip, and one to spare."""
        return draw_words("detection image", self.data_seed, epoch, position)

    def replacements(self, epoch: int, position: int, image: int, size: tuple[int, int]) -> Iterator[int]:
        """Training images that may stand in for `image` at `position`, in keyed order: of its orientation, no larger than the step's padded `size`."""
        own = self.images[self._is_tall(self.images) == self._is_tall(np.array([image]))[0]]
        generator = torch.Generator().manual_seed(self.words(epoch, position)[3])
        for other in own[torch.randperm(len(own), generator=generator).numpy()].tolist():
            height, width = fitted(*self.data.sizes[other].tolist(), self.max_size)
            if other != image and height <= size[0] and width <= size[1]:
                yield other

    def size(self, images: np.ndarray) -> tuple[int, int]:
        """Padded height and width of a step's images."""
        return padded([fitted(*self.data.sizes[i].tolist(), self.max_size) for i in images])


def build_plan(data: CocoData, *, batch_size: int, max_size: tuple[int, int] = MAX_SIZE, data_seed: int = 0) -> StepPlan:
    """Plan of a data set for steps of `batch_size` images over all processes. InputError where it has no image to learn from."""
    return StepPlan(data, data.training_images(), batch_size, max_size, data_seed)


def load_image(data: CocoData, index: int, max_size: tuple[int, int]) -> np.ndarray:
    """Image `index` (H, W, 3), uint8, resized to fit; InputError where it cannot be read or has another size than the annotations say."""
    path = data.file(index)
    image = opened(path)
    height, width = data.sizes[index].tolist()
    if image.shape[:2] != (height, width):
        raise InputError(f"{path} is {image.shape[1]}x{image.shape[0]} pixels, {data.path} says {width}x{height}: correct the one or the other")
    return to_size(image, fitted(height, width, max_size))


def load_target(data: CocoData, index: int, size: tuple[int, int], *, is_flipped: bool, has_masks: bool) -> dict[str, Tensor]:
    """The objects to learn of image `index` once it is resized to `size` and perhaps flipped; masks to the nearest pixel."""
    target = data.target(index, has_masks=has_masks)
    height, width = data.sizes[index].tolist()
    boxes = target["boxes"] * torch.tensor([size[1] / width, size[0] / height] * 2)
    if is_flipped:
        boxes = torch.stack([size[1] - boxes[:, 2], boxes[:, 1], size[1] - boxes[:, 0], boxes[:, 3]], dim=1)
    target["boxes"] = boxes
    if has_masks:
        masks = torch.nn.functional.interpolate(target["masks"][None], size=size, mode="nearest-exact")[0]
        target["masks"] = masks.flip(2) if is_flipped else masks
    return target


class TrainingSet(Dataset):
    """Batches by `Part`, with uint8 images that `finished` is for.

    `replaces_damaged`: another image stands in for one that cannot be read; else that is an error."""

    def __init__(self, plan: StepPlan, *, has_masks: bool, replaces_damaged: bool = False):
        self.plan = plan
        self.has_masks = has_masks
        self.replaces_damaged = replaces_damaged

    def __len__(self) -> int:
        return len(self.plan.images)

    def _load(self, index: int) -> np.ndarray:
        return load_image(self.plan.data, index, self.plan.max_size)

    def __getitems__(self, part: Part) -> Batch:
        data, words = self.plan.data, [self.plan.words(part.epoch, position) for position in part.positions]
        views, targets, indices, replaced, damaged = [], [], [], [], []
        for place, (*_, flip_word, _) in enumerate(words):
            index, position = part.images[place], part.positions[place]
            others = self.plan.replacements(part.epoch, position, index, part.size)
            index, view, found = first_sound(index, others, self._load, replaces=self.replaces_damaged)
            is_flipped = bool(flip_word & 1)
            views.append(view[:, ::-1] if is_flipped else view)
            targets.append(load_target(data, index, view.shape[:2], is_flipped=is_flipped, has_masks=self.has_masks))
            indices.append(index)
            replaced += [place] if found else []
            damaged += found
        originals = [tuple(data.sizes[index].tolist()) for index in indices]
        sizes = [view.shape[:2] for view in views]
        return Batch(written(views, part.size), sizes, originals, indices, targets, [one[:2] for one in words], tuple(replaced), tuple(damaged))


def load_alone(index: int, *, data: CocoData, max_size: tuple[int, int]) -> Batch:
    """Image `index` of an evaluation, in a batch of its own. DamagedImage where it cannot be read."""
    view = load_image(data, index, max_size)
    size = view.shape[:2]
    return Batch(written([view], padded([size])), [size], [tuple(data.sizes[index].tolist())], [index])


NOTHING = Batch(torch.zeros(0, 3, DIVISOR, DIVISOR, dtype=torch.uint8), [], [], [])


def finished(batch: Batch) -> Batch:
    """The batch with its uint8 images normalised, and zero in the padding; on the device they are on."""
    return batch._replace(images=normalised(batch.images, batch.sizes))


def _ready(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device` and finished; the images of the next one on their way while the last is in use."""
    for batch in prefetched(batches, lambda one: finished(one._replace(images=one.images.to(device, non_blocking=True))), device):
        if batch.targets is None:
            yield batch
        else:
            yield batch._replace(targets=[{name: value.to(device, non_blocking=True) for name, value in one.items()} for one in batch.targets])


def build_train_loader(
    plan: StepPlan, rank: Rank, *, has_masks: bool, settings: dict, accum_steps: int = 1, max_bad_images: int = 0, list_path: Path | None = None
) -> StepLoader:
    """The training data in keyed order: `loading.steps.build_step_loader`."""
    log.info("training images %d of %d  steps %d of %d images", len(plan.images), len(plan.data), plan.num_steps, plan.batch_size)
    dataset = TrainingSet(plan, has_masks=has_masks, replaces_damaged=max_bad_images > 0)
    damage = {"max_bad_images": max_bad_images, "list_path": list_path, "others": "others of its shape"}
    return build_step_loader(plan, dataset, rank, settings=settings, accum_steps=accum_steps, prepare=functools.partial(_ready, device=rank.device), **damage)


def build_val_loader(
    data: CocoData,
    rank: Rank,
    *,
    settings: dict,
    max_size: tuple[int, int] = MAX_SIZE,
    skips_damaged: bool = False,
    list_path: Path | None = None,
) -> ImageLoader:
    """Each image once, over all processes: `loading.steps.build_image_loader`."""
    dataset = ImageShare(len(data), rank, functools.partial(load_alone, data=data, max_size=max_size), nothing=NOTHING)
    prepare = functools.partial(_ready, device=rank.device)
    return build_image_loader(dataset, rank, settings=settings, skips_damaged=skips_damaged, list_path=list_path, prepare=prepare)
