"""Latency of fused networks on one image, milliseconds: ONNX Runtime, in float32 and int8, ExecuTorch and torch.

    python tools/latency.py --model recnext_m1 --threads 1
    python tools/latency.py --model recnext_m0,recnext_m1,lsnet_t --forms onnxruntime,eager,channels_last,compiled --out latency.json
    python tools/latency.py --model recnext_m1 --forms onnxruntime,onnxruntime_int8,executorch --threads 1
    python tools/latency.py --model fpn_recnext_m3,fpn_lsnet_t --img-size 512
    python tools/latency.py --model features_recnext_m3,features_lsnet_t --img-size 800x1333
    python tools/latency.py --model recnext_m0,recnext_m1,repnext_m1 --accuracy docs/published.md "top-1 distilled" > latency.md

`fpn_` before a name means Semantic FPN on that backbone, `features_` its feature maps alone, as detectors and segmenters use them. All models
and forms are measured in turns, round after round, in one table: median over rounds, and the lowest and highest round. The ONNX file is the
one that export_onnx.py writes, verified as there. The table is Markdown, on standard output, and `compare_logs.py --scatter` draws it; what is
left out, and why, goes to standard error. Exit status 1 where nothing could be measured.
"""

import argparse
import functools
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from measuring import forms, timing
from measuring.forms import build_onnxruntime
from run.command import run_command
from segmentation.exporting import load_named

FORMS = ("onnxruntime", "onnxruntime_int8", "executorch", *forms.FORMS)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    timing.add_arguments(parser, forms=FORMS, default_forms=("onnxruntime", "eager"), num_rounds=15, threads=1)
    parser.add_argument("--device", default="cpu", help="of the torch forms: auto, cpu, cuda or cuda:N [%(default)s]")
    parser.set_defaults(amp="none")
    return parser.parse_args(argv)


def run(argv: list[str]) -> None:
    args = parse(argv)
    setup = timing.start(args, forms=FORMS, report=lambda text: print(text, file=sys.stderr, flush=True))
    threads = setup.machine["threads"]
    builders = {
        "onnxruntime": functools.partial(build_onnxruntime, threads=threads),
        "onnxruntime_int8": functools.partial(build_onnxruntime, threads=threads, is_int8=True),
        "executorch": functools.partial(forms.build_executorch, threads=threads),
        **forms.torch_builders(args.amp),
    }
    cases = timing.build_cases(setup, timing.load(args, load_named), builders, batch_size=1)
    print(timing.finish(setup, cases, is_latency=True))


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 with one message where the input is at fault or nothing could be measured."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
