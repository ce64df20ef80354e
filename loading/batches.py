"""From keys to batches: images opened, transformed and written side by side, in memory that a loader's processes share."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from loading import augment, pixels
from loading.images import Images
from loading.keys import Key, Plan, borrowed_generators, seed_generators
from utils import Rank


class Batch(NamedTuple):
    """A micro-batch of training images.

    images (B, 3, H, W): normalised float32, or uint8 on its way to a device that will finish them; targets (B,) class indices;
    positions (B,) in the epoch; pixel_hashes (B,) int64, of the uint8 images before erasing, where stored labels need them; erased:
    what is still to be erased; num_fallbacks: images that the fast decoder could not decode."""

    images: Tensor
    targets: Tensor
    positions: Tensor
    pixel_hashes: Tensor | None = None
    erased: augment.Erased | None = None
    num_fallbacks: int = 0


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

    def _fill(self, batch: Tensor | None, i: int, num_images: int, view: np.ndarray, erased: list) -> Tensor:
        """Write the `i`-th of `num_images` views (H, W, 3), uint8, into the batch (B, H, W, 3), which the first one makes."""
        if batch is None:
            batch = self._allocate(num_images, *view.shape[:2])
        batch.numpy()[i] = augment.finish_one(view, erased).permute(1, 2, 0) if self.is_finished_here else view
        return batch


class TrainingSet(_LoadedSet):
    """Augmented images by key: (normalised float32 (3, H, W), class index, position), and whole batches of them.

    `is_hashed`: batches come with hashes of their pixels."""

    def __init__(
        self,
        images: Images,
        transform: augment.Transform,
        plan: Plan,
        *,
        is_finished_here: bool = True,
        reuses_memory: bool = False,
        is_hashed: bool = True,
    ):
        super().__init__(images, transform, is_finished_here=is_finished_here, reuses_memory=reuses_memory)
        self.plan = plan
        self.is_hashed = is_hashed

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, key: Key) -> tuple[np.ndarray, list, bool]:
        """uint8 pixels (H, W, 3) of a view, what is to be erased of it, and whether Pillow had to decode it."""
        with borrowed_generators():
            return self._draw(key)

    def _draw(self, key: Key) -> tuple[np.ndarray, list, bool]:
        image = self.images.open(key.sample, is_fast=self.transform.is_fast)
        seed_generators(self.plan.sample_words(key.epoch, key.sample, key.repeat))
        view, erased = self.transform.draw(image)
        return view, erased, getattr(image, "is_fallback", False)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int]:
        view, erased, _ = self.draw(key)
        return augment.finish_one(view, erased), int(self.images.targets[key.sample]), key.position

    def __getitems__(self, keys: list[Key]) -> Batch:
        batch, hashes, all_erased, num_fallbacks = None, [], [], 0
        with borrowed_generators():  # once, for a state is longer to save than to seed
            for i, key in enumerate(keys):
                view, erased, is_fallback = self._draw(key)
                batch = self._fill(batch, i, len(keys), view, erased)
                if self.is_hashed:
                    hashes.append(pixels.pixel_hash(view))
                all_erased.append(erased)
                num_fallbacks += is_fallback
        targets = torch.from_numpy(self.images.targets[[key.sample for key in keys]].astype(np.int64))
        positions, hashes = torch.tensor([key.position for key in keys]), torch.tensor(hashes) if self.is_hashed else None
        erased = None if self.is_finished_here else augment.gather_erased(all_erased)
        return Batch(batch.permute(0, 3, 1, 2), targets, positions, hashes, erased, num_fallbacks)


class ValidationSet(_LoadedSet):
    """One process's share of the images, each in one process alone: (normalised float32 (3, H, W), class index), and batches."""

    def __init__(self, images: Images, transform: augment.Transform, rank: Rank, *, is_finished_here: bool = True, reuses_memory: bool = False):
        super().__init__(images, transform, is_finished_here=is_finished_here, reuses_memory=reuses_memory)
        self.indices = range(rank.index, len(images), rank.world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images.open(self.indices[index], is_fast=self.transform.is_fast)
        return self.transform(image), int(self.images.targets[self.indices[index]])

    def __getitems__(self, indices: list[int]) -> Batch:
        batch, num_fallbacks, chosen = None, 0, [self.indices[i] for i in indices]
        for i, index in enumerate(chosen):
            image = self.images.open(index, is_fast=self.transform.is_fast)
            batch = self._fill(batch, i, len(chosen), *self.transform.draw(image))
            num_fallbacks += getattr(image, "is_fallback", False)
        targets = torch.from_numpy(self.images.targets[chosen].astype(np.int64))
        erased = None if self.is_finished_here else augment.gather_erased([])
        return Batch(batch.permute(0, 3, 1, 2), targets, torch.tensor(chosen), erased=erased, num_fallbacks=num_fallbacks)
