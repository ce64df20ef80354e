"""The settings that a checkpoint was trained with, and the flags that take their place."""

import argparse

from run import process
from run.command import spellings
from run.config import SETTINGS, Config, validate
from run.errors import InputError
from utils import Rank, log

# What of a run's settings says how it ran, or started, and not how its images and its network are made.
NEUTRAL = {
    "output_dir": None, "overwrite": False, "pretrained": False, "finetune": None, "project": None, "use_ema": False, "report": None, "dry_run": False,
    "compile": False, "teacher_labels": None, "teacher_labels_mode": "auto", "teacher_topk": None, "distillation_type": "none", "amp": "none",
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Those that the commands share: what they read, where they write, and with which of a checkpoint's weights."""
    what = "folders of runs, or checkpoints: files, URLs, hf-hub:name" if several else "checkpoint: file, URL or hf-hub:name"
    parser.add_argument("--input", required=True, metavar="X", nargs="+" if several else None, help=what)
    parser.add_argument("--output", required=True, metavar="FILE", help="the checkpoint to write; none may be there")
    parser.add_argument(*spellings("use_ema"), action="store_true", help="the EMA weights instead of the raw ones")


def settings_of(saved: dict, source: str) -> dict:
    """Settings of the run that wrote the checkpoint `saved`, by name; none where it was not one of classification's. InputError where one is damaged."""
    there = saved.get("args")
    if not isinstance(there, dict) or "mixup" not in there:
        return {}
    return {name: SETTINGS.value(name, value, where=f"{source}: {name}") for name, value in there.items() if name in SETTINGS.fields}


def recipe_of(saved: dict, source: str, flags: dict, *, is_eval: bool) -> Config:
    """Those, and over them `flags`, by the names of settings. `is_eval`: for validation images alone.

    InputError where neither says what network the checkpoint is of."""
    settings = {**settings_of(saved, source), **flags}
    if "model" not in settings:
        raise InputError(f"{source} does not say how its network was trained", "add --model NAME or --config RECIPE, and --data-path")
    cfg = Config(**{**settings, **NEUTRAL, "eval": is_eval, "resume": source if is_eval else None})
    validate(cfg)
    return cfg


def start(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, dict, Rank]:
    """The command's own flags; main.py's settings among the others, by name; and its process. InputError where a flag is unknown or does not fit,
    and where there are several processes."""
    args, flags, notes = read_flags(parser, argv)
    rank = process.start_process(flags.get("device", "auto"), flags.get("seed", 0))
    if rank.world_size > 1:
        raise InputError(f"{parser.prog} is one process, and {rank.world_size} were started", "start it without a launcher")
    for note in notes:
        log.info(note)
    return args, flags, rank


def read_flags(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, dict, list[str]]:
    """The command's own flags; main.py's settings among the others, by name; and notes for the user. InputError where one is unknown or does not fit."""
    args, rest = parser.parse_known_args(argv)
    settings, notes = SETTINGS.parse(rest)
    return args, settings, notes
