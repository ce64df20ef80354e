"""Milliseconds of a whole training step: this project's against the published style, side by side.

    python benchmarks/step.py                                              five networks, on a GPU where there is one
    python benchmarks/step.py -m recnext_m1 --batch-size 8 --rounds 20 --device cpu --threads 1
    python benchmarks/step.py --teacher online                             with the teacher in the step; stored: our side reads its labels

Ours is the training loop's own step, with mixing, clipping, optimiser and EMA. The published style is assembled from timm's public parts: ModelEma,
adaptive_clip_grad tensor by tensor, NativeScaler, create_optimizer_v2, Mixup, NCHW, the loss read at every step; its networks have each operator
written plainly, as in benchmarks/models.py. Both train the same weights on one batch that is ready: loading it is not measured. They take turns;
a figure is the median of the rounds, then the lowest and the highest. One thread on a CPU is timed by the processor time of this process, so what
other work takes of the core does not count. "Rest" is the share of a step that is neither forward nor backward. Peak memory is what was allocated
at once, both sides' weights and states not counted."""

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import timm.data
import timm.loss
import timm.optim
import timm.utils
import torch
from torch import nn

import engine
import model
import utils
from benchmarks import distill
from benchmarks.models import to_plain
from distillation.teacher import no_teacher
from loading.batches import Batch
from loading.keys import build_plan
from losses import DistillationLoss
from measuring.timing import Spread, spread, synchroniser
from run import config

NETWORKS = ("recnext_m1", "recnext_a1", "recnext_t", "repnext_m1", "lsnet_t")
SIDES = ("ours", "published")


@dataclasses.dataclass
class Side:
    """One way to train: its step, the network and scaler inside, and what the rounds gave."""

    step: Callable[[int], None]
    net: nn.Module
    scaler: torch.amp.GradScaler
    rounds_ms: list[float] = dataclasses.field(default_factory=list)
    rest_shares: list[float] = dataclasses.field(default_factory=list)
    peak_mib: float = 0.0


def build_ours(cfg: config.Config, batch: Batch, plan, *, rank: utils.Rank, answers) -> Side:
    """The engine's step."""
    side = distill.build_side(cfg, plan, rank, answers=answers)
    return Side(lambda step: engine.train_step(side.parts, side.state, [batch], epoch=0, step=step), side.state.net, side.state.scaler)


def build_published(cfg: config.Config, batch: Batch, net: nn.Module, *, device: torch.device, teacher: Callable | None) -> Side:
    """The published engines' step, on `net`; `teacher`, where there is one, maps images to logits."""
    net = net.to(device, memory_format=torch.contiguous_format).train()
    images, targets = batch.images.to(device), batch.targets.to(device)
    optimizer = timm.optim.create_optimizer_v2(net, opt=cfg.opt, lr=cfg.lr, weight_decay=cfg.weight_decay, eps=cfg.opt_eps)
    mixup = timm.data.Mixup(cfg.mixup, cfg.cutmix, label_smoothing=cfg.smoothing, num_classes=distill.NUM_CLASSES)
    base = timm.loss.SoftTargetCrossEntropy()
    criterion = DistillationLoss(base, kind="hard", alpha=cfg.distillation_alpha, tau=cfg.distillation_tau) if teacher else base
    scaler, ema = timm.utils.NativeScaler(device.type), timm.utils.ModelEma(net, decay=cfg.model_ema_decay)
    scaler._scaler = torch.amp.GradScaler(device.type, enabled=device.type != "cpu")

    def step(_: int) -> None:
        samples, soft = mixup(images.clone(), targets)
        with torch.autocast(device.type, torch.float16, enabled=device.type != "cpu"):
            outputs = net(samples)
            if teacher:
                with torch.no_grad():
                    answers = teacher(samples).argmax(dim=1)
                loss = criterion(outputs, soft, answers)
            else:
                loss = criterion(outputs, soft)
        loss.item()
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=cfg.clip_grad, clip_mode=cfg.clip_mode, parameters=net.parameters())
        ema.update(net)

    return Side(step, net, scaler._scaler)


# ---- measuring


@dataclasses.dataclass(frozen=True)
class Clock:
    """How time is taken on a device."""

    now: Callable[[], float]
    sync: Callable[[], None]


def pick_clock(device: torch.device) -> Clock:
    is_alone = device.type == "cpu" and torch.get_num_threads() == 1
    return Clock(time.process_time if is_alone else time.perf_counter, synchroniser(device))


def visit_ms(side: Side, clock: Clock, steps: range) -> float:
    """Milliseconds per step of a few steps in a row."""
    clock.sync()
    start = clock.now()
    for step in steps:
        side.step(step)
    clock.sync()
    return 1e3 * (clock.now() - start) / len(steps)


def rest_share(side: Side, clock: Clock, step: int) -> float:
    """Share of one step that is neither forward nor backward: before the network is called, and from the end of backward on."""
    marks = []

    def mark() -> None:
        clock.sync()
        marks.append(clock.now())

    mark()
    with _called_before(side.net, mark), _unscaling_marked(side.scaler, mark):
        side.step(step)
    mark()
    start, forward_start, backward_end, end = marks
    return 1 - (backward_end - forward_start) / (end - start)


@contextlib.contextmanager
def _called_before(net: nn.Module, function: Callable[[], None]) -> Iterator[None]:
    handle = net.register_forward_pre_hook(lambda *_: function())
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _unscaling_marked(scaler: torch.amp.GradScaler, function: Callable[[], None]) -> Iterator[None]:
    """Gradients are unscaled as soon as backward is done."""
    unscale = scaler.unscale_
    scaler.unscale_ = lambda optimizer: (function(), unscale(optimizer))[1]
    try:
        yield
    finally:
        del scaler.unscale_


def peak_mib(side: Side, device: torch.device, step: int) -> float:
    """MiB allocated at once in a step, beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        side.step(step)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        side.step(step)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes)) / 2**20


def measure(sides: dict[str, Side], *, device: torch.device, num_rounds: int, num_steps: int) -> None:
    """Fill in the sides: two turns of each to warm up, then rounds in which the first is first every other time."""
    clock = pick_clock(device)
    for side in sides.values():
        visit_ms(side, clock, range(num_steps))
        side.peak_mib = peak_mib(side, device, 0)
    for i in range(num_rounds):
        for side in reversed(sides.values()) if i % 2 else sides.values():
            side.rounds_ms.append(visit_ms(side, clock, range(num_steps)))
            side.rest_shares.append(rest_share(side, clock, num_steps))


def ratios(sides: dict[str, Side]) -> list[float]:
    """Ours / published, round by round."""
    return [ours / theirs for ours, theirs in zip(*(sides[name].rounds_ms for name in SIDES), strict=True)]


# ---- the table


def compare(name: str, args: argparse.Namespace, rank: utils.Rank) -> dict[str, Side]:
    """Both sides of one network, measured. AssertionError where they do not compute the same."""
    plan = build_plan(args.batch_size, repeated_aug=False, group_size=args.batch_size, lanes=1, data_seed=0)
    flags = ["--data-set=DIGITS", f"--model={name}", f"--batch-size={args.batch_size}", f"--mix-group-size={args.batch_size}", f"--amp={args.amp}"]
    flags += [f"--input-size={args.input_size}", f"--teacher-model={args.teacher_model}", f"--device={args.device}"]
    cfg, _ = config.parse([*flags, f"--distillation-type={'none' if args.teacher == 'none' else 'hard'}"])
    batch = distill.build_batch(plan, args.input_size)
    with tempfile.TemporaryDirectory() as folder:
        answers, teacher = {"none": no_teacher}, None
        if args.teacher != "none":
            answers = distill.build_teachers(cfg, plan, batch, rank=rank, folder=folder)
            teacher = model.create_model(cfg.teacher_model, num_classes=distill.NUM_CLASSES).eval().to(rank.device)
        batch = batch._replace(images=batch.images.to(rank.device))
        ours = build_ours(cfg, batch, plan, rank=rank, answers=answers[args.teacher])
        published = build_published(cfg, batch, to_plain(ours.net), device=rank.device, teacher=teacher)
        with torch.no_grad():
            torch.testing.assert_close(ours.net(batch.images), published.net(batch.images), rtol=1e-3, atol=1e-4)
        sides = dict(zip(SIDES, (ours, published), strict=True))
        measure(sides, device=rank.device, num_rounds=args.rounds, num_steps=args.steps)
    return sides


def _cell(values: Spread, digits: int) -> str:
    return f"{values.median:.{digits}f} ({values.low:.{digits}f} to {values.high:.{digits}f})"


HEADER = ("model", "ours, ms", "published, ms", "ours / published", "rest, %", "published", "peak, MiB", "published")
WIDTHS = (14, 26, 26, 22, 9, 11, 11, 11)


def row(name: str, sides: dict[str, Side]) -> str:
    """One line of the table."""
    cells = [_cell(spread(sides[side].rounds_ms), 0) for side in SIDES] + [_cell(spread(ratios(sides)), 2)]
    cells += [f"{100 * statistics.median(sides[side].rest_shares):.1f}" for side in SIDES]
    cells += [f"{sides[side].peak_mib:.0f}" for side in SIDES]
    return line((name, *cells))


def line(cells: tuple[str, ...]) -> str:
    return "".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("-m", "--models", nargs="+", default=NETWORKS, choices=model.list_models(), metavar="NAME", help="our networks")
    parser.add_argument("--teacher", default="none", choices=distill.SIDES, help="who labels: nobody, stored labels on our side, the teacher [%(default)s]")
    parser.add_argument("--teacher-model", default="regnety_160", help="[%(default)s]")
    parser.add_argument("--batch-size", type=int, help="images, all of one mix group [32 on a CPU, 256 on a GPU]")
    parser.add_argument("--input-size", type=int, default=224, help="side of the images, pixels [%(default)s]")
    parser.add_argument("--steps", type=int, help="steps in a row [1 on a CPU, 10 on a GPU]")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side that are timed [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="processor threads [%(default)s]")
    parser.add_argument("--device", default="auto", help="[%(default)s]")
    parser.add_argument(
        "--amp", default="auto", choices=("auto", "bf16", "fp16", "none"), help="our precision; the published style's is fp16 on a GPU [%(default)s]"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rank = utils.Rank(0, 1, 0, 1, utils.open_device(args.device))
    is_cpu = rank.device.type == "cpu"
    args.batch_size, args.steps = args.batch_size or (32 if is_cpu else 256), args.steps or (1 if is_cpu else 10)
    print(f"batch {args.batch_size} at {args.input_size} pixels, teacher: {args.teacher}, {args.rounds} rounds of {args.steps} steps, on {rank.device}")
    print(line(HEADER))
    for name in args.models:
        print(row(name, compare(name, args, rank)), flush=True)


if __name__ == "__main__":
    main()
