"""What a student really sees: images of a training step with crops, ops, mix and the teacher's labels written under them.

    python tools/show_batch.py --config recipes/recnext_300e.yaml --data-path ~/imagenet --epoch 10 --step 400 --out batch.html
    python tools/show_batch.py --config recipes/demo.yaml --without-teacher --num-images 8 --out batch.png

Takes main.py's settings, and makes the images as that run does: the same keys, transforms and mixing. The page is one file; a .png needs
matplotlib (requirements-plots.txt). Labels come from the folder in --teacher-labels where it has the epoch's, else from the teacher, on the CPU."""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from reporting.plots import PAGE_SUFFIX, checked_path
from run import config
from run.command import positive_int, run_command, spellings
from run.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="show_batch.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epoch", type=int, default=0, help="epoch of the run, from 0 [0]")
    parser.add_argument("--step", type=int, default=0, help="optimiser step of the epoch, from 0 [0]")
    parser.add_argument(*spellings("num_images"), type=positive_int, default=16, help="images to show, of the step's first [16]")
    parser.add_argument(
        *spellings("num_processes"), type=positive_int, default=1, help="processes of the run: a step has so many times --batch-size images [1]"
    )
    parser.add_argument(*spellings("without_teacher"), action="store_true", help="show the images alone")
    parser.add_argument("--out", metavar="FILE", required=True, help="where to draw, .html or .png")
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, config.Config, list[str]]:
    """This command's flags, the run's settings, and notes for the user."""
    args, rest = build_parser().parse_known_args(argv)
    args.out = checked_path(args.out, flag="--out", endings=(PAGE_SUFFIX, ".png"))
    cfg, notes = config.parse(rest)
    if cfg.eval:
        raise InputError("--eval: this shows what training sees: drop it")
    return args, cfg, notes


def run(argv: list[str]) -> None:
    args, cfg, notes = parse(argv)
    import utils
    from distillation.seen import see
    from reporting import batch_page
    from run import process
    from run.disk import write_whole, writing

    rank = process.start_process("cpu", cfg.seed)
    for note in notes:
        utils.log.info(note)
    step, seen = see(cfg, rank, epoch=args.epoch, step=args.step, num_images=args.num_images, num_processes=args.num_processes, asks=not args.without_teacher)
    with writing(f"--out {args.out}", "name another file"):
        if args.out.suffix.lower() == PAGE_SUFFIX:
            write_whole(args.out, batch_page.batch_page(step, seen))
        else:
            batch_page.draw_batch(step, seen, args.out)
    utils.log.info("wrote %s: %d images of epoch %d, step %d", args.out, len(seen), step.epoch, step.step)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with one message where the input is at fault."""
    return run_command(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
