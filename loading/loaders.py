"""Loader processes, and their batches on the way to the device."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from loading import augment, pixels
from loading.batches import PREFETCH, Batch
from loading.damage import TrainingDamage, ValidationDamage
from loading.keys import KeyedBatchSampler, Plan
from loading.transfer import prefetched
from run.config import RunConfig
from utils import Rank, log


def copied(images: Tensor) -> Tensor:
    """A copy of a batch laid out (B, H, W, 3), made by this thread alone: torch would wake its others, and they would take cores
    from the loader's processes."""
    return torch.from_numpy(images.permute(0, 2, 3, 1).numpy().copy()).permute(0, 3, 1, 2)


def _to_device(batch: Batch, device: torch.device, values: augment.Statistics = augment.IMAGENET) -> Batch:
    """The batch with its images on `device` and finished, in memory that no loader process overwrites; `values` are what they are normalised by."""
    images = copied(batch.images) if batch.images.is_shared() else batch.images
    images = images.to(device, non_blocking=True)
    if batch.erased is not None:
        images = augment.finish(images, batch.erased._replace(fill=batch.erased.fill.to(device, non_blocking=True)), values)
    return batch._replace(images=images, erased=None)


def _as_is(batch: Batch) -> Batch:
    """What collates batches that are none to be collated, and what prepares those that are prepared."""
    return batch


def _ready(
    batches: Iterator[Batch],
    device: torch.device,
    values: augment.Statistics,
    *,
    num_batches: int | None,
    purpose: str,
    prepare: Callable[[Batch], Batch] = _as_is,
) -> Iterator[Batch]:
    """The batches on `device`, finished by the `values` and prepared, the next one while the last is in use; with the `num_batches`-th, which is
    the last, it says how many images Pillow had to decode; nothing where that is None."""
    num_fallbacks = num_images = 0
    for i, batch in enumerate(prefetched(batches, lambda batch: prepare(_to_device(batch, device, values)), device), 1):
        num_fallbacks, num_images = num_fallbacks + batch.num_fallbacks, num_images + len(batch.positions)
        if i == num_batches and num_fallbacks:
            log.info("%s: %d of %d images were no JPEGs that the fast decoder takes and were decoded by Pillow", purpose, num_fallbacks, num_images)
        yield batch


def received(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches of loader processes; where one died while its batch was fetched, the error with which torch tells so elsewhere."""
    try:
        yield from batches
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        raise RuntimeError("DataLoader worker (pid unknown) is gone") from error


SHARE_EVERY = 64  # micro-batches between which processes tell each other of damaged files


@dataclass(frozen=True)
class TrainLoader:
    """Micro-batches of any epoch, from any step on; what is damaged among their images is in `damage`.

    `is_in_step`: all processes take as many micro-batches as this one, and report damage while they do; else the caller does for them."""

    loader: DataLoader
    sampler: KeyedBatchSampler
    plan: Plan
    damage: TrainingDamage
    is_in_step: bool = True

    @property
    def num_steps(self) -> int:
        """Optimiser steps per epoch."""
        return self.sampler.num_steps

    @property
    def global_batch(self) -> int:
        """Images per optimiser step, over all processes."""
        return self.sampler.batch_size * self.sampler.accum_steps * self.sampler.world_size

    def shape(self, input_size: int) -> tuple[int, int, int, int]:
        """Of a micro-batch's images."""
        return self.sampler.batch_size * self.loader.dataset.transform.num_splits, 3, input_size, input_size

    def batches(self, epoch: int, first_step: int = 0, *, prepare: Callable[[Batch], Batch] = _as_is) -> Iterator[Batch]:
        """The micro-batches of `epoch` from optimiser step `first_step` on. DamagedImages, in every process, where too many are.

        `prepare` is what else is done to each; on a GPU while the one before is in use."""
        self.sampler.start(epoch=epoch, step=first_step)
        return self._watched(received(iter(self.loader)), num_batches=len(self.sampler), prepare=prepare)

    def _watched(self, batches: Iterator[Batch], *, num_batches: int, prepare: Callable[[Batch], Batch]) -> Iterator[Batch]:
        is_alone = self.damage.rank.world_size == 1
        values = self.loader.dataset.transform.statistics
        ready = _ready(batches, self.damage.rank.device, values, num_batches=num_batches, purpose="training", prepare=prepare)
        for i, batch in enumerate(ready, 1):
            self.damage.add(batch.damaged)
            if self.is_in_step and (is_alone or i % SHARE_EVERY == 0 or i == num_batches):
                self.damage.report()
            yield batch


@dataclass(frozen=True)
class ValLoader:
    """Batches (images, targets) of a process's share of the validation images; those that are damaged are in `damage`.

    `says_fallbacks`: a pass ends with a line on the images that Pillow had to decode, where there are any."""

    loader: DataLoader
    damage: ValidationDamage
    says_fallbacks: bool = True

    def shape(self, input_size: int) -> tuple[int, int, int, int]:
        """Of the images in each batch but an odd last one."""
        return min(self.loader.batch_size, len(self.loader.dataset)), 3, input_size, input_size

    def start(self) -> None:
        """On a CPU, start the loader's processes, which the first pass would do else: while the run has little memory that they would share.

        What is shared, the run's next write copies, and huge pages come apart into small ones."""
        if self.damage.rank.device.type == "cpu" and self.loader.persistent_workers:
            with torch.random.fork_rng(devices=[]):  # the loader draws a seed, which nothing goes by
                iter(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A pass. Every process takes part to its end, where DamagedImages names what is damaged unless it is to be left out."""
        return ((batch.images, batch.targets) for batch in self.batches())

    def batches(self) -> Iterator[Batch]:
        """The same pass in whole batches, whose `positions` are places in the set."""
        return self._watched(received(iter(self.loader)))

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        num_damaged = 0
        num_batches = len(self.loader) if self.says_fallbacks else None
        values = self.loader.dataset.transform.statistics
        for batch in _ready(batches, self.damage.rank.device, values, num_batches=num_batches, purpose="evaluation"):
            self.damage.add(batch.damaged)
            num_damaged += len(batch.damaged)
            if len(batch.targets):
                yield batch
        self.damage.end_pass(num_damaged)

    def __len__(self) -> int:
        return len(self.loader)


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def count_workers(cfg: RunConfig, rank: Rank) -> int:
    """Loader processes of this process: as asked for, else one per core that it has to itself, at most 10."""
    if cfg.num_workers is not None:
        return cfg.num_workers
    return min(10, max(1, count_cores() // rank.local_world_size))


def _obey_parent_alone() -> None:
    """Make a loader's worker ignore what asks a whole process group to stop, but for its own parent's SIGTERM.

    The training process still needs its workers to reach the next checkpoint."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


PR_SET_PDEATHSIG = 1  # of Linux's prctl


def _end_with_killed_parent() -> None:
    """Have Linux kill this process when its parent is killed.

    torch's own watch looks every 5 seconds, not while a file is waited for, and takes a parent that was killed while this process started for alive."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:  # killed before that
            os._exit(1)


def _tell_unless_parent_left(kind: type[BaseException], error: BaseException, trace) -> None:
    """Print an error of a worker's own threads, but for that of handing a batch to a parent that stopped fetching it."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def prepare_worker(worker_id: int) -> None:
    """What a loader's process does first."""
    sys.excepthook = _tell_unless_parent_left
    _obey_parent_alone()
    _end_with_killed_parent()
    pixels.prepare_process()
    pixels.keep_freed_memory()


def loader_settings(cfg: RunConfig, rank: Rank, num_items: int) -> dict:
    num_workers = count_workers(cfg, rank) if num_items else 0
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0, "worker_init_fn": prepare_worker, "collate_fn": _as_is}
    workers["prefetch_factor"] = PREFETCH if num_workers else None
    if num_workers and "fork" in multiprocessing.get_all_start_methods():  # spawned ones take seconds to start
        workers["multiprocessing_context"] = "fork"
    return {**workers, "pin_memory": cfg.pin_mem and rank.device.type == "cuda"}
