"""From keys to batches: images opened, transformed and written side by side, in memory that a loader's processes share."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from loading import augment, pixels
from loading.images import Images
from loading.keys import Key, Plan, borrowed_generators, seed_generators
from run.errors import DamagedImage, InputError
from utils import Rank


class Batch(NamedTuple):
    """A micro-batch of training images.

    images (B, 3, H, W): normalised float32, or uint8 on its way to a device that will finish them; targets (B,) class indices; with S views of
    each image both are (S * B), the first view of each, then the second of each, and so on; positions (B,) in the epoch; pixel_hashes (B,)
    int64, of the uint8 images before erasing, where stored labels need them; erased: what is still to be erased; num_fallbacks: images that the
    fast decoder could not decode; replaced: places in the batch where another image of the class stands in for a damaged one; damaged: (name,
    reason) of each damaged file that was met; mixed: the images and targets that the network is to learn, where they were made on the batch's
    way to the device; `images` is then empty."""

    images: Tensor
    targets: Tensor
    positions: Tensor
    pixel_hashes: Tensor | None = None
    erased: augment.Erased | None = None
    num_fallbacks: int = 0
    replaced: Sequence[int] = ()
    damaged: Sequence[tuple[str, str]] = ()
    mixed: tuple[Tensor, Tensor] | None = None


class View(NamedTuple):
    """A view of an image: uint8 pixels (H, W, 3), what is to be erased of them, whether Pillow had to decode it, (name, reason) of the damaged
    files in whose place it is, and pixels and what is to be erased of further views of it."""

    pixels: np.ndarray
    erased: list
    is_fallback: bool = False
    damaged: Sequence[tuple[str, str]] = ()
    further: Sequence[tuple[np.ndarray, list]] = ()


PREFETCH = 2  # batches that a DataLoader has each of its processes work ahead


class _Rooms:
    """Memory for a loader process's batches, shared with its parent, that takes turns: fresh pages cost more than filling them.

    A process is at most `PREFETCH` batches ahead of the one that its parent has just taken, and is copying (see `_ready`)."""

    def __init__(self):
        self._storages: list[torch.UntypedStorage] = []
        self._turn = -1

    def next(self, num_bytes: int) -> torch.UntypedStorage:
        """Room of at least `num_bytes`, that used longest ago."""
        self._turn = (self._turn + 1) % (PREFETCH + 2)
        if self._turn == len(self._storages):
            self._storages.append(torch.UntypedStorage._new_shared(num_bytes))
        elif self._storages[self._turn].nbytes() < num_bytes:  # made for an epoch's last batch
            self._storages[self._turn] = torch.UntypedStorage._new_shared(num_bytes)
        return self._storages[self._turn]


class _LoadedSet(Dataset):
    """Images that a loader's processes open and transform, written once into the batch (B, 3, H, W) that holds them.

    `is_finished_here`: normalise and erase in the loader; else batches are uint8 and finished on the device. `reuses_memory`:
    a batch of a loader's process is overwritten three batches later."""

    def __init__(self, images: Images, transform: augment.Transform, *, is_finished_here: bool = True, reuses_memory: bool = False):
        self.images = images
        self.transform = transform
        self.is_finished_here = is_finished_here
        self._rooms = _Rooms() if reuses_memory else None

    def _allocate(self, num_images: int, height: int, width: int) -> Tensor:
        """Room for a batch (B, H, W, 3); in a loader's process in memory shared with its parent."""
        dtype = torch.float32 if self.is_finished_here else torch.uint8
        shape, num_bytes = (num_images, height, width, 3), num_images * height * width * 3 * dtype.itemsize
        if get_worker_info() is None:
            return torch.empty(shape, dtype=dtype)
        storage = torch.UntypedStorage._new_shared(num_bytes) if self._rooms is None else self._rooms.next(num_bytes)
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape)

    def _fill(self, batch: Tensor | None, i: int, num_images: int, view: View) -> Tensor:
        """Write the `i`-th of `num_images` views into the batch (B, H, W, 3), which the first one makes; further views of it `num_images` later each."""
        if batch is None:
            batch = self._allocate(num_images * (1 + len(view.further)), *view.pixels.shape[:2])
        for place, (one, erased) in enumerate([(view.pixels, view.erased), *view.further]):
            finished = augment.finish_one(one, erased, self.transform.statistics).permute(1, 2, 0) if self.is_finished_here else one
            batch.numpy()[place * num_images + i] = finished
        return batch

    def _view(self, index: int, words: tuple[int, ...] | None = None, epoch: int = 0) -> View:
        """The image at `index`, transformed as in `epoch`, with the generators seeded by `words`. DamagedImage where it cannot be read."""
        image = self.images.open(index, is_fast=self.transform.is_fast)
        if words is not None:
            seed_generators(words)
        (pixels, erased), *further = self.transform_at(epoch).draw_splits(image)
        return View(pixels, erased, getattr(image, "is_fallback", False), (), further)

    def transform_at(self, epoch: int) -> augment.Transform:
        """What images of `epoch` go through."""
        return self.transform


class TrainingSet(_LoadedSet):
    """Augmented images by key: (normalised float32 (3, H, W), class index, position), and whole batches of them.

    `is_hashed`: batches come with hashes of their pixels. `replaces_damaged`: another image of its class, chosen by the key, stands in
    for one that cannot be read; else that is an error. `later`: transforms that take over, each from its epoch on."""

    def __init__(
        self,
        images: Images,
        transform: augment.Transform,
        plan: Plan,
        *,
        is_finished_here: bool = True,
        reuses_memory: bool = False,
        is_hashed: bool = True,
        replaces_damaged: bool = False,
        later: Mapping[int, augment.Transform] | None = None,
    ):
        super().__init__(images, transform, is_finished_here=is_finished_here, reuses_memory=reuses_memory)
        self.plan = plan
        self.is_hashed = is_hashed
        self.replaces_damaged = replaces_damaged
        self.later = dict(later or {})

    def transform_at(self, epoch: int) -> augment.Transform:
        begun = [first for first in self.later if first <= epoch]
        return self.later[max(begun)] if begun else self.transform

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, key: Key) -> View:
        """What `key` shows. InputError where neither its image nor any other of the class can be read."""
        with borrowed_generators():
            return self._draw(key)

    def _draw(self, key: Key) -> View:
        words = self.plan.sample_words(key.epoch, key.sample, key.repeat)
        try:
            return self._view(key.sample, words, key.epoch)
        except DamagedImage as error:
            if not self.replaces_damaged:
                raise
            return self._draw_another(key, words, (error.name, error.reason))

    def _draw_another(self, key: Key, words: tuple[int, ...], found: tuple[str, str]) -> View:
        """A view of the first sound image among those that may stand in for the one of `key`, which was `found` to be damaged."""
        target = self.images.targets[key.sample]
        members = np.flatnonzero(self.images.targets == target)
        damaged = [found]
        for sample in self.plan.replacements(key, members):
            try:
                return self._view(sample, words, key.epoch)._replace(damaged=damaged)
            except DamagedImage as error:
                damaged.append((error.name, error.reason))
        raise InputError(
            f"none of the {len(members)} images of class {self.images.classes[target]} can be read, the first of them for: "
            f"{found[0]}: {found[1]}. Restore them, or remove the class's folder"
        )

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int]:
        view = self.draw(key)
        return augment.finish_one(view.pixels, view.erased, self.transform.statistics), int(self.images.targets[key.sample]), key.position

    def __getitems__(self, keys: list[Key]) -> Batch:
        batch, hashes, all_erased, num_fallbacks, replaced, damaged = None, [], [], 0, [], []
        with borrowed_generators():  # once, for a state is longer to save than to seed
            for i, key in enumerate(keys):
                view = self._draw(key)
                batch = self._fill(batch, i, len(keys), view)
                if self.is_hashed:
                    hashes.append(pixels.pixel_hash(view.pixels))
                all_erased.append([view.erased, *(erased for _, erased in view.further)])
                num_fallbacks += view.is_fallback
                if view.damaged:
                    replaced.append(i)
                    damaged += view.damaged
        all_erased = list(itertools.chain.from_iterable(zip(*all_erased, strict=True)))  # in the order of the batch
        targets = torch.from_numpy(self.images.targets[[key.sample for key in keys]].astype(np.int64)).repeat(self.transform.num_splits)
        positions, hashes = torch.tensor([key.position for key in keys]), torch.tensor(hashes) if self.is_hashed else None
        erased = None if self.is_finished_here else augment.gather_erased(all_erased)
        return Batch(batch.permute(0, 3, 1, 2), targets, positions, hashes, erased, num_fallbacks, replaced, damaged)


class ValidationSet(_LoadedSet):
    """One process's share of the images, each in one process alone: (normalised float32 (3, H, W), class index), and batches.

    A batch is without the images that cannot be read, and names them."""

    def __init__(self, images: Images, transform: augment.Transform, rank: Rank, *, is_finished_here: bool = True, reuses_memory: bool = False):
        super().__init__(images, transform, is_finished_here=is_finished_here, reuses_memory=reuses_memory)
        self.indices = range(rank.index, len(images), rank.world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        view = self._view(self.indices[index])
        return augment.finish_one(view.pixels, view.erased, self.transform.statistics), int(self.images.targets[self.indices[index]])

    def __getitems__(self, indices: list[int]) -> Batch:
        batch, sound, num_fallbacks, damaged = None, [], 0, []
        for i in indices:
            index = self.indices[i]
            try:
                view = self._view(index)
            except DamagedImage as error:
                damaged.append((error.name, error.reason))
                continue
            batch = self._fill(batch, len(sound), len(indices), view)
            sound.append(index)
            num_fallbacks += view.is_fallback
        images = torch.empty(0, 0, 0, 3) if batch is None else batch[: len(sound)]
        targets = torch.from_numpy(self.images.targets[sound].astype(np.int64))
        erased = None if self.is_finished_here else augment.gather_erased([])
        return Batch(images.permute(0, 3, 1, 2), targets, torch.tensor(sound, dtype=torch.int64), None, erased, num_fallbacks, damaged=damaged)
