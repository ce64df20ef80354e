"""The five most probable classes of images: of files, and of all images in folders and their sub-folders.

    python predict.py cat.jpg --model recnext_m1 --resume pretrain/recnext_m1_distill_300e.pth
    python predict.py photos/ dog.png --resume checkpoints/m1/checkpoint_best.pth --csv photos.csv

Images are resized, cropped and normalised as the checkpoint's evaluation does. With --csv the predictions go to that file, a line per image
and rank, written whole or not at all. Files that cannot be read are named and counted on standard error and do not end the run; exit
status 1 where none could be read or the input is at fault, else 0.
"""

import argparse
import sys
from pathlib import Path

from deployment.prediction import COLUMNS, find_images, predict_files, say, writing
from run.command import positive_int, run_command, spellings
from run.hardware import open_device


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("paths", nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--model", help="network of timm's registry (default: the checkpoint's own)")
    parser.add_argument("--resume", required=True, help="its weights: file, URL or hf-hub:name")
    parser.add_argument(*spellings("use_ema"), action="store_true", help="the checkpoint's EMA weights")
    parser.add_argument("--csv", type=Path, metavar="FILE", help=f"write {', '.join(COLUMNS)} there instead of printing")
    parser.add_argument(*spellings("batch_size"), type=positive_int, default=32, help="images [%(default)s]")
    parser.add_argument(*spellings("num_workers"), type=int, help="loader processes (default: one per core, none for a single batch)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    return parser.parse_args(argv)


def run(argv: list[str]) -> None:
    """Predict, and say how many images could be read. InputError where none could."""
    args = parse(argv)
    files, device = find_images(args.paths), open_device(args.device)
    with writing(args.csv) as write:
        num_read = predict_files(args, files, device, write)
    say(f"{num_read} of {len(files)} images predicted, {len(files) - num_read} could not be read{f'; {args.csv} written' if args.csv else ''}")


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 with one message where the input is at fault or no image could be read."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
