"""int8 files for ONNX Runtime: a network's float export, quantised after training with the ranges that its maps have on real images.

Weights are int8, symmetric, a scale per output channel; maps between layers uint8, a scale per map (QDQ form, which any runtime of ONNX
reads). Convolutions and linear layers are quantised; what multiplies two maps, as attention does, stays in float32.
Source: ONNX Runtime's static quantisation."""

import argparse
import dataclasses
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from deployment import accuracy, formats
from deployment.verify import Format, Opened, make_noise
from deployment.weights import Trained
from run.errors import InputError

QUANTISED_OPS = ["Conv", "Gemm", "MatMul"]
RANGES = ("MinMax", "Percentile")  # ways to choose a map's range: all of it, or 99.999 % of its values


class _Reader:
    """Images for ONNX Runtime's calibration, one at a time."""

    def __init__(self, images: Tensor):
        self.rest = iter(images.split(1))

    def get_next(self) -> dict | None:
        image = next(self.rest, None)
        return None if image is None else {"image": image.numpy()}


def _quantise(ranges: str, images: Tensor, trained: Trained, path: Path, dtype: torch.dtype) -> dict:
    """Write `path`, calibrated on `images`; what to note of it."""
    if dtype != torch.float32:
        raise InputError("an int8 file is made of a float32 one: drop --float16")
    formats.require("onnxruntime")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        exported, prepared = Path(folder) / "float.onnx", Path(folder) / "prepared.onnx"
        noted = formats.ONNX.ways["dynamo"](trained, exported, dtype)
        quant_pre_process(str(exported), str(prepared), skip_symbolic_shape=True)
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it tells the root logger of every tensor that it leaves alone
        try:
            quantization.quantize_static(
                str(prepared), str(path), _Reader(images), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod[ranges], op_types_to_quantize=QUANTISED_OPS,
                extra_options={"MatMulConstBOnly": True, "ActivationSymmetric": False, "WeightSymmetric": True},
            )  # fmt: skip
        finally:
            root.setLevel(level)
    return {**noted, "calibration_images": len(images), "ranges": ranges}


def _writer(ranges: str, images: Tensor | None) -> Callable[[Trained, Path, torch.dtype], dict]:
    def write(trained: Trained, path: Path, dtype: torch.dtype) -> dict:
        # Weights do not depend on the images: noise does where they alone are wanted.
        return _quantise(ranges, make_noise(trained, 2) if images is None else images, trained, path, torch.float32 if images is None else dtype)

    return write


def _open(path: Path, trained: Trained) -> Opened:
    """The file's int8 weights and their scales are what can be compared with another file's; other scales depend on the images."""
    opened = formats.ONNX.open(path, trained)
    weights = {name: tensor for name, tensor in opened.tensors.items() if tensor.dtype == torch.int8 and tensor.ndim > 1}
    scales = {name: opened.tensors[name] for name in (f"{key.removesuffix('_quantized')}_scale" for key in weights) if name in opened.tensors}
    faults = [] if weights else ["none of its weights are int8: it is no quantised file"]
    return dataclasses.replace(opened, tensors={**weights, **scales}, faults=[*opened.faults, *faults])


def build_format(images: Tensor | None = None) -> Format:
    """The format of int8 files calibrated on normalised images (N, 3, H, W); without any it reads and verifies files, and writes none of use."""
    return Format("int8 ONNX", {f"{ranges} ranges": _writer(ranges, images) for ranges in RANGES}, _open)


def is_quantised(path: Path) -> bool:
    """Whether `path` is an ONNX file with quantised tensors."""
    if path.suffix != ".onnx" or not path.is_file():
        return False
    onnx = formats.require("onnx")
    try:
        return any(node.op_type == "DequantizeLinear" for node in onnx.load(str(path)).graph.node)
    except Exception:  # damaged files are refused, with a reason, by the format that they pretend to be
        return False


def measure_both(args: argparse.Namespace, trained: Trained, path: Path) -> dict:
    """Accuracy of the int8 file at `path`, and of the float32 file that it is made of, on the validation images that the options name."""
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "float.onnx"
        formats.ONNX.ways["dynamo"](trained, exported, torch.float32)
        files = {"float32": formats.ONNX.open(exported, trained), "int8": _open(path, trained)}
        return {"accuracy": accuracy.measure_opened(args, trained, files), "float32_bytes": exported.stat().st_size}


def report_accuracy(described: dict) -> str:
    """A line on both accuracies; empty where they were not measured."""
    if "accuracy" not in described:
        return "accuracy: not measured, --data-path names no labelled images"
    both = [described["accuracy"][name] for name in ("float32", "int8")]
    return f"top-1 on {both[0]['num_images']} images: float32 {both[0]['acc1']:.2f} %, int8 {both[1]['acc1']:.2f} % ({both[1]['acc1'] - both[0]['acc1']:+.2f})"
