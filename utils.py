"""The process a run lives in: rank and device, seeds, the logger, sums over processes. Also `replace_batchnorm`, for published callers."""

import contextlib
import inspect
import logging
import random
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

log = logging.getLogger("understudy")


@dataclass(frozen=True)
class Rank:
    """This process among those of the run, and the device it computes on."""

    index: int
    world_size: int
    local_index: int
    local_world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # for agreeing on flags without waiting for a GPU

    @property
    def is_main(self) -> bool:
        return self.index == 0


def wrap_distributed(net: nn.Module, rank: Rank, *, accum_steps: int) -> nn.Module:
    """`net`, or with several processes what averages its gradients over them. BatchNorm's buffers stay each process's own.

    Gradients lie in the buckets that are sent. The graph is the same at every step, unless only the last of `accum_steps` sends."""
    if rank.world_size == 1:
        return net
    distributed = nn.parallel.DistributedDataParallel
    parameters = inspect.signature(distributed).parameters
    # Of a kernel of one channel, which lies in memory one way only, strides can be written two ways, and it compares them.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # torch 2.15 renamed it
    return distributed(net, **{name: False}, gradient_as_bucket_view=True, static_graph=accum_steps == 1)


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators: the same on every process, so that all build the same network."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def all_sum(values: Tensor) -> Tensor:
    """`values` summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def mean_over_processes(values: Tensor, rank: Rank) -> Tensor:
    """The mean of `values` over all processes, on the device they are on; of equal values exactly these, for they are summed in double precision."""
    return all_sum(values.to(rank.device, torch.float64, copy=True)).div_(rank.world_size).to(values)


def gather(values: Tensor, rank: Rank) -> Tensor:
    """(world_size, *values.shape): the `values` of every process, on each."""
    parts = [torch.empty_like(values) for _ in range(rank.world_size)]
    if rank.world_size == 1:
        return values.unsqueeze(0)
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts)


def gather_objects(value, rank: Rank) -> list:
    """The `value` of every process, on each; for plain data, as small as a message."""
    values = [value] * rank.world_size
    if rank.world_size > 1:
        dist.all_gather_object(values, value, group=rank.control)
    return values


def max_over_processes(values: list[float], rank: Rank) -> list[float]:
    """Each value's maximum over all processes."""
    if rank.world_size == 1:
        return values
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=rank.control)
    return found.tolist()


def any_process(flags: list[bool], rank: Rank) -> list[bool]:
    """Each flag, true where it is true in any process: what all of them then act on alike."""
    return [bool(value) for value in max_over_processes(flags, rank)]


AGREE_EVERY_S = 2.0  # so that an answer comes well within 10 s, also where steps suddenly take longer


class Agreement:
    """Has all processes agree on flags, not at every step but every so many that it costs nothing."""

    def __init__(self, rank: Rank):
        self.rank = rank
        self.num_steps = self.left = 1
        self.since = time.perf_counter()

    def any_process(self, flags: list[bool]) -> list[bool]:
        """After each step: the flags that are true in any process, or all false where this is not a step to agree on."""
        if self.rank.world_size == 1:
            return flags
        self.left -= 1
        if self.left > 0:
            return [False] * len(flags)
        now = time.perf_counter()
        *found, slowest_s = max_over_processes([*flags, (now - self.since) / self.num_steps], self.rank)
        self.num_steps = self.left = max(1, int(AGREE_EVERY_S / slowest_s))
        self.since = now
        return [bool(value) for value in found]


def from_main(find: Callable[[], str | None], rank: Rank) -> str | None:
    """What `find` returns on the first process, on all of them; the others wait, and do not call it."""
    found = [find() if rank.is_main else None]
    if rank.world_size > 1:
        dist.broadcast_object_list(found, group=rank.control)
    return found[0]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first(rank: Rank):
    """The first process of each node runs the block before the others do: for downloads into a cache they share."""
    if rank.local_index != 0:
        barrier()
    yield
    if rank.local_index == 0:
        barrier()


def unwrap(net: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel and torch.compile, whose state-dict names are the canonical ones."""
    while True:
        if isinstance(net, nn.parallel.DistributedDataParallel):
            net = net.module
        elif hasattr(net, "_orig_mod"):
            net = net._orig_mod
        else:
            return net


@torch.no_grad()
def replace_batchnorm(net: nn.Module) -> nn.Module:
    """Fuse `net` in place, and return it: it and every module in it with a method `fuse()` is replaced by that method's result.

    Parents first, as in timm and in the published scripts. The result is for evaluation; fusing it again changes nothing."""
    if hasattr(net, "fuse"):
        net = net.fuse()
    for name, child in net.named_children():
        setattr(net, name, replace_batchnorm(child))
    return net


def checkout() -> str | None:
    """The commit of this checkout, `-dirty` where files differ from it; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
