"""Fair timing of networks side by side: forms of a network, interleaved rounds, medians with the spread between rounds, tables.

Every round visits every model in every form, so that a machine that warms up or slows down does so for all of them. A figure is the median of
the rounds' medians, its spread the smallest and the largest of them: what another run may find, not how well this run knows its own mean."""

import argparse
import functools
import gc
import json
import math
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from deployment import verify
from deployment.weights import Trained, describe_weights, fused, load_trained
from deployment.weights import versions as package_versions
from measuring.forms import Builder, Call, Images, forward
from reporting import scatter
from run.command import image_size, positive_int, size_text, spellings
from run.compiling import any_number_compiled
from run.errors import InputError, first_line
from run.hardware import open_device, pick_amp
from utils import checkout

Report = Callable[[str], None]

MIN_CALLS = 5  # per round of a single call's duration, so that its median forgives a stray one
NUM_WARM_UP = 3
SLICE_S = 0.2  # what a case is given in a round: long against a scheduler's tick, short against a machine's drift
MAX_CALLS = 1000
QUIET_CPU_SHARE = 0.95  # below, a single thread was kept waiting
TOLERANCES = {False: 1e-2, True: 1e-1}  # of a form's logits, relative to eager, without and with autocast: exactness is what exports are verified for
INT8_TOLERANCE = verify.TOLERANCE[torch.int8]  # of a form whose name ends with int8


@dataclass
class Case:
    """One form of one model: what is timed, or why it cannot be, and the median of each round in seconds."""

    trained: Trained
    form: str
    batch_size: int
    call: Call | None = None
    remark: str | None = None
    is_out_of_memory: bool = False
    rounds_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Spread:
    """The median over rounds, and the lowest and highest round."""

    median: float
    low: float
    high: float


# --- the command line ------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, *, forms: tuple[str, ...], default_forms: tuple[str, ...], num_rounds: int, threads: int | None) -> None:
    """The flags that every timing command has."""
    names = "comma-separated"
    parser.add_argument("--model", "-m", required=True, help=f"networks of timm's registry, {names}: one table, measured in one interleaved run")
    parser.add_argument("--resume", help=f"their checkpoints, {names} in the same order; without, random weights")
    parser.add_argument(*spellings("use_ema"), action="store_true", help="the checkpoints' EMA weights")
    parser.add_argument(
        *spellings("img_size"), type=image_size, help="side of the square images, pixels, or HxW where the network takes such (default: each network's own)"
    )
    parser.add_argument("--forms", default=",".join(default_forms), help=f"{names}, of {', '.join(forms)} [%(default)s]")
    parser.add_argument("--threads", type=positive_int, default=threads, help=f"processor threads of each operator [{threads or 'as many as torch takes'}]")
    parser.add_argument("--rounds", type=positive_int, default=num_rounds, help="visits of each form of each model [%(default)s]")
    parser.add_argument(*spellings("prepare_limit"), type=positive_int, default=600, metavar="S", help="a form not ready by then is left out, [600] s")
    parser.add_argument("--accuracy", nargs=2, metavar=("TABLE", "COLUMN"), help="add that column of a CSV or Markdown table, joined by the model's name")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write figures of every round, machine and versions")


@dataclass(frozen=True)
class Setup:
    """What a run of a timing command works with; `machine` as it was before the work, `accuracies` by model under the name `column`."""

    args: argparse.Namespace
    device: torch.device
    machine: dict
    forms: list[str]
    column: str | None
    accuracies: dict[str, float]
    report: Report


def start(args: argparse.Namespace, *, forms: tuple[str, ...], report: Report) -> Setup:
    """Apply --threads before anything runs, and look at what can be seen to be wrong by now: InputError."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.out is not None and not os.access(args.out.resolve().parent, os.W_OK):
        raise InputError(f"--out {args.out}: there is no folder {args.out.parent} that can be written; make it first")
    column, accuracies = None, {}
    if args.accuracy:
        column, accuracies = args.accuracy[1], read_accuracies(*args.accuracy)
    device = open_device(args.device)
    return Setup(args, device, describe_machine(device), pick_forms(args.forms, forms), column, accuracies, report)


def pick_forms(text: str, known: tuple[str, ...]) -> list[str]:
    """The forms that --forms names, once each."""
    forms = list(dict.fromkeys(text.split(",")))
    for form in forms:
        if form not in known:
            raise InputError(f"--forms {form} is unknown: choose of {', '.join(known)}")
    return forms


def load(args: argparse.Namespace, load_one: Callable[..., Trained] = load_trained) -> list[Trained]:
    """The networks of --model with the weights of --resume, each by `load_one`."""
    names = args.model.split(",")
    sources = args.resume.split(",") if args.resume else [None] * len(names)
    if len(sources) != len(names):
        raise InputError(f"--resume names {len(sources)} checkpoints, --model {len(names)} networks: give one for each, in the same order")
    return [load_one(name, source, use_ema=args.use_ema, img_size=args.img_size) for name, source in zip(names, sources, strict=True)]


def read_accuracies(table: str, column: str) -> dict[str, float]:
    """The numbers of `column` in a CSV or Markdown table by model name; of a cell such as `79.2 / 78.0` the first."""
    return {model.label: model.y for model in scatter.read_models(Path(table), column, column)}


# --- what is timed ---------------------------------------------------------------------------------------------------------------------


class _NotReady(BaseException):
    """Raised by the alarm; no Exception, as compilers catch those and go on."""


@contextmanager
def _deadline(limit_s: float):
    def ring(number: int, frame) -> None:
        raise _NotReady

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def relative_error(logits: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest absolute value of the reference; infinite where a logit is no number."""
    logits, reference = logits.float().to(reference.device), reference.float()
    error = ((logits - reference).abs().max() / reference.abs().max().clamp_min(1e-30)).item()
    return error if math.isfinite(error) else math.inf


def prepare(case: Case, build: Callable[[], Call], *, reference: Tensor, tolerance: float, limit_s: float) -> None:
    """Build the call of `case` and warm it up; where that fails, takes too long or computes something else, say so in its remark."""
    try:
        with _deadline(limit_s), any_number_compiled():
            call = build()
            error = relative_error(call(), reference)
            for _ in range(NUM_WARM_UP):
                call()
    except _NotReady:
        case.remark = f"not ready after {limit_s:g} s (--prepare-limit)"
    except Exception as failure:  # compilers, exporters and a full memory raise many kinds; a gap must not end the others' run
        case.remark = f"{type(failure).__name__}: {first_line(failure)}"
        case.is_out_of_memory = isinstance(failure, torch.OutOfMemoryError)
    else:
        if error <= tolerance:
            case.call = call
        else:
            case.remark = f"its logits differ from eager's by {error:.1e} of the largest"


def build_cases(setup: Setup, subjects: list[Trained], builders: dict[str, Builder], batch_size: int) -> list[Case]:
    """Every form of every model, prepared one after the other. InputError where none is left to measure."""
    args, images, cases = setup.args, Images(batch_size, setup.device), []
    for trained in subjects:
        net = fused(trained).to(setup.device)
        own = [Case(trained, form, batch_size) for form in setup.forms]
        cases += own
        try:
            reference = forward(net, images.get(trained.input_size), pick_amp(args.amp, setup.device))
        except RuntimeError as error:
            for case in own:
                case.remark, case.is_out_of_memory = first_line(error), isinstance(error, torch.OutOfMemoryError)
            setup.report(f"{trained.name} does not run on {batch_size} images of {size_text(trained.input_size)} pixels: {first_line(error)}")
            continue
        for case in own:
            setup.report(f"preparing {trained.name} {case.form}")
            build = functools.partial(builders[case.form], trained, net, images)
            tolerance = INT8_TOLERANCE if case.form.endswith("int8") else TOLERANCES[args.amp != "none"]
            prepare(case, build, reference=reference, tolerance=tolerance, limit_s=args.prepare_limit)
            if case.remark:
                setup.report(f"{trained.name} {case.form} is left out: {case.remark}")
    if all(case.call is None for case in cases):
        raise InputError("nothing is left to measure: the lines above say why")
    return cases


# --- measuring -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """How time is taken: `now` in seconds, and what waits until the device has done all it was given.

    `is_queued`: calls are given to the device without waiting for one another, as for throughput."""

    now: Callable[[], float]
    sync: Callable[[], None]
    is_queued: bool


def synchroniser(device: torch.device) -> Callable[[], None]:
    """What waits until `device` has done all it was given; nothing to wait for on a CPU."""
    return (lambda: None) if device.type == "cpu" else functools.partial(torch.accelerator.synchronize, device)


def pick_clock(setup: Setup, *, is_latency: bool) -> Clock:
    """One thread on a CPU is timed by its own processor time: equal to the time that passes but for what other work takes of the processor."""
    is_cpu = setup.device.type == "cpu"
    now = time.thread_time if is_cpu and setup.machine["threads"] == 1 else time.perf_counter
    return Clock(now, synchroniser(setup.device), is_queued=not (is_latency or is_cpu))


def time_calls(call: Call, count: int, clock: Clock) -> float:
    """Seconds of one call: the median of `count`, or, where they queue up, their mean from the first's start to the last's end.

    One call beforehand is not counted: what ran before left its own data in the caches, and its threads waiting for more."""
    call()
    clock.sync()
    if clock.is_queued:
        start = clock.now()
        for _ in range(count):
            call()
        clock.sync()
        return (clock.now() - start) / count
    durations_s = []
    for _ in range(count):
        start = clock.now()
        call()
        clock.sync()
        durations_s.append(clock.now() - start)
    return statistics.median(durations_s)


@contextmanager
def _without_collector():
    """Python's garbage collector would strike some calls and not others."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(cases: list[Case], clock: Clock, *, num_rounds: int, min_calls: int, report: Report) -> float:
    """Fill the cases' `rounds_s`: in every round each takes its turn, in every other round backwards, so that drift meets all alike.

    Returns the processor time of this process over the time that passed; 1 where a single thread was never kept waiting."""
    cases = [case for case in cases if case.call is not None]
    counts = [min(MAX_CALLS, max(min_calls, math.ceil(SLICE_S / time_calls(case.call, 1, clock)))) for case in cases]
    turns = list(zip(cases, counts, strict=True))
    start, cpu_start = time.perf_counter(), time.process_time()
    with _without_collector():
        for index in range(num_rounds):
            report(f"round {index + 1} of {num_rounds}")
            for case, count in reversed(turns) if index % 2 else turns:
                case.rounds_s.append(time_calls(case.call, count, clock))
    return (time.process_time() - cpu_start) / (time.perf_counter() - start)


def spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


# --- what comes out --------------------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    """Four significant digits, without an exponent."""
    return f"{value:.{max(0, 3 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def durations_ms(case: Case) -> list[float]:
    """Of one call, a value per round."""
    return [1e3 * value for value in case.rounds_s]


def images_per_s(case: Case) -> list[float]:
    """A value per round."""
    return [case.batch_size / value for value in case.rounds_s]


def _cell(case: Case, unit: str) -> str:
    if not case.rounds_s:
        return "-"
    numbers = spread({"ms": durations_ms, "images_per_s": images_per_s}[unit](case))
    return f"{_number(numbers.median)} ({_number(numbers.low)} to {_number(numbers.high)})"


def table(cases: list[Case], *, unit: str, column: str | None = None, accuracies: dict[str, float] | None = None) -> str:
    """Markdown that is aligned as it stands: a row per model, a column per form, cells `median (low to high)`, a dash for a gap.

    `unit` is `ms` or `images_per_s`; `accuracies`, by model, fill a column of that name."""
    rows: dict[int, dict[str, str]] = {}
    for case in cases:
        trained = case.trained
        row = rows.setdefault(id(trained), {"model": trained.name, "input": size_text(trained.input_size), "batch": str(case.batch_size)})
        if column is not None:
            row[column] = f"{accuracies[trained.name]:g}" if trained.name in accuracies else "-"
        row[f"{case.form}_{unit}"] = _cell(case, unit)
    header = list(next(iter(rows.values())))
    lines = [header, *([row[name] for name in header] for row in rows.values())]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    rule = ["-" * (width - 1) + (":" if index else "-") for index, width in enumerate(widths)]
    aligned = [[text.rjust(width) if index else text.ljust(width) for index, (text, width) in enumerate(zip(line, widths, strict=True))] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [aligned[0], rule, *aligned[1:]])


def _cpu_name() -> str:
    """The processor as Linux names it, elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict:
    """Processor, cores this process may use, threads it does use, load of the last minute, GPU and system."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": str(device),
        "system": platform.platform(),
    }


def versions() -> dict:
    """Versions of what decides a timing, and this checkout's commit."""
    return {**package_versions(), "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "commit": checkout()}


def to_record(case: Case) -> dict:
    """One case for the JSON file."""
    record = {
        "model": case.trained.name,
        "form": case.form,
        "weights": describe_weights(case.trained),
        "input_size": case.trained.input_size,
        "batch_size": case.batch_size,
        "remark": case.remark,
    }
    if case.rounds_s:
        rounds_ms = durations_ms(case)
        record |= {"duration_ms": vars(spread(rounds_ms)), "images_per_s": vars(spread(images_per_s(case))), "rounds_ms": rounds_ms}
    return record


def write_json(path: Path, content: dict) -> None:
    """Write `content` whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"--out {path} cannot be written ({error.strerror}): name another file") from error


def finish(setup: Setup, cases: list[Case], *, is_latency: bool) -> str:
    """Measure; the table, and --out besides."""
    args, machine = setup.args, setup.machine
    clock = pick_clock(setup, is_latency=is_latency)
    cpu_share = measure(cases, clock, num_rounds=args.rounds, min_calls=MIN_CALLS if is_latency else 1, report=setup.report)
    if clock.now is time.thread_time and cpu_share < QUIET_CPU_SHARE:
        setup.report(f"other work took {1 - cpu_share:.0%} of the processor: that time is not counted, but a quiet machine gives lower and closer figures")
    if args.out is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        content = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "settings": settings,
            "machine": machine,
            "versions": versions(),
            "clock": clock.now.__name__,
            "cpu_share": cpu_share,
        }
        write_json(args.out, {**content, "results": [to_record(case) for case in cases]})
    return table(cases, unit="ms" if is_latency else "images_per_s", column=setup.column, accuracies=setup.accuracies)
