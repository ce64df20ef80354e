"""Write the fifteen corruptions of ImageNet-C, at five severities, of the images of a validation folder.

    python tools/corrupt_images.py ~/imagenet/val ~/imagenet-c
    python tools/corrupt_images.py digits/val digits-c --size 32 --crop-pct 1 --corruptions fog snow

SRC holds a folder per class. DST gets <corruption>/<1 to 5>/<class>/<file>, JPEGs of the central square, which main.py --eval takes as
--inc-path. What is drawn at random is decided by the file's class and name and by --seed alone, so that a second run writes the same files.
A run that was stopped goes on: files that are there stay as they are. Needs imagecorruptions-imaug (requirements-robustness.txt). Ends with
code 0, 1 where an image could not be read, 130 if interrupted."""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from loading.loaders import count_cores
from robustness.corrupting import SMALLEST, Corruptions, Recipe, claim, make
from robustness.scores import CORRUPTIONS, SEVERITIES
from run.command import positive_int, run_process, spellings
from run.errors import InputError

NUM_SHOWN = 20
DEFAULTS = Recipe()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="corrupt_images.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("src", type=Path, metavar="SRC", help="folder of class folders, such as ImageNet's val/")
    parser.add_argument("dst", type=Path, metavar="DST", help="folder to fill")
    parser.add_argument("--size", type=positive_int, default=DEFAULTS.size, metavar="N", help="side of the written images, pixels [%(default)s]")
    parser.add_argument(*spellings("crop_pct"), type=float, default=DEFAULTS.crop_pct, metavar="X", help="part of the short side they are [%(default)s]")
    parser.add_argument("--quality", type=positive_int, default=DEFAULTS.quality, metavar="N", help="of the JPEGs, up to 100 [%(default)s]")
    parser.add_argument("--seed", type=int, default=DEFAULTS.seed, metavar="N", help="of what is drawn at random [%(default)s]")
    parser.add_argument("--corruptions", nargs="+", choices=CORRUPTIONS, default=CORRUPTIONS, metavar="NAME", help="some of: %(choices)s [all]")
    parser.add_argument("--severities", nargs="+", type=int, choices=SEVERITIES, default=SEVERITIES, metavar="N", help="some of: %(choices)s [all]")
    parser.add_argument(*spellings("num_workers"), type=positive_int, default=count_cores(), metavar="N", help="processes [one per core: %(default)s]")
    return parser


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def validate(args: argparse.Namespace) -> None:
    """InputError where a setting or a folder does not fit."""
    rules = [
        (args.size < SMALLEST, f"--size {args.size} is less than the {SMALLEST} pixels that the corruptions are made for"),
        (not 0 < args.crop_pct <= 1, f"--crop-pct {args.crop_pct} is no part: above 0, and 1 at most"),
        (args.quality > 100, f"--quality {args.quality} is more than 100"),
        (not args.src.is_dir(), f"{args.src} is no folder: name one that holds a folder of images per class, such as ImageNet's val/"),
        ((args.src / "val").is_dir(), f"{args.src} holds val/, which is what to corrupt: name {args.src / 'val'}"),
        (args.dst.resolve().is_relative_to(args.src.resolve()), f"{args.dst} lies in {args.src}, whose folders are classes: name one outside of it"),
    ]
    for is_wrong, message in rules:
        if is_wrong:
            raise InputError(message)


def main(argv: list[str]) -> int:
    """Exit status: 0, 1 where an image cannot be read, 130 if interrupted. InputError where there is nothing to read or it cannot be written."""
    args = build_parser().parse_args(argv)
    args.src, args.dst = args.src.expanduser(), args.dst.expanduser()
    validate(args)
    recipe = Recipe(args.size, args.crop_pct, args.quality, args.seed)
    dataset = Corruptions(args.src, args.dst, recipe, dict.fromkeys(args.corruptions), dict.fromkeys(args.severities))
    claim(args.dst, recipe)
    num_written, num_there, problems = 0, 0, []
    try:
        for made in make(dataset, num_workers=args.num_workers, say=say):
            num_written, num_there = num_written + made.num_written, num_there + made.num_there
            problems += [made.problem] if made.problem else []
    except KeyboardInterrupt:
        say(f"interrupted after {num_written:,} files; the same command goes on from there")
        return 130
    print(f"{args.dst}: {num_written:,} files written, {num_there:,} were there, of {len(dataset):,} images of {len(dataset.images.classes)} classes")
    for problem in problems[:NUM_SHOWN]:
        say(f"damaged, and so without corruptions: {problem}")
    if len(problems) > NUM_SHOWN:
        say(f"and {len(problems) - NUM_SHOWN} more: tools/check_images.py lists all")
    return 1 if problems else 0


if __name__ == "__main__":
    run_process(main, sys.argv[1:])
