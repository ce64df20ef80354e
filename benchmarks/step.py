"""Milliseconds of a whole training step: this project's against the published style, side by side.

    python benchmarks/step.py                                              five networks, on a GPU where there is one
    python benchmarks/step.py -m recnext_m1 --batch-size 8 --rounds 20 --device cpu --threads 1
    python benchmarks/step.py --teacher online                             with the teacher in the step; stored: our side reads its labels
    python benchmarks/step.py --compile                                    our side through torch.compile

Ours is the training loop's own step, with mixing, clipping, optimiser and EMA. The published style is assembled from timm's public parts: ModelEma,
adaptive_clip_grad tensor by tensor, NativeScaler, create_optimizer_v2, Mixup, NCHW, the loss read at every step; its networks have each operator
written plainly, as in benchmarks/models.py, or are ours as they are (--published-networks own). Both train the same weights on one batch that is
ready: loading it is not measured, and it is mixed further with every step, in place. Each side has a process of its own, and they take turns; a figure
is the median of the rounds, then the lowest and the highest. One thread on a CPU is timed by the processor time of its process, so what other work
takes of the core does not count. "Rest" is the share of a step that is neither forward nor backward. Peak memory is what a step allocates at once,
besides weights and optimiser."""

import argparse
import contextlib
import dataclasses
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
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
from loading.keys import Plan, build_plan
from losses import DistillationLoss
from measuring import steps
from measuring.timing import spread, synchroniser
from run import config, hardware, network, process

NETWORKS = ("recnext_m1", "recnext_a1", "recnext_t", "repnext_m1", "lsnet_t")
SIDES = ("ours", "published")


@dataclasses.dataclass
class Task:
    """What both sides train."""

    cfg: config.Config
    plan: Plan
    batch: Batch
    rank: utils.Rank


@dataclasses.dataclass
class Side:
    """One way to train: its step, and the network and scaler inside."""

    step: Callable[[int], None]
    net: nn.Module
    scaler: torch.amp.GradScaler


def build_task(name: str, args: argparse.Namespace) -> Task:
    rank = utils.Rank(0, 1, 0, 1, hardware.open_device(args.device))
    plan = build_plan(args.batch_size, repeated_aug=False, group_size=args.batch_size, lanes=1, data_seed=0)
    flags = ["--data-set=DIGITS", f"--model={name}", f"--batch-size={args.batch_size}", f"--mix-group-size={args.batch_size}", f"--amp={args.amp}"]
    flags += [f"--input-size={args.input_size}", f"--teacher-model={args.teacher_model}", f"--device={args.device}"]
    flags += ["--compile"] if args.compile else []
    cfg, _ = config.parse([*flags, f"--distillation-type={'none' if args.teacher == 'none' else 'hard'}"])
    return Task(cfg, plan, steps.build_batch(plan, args.input_size), rank)


def build_ours(task: Task, args: argparse.Namespace, folder: str) -> Side:
    """The engine's step, in a process that was set up for it."""
    process.prepare_memory(task.rank.device)
    answers = {"none": no_teacher}
    if args.teacher != "none":
        answers = distill.build_teachers(task.cfg, task.plan, task.batch, rank=task.rank, folder=folder)
    batch = task.batch._replace(images=task.batch.images.to(task.rank.device))
    side = steps.build_side(task.cfg, task.plan, task.rank, answers=answers[args.teacher])
    return Side(lambda step: engine.train_step(side.parts, side.state, [batch], epoch=0, step=step), side.state.net, side.state.scaler)


def build_published(task: Task, args: argparse.Namespace, folder: str) -> Side:
    """The published engines' step."""
    cfg, device = task.cfg, task.rank.device
    torch.manual_seed(0)
    net = network.build(cfg, steps.NUM_CLASSES, distillation=cfg.distillation != "none")
    net = (to_plain(net) if args.published_networks == "plain" else net).to(device).train()
    teacher = model.create_model(cfg.teacher_model, num_classes=steps.NUM_CLASSES).eval().to(device) if args.teacher != "none" else None
    images, targets = task.batch.images.to(device).contiguous(), task.batch.targets.to(device)
    optimizer = timm.optim.create_optimizer_v2(net, opt=cfg.opt, lr=cfg.lr, weight_decay=cfg.weight_decay, eps=cfg.opt_eps)
    mixup = timm.data.Mixup(cfg.mixup, cfg.cutmix, label_smoothing=cfg.smoothing, num_classes=steps.NUM_CLASSES)
    criterion = timm.loss.SoftTargetCrossEntropy()
    if teacher is not None:
        criterion = DistillationLoss(criterion, kind="hard", alpha=cfg.distillation_alpha, tau=cfg.distillation_tau)
    scaler, ema = timm.utils.NativeScaler(device.type), timm.utils.ModelEma(net, decay=cfg.model_ema_decay)
    scaler._scaler = torch.amp.GradScaler(device.type, enabled=device.type != "cpu")

    def step(_: int) -> None:
        samples, soft = mixup(images, targets)
        with torch.autocast(device.type, torch.float16, enabled=device.type != "cpu"):
            outputs = net(samples)
            if teacher is None:
                loss = criterion(outputs, soft)
            else:
                with torch.no_grad():
                    answers = teacher(samples).argmax(dim=1)
                loss = criterion(outputs, soft, answers)
        loss.item()
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=cfg.clip_grad, clip_mode=cfg.clip_mode, parameters=net.parameters())
        ema.update(net)

    return Side(step, net, scaler._scaler)


# ---- measuring, in each side's process


@dataclasses.dataclass(frozen=True)
class Clock:
    """How time is taken on a device."""

    now: Callable[[], float]
    sync: Callable[[], None]


def pick_clock(device: torch.device) -> Clock:
    is_alone = device.type == "cpu" and torch.get_num_threads() == 1
    return Clock(time.process_time if is_alone else time.perf_counter, synchroniser(device))


def step_ms(side: Side, clock: Clock, num_steps: int) -> float:
    """Milliseconds per step of a few steps in a row."""
    clock.sync()
    start = clock.now()
    for step in range(num_steps):
        side.step(step)
    clock.sync()
    return 1e3 * (clock.now() - start) / num_steps


def rest_share(side: Side, clock: Clock) -> float:
    """Share of one step that is neither forward nor backward: before the network is called, and from the end of backward on."""
    marks = []

    def mark() -> None:
        clock.sync()
        marks.append(clock.now())

    mark()
    with _called_before(side.net, mark), _called_at_unscaling(side.scaler, mark):
        side.step(0)
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
def _called_at_unscaling(scaler: torch.amp.GradScaler, function: Callable[[], None]) -> Iterator[None]:
    """Gradients are unscaled as soon as backward is done."""
    unscale = scaler.unscale_
    scaler.unscale_ = lambda optimizer: (function(), unscale(optimizer))[1]
    try:
        yield
    finally:
        del scaler.unscale_


def peak_mib(side: Side, device: torch.device) -> float:
    """MiB allocated at once in a step, beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        side.step(0)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        side.step(0)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes)) / 2**20


def serve(connection: Connection, build: Callable, name: str, args: argparse.Namespace) -> None:
    """A side's life: send its logits and peak memory, then, for each number of steps received, ms per step and the share of the rest; 0 ends it."""
    torch.set_num_threads(args.threads)
    task = build_task(name, args)
    device, clock = task.rank.device, pick_clock(task.rank.device)
    with tempfile.TemporaryDirectory() as folder:
        side = build(task, args, folder)
        with torch.no_grad():
            outputs = utils.unwrap(side.net)(task.batch.images.to(device))
        connection.send((outputs[0] if isinstance(outputs, tuple) else outputs).cpu().numpy())
        step_ms(side, clock, args.steps)
        connection.send(peak_mib(side, device))
        while num_steps := connection.recv():
            connection.send((step_ms(side, clock, num_steps), rest_share(side, clock)))


# ---- the table


@dataclasses.dataclass
class Figures:
    """What was measured of a side, a value per round."""

    peak_mib: float
    step_ms: list[float] = dataclasses.field(default_factory=list)
    rest_shares: list[float] = dataclasses.field(default_factory=list)


def compare(name: str, args: argparse.Namespace) -> dict[str, Figures]:
    """Both sides of one network, measured. AssertionError where they do not compute the same."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    for side, build in zip(SIDES, (build_ours, build_published), strict=True):
        connections[side], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, build, name, args), daemon=True))
        processes[-1].start()
        theirs.close()
    logits = [torch.from_numpy(connection.recv()) for connection in connections.values()]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    figures = {side: Figures(connection.recv()) for side, connection in connections.items()}
    for i in range(args.rounds):
        for side in SIDES[::-1] if i % 2 else SIDES:
            connections[side].send(args.steps)
            ms, share = connections[side].recv()
            figures[side].step_ms.append(ms)
            figures[side].rest_shares.append(share)
    for connection, child in zip(connections.values(), processes, strict=True):
        connection.send(0)
        child.join()
    return figures


def ratios(figures: dict[str, Figures]) -> list[float]:
    """Ours / published, round by round."""
    return [ours / theirs for ours, theirs in zip(*(figures[side].step_ms for side in SIDES), strict=True)]


def _cell(values: list[float], digits: int) -> str:
    found = spread(values)
    return f"{found.median:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


HEADER = ("model", "ours, ms", "published, ms", "ours / published", "rest, %", "published", "peak, MiB", "published")
WIDTHS = (14, 26, 26, 22, 9, 11, 11, 11)


def row(name: str, figures: dict[str, Figures]) -> str:
    """One line of the table."""
    cells = [_cell(figures[side].step_ms, 0) for side in SIDES] + [_cell(ratios(figures), 2)]
    cells += [f"{100 * statistics.median(figures[side].rest_shares):.1f}" for side in SIDES]
    cells += [f"{figures[side].peak_mib:.0f}" for side in SIDES]
    return line((name, *cells))


def line(cells: tuple[str, ...]) -> str:
    return "".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("-m", "--models", nargs="+", default=NETWORKS, choices=model.list_models(), metavar="NAME", help="our networks")
    parser.add_argument("--published-networks", default="plain", choices=("plain", "own"), help="those of the published side [%(default)s]")
    parser.add_argument("--teacher", default="none", choices=distill.SIDES, help="who labels: nobody, stored labels on our side, the teacher [%(default)s]")
    parser.add_argument("--teacher-model", default="regnety_160", help="[%(default)s]")
    parser.add_argument("--batch-size", type=int, help="images, all of one mix group [32 on a CPU, 256 on a GPU]")
    parser.add_argument("--input-size", type=int, default=224, help="side of the images, pixels [%(default)s]")
    parser.add_argument("--steps", type=int, help="steps in a row [1 on a CPU, 10 on a GPU]")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side that are timed [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="processor threads [%(default)s]")
    parser.add_argument("--device", default="auto", help="[%(default)s]")
    parser.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "none"), help="our precision; published: fp16 on a GPU [%(default)s]")
    parser.add_argument("--compile", action="store_true", help="our side through torch.compile")
    args = parser.parse_args(argv)
    device = hardware.pick_device(args.device)
    is_cpu = device.type == "cpu"
    args.batch_size, args.steps = args.batch_size or (32 if is_cpu else 256), args.steps or (1 if is_cpu else 10)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = hardware.pick_device(args.device)
    print(f"batch {args.batch_size} at {args.input_size} pixels, teacher: {args.teacher}, {args.rounds} rounds of {args.steps} steps, on {device}")
    print(line(HEADER))
    for name in args.models:
        print(row(name, compare(name, args)), flush=True)


if __name__ == "__main__":
    main()
