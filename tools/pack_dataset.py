"""Pack a data set into one file per split: `python tools/pack_dataset.py SRC DST`, then train with `--data-path DST`.

    python tools/pack_dataset.py ~/imagenet ~/packed
    python tools/pack_dataset.py ~/imagenet ~/packed --check
    python tools/pack_dataset.py s3://bucket/imagenet ~/small --max-side 512

SRC is anything that main.py's --data-path takes. DST gets train.pack and val.pack, with the images' own bytes, so that a run from them is, to
the last bit, the run from SRC, and teacher labels stored for one serve the other. With --max-side, images whose longer side has more pixels
are made smaller (Lanczos) and written as JPEGs: that is another data set, and is treated as one. A stopped command goes on where it was.
Ends with code 0, 1 where an image differs or something cannot be read or written, 130 if interrupted."""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from loading.loaders import count_cores
from run import config
from run.command import positive_int, run_process, spellings
from run.errors import InputError
from sources import finding, packing
from sources.packed import ENDING


def quality(text: str) -> int:
    """For argparse: a JPEG quality, from 1 to 100."""
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 to 100")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pack_dataset.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("source", metavar="SRC", help="what --data-path takes")
    parser.add_argument("folder", type=Path, metavar="DST", help="folder of the packed files")
    parser.add_argument("--check", action="store_true", help="compare every image with its source; packs first what is not packed yet")
    parser.add_argument(*spellings("max_side"), type=positive_int, metavar="N", help="make images smaller whose longer side has more pixels")
    parser.add_argument("--quality", type=quality, default=90, metavar="Q", help="of the JPEGs that --max-side writes [%(default)s]")
    parser.add_argument(*spellings("num_workers"), type=positive_int, default=count_cores(), metavar="N", help="processes [one per core: %(default)s]")
    for name in ("data_format", "data_cache", "class_map"):
        field = config.SETTINGS.fields[name]
        parser.add_argument(*spellings(name), choices=field.metadata["choices"], default=field.default, help="as main.py's")
    return parser


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Exit status: 0, 1 where --check finds a difference, 130 if interrupted. InputError where there is nothing to pack."""
    args = build_parser().parse_args(argv)
    flags = [f"--{name.replace('_', '-')}={value}" for name in ("data_format", "data_cache", "class_map") if (value := getattr(args, name))]
    cfg, _ = config.parse([f"--data-path={args.source}", *flags])
    recipe = packing.Recipe(args.max_side, args.quality)
    folder = args.folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}): choose another folder") from error
    try:
        return _all_splits(cfg, folder, recipe, args)
    except KeyboardInterrupt:
        say("interrupted: start again to go on")
        return 130


def _all_splits(cfg: config.Config, folder: Path, recipe: packing.Recipe, args: argparse.Namespace) -> int:
    num_wrong = num_splits = 0
    for split, part, images in finding.parts_of(cfg, "val"):
        path, num_splits = folder / f"{split}{ENDING}", num_splits + 1
        if not path.exists():
            packing.pack(part, images, path, recipe, num_workers=args.num_workers, say=say)
            print(f"{path}: {len(images):,} images of {len(images.classes):,} classes, {path.stat().st_size:,} bytes")
        elif not args.check:
            print(f"{path} is there already: --check compares it with its source")
        if args.check:
            found = packing.check(images, path, recipe, finding.cache_of(cfg), num_workers=args.num_workers, say=say)
            print(f"{path}: {len(images):,} images compared with {part.what}: {found or 'none'} differ")
            num_wrong += found
    if not num_splits:
        raise InputError(f"{cfg.data_path} holds no images of train or val: see what main.py's --data-path takes")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    run_process(main, sys.argv[1:])
