"""Latency of fused networks on one image, milliseconds: ONNX Runtime and torch.

    python tools/latency.py --model recnext_m1 --threads 1
    python tools/latency.py --model recnext_m0,recnext_m1,lsnet_t --forms onnxruntime,eager,channels_last,compiled --out latency.json
    python tools/latency.py --model recnext_m0,recnext_m1,repnext_m1 --accuracy README.md top-1 > latency.md

All models and forms are measured in turns, round after round, in one table: median over rounds, and the lowest and highest round. The ONNX
file is the one that export_onnx.py writes, verified as there. The table is Markdown, on standard output, and `compare_logs.py --scatter`
draws it; what is left out, and why, goes to standard error. Exit status 1 where nothing could be measured.
"""

import argparse
import functools
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import nn

from deployment import formats
from deployment.verify import run_command, write_verified
from deployment.weights import Trained
from measuring import timing
from run.errors import InputError

FORMS = ("onnxruntime", *timing.FORMS)


def build_onnxruntime(trained: Trained, net: nn.Module, images: timing.Images, *, threads: int) -> timing.Call:
    """One inference by ONNX Runtime of the network's verified export, with `threads` threads in each operator, on the CPU."""
    if images.device.type != "cpu":
        raise InputError("ONNX Runtime is measured on the CPU alone")
    onnxruntime = formats.require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        write_verified(trained, path, formats.ONNX)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.get(trained.input_size).numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    timing.add_arguments(parser, forms=FORMS, default_forms=("onnxruntime", "eager"), num_rounds=15, threads=1)
    parser.add_argument("--device", default="cpu", help="of the torch forms: auto, cpu, cuda or cuda:N [%(default)s]")
    parser.set_defaults(amp="none")
    return parser.parse_args(argv)


def run(argv: list[str]) -> None:
    args = parse(argv)
    setup = timing.start(args, forms=FORMS, report=lambda text: print(text, file=sys.stderr, flush=True))
    builders = {"onnxruntime": functools.partial(build_onnxruntime, threads=setup.machine["threads"]), **timing.torch_builders(args.amp)}
    cases = timing.build_cases(setup, timing.load(args), builders, batch_size=1)
    print(timing.finish(setup, cases, is_latency=True))


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 with one message where the input is at fault or nothing could be measured."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
