"""Export a checkpoint to Core ML: an RGB image in, class labels and their probabilities out; fused, and verified before it is put in place.

    python export_coreml.py --model recnext_m1 --ckpt pretrain/recnext_m1_distill_300e.pth
    python export_coreml.py --model recnext_m1 --ckpt pretrain/recnext_m1_distill_300e.pth --verify pretrain/recnext_m1_distill_300e_224.mlpackage

Writes an ML Program in float16 (.mlpackage, iOS 15 and later), --float32 one in full precision, --legacy a neural network in the old format
(.mlmodel). The image is a photograph resized and cropped to the square; its normalisation is in the model. On macOS Core ML itself runs the
written file; elsewhere its program is evaluated operator by operator, and the report says so."""

import sys
from pathlib import Path

import torch

from deployment import coreml, formats, options, verify
from run import command


def run(argv: list[str]) -> None:
    parser = options.build_parser(__doc__)
    options.add_verify(parser)
    parser.add_argument("--float32", action="store_true", help="full precision instead of float16")
    parser.add_argument("--legacy", action="store_true", help="the old neural-network format (.mlmodel), in full precision")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: pretrain/<name>_<size>.mlpackage)")
    args = parser.parse_args(argv)
    trained = options.load_for(args)
    if args.verify:
        print(formats.verdict(Path(args.verify), trained, args.data_path))
        return
    fmt, suffix = (coreml.LEGACY, ".mlmodel") if args.legacy else (coreml.PROGRAM, ".mlpackage")
    target = Path(args.out) if args.out else verify.default_target(trained, f"_{trained.input_size}{suffix}")
    dtype = torch.float32 if args.float32 or args.legacy else torch.float16
    print(verify.report(target, verify.write_verified(trained, target, fmt, data_path=args.data_path, dtype=dtype)))


if __name__ == "__main__":
    sys.exit(command.run_command(run, sys.argv[1:]))
