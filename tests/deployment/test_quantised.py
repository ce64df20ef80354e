"""int8 ONNX and ExecuTorch: files for phones, as close to the network as their arithmetic allows, and none accepted of another."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import export_onnx
import model
from deployment import accuracy, executorch, formats, quantised, verify, weights
from run import command
from run.errors import InputError
from sources.sets import load_digits
from tests.nets import randomise

SIZE = 32
SMALL_NET = {"depths": (0, 0, 1, 1), "dims": (16, 32, 64, 128)}


def save_trained(folder: Path, seed: int) -> Path:
    """A checkpoint of a small network for the ten digits, in the state of a trained one."""
    torch.manual_seed(seed)
    net = randomise(model.create_model("recnext_m0", num_classes=10, distillation=True, **SMALL_NET))
    args = {"model": "recnext_m0", "model_kwargs": SMALL_NET}
    path = folder / f"net_{seed}.pth"
    torch.save({"model": net.state_dict(), "class_names": [str(i) for i in range(10)], "input_size": SIZE, "epoch": 3, "args": args}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("quantised")


@pytest.fixture(scope="module")
def checkpoint(folder) -> Path:
    return save_trained(folder, 0)


@pytest.fixture(scope="module")
def trained(checkpoint) -> weights.Trained:
    return weights.load_trained(None, str(checkpoint))


@pytest.fixture(scope="module")
def written(checkpoint, folder) -> tuple[Path, dict]:
    """An int8 file of the command, and its sidecar."""
    target = folder / "net_int8.onnx"
    export_onnx.run([f"--ckpt={checkpoint}", "--int8", "--calibration-images=32", "--data-set=DIGITS", f"--out={target}"])
    return target, json.loads(Path(f"{target}.json").read_text())


def test_weights_are_the_network_s_in_steps_of_their_scale(trained, written):
    path, described = written
    assert described["verified"]["precision"] == "int8"
    assert described["calibration_images"] == 32
    opened = quantised.build_format().open(path, trained)
    stored = {name: tensor for name, tensor in opened.tensors.items() if tensor.dtype == torch.int8}
    kernels = [parameter.detach() for parameter in weights.fused(trained).parameters() if parameter.ndim > 1]
    assert sum(tensor.numel() for tensor in stored.values()) >= 0.9 * sum(kernel.numel() for kernel in kernels)
    proto = onnx.load(str(path))
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    steps = []
    for name, tensor in stored.items():
        scale = torch.from_numpy(np.atleast_1d(known[f"{name.removesuffix('_quantized')}_scale"]))
        assert 1 < len(scale) <= max(tensor.shape)  # a scale per output channel
        for axis in {i for i, side in enumerate(tensor.shape) if side == len(scale)}:
            values = tensor.float() * scale.view([-1 if i == axis else 1 for i in range(tensor.ndim)])
            same = [kernel for kernel in kernels if sorted(kernel.shape) == sorted(values.shape)]
            candidates = [*same, *(kernel.T for kernel in same if kernel.ndim == 2)]
            steps += [min(((values - one).abs().max() / scale.max()).item() for one in candidates if one.shape == values.shape)]
    assert len(steps) >= len(stored)
    assert sum(step <= 0.51 for step in steps) >= len(stored)  # rounded to the nearest step of some kernel


def test_accuracy_of_both_files_is_measured(trained, written, capsys):
    path, described = written
    images = load_digits()[1]
    transform = verify._probe_transform(trained)
    with torch.no_grad():
        logits = trained.net(torch.stack([transform(images[i][0]) for i in range(len(images))]))
    expected = 100 * (logits.argmax(1) == torch.tensor(list(images.targets))).double().mean().item()
    found = described["accuracy"]
    assert found["float32"]["num_images"] == found["int8"]["num_images"] == 360
    assert found["float32"]["acc1"] == pytest.approx(expected, abs=0.3)  # an image between two classes may fall to either
    assert path.stat().st_size < described["float32_bytes"]
    assert "int8" in quantised.report_accuracy(described)


def test_another_network_s_file_and_a_changed_one_are_refused(trained, written, folder, checkpoint, capsys):
    path, _ = written
    export_onnx.run([f"--ckpt={checkpoint}", f"--verify={path}"])
    assert "stored tensors are the checkpoint's" in capsys.readouterr().out
    with pytest.raises(InputError, match="is refused: it differs from the network|are not the checkpoint's"):
        export_onnx.run([f"--ckpt={save_trained(folder, 1)}", f"--verify={path}"])
    proto = onnx.load(str(path))
    kernel = next(tensor for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4)
    values = onnx.numpy_helper.to_array(kernel).copy()
    values.flat[0] += 3 if values.flat[0] < 0 else -3
    kernel.CopyFrom(onnx.numpy_helper.from_array(values, kernel.name))
    changed = folder / "changed.onnx"
    changed.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="1 of its .* stored tensors are not the checkpoint's"):
        export_onnx.run([f"--ckpt={checkpoint}", f"--verify={changed}"])
    float_file = folder / "float.onnx"
    formats.ONNX.ways["dynamo"](trained, float_file, torch.float32)
    assert not quantised.is_quantised(float_file)
    with pytest.raises(InputError, match="none of its weights are int8"):
        verify.verify(float_file, trained, quantised.build_format())


@pytest.mark.parametrize("flag", ["--float16", "--format=torchscript"])
def test_int8_is_of_float32_onnx(checkpoint, flag, capsys):
    assert command.run_command(export_onnx.run, [f"--ckpt={checkpoint}", "--int8", flag]) == 1
    assert f"drop {flag.replace('=', ' ')}" in capsys.readouterr().err


def test_other_classes_are_told(trained):
    args = argparse.Namespace(data_set="DIGITS", data_path=None, batch_size=64)
    with pytest.raises(InputError, match="has 7 classes, the data has 10"):
        accuracy.measure_opened(args, dataclasses.replace(trained, num_classes=7), {})


def test_executorch_is_asked_for_where_it_is_missing(checkpoint, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    target = tmp_path / "net.pte"
    assert command.run_command(export_onnx.run, [f"--ckpt={checkpoint}", "--format=executorch", f"--out={target}"]) == 1
    assert "pip install -r requirements-executorch.txt" in capsys.readouterr().err
    assert not target.exists()


def test_executorch_program_computes_the_same(trained, checkpoint, folder, capsys):
    pytest.importorskip("executorch", reason="needs requirements-executorch.txt")
    target = folder / "net.pte"
    described = verify.write_verified(trained, target, executorch.PROGRAM)
    assert described["verified"]["largest_relative_difference"] < 1e-4
    assert described["xnnpack_parts"] >= 1
    export_onnx.run([f"--ckpt={checkpoint}", f"--verify={target}"])
    assert "more images were run instead" in capsys.readouterr().out
    with pytest.raises(InputError, match="it differs from the network"):
        export_onnx.run([f"--ckpt={save_trained(folder, 1)}", f"--verify={target}"])
    content = target.read_bytes()
    for damaged in (b"no program", content[: len(content) // 2]):
        (folder / "damaged.pte").write_bytes(damaged)
        with pytest.raises(InputError, match="write it again"):
            executorch.open_program(folder / "damaged.pte", trained)
