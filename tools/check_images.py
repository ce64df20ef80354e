"""Read a whole tree of images with the loader's own decoder, on all cores, and list what a run would stumble over.

    python tools/check_images.py ~/imagenet
    python tools/check_images.py ~/imagenet/train.tar --out train.csv --loader reference

Writes a CSV file: path, problem, message. Problems are `damaged`, `not an image`, and, for --loader fast, `read by the fallback`: sound, but
no JPEG that the fast decoder takes, and so decoded by Pillow, more slowly; and `turned`: sound, but stored on its side, on its head or mirrored,
as its EXIF orientation says, which only a run with --exif-transpose takes heed of. Tars in the tree are read too; hidden folders, and files whose
names are no image's, are passed over, as the loaders do. Ends with code 0 where all images can be read, 1 where not, 130 if interrupted."""

import argparse
import collections
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from loading import pixels
from loading.loaders import count_cores
from run.command import positive_int, run_process, spellings
from run.disk import writing_csv
from sources.checking import DAMAGED, FALLBACK, NOT_AN_IMAGE, SOUND, TURNED, Problem, check, find_images


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="check_images.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("root", type=Path, metavar="DIR", help="folder of any depth, or a tar")
    parser.add_argument("--out", type=Path, default=Path("bad_images.csv"), metavar="FILE", help="the list [%(default)s]")
    parser.add_argument("--loader", choices=("fast", "reference"), default="fast", help="the decoder of main.py's --loader [%(default)s]")
    parser.add_argument(*spellings("num_workers"), type=positive_int, default=count_cores(), metavar="N", help="processes [one per core: %(default)s]")
    return parser


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Exit status: 0, 1 where an image cannot be read, 130 if interrupted. InputError where there is nothing to read."""
    args = build_parser().parse_args(argv)
    is_fast = args.loader == "fast"
    if is_fast:
        pixels.require()
    counts = collections.Counter()
    try:
        tree = find_images(args.root.expanduser())
        with writing_csv(args.out.expanduser(), Problem._fields, flag="--out") as writer:
            for problem in check(tree, is_fast=is_fast, num_workers=args.num_workers, say=say):
                writer.writerow(problem)
                counts[problem.problem] += 1
    except KeyboardInterrupt:
        say(f"interrupted: {args.out} is not written")
        return 130
    found = ", ".join(f"{counts[kind]:,} {kind}" for kind in (DAMAGED, NOT_AN_IMAGE, FALLBACK, TURNED) if counts[kind]) or "no problem"
    print(f"{tree.num_images:,} images: {found}; {tree.num_others:,} other files passed over. The list: {args.out}")
    return 1 if set(counts) - SOUND else 0


if __name__ == "__main__":
    run_process(main, sys.argv[1:])
