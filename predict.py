"""The five most probable classes of images: of files, and of all images in folders and their sub-folders; with a segmenter, of their pixels;
with a detector, the objects in them.

    python predict.py cat.jpg --model recnext_m1 --resume pretrain/recnext_m1_distill_300e.pth
    python predict.py photos/ dog.png --resume checkpoints/m1/checkpoint_best.pth --csv photos.csv
    python predict.py street.jpg --resume checkpoints/fpn_m3/checkpoint_best.pth --out seen
    python predict.py street.jpg --resume checkpoints/mask_rcnn_m3/checkpoint_best.pth --out seen

Images are turned as their EXIF orientation says, then resized, cropped and normalised as the checkpoint's evaluation does. With --csv the
predictions go to that file, a line per image and rank, written whole or not at all. A segmenter gives the classes that occur, each with its
part of the pixels, and with --out a label image and an overlay of each image, at its own size. A detector gives class, score and box (x1 y1
x2 y2, pixels of the image as it was turned) of every object from --min-score on, and with --out draws boxes and masks over each image. Files
that cannot be read are named and counted on standard error and do not end the run; exit status 1 where none could be read or the input is at
fault, else 0.
"""

import argparse
import sys
from pathlib import Path

import detection.painting
import detection.saved
import segmentation.painting
import segmentation.saved
from deployment import weights
from deployment.prediction import COLUMNS, find_images, predict_files, say, writing
from run.command import positive_int, run_command, spellings
from run.errors import InputError
from run.hardware import open_device


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("paths", nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--model", help="network of timm's registry (default: the checkpoint's own)")
    parser.add_argument("--resume", required=True, help="its weights: file, URL or hf-hub:name")
    parser.add_argument(*spellings("use_ema"), action="store_true", help="the checkpoint's EMA weights")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where overlays and a segmenter's label images go; FILE.png: one sheet of overlays")
    parser.add_argument(*spellings("min_score"), type=part, metavar="S", help=f"of a detector: the least score of an object [{detection.painting.MIN_SCORE}]")
    parser.add_argument("--csv", type=Path, metavar="FILE", help=f"write {', '.join(COLUMNS)} there instead of printing")
    parser.add_argument(*spellings("batch_size"), type=positive_int, default=32, help="images [%(default)s]")
    parser.add_argument(*spellings("num_workers"), type=int, help="loader processes (default: one per core, none for a single batch)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    return parser.parse_args(argv)


def part(text: str) -> float:
    """For argparse: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 to 1")
    return value


def run(argv: list[str]) -> None:
    """Predict, and say how many images could be read. InputError where none could."""
    args = parse(argv)
    files, device = find_images(args.paths), open_device(args.device)
    checkpoint = weights.read_file(args.resume)
    is_detector, is_segmenter = detection.saved.is_detector(checkpoint), segmentation.saved.is_segmenter(checkpoint)
    if args.min_score is not None and not is_detector:
        raise InputError(f"--min-score is for what a detector finds, and {args.resume} holds none: drop it")
    if args.out and not (is_detector or is_segmenter):
        raise InputError(f"--out is for what a detector or segmenter sees, and {args.resume} holds a classifier: drop it")
    if args.use_ema and (is_detector or is_segmenter):
        raise InputError(f"--use-ema is for classifiers, and {args.resume} holds none; others are trained without an average of the weights: drop it")
    if is_detector:
        painting, opened = detection.painting, detection.saved.build(checkpoint, where=args.resume, model=args.model)
        min_score = painting.MIN_SCORE if args.min_score is None else args.min_score
        with writing(args.csv, painting.COLUMNS, show=painting.show_objects, rows=painting.object_rows) as write:
            num_read = painting.predict_files(opened, files, device, min_score=min_score, out=args.out, write=write)
    elif is_segmenter:
        painting, opened = segmentation.painting, segmentation.saved.build(checkpoint, where=args.resume, model=args.model)
        with writing(args.csv, painting.COLUMNS, show=painting.show_shares, rows=painting.share_rows) as write:
            num_read = painting.predict_files(opened, files, device, out=args.out, write=write)
    else:
        with writing(args.csv) as write:
            num_read = predict_files(args, files, device, write)
    written = "".join(f"; {place} written" for place in (args.csv, args.out) if place)
    say(f"{num_read} of {len(files)} images predicted, {len(files) - num_read} could not be read{written}")


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 with one message where the input is at fault or no image could be read."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
