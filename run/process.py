"""A run's processes: how each joins the others and leaves them, and where it writes its log."""

import ctypes
import logging
import os
import sys

import torch
from torch import distributed as dist
from torch.distributed.constants import default_pg_timeout

from run.console import Console
from run.hardware import pick_device
from utils import Rank, barrier, log, seed_all


def start_process(device: str, seed: int, *, is_alone: bool = False) -> Rank:
    """Join the launcher's other processes, choose the device, seed, start logging. Called once, by main.

    The launcher (torchrun) speaks through the environment; without one there is a single process. `is_alone`: the others are counted, but not
    met, and need not be there."""
    env = os.environ
    world_size, index = int(env.get("WORLD_SIZE", 1)), int(env.get("RANK", 0))
    local_index = int(env.get("LOCAL_RANK", 0))
    chosen = pick_device(device, local_index)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    control = None
    if world_size > 1 and not is_alone:
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
HUGE_PAGE, MADV_HUGEPAGE = 2 << 20, 14  # of Linux


def prepare_memory(device: torch.device) -> None:
    """On a CPU, have glibc keep the memory that a training step frees, for the next one takes as much again, and Linux back it by huge pages.

    Given back, each page of it is fetched from the system and cleared anew: up to a tenth of a step's time."""
    if device.type == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # other C libraries have none
            for option, value in KEEP_ALL.items():
                libc.mallopt(option, value)
            _ask_for_huge_pages(libc)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Have the heap grow in huge pages, up to half of the machine's memory; where Linux has none, or will not promise so much, in small ones.

    A training step goes through hundreds of MiB that no cache holds: in pages of 4 KiB, by looking most of their addresses up in memory too."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if start := libc.malloc(size):  # addresses alone: nothing there is touched
        first = -(-start // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(first, (start + size - first) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
        libc.free(start)


def stop_process() -> None:
    """Leave the other processes, once all are done: the launcher ends those that are left when one has ended."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def start_logging(rank: Rank) -> None:
    """Send the first process's `log` to the console, and other processes' errors, tagged with their rank."""
    handler = Console()
    handler.setFormatter(logging.Formatter("%(message)s" if rank.is_main else f"[rank {rank.index}] %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank.is_main else logging.ERROR)
    logging.getLogger("timm.scheduler").setLevel(logging.ERROR)  # a one-epoch run needs no telling that its rate stays
