"""Throughput of fused networks in several forms, against the same network unfused, eager and in NCHW, in float32.

    python benchmarks/inference.py -m recnext_m1,recnext_a1,recnext_t                        on a GPU where there is one
    python benchmarks/inference.py -m recnext_m1 --device cpu --threads 1 --batch-size 8 --forms unfused,fused,channels_last_bf16

All forms of all networks take turns, round after round. The first table is images per second; the second each form's time over that of the
unfused one in the same round: below 1 it is faster. A cell is the median over rounds, then the lowest and highest round."""

import argparse
import copy
import functools
import statistics
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import nn

from deployment.weights import Trained
from measuring import forms, timing
from run.command import positive_int, run_command, spellings
from run.hardware import pick_amp, pick_device

BASE = "unfused"


def build(
    trained: Trained, net: nn.Module, images: forms.Images, *, is_fused: bool = True, is_last: bool = False, is_compiled: bool = False, amp: str = "none"
):
    """One inference, ready to be repeated; `net` is the fused form of `trained`, `is_last`: in channels-last."""
    memory_format = torch.channels_last if is_last else torch.contiguous_format
    one = copy.deepcopy(net if is_fused else trained.net).to(images.device, memory_format=memory_format)
    one = torch.compile(one, dynamic=False) if is_compiled else one
    return functools.partial(forms.forward, one, images.get(trained.input_size, memory_format), pick_amp(amp, images.device))


BUILDERS = {
    BASE: functools.partial(build, is_fused=False),
    "fused": build,
    "channels_last": functools.partial(build, is_last=True),
    "compiled": functools.partial(build, is_last=True, is_compiled=True),
    "channels_last_bf16": functools.partial(build, is_last=True, amp="bf16"),
    "compiled_bf16": functools.partial(build, is_last=True, is_compiled=True, amp="bf16"),
}


def measure(argv: list[str], report: timing.Report) -> tuple[str, list[timing.Case]]:
    """The table of images per second, and what it is made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    timing.add_arguments(parser, forms=tuple(BUILDERS), default_forms=tuple(BUILDERS), num_rounds=10, threads=1)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    parser.add_argument(*spellings("batch_size"), type=positive_int, help="images [32 on a CPU, 256 on a GPU]")
    parser.set_defaults(amp="bf16")  # of which the reference is to be that all forms are compared with
    args = parser.parse_args(argv)
    setup = timing.start(args, forms=tuple(BUILDERS), report=report)
    batch_size = args.batch_size or (32 if pick_device(args.device).type == "cpu" else 256)
    cases = timing.build_cases(setup, timing.load(args), BUILDERS, batch_size)
    return timing.finish(setup, cases, is_latency=False), cases


def ratios(cases: list[timing.Case]) -> dict[tuple[str, str], list[float]]:
    """By model and form: time over that of the unfused network, round by round."""
    times = {(case.trained.name, case.form): case.rounds_s for case in cases if case.rounds_s}
    return {
        (name, form): [mine / base for mine, base in zip(rounds, times[name, BASE], strict=True)]
        for (name, form), rounds in times.items()
        if form != BASE and (name, BASE) in times
    }


def run(argv: list[str]) -> None:
    table, cases = measure(argv, report=lambda text: print(text, file=sys.stderr, flush=True))
    print(table + f"\n\nform / {BASE}")
    for (name, form), values in ratios(cases).items():
        print(f"{name:<26}{form:<22}{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
