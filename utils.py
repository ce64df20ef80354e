"""The process a run lives in: rank and device, seeds, the logger, sums over processes. Also `replace_batchnorm`, for published callers."""

import contextlib
import ctypes
import functools
import inspect
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.constants import default_pg_timeout

from run.command import discard, tell
from run.errors import InputError

log = logging.getLogger("understudy")
ONE_KEYSTROKE_S = 1.0


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


def pick_device(name: str, local_index: int = 0) -> torch.device:
    """The device `name` (`auto`, `cpu`, `cuda`, `cuda:1`) means here; InputError where there is no such device."""
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name} is no device: use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not has_gpu:
        raise InputError(f"--device {name}: torch sees no GPU here; use --device cpu, or check the driver with nvidia-smi")
    return torch.device("cuda", local_index) if name == "cuda" else device


def open_device(name: str) -> torch.device:
    """The device of that name, made the current one, for that is where compiled kernels run."""
    device = pick_device(name)
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device)
    return device


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Autocast type that `--amp` means on `device`; None for full precision."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[name]


def pick_memory_format(name: str, device: torch.device, amp_dtype: torch.dtype | None) -> torch.memory_format:
    """Layout of activations that `--memory-format` means.

    `auto` is channels-last, the faster, but for bfloat16 on a CPU: there oneDNN's channels-last weight gradient of a strided
    depthwise convolution reads uninitialised memory where the feature map is smaller than the kernel (torch 2.15)."""
    if name == "auto":
        name = "nchw" if device.type == "cpu" and amp_dtype is torch.bfloat16 else "channels_last"
    return {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}[name]


def build_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaler for `--amp`: neutral but for float16."""
    return torch.amp.GradScaler(device.type, enabled=pick_amp(amp, device) is torch.float16)


def wrap_distributed(net: nn.Module, rank: Rank, *, accum_steps: int) -> nn.Module:
    """`net`, or with several processes what averages its gradients over them. BatchNorm's buffers stay each process's own.

    Gradients lie in the buckets that are sent. The graph is the same at every step, unless only the last of `accum_steps` sends."""
    if rank.world_size == 1:
        return net
    distributed = nn.parallel.DistributedDataParallel
    parameters = inspect.signature(distributed).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # torch 2.15 renamed it
    return distributed(net, **{name: False}, gradient_as_bucket_view=True, static_graph=accum_steps == 1)


def start_process(device: str, seed: int) -> Rank:
    """Join the launcher's other processes, choose the device, seed, start logging. Called once, by main.

    The launcher (torchrun) speaks through the environment; without one there is a single process."""
    env = os.environ
    world_size, index = int(env.get("WORLD_SIZE", 1)), int(env.get("RANK", 0))
    local_index = int(env.get("LOCAL_RANK", 0))
    chosen = pick_device(device, local_index)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    control = None
    if world_size > 1:
        join_processes("nccl" if chosen.type == "cuda" else "gloo")
        control = dist.new_group(backend="gloo")
    rank = Rank(index, world_size, local_index, int(env.get("LOCAL_WORLD_SIZE", 1)), chosen, control)
    prepare_memory(chosen)
    seed_all(seed)
    start_logging(rank)
    return rank


def join_processes(backend: str) -> None:
    """Meet the launcher's other processes where the environment says.

    Those of earlier attempts have left their addresses there: torchrun keeps one store over all its restarts."""
    store, index, world_size = next(dist.rendezvous("env://", timeout=default_pg_timeout))
    store.set_timeout(default_pg_timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(backend, store=dist.PrefixStore(f"attempt_{attempt}", store), rank=index, world_size=world_size)


KEEP_ALL = {-4: 0, -1: -1}  # glibc's M_MMAP_MAX and M_TRIM_THRESHOLD: nothing is mapped apart, nothing is given back


def prepare_memory(device: torch.device) -> None:
    """On a CPU, have glibc keep the memory that a training step frees, for the next one takes as much again.

    Given back, each page of it is fetched from the system and cleared anew: up to a tenth of a step's time."""
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        for option, value in KEEP_ALL.items() if mallopt else ():
            mallopt(option, value)


def stop_process() -> None:
    """Leave the other processes, once all are done: the launcher ends those that are left when one has ended."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators: the same on every process, so that all build the same network."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Console(logging.StreamHandler):
    """Standard output for as long as it can be written; then one line on standard error, and silence."""

    def __init__(self):
        super().__init__(sys.stdout)
        if sys.stdout is None:  # it was closed from the start
            self._fall_silent("it is closed")

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError) or self.stream.closed:
            discard(self.stream)
            self._fall_silent(getattr(error, "strerror", None) or "it is closed")
        else:
            super().handleError(record)

    def _fall_silent(self, reason: str) -> None:
        self.setLevel(logging.CRITICAL + 1)
        tell(f"standard output cannot be written ({reason}): the run goes on without it, and writes its files\n")


def start_logging(rank: Rank) -> None:
    """Send the first process's `log` to the console, and other processes' errors, tagged with their rank."""
    handler = Console()
    handler.setFormatter(logging.Formatter("%(message)s" if rank.is_main else f"[rank {rank.index}] %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank.is_main else logging.ERROR)
    logging.getLogger("timm.scheduler").setLevel(logging.ERROR)  # a one-epoch run needs no telling that its rate stays


def all_sum(values: Tensor) -> Tensor:
    """`values` summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def mean_over_processes(values: Tensor, rank: Rank) -> Tensor:
    """The mean of `values` over all processes, on the device they are on."""
    return all_sum(values.to(rank.device, copy=True)).div_(rank.world_size).to(values.device)


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


class StopRequest:
    """Remembers that this process was asked to save and stop: by SIGTERM or SIGUSR1, which a cluster sends before it takes the machine
    away, by SIGHUP, when its terminal closes, or by SIGINT, Ctrl-C. A second Ctrl-C ends it at once.

    What this process was started to ignore, as by nohup, it ignores."""

    is_made = False  # of the class: a process has one
    interrupted_at = None  # time of the first Ctrl-C

    def __init__(self):
        StopRequest.is_made, StopRequest.interrupted_at = False, None
        handlers = {number: self._remember for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)} | {signal.SIGINT: self._interrupt}
        for number, handler in handlers.items():
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        StopRequest.is_made = True

    def _interrupt(self, number: int, frame) -> None:
        """One Ctrl-C reaches a launched process twice, from the terminal and from its launcher."""
        has_launcher, now = int(os.environ.get("WORLD_SIZE", 1)) > 1, time.monotonic()
        if StopRequest.interrupted_at is None:
            StopRequest.is_made, StopRequest.interrupted_at = True, now
            if not has_launcher:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            if int(os.environ.get("RANK", 0)) == 0:
                os.write(2, b"\nstopping: saves after this step; Ctrl-C again stops at once\n")  # a logger may be in the middle of a line
        elif now - StopRequest.interrupted_at > ONE_KEYSTROKE_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)


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


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream that batches reach `device` on; each would keep freed memory of its own."""
    return torch.cuda.Stream(device)


def prefetched(batches: Iterator, to_device: Callable, device: torch.device) -> Iterator:
    """`to_device(batch)` of each batch; on a GPU of the next one, on a stream of its own, while the last is in use."""
    if device.type != "cuda":
        yield from map(to_device, batches)
        return
    stream = _copy_stream(device)
    ahead = None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved, is_there = to_device(batch), stream.record_event()
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = moved, is_there, batch  # the source must live until it is copied
    if ahead is not None:
        yield _arrived(*ahead, device)


def _arrived(moved: tuple, is_there: torch.cuda.Event, source: tuple, device: torch.device) -> tuple:
    """The batch `moved`, for use on the current stream once it is there."""
    current = torch.cuda.current_stream(device)
    current.wait_event(is_there)
    for tensor in moved:
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            tensor.record_stream(current)
    return moved
