"""Throughput of fused networks, images per second, on any device.

    python speed_gpu.py --model recnext_m1
    python speed_gpu.py --model recnext_m1,recnext_a1,lsnet_t --batch-size 256 --amp bf16 --out speed.json
    python speed_gpu.py --model recnext_m1 --resume pretrain/recnext_m1_distill_300e.pth --device cpu --threads 1

All models and forms (eager, channels-last, compiled) are measured in turns, round after round, in one table: median over rounds, and the
lowest and highest round. The table is Markdown, on standard output; what is left out, and why, on standard error. Exit status 1 where
nothing could be measured.
"""

import argparse
import sys

from measuring import forms, timing
from measuring.throughput import batch_size_or_auto, build_cases
from run.command import run_command, spellings
from segmentation.exporting import load_named


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    timing.add_arguments(parser, forms=forms.FORMS, default_forms=forms.FORMS, num_rounds=10, threads=None)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    parser.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"), help="autocast type [%(default)s]")
    batch_help = "images, or auto: the largest power of two that fits [%(default)s]"
    parser.add_argument(*spellings("batch_size"), type=batch_size_or_auto, default="auto", help=batch_help)
    return parser.parse_args(argv)


def run(argv: list[str]) -> None:
    args = parse(argv)
    setup = timing.start(args, forms=forms.FORMS, report=lambda text: print(text, file=sys.stderr, flush=True))
    cases = build_cases(setup, timing.load(args, load_named))
    print(timing.finish(setup, cases, is_latency=False))


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 with one message where the input is at fault or nothing could be measured."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
