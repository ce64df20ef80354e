"""Seconds per training step with the teacher online, with its labels stored, and without distillation.

    python benchmarks/distill.py                                         recnext_m0, m1 and m3 from regnety_160, on a GPU where there is one
    python benchmarks/distill.py --models recnext_m1 --batch-size 8 --rounds 20 --device cpu

The steps are the training loop's own, with mixing, clipping, optimiser and EMA, on one batch that is ready: loading it is not measured. The
teacher has random weights. All sides take turns, step by step; a figure is the median of the rounds, with the lowest and the highest. MACs is
what the ratio online / stored would be if time were multiply-accumulates, a step being three forward passes of the student."""

import argparse
import itertools
import statistics
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

import utils
from distillation import teacher
from distillation.labelling import StoredLabels
from distillation.store import LabelStore
from loading import augment
from loading.batches import Batch
from loading.keys import Plan, build_plan
from measuring import operations
from measuring.steps import NUM_CLASSES, build_batch, build_online, build_side, visit_s
from run import config, hardware

SIDES = ("online", "stored", "none")
ORDERS = list(itertools.permutations(SIDES))  # so that no side always follows the same other one


def build_teachers(cfg: config.Config, plan: Plan, batch: Batch, *, rank: utils.Rank, folder: str) -> dict:
    """The teacher of each side; the stored labels are those of the online one for the batch, after a round trip through files."""
    online = build_online(cfg, plan, rank)
    store = LabelStore(Path(folder), num_positions=plan.num_positions, num_groups=plan.num_positions // plan.group_size, width=1)
    settings = {"plan": plan, "answer": online.answer, "is_mixing": True, "is_spread": False, "rank": rank, "claim": lambda: None}
    images, targets = batch.images.to(rank.device, copy=True), batch.targets.to(rank.device)
    mixed, _ = augment.build_mixing(cfg, plan, NUM_CLASSES)(images, targets, 0, batch.positions)
    writing = StoredLabels(store, teacher=online, mode="auto", **settings)
    writing(mixed, batch, 0)
    writing.end_epoch(0)
    return {"online": online, "stored": StoredLabels(store, teacher=None, mode="read", **settings), "none": teacher.no_teacher}


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratio_of_macs(name: str, teacher_name: str, input_size: int) -> float:
    """(Teacher + 3 x student) / (3 x student)."""
    student = operations.measure(name, input_size)[-1]
    return 1 + operations.measure(teacher_name, input_size)[-1] / (3 * student)


def measure(name: str, args: argparse.Namespace, rank: utils.Rank) -> dict[str, list[float]]:
    """Seconds per step of each side, round by round."""
    plan = build_plan(args.batch_size, repeated_aug=False, group_size=args.batch_size, lanes=1, data_seed=0)
    flags = ["--data-set=DIGITS", f"--model={name}", f"--batch-size={args.batch_size}", f"--mix-group-size={args.batch_size}", f"--amp={args.amp}"]
    flags += [f"--input-size={args.input_size}", f"--teacher-model={args.teacher_model}", f"--device={args.device}"]
    batch = build_batch(plan, args.input_size)
    cfgs = {side: config.parse([*flags, f"--distillation-type={'none' if side == 'none' else 'hard'}"])[0] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        teachers = build_teachers(cfgs["online"], plan, batch, rank=rank, folder=folder)
        batch = batch._replace(images=batch.images.to(rank.device))
        sides = {side: build_side(cfgs[side], plan, rank, answers=teachers[side]) for side in SIDES}
        for i in range(args.warm_up + args.rounds):
            for side in ORDERS[i % len(ORDERS)]:
                seconds = visit_s(sides[side], batch, args.steps)
                if i >= args.warm_up:
                    sides[side].rounds_s.append(seconds)
    return {side: sides[side].rounds_s for side in SIDES}


def compare(name: str, args: argparse.Namespace, rank: utils.Rank) -> str:
    """One line of the table."""
    rounds_s = measure(name, args, rank)
    online, stored, none = (rounds_s[side] for side in SIDES)
    columns = [spread(values, 3) for values in (online, stored, none)]
    columns += [spread([a / b for a, b in zip(first, second, strict=True)], 2) for first, second in ((online, stored), (stored, none))]
    return "".join(f"{column:>24}" for column in [name, *columns]) + f"{ratio_of_macs(name, args.teacher_model, args.input_size):>8.1f}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=["recnext_m0", "recnext_m1", "recnext_m3"], metavar="NAME", help="students")
    parser.add_argument("--teacher-model", default="regnety_160", help="[%(default)s]")
    parser.add_argument("--batch-size", type=int, help="images, all of one mix group [32 on a CPU, 256 on a GPU]")
    parser.add_argument("--input-size", type=int, default=224, help="side of the images, pixels [%(default)s]")
    parser.add_argument("--steps", type=int, help="steps in a row [1 on a CPU, 10 on a GPU]")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each side that are timed [%(default)s]")
    parser.add_argument("--warm-up", type=int, default=2, help="turns before that [%(default)s]")
    parser.add_argument("--threads", type=int, help="processor threads [as many as torch takes]")
    parser.add_argument("--device", default="auto", help="[%(default)s]")
    parser.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "none"), help="the student's precision [%(default)s]")
    args = parser.parse_args(argv)
    is_cpu = hardware.pick_device(args.device).type == "cpu"
    args.batch_size, args.steps = args.batch_size or (32 if is_cpu else 256), args.steps or (1 if is_cpu else 10)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rank = utils.Rank(0, 1, 0, 1, hardware.pick_device(args.device))
    print(f"batch {args.batch_size} at {args.input_size} pixels from {args.teacher_model}, {args.rounds} rounds of {args.steps} steps, on {rank.device}")
    print("".join(f"{title:>24}" for title in ("model", *(f"{side}, s" for side in SIDES), "online / stored", "stored / none")) + f"{'MACs':>8}")
    for name in args.models:
        print(compare(name, args, rank), flush=True)


if __name__ == "__main__":
    main()
