"""What is left of a training run that is killed again and again, and what one that is left alone holds on to.

    python benchmarks/soak.py [--kills 20] [--steps 3000] [--data digits|FOLDER] [--record] [main.py's flags]

The same run is made twice: once alone, watched for growing memory and open files, and once ended by kill -9 at random moments and
started again with --resume auto; a third of the kills wait for a checkpoint that is being written. Both runs must be the same to the
last bit. `--record` appends the figures to benchmarks/RESULTS.md."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import timm
import torch

import datasets
import utils
from measuring import timing
from run import checkpoint, config
from run.command import positive_int, run_command
from run.errors import InputError

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
SMALL_RUN = [
    "--model=recnext_m0", "--input-size=32", "--batch-size=32", "--mix-group-size=32", "--distillation-type=none", "--warmup-epochs=1", "--hflip=0",
    "--model-ema-decay=0.99", "--device=cpu", "--num_workers=2", "--checkpoint-steps=7",
]  # fmt: skip
UNSTEADY = {"images_per_s", "data_wait_s", "epoch_s", "eval_s"}  # of log.txt: what two equal runs may differ in
SAVED = ("model", "model_ema", "optimizer", "lr_scheduler", "scaler", "epoch", "step", "best_acc1", "best_ema_acc1")
KINDS = ("writing", "training", "starting")
STARTING_S = 5.0  # a process imports, reads and continues for longer than that


# ---- runs


def start(flags: list[str], folder: Path, output: Path) -> subprocess.Popen:
    """The training run, begun or continued in `folder`; what it says is appended to `output`."""
    with output.open("a") as file:
        return subprocess.Popen([sys.executable, "main.py", *flags, f"--output_dir={folder}", "--resume=auto"], cwd=ROOT, stdout=file, stderr=file)


def require_done(process: subprocess.Popen, output: Path) -> None:
    if process.wait() != 0:
        raise InputError(f"the run ended with code {process.returncode}: " + " / ".join(output.read_text().splitlines()[-3:]))


def count_steps(flags: list[str]) -> int:
    """Optimiser steps per epoch of the run."""
    cfg, _ = config.parse(flags)
    images, _ = datasets.open_images(cfg)
    return datasets.build_train_loader(dataclasses.replace(cfg, num_workers=0), images, utils.Rank(0, 1, 0, 1, torch.device("cpu"))).num_steps


# ---- growth


def family(pid: int) -> list[int]:
    """The process and all its descendants."""
    children = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        children += [int(child) for child in listing.read_text().split()]
    return [pid, *(one for child in children for one in family(child))]


def sample(pid: int) -> tuple[int, float, int] | None:
    """Number of processes, their resident memory in MiB, and their open files; None where one of them has just ended."""
    try:
        pids = family(pid)
        pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in pids)
        return len(pids), pages * os.sysconf("SC_PAGE_SIZE") / 2**20, sum(len(os.listdir(f"/proc/{one}/fd")) for one in pids)
    except OSError:
        return None


def watch(process: subprocess.Popen, output: Path) -> dict[str, tuple[float, float]]:
    """Processes, memory and open files of a run until it is done: medians of early on (the second tenth of the time) and of its last tenth."""
    samples = []
    while process.poll() is None:
        if (seen := sample(process.pid)) is not None:
            samples.append(seen)
        time.sleep(0.2)
    require_done(process, output)
    num = len(samples)
    early, late = (list(zip(*part, strict=True)) for part in (samples[num // 10 : num // 5 + 1], samples[num - num // 10 - 1 :]))
    names = ("processes", "memory, MiB", "open files")
    return {name: (statistics.median(first), statistics.median(last)) for name, first, last in zip(names, early, late, strict=True)}


# ---- kills


@dataclasses.dataclass
class Kills:
    """What kills did: how many of each kind, how many left a file half written, a checkpoint that cannot be read, and epochs lost."""

    kinds: list[str] = dataclasses.field(default_factory=list)
    num_half_written: int = 0
    num_damaged: int = 0
    epochs_lost: float = 0.0


def saved_at(folder: Path) -> int:
    """When the last checkpoint was written, in ns; 0 where there is none."""
    try:
        return (folder / checkpoint.LAST).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def is_half_written(folder: Path) -> bool:
    """Whether a file of a checkpoint is there that has not got its name yet."""
    return folder.is_dir() and any(".tmp" in name for name in os.listdir(folder))


def wait_for_saves(process: subprocess.Popen, folder: Path, num_saves: int) -> float:
    """Until the run has written that many checkpoints more, or has ended; seconds between the last two."""
    saved, last, interval_s = saved_at(folder), time.monotonic(), 0.0
    while num_saves and process.poll() is None:
        time.sleep(0.005)
        if saved_at(folder) != saved:
            saved, num_saves = saved_at(folder), num_saves - 1
            interval_s, last = time.monotonic() - last, time.monotonic()
    return interval_s


def wait_for_moment(process: subprocess.Popen, folder: Path, *, kind: str, num_saves: int, draw: random.Random) -> None:
    """Until the moment of a kill: before the run trains, between two checkpoints after `num_saves`, or while one is written."""
    interval_s = STARTING_S if kind == "starting" else wait_for_saves(process, folder, num_saves)
    if kind == "writing":
        while process.poll() is None and not is_half_written(folder):
            time.sleep(0.0002)
    else:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=draw.uniform(0, interval_s))


def position(folder: Path, num_steps: int) -> float | None:
    """Where the last checkpoint stands, in epochs; None where it cannot be read."""
    try:
        saved = checkpoint.read(str(folder / checkpoint.LAST))
    except InputError:
        return None
    return saved["epoch"] + 1 + saved["step"] / num_steps


def continued_at(said: str, num_steps: int) -> float:
    """Where a run says that it continues, in epochs; 0 where it starts."""
    found = re.search(r"continuing \S+ with epoch (\d+), step (\d+)", said)
    return int(found[1]) + int(found[2]) / num_steps if found else 0.0


def make_killed(flags: list[str], folder: Path, output: Path, *, num_kills: int, num_steps: int, num_saves: int, draw: random.Random) -> Kills:
    """The run of `num_saves` checkpoints, killed `num_kills` times and made to its end; InputError where it ends before that."""
    kills, furthest, num_epochs = Kills(), 0.0, config.parse(flags)[0].num_epochs
    kinds = [KINDS[i % len(KINDS)] for i in range(num_kills)]
    draw.shuffle(kinds)
    for kind in [*kinds, None]:
        num_said = len(output.read_text()) if output.exists() else 0
        process = start(flags, folder, output)
        if kind is None:
            require_done(process, output)
        else:
            num_left = num_saves * (1 - furthest / num_epochs)
            most = max(1, int(2 * num_left / (num_kills - len(kills.kinds) + 3)))
            wait_for_moment(process, folder, kind=kind, num_saves=draw.randint(1, most), draw=draw)
            if process.poll() is not None:
                raise InputError(f"the run ended with code {process.returncode} after {len(kills.kinds)} of {num_kills} kills: ask for more --steps")
            process.kill()
            process.wait()
            kills.kinds.append(kind)
            kills.num_half_written += is_half_written(folder)
        said = output.read_text()[num_said:]
        if "global batch" in said:  # it got that far
            kills.epochs_lost += max(0.0, furthest - continued_at(said, num_steps))
        if saved_at(folder):
            reached = position(folder, num_steps)
            kills.num_damaged += reached is None
            furthest = max(furthest, reached or 0.0)
    return kills


# ---- comparison


def is_equal(a, b) -> bool:
    """Whether two entries of checkpoints are the same to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(is_equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def differences(folder: Path, expected: Path) -> list[str]:
    """What differs between two finished runs: entries of their last checkpoints, and their logs."""
    ours, theirs = (checkpoint.read(str(path / checkpoint.LAST)) for path in (folder, expected))
    logs = [[json.loads(line) for line in (path / "log.txt").read_text().splitlines()] for path in (folder, expected)]
    steady = [[{key: value for key, value in record.items() if key not in UNSTEADY} for record in log] for log in logs]
    return [name for name in SAVED if not is_equal(ours[name], theirs[name])] + (["log.txt"] if steady[0] != steady[1] else [])


# ---- report


def table(kills: Kills, differing: list[str], growth: dict, num_steps: int) -> str:
    """Markdown: what the kills did, and what grew."""
    counts = ", ".join(f"{kills.kinds.count(kind)} {kind}" for kind in KINDS)
    lines = [
        "| kills | moments | left a file half written | checkpoints damaged | epochs lost | bit-equal to a run never killed |",
        "|---|---|---|---|---|---|",
        f"| {len(kills.kinds)} | {counts} | {kills.num_half_written} | {kills.num_damaged} | {kills.epochs_lost:.2f} | "
        f"{'no: ' + ', '.join(differing) if differing else 'yes'} |",
        "",
        f"| over {num_steps} steps | early | at the end | growth |",
        "|---|---|---|---|",
    ]
    return "\n".join(lines + [f"| {name} | {early:.0f} | {late:.0f} | {late - early:+.1f} |" for name, (early, late) in growth.items()])


def record(text: str, args: list[str]) -> None:
    """Append the figures to RESULTS.md, with the command's arguments, date, machine and versions."""
    if not RESULTS.exists():
        RESULTS.write_text("# Results of the benchmarks\n\nWhat each measures and how is in its header.\n", encoding="utf-8")
    here = timing.describe_machine(torch.device("cpu"))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    command = f"`python benchmarks/soak.py {shlex.join(args)}`"
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(f"\n## soak.py, {time.strftime('%Y-%m-%d', time.gmtime())}\n\n{command}  \n{here['cpu']}, {here['cores']} cores; {versions}\n\n{text}\n")


def soak(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--kills", type=positive_int, default=20, metavar="N", help="how often the run is killed [%(default)s]")
    parser.add_argument("--steps", type=positive_int, default=3000, metavar="N", help="length of the run in steps, rounded up to epochs [%(default)s]")
    parser.add_argument("--data", default="digits", help="digits, which scikit-learn ships, or an image folder [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [%(default)s]")
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/RESULTS.md")
    args, more = parser.parse_known_args(argv)
    flags = [*SMALL_RUN, *(["--data-set=DIGITS"] if args.data == "digits" else [f"--data-path={args.data}"]), *more]
    num_steps = count_steps(flags)
    num_epochs = math.ceil(args.steps / num_steps)
    flags.append(f"--epochs={num_epochs}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"{num_epochs} epochs of {num_steps} steps, left alone", flush=True)
        alone = start(flags, folder / "alone", folder / "alone.out")
        growth = watch(alone, folder / "alone.out")
        num_saves = num_epochs * (1 + (num_steps - 1) // config.parse(flags)[0].checkpoint_steps)
        print(f"the same, killed {args.kills} times", flush=True)
        kills = make_killed(
            flags,
            folder / "killed",
            folder / "killed.out",
            num_kills=args.kills,
            num_steps=num_steps,
            num_saves=num_saves,
            draw=random.Random(args.seed),
        )
        differing = differences(folder / "killed", folder / "alone")
    text = table(kills, differing, growth, num_epochs * num_steps)
    print("\n" + text, flush=True)
    if args.record:
        record(text, [f"--kills={args.kills}", f"--steps={args.steps}", f"--seed={args.seed}", *more])
    if differing or kills.num_damaged or kills.epochs_lost:
        raise InputError("the kills did harm: see the table")


if __name__ == "__main__":
    sys.exit(run_command(soak, sys.argv[1:]))
