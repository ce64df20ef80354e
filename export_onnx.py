"""Export a checkpoint to ONNX, TorchScript or torch.export, fused, and verify the file before it is put in place.

    python export_onnx.py --model recnext_m1 --ckpt pretrain/recnext_m1_distill_300e.pth
    python export_onnx.py --model recnext_m1 --ckpt pretrain/recnext_m1_distill_300e.pth --verify pretrain/recnext_m1_distill_300e.onnx

The input `image` takes normalised images (B, 3, H, W) of any number B; `logits` is (B, classes), and of a segmenter (B, classes, H / 4, W / 4),
or by 8 where its finest map has that stride: to be enlarged, bilinear, before the highest of each pixel is taken. The written file is run and compared with
the network it came from; the figures go into FILE.json beside it. --verify does so with any file of this project, Core ML's too."""

import argparse
import sys
from pathlib import Path

import torch

from deployment import formats, options, verify, weights
from run import command
from segmentation import exporting, saved

FORMATS = {"onnx": (formats.ONNX, ".onnx"), "torchscript": (formats.TORCHSCRIPT, "_fused.pt"), "torch-export": (formats.PROGRAM, "_fused.pt2")}


def load(args: argparse.Namespace) -> weights.Trained:
    """The classifier or segmenter in the checkpoint that the options name."""
    if saved.is_segmenter(weights.read_file(args.ckpt)):
        return exporting.load_trained(args.model, args.ckpt, img_size=args.input_size)
    return options.load_for(args)


def run(argv: list[str]) -> None:
    parser = options.build_parser(__doc__)
    options.add_verify(parser)
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="kind of file to write (default: onnx)")
    parser.add_argument("--float16", action="store_true", help="compute in float16, between float32 images and logits")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: in pretrain/, named after the checkpoint or the model)")
    args = parser.parse_args(argv)
    trained = load(args)
    if args.verify:
        print(formats.verdict(Path(args.verify), trained, args.data_path))
        return
    fmt, suffix = FORMATS[args.format]
    target = Path(args.out) if args.out else verify.default_target(trained, suffix)
    dtype = torch.float16 if args.float16 else torch.float32
    described = verify.write_verified(trained, target, fmt, data_path=args.data_path, dtype=dtype)
    print(verify.report(target, described))


if __name__ == "__main__":
    sys.exit(command.run_command(run, sys.argv[1:]))
