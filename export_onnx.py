"""Export a checkpoint to ONNX, TorchScript, torch.export or ExecuTorch, fused, and verify the file before it is put in place.

    python export_onnx.py --model recnext_m1 --ckpt pretrain/recnext_m1_distill_300e.pth
    python export_onnx.py --model recnext_m1 --ckpt pretrain/recnext_m1_distill_300e.pth --int8 --data-path ~/imagenet
    python export_onnx.py --model recnext_m1 --ckpt pretrain/recnext_m1_distill_300e.pth --format executorch
    python export_onnx.py --model recnext_m1 --ckpt pretrain/recnext_m1_distill_300e.pth --verify pretrain/recnext_m1_distill_300e.onnx

The input `image` takes normalised images (B, 3, H, W) of any number B; `logits` is (B, classes), and of a segmenter (B, classes, H / 4, W / 4),
or by 8 where its finest map has that stride: to be enlarged, bilinear, before the highest of each pixel is taken. A detector takes one image
of one size and gives `boxes` (n, 4) x1, y1, x2, y2 in its pixels, `scores` (n,), `labels` (n,) and of Mask R-CNN `masks` (n, 1, 28, 28) of
probabilities inside the boxes. The written file is run and compared with the network it came from; the figures go into FILE.json beside it.
--verify does so with any file of this project, Core ML's too.

--int8 quantises the ONNX file after training: the ranges of its maps are those that --calibration-images of the training images give them. Where
--data-path or --data-set names labelled images, the accuracy of both files on those of val is measured, told and noted."""

import argparse
import sys
from pathlib import Path

import torch

import detection.exporting
import detection.saved
import segmentation.exporting
import segmentation.saved
from deployment import executorch, formats, options, quantised, verify, weights
from run import command
from run.command import positive_int, spellings
from run.errors import InputError

FORMATS = {
    "onnx": (formats.ONNX, ".onnx"),
    "torchscript": (formats.TORCHSCRIPT, "_fused.pt"),
    "torch-export": (formats.PROGRAM, "_fused.pt2"),
    "executorch": (executorch.PROGRAM, ".pte"),
}
CALIBRATION_IMAGES = 256


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
        return segmentation.exporting.load_trained(args.model, args.ckpt, img_size=args.input_size), dict(FORMATS)
    return options.load_for(args), FORMATS


def format_of_file(path: Path) -> verify.Format | None:
    """The format of a file that `formats.format_of` does not tell from others."""
    if path.suffix == ".pte":
        return executorch.PROGRAM
    return quantised.build_format() if quantised.is_quantised(path) else None


def write_int8(args: argparse.Namespace, trained: weights.Trained) -> None:
    """Write, verify and measure the quantised ONNX file that the options ask for."""
    if args.format != "onnx" or args.float16:
        raise InputError(f"--int8 makes an ONNX file of a float32 one: drop {'--float16' if args.float16 else f'--format {args.format}'}")
    images, origin = verify.calibration_images(trained, args.data_path, args.calibration_images or CALIBRATION_IMAGES)
    target = Path(args.out) if args.out else verify.default_target(trained, "_int8.onnx")
    has_data = options.has_data(args)
    described = verify.write_verified(
        trained,
        target,
        quantised.build_format(images),
        data_path=args.data_path,
        also=lambda path: {"calibrated_on": origin, **(quantised.measure_both(args, trained, path) if has_data else {})},
    )
    print(verify.report(target, described))
    print(quantised.report_accuracy(described))


def run(argv: list[str]) -> None:
    parser = options.build_parser(__doc__)
    options.add_verify(parser)
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="kind of file to write (default: onnx)")
    parts = "of a detector: the whole of it, or backbone and pyramid alone"
    parser.add_argument("--part", choices=detection.exporting.PARTS, default="detector", help=f"{parts} (default: detector)")
    parser.add_argument("--float16", action="store_true", help="compute in float16, between float32 images and logits")
    parser.add_argument("--int8", action="store_true", help="quantise an ONNX file to 8 bits, calibrated on images of --data-path (default: digits)")
    calibration = f"images that --int8 is calibrated on (default: {CALIBRATION_IMAGES})"
    parser.add_argument(*spellings("calibration_images"), type=positive_int, metavar="N", help=calibration)
    options.add_data_flags(parser, has_device=False)
    parser.add_argument("--out", metavar="FILE", help="file to write (default: in pretrain/, named after the checkpoint or the model)")
    args = parser.parse_args(argv)
    if args.calibration_images is not None and not args.int8:
        raise InputError("--calibration-images are what an int8 file is calibrated on: add --int8, or drop it")
    trained, known = load(args)
    if args.format not in known:
        raise InputError(f"--format {args.format} is not for detectors: these are written as onnx")
    fmt, suffix = known[args.format]
    if args.verify:
        path = Path(args.verify)
        print(formats.verdict(path, trained, args.data_path, known=fmt if len(known) == 1 else format_of_file(path)))
        return
    if args.int8:
        if known is not FORMATS:
            raise InputError(f"--int8 is for classifiers, and {args.ckpt} holds none: drop it")
        write_int8(args, trained)
        return
    target = Path(args.out) if args.out else verify.default_target(trained, suffix)
    dtype = torch.float16 if args.float16 else torch.float32
    described = verify.write_verified(trained, target, fmt, data_path=args.data_path, dtype=dtype)
    print(verify.report(target, described))


if __name__ == "__main__":
    sys.exit(command.run_command(run, sys.argv[1:]))
