"""The files a trained network can be written to and read from again: state dicts, TorchScript, torch.export and ONNX.

Each `Format` writes a fused network (state dicts also an unfused one) and opens what was written in the runtime it is meant for."""

import importlib
import io
import json
import warnings
import zipfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from deployment import coreml
from deployment.verify import Format, Opened, make_noise, summary, verify
from deployment.weights import FACTS_NAME, Trained, facts, fused, load_torchscript, load_trained
from run import integrity
from run.checkpoint import is_torchscript
from run.errors import InputError, first_line

JIT_IS_DEPRECATED = r"`torch\.jit\.(script|script_method|trace|trace_method|save|load)` is deprecated"
RANDOM_OPS = ("bernoulli", "dropout", "rand", "randn", "rand_like", "randn_like", "native_dropout", "uniform")


class InHalf(nn.Module):
    """A network computing in float16, between float32 images and float32 logits."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.half()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.half()).float()


def prepared(trained: Trained, dtype: torch.dtype) -> nn.Module:
    """The fused network in evaluation mode, between float32 images and logits, computing in `dtype`."""
    net = fused(trained)
    return (InHalf(net) if dtype == torch.float16 else net).eval()


def example(trained: Trained) -> Tensor:
    """Images for an exporter to follow; two of them, for it to see that their number may vary."""
    return make_noise(trained, 2)


def require(name: str) -> ModuleType:
    """An optional package; InputError with the cure where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this needs the package {name}: pip install -r requirements-export.txt") from error


# ---- state dicts: .pth and .safetensors


def state_entry(trained: Trained, *, is_fused: bool) -> dict[str, Tensor]:
    """State dict as it is published: contiguous copies, fused or as trained."""
    net = fused(trained) if is_fused else trained.net
    return {name: value.detach().contiguous().clone() for name, value in net.state_dict().items()}


def _write_pth(is_fused: bool):
    def write(trained: Trained, path: Path, dtype: torch.dtype) -> dict:
        buffer = io.BytesIO()
        torch.save({"model": state_entry(trained, is_fused=is_fused), **facts(trained)}, buffer)
        integrity.seal(buffer)
        path.write_bytes(buffer.getvalue())
        return {"fused": is_fused}

    return write


def _write_safetensors(is_fused: bool):
    def write(trained: Trained, path: Path, dtype: torch.dtype) -> dict:
        from safetensors.torch import save

        path.write_bytes(save(state_entry(trained, is_fused=is_fused), {"format": "pt", FACTS_NAME: json.dumps(facts(trained))}))
        return {"fused": is_fused}

    return write


def _open_state(path: Path, trained: Trained) -> Opened:
    again = load_trained(trained.name, str(path), img_size=trained.input_size)
    return Opened(run=again.net, tensors=again.net.state_dict(), faults=[])


# ---- TorchScript: .pt


def _save_script(net: torch.jit.ScriptModule, path: Path, trained: Trained) -> None:
    buffer = io.BytesIO()
    torch.jit.save(net, buffer, _extra_files={FACTS_NAME: json.dumps({"model_name": trained.name, **facts(trained)})})
    integrity.seal(buffer)
    path.write_bytes(buffer.getvalue())


def write_scripted(trained: Trained, path: Path, dtype: torch.dtype) -> dict:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", JIT_IS_DEPRECATED, FutureWarning)
        _save_script(torch.jit.script(prepared(trained, dtype)), path, trained)
    return {}


@torch.no_grad()
def write_traced(trained: Trained, path: Path, dtype: torch.dtype) -> dict:
    """A trace fixes what depends on the image size; its comparison with the network is left to `export.compare`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", JIT_IS_DEPRECATED, FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        _save_script(torch.jit.trace(prepared(trained, dtype), example(trained), check_trace=False), path, trained)
    return {}


def _open_script(path: Path, trained: Trained) -> Opened:
    net, _ = load_torchscript(path)
    training = [name or "the network" for name, module in net.named_modules() if getattr(module, "training", False)]
    faults = [f"it was exported in training mode: {len(training)} of its modules are in it, first: {training[0]}"] if training else []
    return Opened(run=net, tensors=net.state_dict(), faults=faults)


# ---- torch.export: .pt2


def _batch_varies() -> tuple[dict]:
    return ({0: torch.export.Dim("batch")},)


@torch.no_grad()
def write_program(trained: Trained, path: Path, dtype: torch.dtype) -> dict:
    program = torch.export.export(prepared(trained, dtype), (example(trained),), dynamic_shapes=_batch_varies())
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={FACTS_NAME: json.dumps({"model_name": trained.name, **facts(trained)})})
    integrity.seal(buffer)
    path.write_bytes(buffer.getvalue())
    return {}


def _open_program(path: Path, trained: Trained) -> Opened:
    if not zipfile.is_zipfile(path):  # or torch would also log a traceback
        raise InputError("it is no torch.export file: write it again")
    integrity.require_intact(path)
    try:
        program = torch.export.load(path)
    except Exception as error:  # zip, pickle and schema errors, all of which mean: damaged
        raise InputError(f"it is no complete torch.export file ({first_line(error)}): write it again") from error
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    calls = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    acting = sorted({str(node.target) for node in calls if _acts_in_training(node)})
    faults = [f"it was exported in training mode: it holds {', '.join(acting)}"] if acting else []
    tensors = {**program.state_dict, **{name: value for name, value in program.constants.items() if isinstance(value, Tensor)}}
    return Opened(run=program.module(), tensors=tensors, faults=faults)


def _acts_in_training(node: torch.fx.Node) -> bool:
    """Whether an operator is random, or normalises by its batch's statistics."""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    if name == "dropout":
        return bool(node.args[2])
    if name == "batch_norm":
        return bool(node.args[5])
    return name.rstrip("_") in RANDOM_OPS or name in ("_native_batch_norm_legit_functional", "_native_batch_norm_legit")


# ---- ONNX: .onnx

ONNX_OPSET = 20
ONNX_LEGACY_OPSET = 18  # the older exporter knows none that is newer than 20, and was made for these


@torch.no_grad()
def write_onnx_dynamo(trained: Trained, path: Path, dtype: torch.dtype) -> dict:
    require("onnx"), require("onnxscript")
    net = prepared(trained, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", JIT_IS_DEPRECATED, FutureWarning)
        program = torch.onnx.export(
            net, (example(trained),), dynamo=True, external_data=False, opset_version=ONNX_OPSET, verbose=False,
            input_names=["image"], output_names=["logits"], dynamic_shapes=_batch_varies(),
        )  # fmt: skip
    path.write_bytes(program.model_proto.SerializeToString())
    return {"opset": ONNX_OPSET, "input_name": "image", "output_name": "logits"}


def write_onnx_legacy(trained: Trained, path: Path, dtype: torch.dtype) -> dict:
    return export_legacy(prepared(trained, dtype), example(trained), path, outputs=["logits"], varying={"image": "batch", "logits": "batch"})


@torch.no_grad()
def export_legacy(net: nn.Module, images: Tensor, path: Path, *, outputs: list[str], varying: dict[str, str]) -> dict:
    """Write what `net` does with `images` by the TorchScript exporter; what to note of it. `varying` names the first dimension of those whose may vary."""
    require("onnx")
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", JIT_IS_DEPRECATED, FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export|The feature will be removed", DeprecationWarning)
        warnings.filterwarnings("ignore", "Exporting aten::index operator of advanced indexing", UserWarning)  # right but for negative indices: we have none
        torch.onnx.export(
            net, (images,), buffer, dynamo=False, opset_version=ONNX_LEGACY_OPSET,
            input_names=["image"], output_names=outputs, dynamic_axes={name: {0: text} for name, text in varying.items()},
        )  # fmt: skip
    path.write_bytes(buffer.getvalue())
    return {"opset": ONNX_LEGACY_OPSET, "input_name": "image", **({"output_name": outputs[0]} if len(outputs) == 1 else {"output_names": outputs})}


def _open_onnx(path: Path, trained: Trained) -> Opened:
    onnx, onnxruntime = require("onnx"), require("onnxruntime")
    try:
        proto = onnx.load(str(path))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # protobuf and the runtime raise kinds of their own
        raise InputError(f"it is no ONNX file that onnxruntime runs ({first_line(error)}): write it again") from error
    if len(session.get_inputs()) != 1:
        raise InputError(f"it takes {len(session.get_inputs())} inputs where one is due: another model")
    (image,) = session.get_inputs()

    def run(images: Tensor) -> Tensor:
        outputs = session.run(None, {image.name: images.numpy()})
        return torch.from_numpy(outputs[0]) if len(outputs) == 1 else outputs

    tensors = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in proto.graph.initializer}
    for node in _nodes(proto.graph):
        tensors |= {
            f"{node.output[0]} ({attribute.name})": torch.from_numpy(onnx.numpy_helper.to_array(attribute.t).copy())
            for attribute in node.attribute
            if attribute.type == onnx.AttributeProto.TENSOR
        }
    return Opened(run=run, tensors=tensors, faults=_onnx_faults(proto))


def _nodes(graph):
    """Nodes of an ONNX graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _onnx_faults(proto) -> list[str]:
    acting = set()
    known = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in _nodes(proto.graph):
        is_training_norm = node.op_type == "BatchNormalization" and any(a.name == "training_mode" and a.i for a in node.attribute)
        has_training_input = node.op_type == "Dropout" and len(node.input) > 2 and not _is_false(known.get(node.input[2]))
        if is_training_norm or has_training_input or node.op_type.startswith(("Random", "Bernoulli", "Multinomial")):
            acting.add(node.op_type)
    return [f"it was exported in training mode: it holds {', '.join(sorted(acting))}"] if acting else []


def _is_false(tensor) -> bool:
    return tensor is not None and not any(tensor.raw_data) and not any(tensor.int32_data)


# ---- the table

STATE = Format("state dict", {"as trained": _write_pth(False), "fused": _write_pth(True)}, _open_state)
FUSED_STATE = Format("state dict", {"fused": _write_pth(True)}, _open_state)
SAFETENSORS = Format("safetensors", {"as trained": _write_safetensors(False), "fused": _write_safetensors(True)}, _open_state)
FUSED_SAFETENSORS = Format("safetensors", {"fused": _write_safetensors(True)}, _open_state)
TORCHSCRIPT = Format("TorchScript", {"torch.jit.script": write_scripted, "torch.jit.trace": write_traced}, _open_script)
PROGRAM = Format("torch.export", {"torch.export": write_program}, _open_program)
ONNX = Format("ONNX", {"dynamo": write_onnx_dynamo, "TorchScript exporter": write_onnx_legacy}, _open_onnx)


def format_of(path: Path) -> Format:
    """The format of an existing file, by its suffix and content; InputError where it is none of ours."""
    by_suffix = {".onnx": ONNX, ".pt2": PROGRAM, ".safetensors": SAFETENSORS, ".mlpackage": coreml.PROGRAM, ".mlmodel": coreml.LEGACY, ".tar": STATE}
    if path.suffix in by_suffix:
        return by_suffix[path.suffix]
    if path.suffix in (".pt", ".pth"):
        return TORCHSCRIPT if path.is_file() and is_torchscript(path) else STATE
    raise InputError(f"{path} is no kind of file that can be verified: known are {', '.join((*by_suffix, '.pt', '.pth'))}")


def verdict(path: Path, trained: Trained, data_path: str | None, *, known: Format | None = None) -> str:
    """What --verify has to say of a file that passes; InputError where it does not. `known`: its format, where its suffix does not tell."""
    figures = verify(path, trained, known or format_of(path), data_path=data_path)
    return "\n".join([f"{path} computes what the checkpoint does", summary(figures), f"weights: {figures['weights']}"])
