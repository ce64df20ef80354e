"""Export a checkpoint to ONNX, TorchScript or torch.export, fused, and verify the file before it is put in place.

    python export_onnx.py --model recnext_m1 --ckpt pretrain/recnext_m1_distill_300e.pth
    python export_onnx.py --model recnext_m1 --ckpt pretrain/recnext_m1_distill_300e.pth --verify pretrain/recnext_m1_distill_300e.onnx

The input `image` takes normalised images (B, 3, H, W) of any number B; `logits` is (B, classes), and of a segmenter (B, classes, H / 4, W / 4),
or by 8 where its finest map has that stride: to be enlarged, bilinear, before the highest of each pixel is taken. A detector takes one image
of one size and gives `boxes` (n, 4) x1, y1, x2, y2 in its pixels, `scores` (n,), `labels` (n,) and of Mask R-CNN `masks` (n, 1, 28, 28) of
probabilities inside the boxes. The written file is run and compared with the network it came from; the figures go into FILE.json beside it.
--verify does so with any file of this project, Core ML's too."""

import argparse
import sys
from pathlib import Path

import torch

import detection.exporting
import detection.saved
import segmentation.exporting
import segmentation.saved
from deployment import formats, options, verify, weights
from run import command
from run.errors import InputError

FORMATS = {"onnx": (formats.ONNX, ".onnx"), "torchscript": (formats.TORCHSCRIPT, "_fused.pt"), "torch-export": (formats.PROGRAM, "_fused.pt2")}


def load(args: argparse.Namespace) -> tuple[weights.Trained, dict]:
    """The classifier, segmenter or detector in the checkpoint that the options name, and the formats that it can be written in, as `FORMATS`."""
    saved = weights.read_file(args.ckpt)
    if args.use_ema and (detection.saved.is_detector(saved) or segmentation.saved.is_segmenter(saved)):
        raise InputError(f"--use-ema is for classifiers, and {args.ckpt} holds none; others are trained without an average of the weights: drop it")
    if detection.saved.is_detector(saved):
        trained = detection.exporting.load_trained(args.model, args.ckpt, img_size=args.input_size, part=args.part)
        return trained, {"onnx": (detection.exporting.FORMATS[args.part], ".onnx")}
    if args.part != "detector":
        raise InputError(f"--part {args.part} is of a detector, and {args.ckpt} holds none: drop it")
    if segmentation.saved.is_segmenter(saved):
        return segmentation.exporting.load_trained(args.model, args.ckpt, img_size=args.input_size), FORMATS
    return options.load_for(args), FORMATS


def run(argv: list[str]) -> None:
    parser = options.build_parser(__doc__)
    options.add_verify(parser)
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="kind of file to write (default: onnx)")
    parts = "of a detector: the whole of it, or backbone and pyramid alone"
    parser.add_argument("--part", choices=detection.exporting.PARTS, default="detector", help=f"{parts} (default: detector)")
    parser.add_argument("--float16", action="store_true", help="compute in float16, between float32 images and logits")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: in pretrain/, named after the checkpoint or the model)")
    args = parser.parse_args(argv)
    trained, known = load(args)
    if args.format not in known:
        raise InputError(f"--format {args.format} is not for detectors: these are written as onnx")
    fmt, suffix = known[args.format]
    if args.verify:
        print(formats.verdict(Path(args.verify), trained, args.data_path, known=fmt if known is not FORMATS else None))
        return
    target = Path(args.out) if args.out else verify.default_target(trained, suffix)
    dtype = torch.float16 if args.float16 else torch.float32
    described = verify.write_verified(trained, target, fmt, data_path=args.data_path, dtype=dtype)
    print(verify.report(target, described))


if __name__ == "__main__":
    sys.exit(command.run_command(run, sys.argv[1:]))
