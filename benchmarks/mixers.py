"""How far the token mixers are from the least they have to move through memory: bytes per image, and time against a plain copy's.

    python benchmarks/mixers.py
    python benchmarks/mixers.py --batch-size 256 --amp bf16

The least traffic is counted by operator, each of which reads its inputs and writes its output once; backward it reads the output's gradient and
the inputs, and writes their gradients. A BatchNorm in training goes through its input twice, for it needs the statistics first. Element by element
work (sums, interpolation, activations) is counted as part of its neighbour; weights are too small to count. Time / least is the measured time over
that of moving the least traffic as fast as a large copy moves its own: 1 cannot be beaten by more than caches help. Forward, and forward with
backward, take turns with the copy; a figure is the median of the rounds, then the lowest and the highest."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn

from measuring.timing import spread, synchroniser
from model.mixers import RecConv2d, build_rec_attention
from model.repnext import ChunkConv
from model.ska import ska
from run import hardware
from run.command import positive_int, run_command


@dataclasses.dataclass(frozen=True)
class Operator:
    """Elements that an operator reads and writes; `has_norm`: a BatchNorm follows it."""

    inputs: float
    outputs: float
    has_norm: bool = False

    @property
    def forward(self) -> float:
        return self.inputs + self.outputs + 3 * self.outputs * self.has_norm

    @property
    def backward(self) -> float:
        """The gradient and the input are read by the norm twice: for its weights' gradients, then for its input's."""
        return self.outputs + 2 * self.inputs + 5 * self.outputs * self.has_norm


def rec_conv(size: float, level: int) -> list[Operator]:
    """Of a map of `size` elements: down a pyramid, and up again by convolutions of each level with the one below, enlarged and added."""
    sizes = [size / 4**i for i in range(level + 1)]
    steps = list(zip(sizes, sizes[1:], strict=False))
    return [*(Operator(fine, coarse) for fine, coarse in steps), Operator(sizes[-1], sizes[-1]), *(Operator(fine + coarse, fine) for fine, coarse in steps)]


def rec_attention(size: float) -> list[Operator]:
    """Down to half the resolution, queries and keys, keys with values, queries with that, places, and the convolution of it all."""
    half = size / 4
    attention = [Operator(half, 2 * half, True), Operator(2 * half, 0), Operator(half, half), Operator(half, half, True)]
    return [Operator(size, half, True), *attention, Operator(size + half, size, True)]


def chunk_conv(size: float) -> list[Operator]:
    """Three quarters are convolved once each, one is copied."""
    return [Operator(size / 4, size / 4) for _ in range(4)]


def aggregation(size: float) -> list[Operator]:
    """The map, and nine weights for each group of eight channels."""
    return [Operator(size + 9 * size / 8, size)]


class Aggregation(nn.Module):
    """SKA on weights that are at hand."""

    def __init__(self, dim: int):
        super().__init__()
        self.groups = dim // 8

    def forward(self, x: Tensor) -> Tensor:
        maps, weights = x.split([self.groups * 8, self.groups * 9], dim=1)
        return ska(maps, weights.unflatten(1, (self.groups, 9)))


@dataclasses.dataclass(frozen=True)
class Mixer:
    """A token mixer where a published network has it: channels and side of its map, how it is built, what it consists of."""

    dim: int
    side: int
    build: Callable[[], nn.Module]
    operators: Callable[[float], list[Operator]]
    input_dim: int | None = None  # where it is another than `dim`


MIXERS = {
    "RecConv (recnext_m1)": Mixer(48, 56, lambda: RecConv2d(48, level=4), lambda size: rec_conv(size, 4)),
    "RecAttn (recnext_a1)": Mixer(48, 56, lambda: build_rec_attention(48, num_heads=2), rec_attention),
    "ChunkConv (repnext_m1)": Mixer(48, 56, lambda: ChunkConv(48), chunk_conv),
    "SKA (lsnet_t)": Mixer(128, 14, lambda: Aggregation(128), aggregation, input_dim=128 // 8 * 17),
}


def least_bytes(mixer: Mixer, element_size: int) -> tuple[float, float]:
    """Bytes per image, forward and backward."""
    operators = mixer.operators(mixer.dim * mixer.side**2)
    return element_size * sum(one.forward for one in operators), element_size * sum(one.backward for one in operators)


def measure(mixer: Mixer, args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Seconds per image of `forward` and `both`, and per byte of a `copy`, round by round."""
    amp_dtype, sync = hardware.pick_amp(args.amp, device), synchroniser(device)
    net = mixer.build().to(device, memory_format=torch.channels_last).train()
    shape = args.batch_size, mixer.input_dim or mixer.dim, mixer.side, mixer.side
    images = torch.randn(shape, device=device, dtype=amp_dtype or torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
    source = torch.randn(args.copy_mib * 2**18, device=device)
    target = torch.empty_like(source)

    def run() -> Tensor:
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            return net(images)

    grad = torch.randn_like(run())
    calls = {"forward": run, "both": lambda: run().backward(grad), "copy": lambda: target.copy_(source)}
    units = {"forward": args.batch_size, "both": args.batch_size, "copy": 2 * source.nbytes}
    found = {name: [] for name in calls}
    for i in range(args.rounds + 1):
        for name, call in calls.items():
            seconds = _call_s(call, sync, args.calls) / units[name]
            if i > 0:  # the first warms up
                found[name].append(seconds)
    return found


def _call_s(call: Callable[[], object], sync: Callable[[], None], num_calls: int) -> float:
    sync()
    start = time.perf_counter()
    for _ in range(num_calls):
        call()
    sync()
    return (time.perf_counter() - start) / num_calls


def ratios(mixer: Mixer, args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Time over least, forward and `both`, round by round; and the microseconds per image behind them."""
    found = measure(mixer, args, device)
    forward, backward = least_bytes(mixer, (hardware.pick_amp(args.amp, device) or torch.float32).itemsize)
    least = {"forward": forward, "both": forward + backward}
    over = {key: [one / (num_bytes * copy) for one, copy in zip(found[key], found["copy"], strict=True)] for key, num_bytes in least.items()}
    return over | {f"{key}_us": [1e6 * one for one in found[key]] for key in least}


def row(name: str, args: argparse.Namespace, device: torch.device) -> str:
    """One line of the table."""
    mixer = MIXERS[name]
    found = ratios(mixer, args, device)
    forward, backward = least_bytes(mixer, (hardware.pick_amp(args.amp, device) or torch.float32).itemsize)
    cells = [name.ljust(24), f"{forward / 1e6:>10.2f}", f"{backward / 1e6:>10.2f}"]
    for key in ("forward", "both"):
        over = spread(found[key])
        cells += [f"{spread(found[f'{key}_us']).median:>12.1f}", f" {over.median:.1f} ({over.low:.1f} to {over.high:.1f})".rjust(22)]
    return "".join(cells)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images [%(default)s]")
    parser.add_argument("--rounds", type=positive_int, default=10, help="turns that are timed [%(default)s]")
    parser.add_argument("--calls", type=positive_int, default=5, help="in a row, of a turn [%(default)s]")
    parser.add_argument("--copy-mib", type=positive_int, default=256, help="MiB that are copied [%(default)s]")
    parser.add_argument("--threads", type=positive_int, default=1, help="processor threads [%(default)s]")
    parser.add_argument("--device", default="auto", help="[%(default)s]")
    parser.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"), help="precision [%(default)s]")
    return parser.parse_args(argv)


def run(argv: list[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    device = hardware.open_device(args.device)
    print(f"batch {args.batch_size}, precision {args.amp}, on {device}")
    titles = ("least, MB", "backward"), ("forward, us", "time / least"), ("with backward", "time / least")
    print(f"{'per image':<24}{titles[0][0]:>10}{titles[0][1]:>10}" + "".join(f"{left:>14}{right:>20}" for left, right in titles[1:]))
    for name in MIXERS:
        print(row(name, args, device), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
