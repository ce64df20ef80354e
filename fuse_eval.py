"""Evaluate a fused file as `main.py --eval` evaluates a checkpoint: same settings, same data, same last line.

    python fuse_eval.py --model recnext_m1 --resume pretrain/recnext_m1_distill_300e_fused.pt --data-path ~/imagenet

Takes every setting of main.py (`python main.py --help`) but those of robustness. --resume is what publish.py --fused writes (a TorchScript
program, which is run as it is, or the safetensors beside it), or any checkpoint, which is fused first."""

import argparse
import sys

import utils
from deployment.accuracy import prepare
from robustness.evaluation import Report, evaluate_validation
from run import config, process
from run.command import run_process
from run.errors import InputError


def main(argv: list[str]) -> int:
    own = argparse.ArgumentParser(prog="fuse_eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    _, argv = own.parse_known_args(argv)  # main.py's help would be of main.py
    cfg, notes = config.parse(["--eval", *argv])
    rank = process.start_process(cfg.device, cfg.seed)
    for note in notes:
        utils.log.info(note)
    if not cfg.resume:
        raise InputError("fuse_eval.py evaluates a file: add --resume FILE")
    if cfg.robustness_flags:
        raise InputError(f"fuse_eval.py evaluates the validation images alone: main.py --eval takes {' '.join(cfg.robustness_flags)}")
    prepared = prepare(cfg, rank)
    report = Report(cfg, prepared["loader"].loader.dataset.images.classes, prepared["parts"], cfg.resume)
    report.check_writable()
    evaluate_validation(**prepared, report=report)
    process.stop_process()
    return 0


if __name__ == "__main__":
    run_process(main, sys.argv[1:])
