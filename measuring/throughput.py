"""Throughput of fused networks: the batch size that fits, and what is timed."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from deployment.weights import Trained, fused
from measuring import forms, timing
from measuring.timing import Case, Setup
from run.command import positive_int

CPU_CAP = 64  # images; a processor's throughput no longer grows there, and batches beyond take many seconds
ACCELERATOR_CAP = 2**16
LAYERS_HELD = 4  # largest layers whose tensors are alive at once: measured 0.9 to 3.4 over eight families, most where a mixer is recursive
MEMORY_SHARE = 0.5  # of the free memory, as a processor has no allocator whose refusal would be harmless


def free_memory() -> int | None:
    """Bytes that can still be allocated without swapping, within the control group's limit; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return free
    return min(free, limit - used)


def image_bytes(trained: Trained) -> int:
    """Memory that one image takes while the network runs, estimated from the layer that reads and writes the most."""
    largest = 0

    def note(module, inputs, output) -> None:
        nonlocal largest
        largest = max(largest, sum(value.numel() * value.element_size() for value in (*inputs, output) if isinstance(value, torch.Tensor)))

    net = fused(trained)
    for module in [module for module in net.modules() if not any(module.children())]:
        module.register_forward_hook(note)
    forms.forward(net, forms.Images(1, torch.device("cpu")).get(trained.input_size), None)
    return LAYERS_HELD * largest


def fits_memory(trained: Trained) -> Callable[[int], bool]:
    """Whether that many images fit into the memory that is free now."""
    free, per_image = free_memory(), image_bytes(trained)
    return lambda batch_size: free is None or batch_size * per_image <= MEMORY_SHARE * free


def fits_accelerator(setup: Setup, trained: Trained, batch_size: int) -> bool:
    """Whether a batch runs in both layouts: found out by running it."""
    builders = forms.torch_builders(setup.args.amp)
    try:
        net, images = fused(trained).to(setup.device), forms.Images(batch_size, setup.device)
        for form in ("eager", "channels_last"):
            builders[form](trained, net, images)()
            timing.synchroniser(setup.device)()
    except RuntimeError:  # out of memory, or a batch that a kernel cannot index: both are too large
        return False
    return True


def largest_batch(fits: Callable[[int], bool], cap: int) -> int:
    """The largest power of two up to `cap` for which, and for all before it, `fits` is true; 1 if there is none, whose failure will say why."""
    batch_size = 1
    while batch_size * 2 <= cap and fits(batch_size * 2):
        batch_size *= 2
    return batch_size


def choose_batch(setup: Setup, subjects: list[Trained]) -> int:
    """The largest power of two that fits for every model, for figures of one batch size compare; says what limits it."""
    is_cpu = setup.device.type == "cpu"
    cap = CPU_CAP if is_cpu else ACCELERATOR_CAP
    limit = f"the cap of {cap} on {setup.device.type}"
    for trained in subjects:
        batch_size = largest_batch(fits_memory(trained) if is_cpu else functools.partial(fits_accelerator, setup, trained), cap)
        if batch_size < cap:
            cap, limit = batch_size, f"the memory for {trained.name}"
    setup.report(f"batch size {cap}, the largest power of two within {limit}")
    return cap


def build_cases(setup: Setup, subjects: list[Trained]) -> list[Case]:
    """What is to be measured; with --batch-size auto, half the batch as often as a form of a model runs out of memory."""
    is_auto = setup.args.batch_size == "auto"
    batch_size = choose_batch(setup, subjects) if is_auto else setup.args.batch_size
    while True:
        cases = timing.build_cases(setup, subjects, forms.torch_builders(setup.args.amp), batch_size)
        if not (is_auto and batch_size > 1 and any(case.is_out_of_memory for case in cases)):
            return cases
        del cases  # room for the next
        batch_size //= 2
        setup.report(f"batch size {batch_size}, for a larger one does not fit in every form")


def batch_size_or_auto(text: str) -> int | str:
    return text if text == "auto" else positive_int(text)
