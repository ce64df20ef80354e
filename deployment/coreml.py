"""Core ML: an image in, class labels out; written with coremltools, and evaluated here operator by operator where Core ML itself cannot run.

Core ML gives a network pixels from 0 to 255 times one scale plus a bias per channel; what is left of the normalisation by three standard
deviations is a factor per channel in the network. Its outputs are probabilities: a softmax follows the logits."""

import contextlib
import functools
import importlib
import io
import itertools
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from deployment.coreml_eval import Network, Program, weights_of
from deployment.verify import Format, Opened, to_pixels
from deployment.weights import Trained, describe_weights, fused, labels
from run.errors import InputError, first_line

NOT_RUN = "Core ML itself, which runs on macOS alone: what the saved file holds was evaluated operator by operator in torch"


# ---- the network as Core ML sees it


def pixel_scale(trained: Trained) -> tuple[float, list[float], Tensor]:
    """Scale and biases for Core ML's image input, and the factors (3, 1, 1) that complete the normalisation inside the network."""
    std = sum(trained.std) / len(trained.std)
    factors = torch.tensor([std / own for own in trained.std]).view(-1, 1, 1)
    return 1 / (255 * std), [-mean / std for mean in trained.mean], factors


class PixelNet(nn.Module):
    """A network behind what is left of the normalisation, before a softmax: scaled pixels (B, 3, H, W) -> probabilities (B, C)."""

    def __init__(self, net: nn.Module, factors: Tensor):
        super().__init__()
        self.net = net
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * self.factors).softmax(dim=1)


def _nearest_by_whole_factors(graph: torch.fx.Graph) -> None:
    """Nearest-neighbour resizing by a fraction (4 -> 7) as one by a whole number and a crop: the old format has none by a fraction.

    InputError where that would not choose the same pixels."""
    resize = torch.ops.aten.upsample_nearest2d.vec
    for node in [node for node in graph.nodes if node.target == resize]:
        source = node.args[0]
        before, after = source.meta["val"].shape[2:], node.meta["val"].shape[2:]
        factors = [math.ceil(new / old) for old, new in zip(before, after, strict=True)]
        if all(old * factor == new for old, new, factor in zip(before, after, factors, strict=True)):
            continue
        if any(i * old // new != i // factor for old, new, factor in zip(before, after, factors, strict=True) for i in range(new)):
            raise InputError(f"Core ML cannot resize from {list(before)} to {list(after)}: choose another --input-size")
        with graph.inserting_before(node):
            larger = graph.call_function(resize, (source, [old * factor for old, factor in zip(before, factors, strict=True)], None))
            larger.meta["val"] = source.meta["val"].repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3)
            rows = graph.call_function(torch.ops.aten.slice.Tensor, (larger, 2, 0, after[0]))
            rows.meta["val"] = larger.meta["val"][:, :, : after[0]]
            cropped = graph.call_function(torch.ops.aten.slice.Tensor, (rows, 3, 0, after[1]))
            cropped.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(cropped)
        graph.erase_node(node)


@torch.no_grad()
def _export_program(trained: Trained) -> torch.export.ExportedProgram:
    """The fused network on pixels that Core ML has scaled, in operators that coremltools knows."""
    net = PixelNet(fused(trained), pixel_scale(trained)[2]).eval()
    x = torch.zeros(1, 3, trained.input_size, trained.input_size)
    program = torch.export.export(net, (x,)).run_decompositions({})
    _nearest_by_whole_factors(program.graph_module.graph)
    program.graph_module.recompile()
    return program


# ---- writing


@contextlib.contextmanager
def _listening():
    """Collects what coremltools says on standard error, where its progress bars go too; its warnings of its own old functions are dropped."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Function _TORCH_OPS_REGISTRY.*is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "Implicitly cleaning up <TemporaryDirectory", ResourceWarning)
        yield said


def load_coremltools() -> ModuleType:
    """The package; InputError with the cure where it is missing."""
    try:
        with _listening():
            return importlib.import_module("coremltools")
    except ImportError as error:
        raise InputError("this needs the package coremltools: pip install -r requirements-export.txt") from error


def _write(convert_to: str):
    def write(trained: Trained, path: Path, dtype: torch.dtype) -> dict:
        ct = load_coremltools()
        scale, bias, _ = pixel_scale(trained)
        size = trained.input_size
        image = ct.ImageType(name="image", shape=(1, 3, size, size), scale=scale, bias=bias, color_layout=ct.colorlayout.RGB)
        precision = {torch.float32: ct.precision.FLOAT32, torch.float16: ct.precision.FLOAT16}[dtype]
        is_program = convert_to == "mlprogram"
        settings = {"compute_precision": precision, "minimum_deployment_target": ct.target.iOS15} if is_program else {}
        with _listening() as said:
            converted = ct.convert(
                _export_program(trained), inputs=[image], classifier_config=ct.ClassifierConfig(labels(trained)), convert_to=convert_to,
                skip_model_load=True, **settings,
            )  # fmt: skip
            converted.short_description = f"{trained.name}, an image classifier of {trained.num_classes} classes; {describe_weights(trained)}"
            converted.save(str(path))
        warned = [line for line in said.getvalue().splitlines() if "Falling back" in line or "Unsupported" in line]
        if warned:
            raise InputError(f"coremltools converted it approximately: {warned[0]}")
        normalisation = {"scale": scale, "bias": bias, "then_times": pixel_scale(trained)[2].flatten().tolist()}
        return {"input_name": "image", "pixels": normalisation, "outputs": ["classLabel", "classLabel_probs"] if is_program else ["classLabel"]}

    return write


# ---- reading


def _open_spec(path: Path):
    """The saved model, unloaded; InputError where it is damaged."""
    ct = load_coremltools()
    try:
        with _listening():
            return ct.models.MLModel(str(path), skip_model_load=True)
    except Exception as error:  # protobuf, file system and coremltools' own kinds, all of which mean: damaged
        raise InputError(f"it is no complete Core ML model ({first_line(error)}): export it again") from error


def _image_faults(spec, trained: Trained, class_names: list[str]) -> list[str]:
    """What is wrong with the image input or the class labels."""
    if len(spec.description.input) != 1:
        return [f"it takes {len(spec.description.input)} inputs where one image is due"]
    (given,) = spec.description.input
    image, faults = given.type.imageType, []
    if given.type.WhichOneof("Type") != "imageType" or (image.width, image.height) != (trained.input_size,) * 2:
        faults.append(f"its input {given.name} is no image of {trained.input_size} x {trained.input_size} pixels")
    elif image.colorSpace != image.ColorSpace.Value("RGB"):
        faults.append(f"its image is {image.ColorSpace.Name(image.colorSpace)}, not RGB")
    if class_names != labels(trained):
        faults.append(f"its {len(class_names)} class labels are not the checkpoint's {trained.num_classes}")
    return faults


def _open_program(path: Path, trained: Trained) -> Opened:
    saved = _open_spec(path)
    spec = saved.get_spec()
    if spec.WhichOneof("Type") != "mlProgram":
        raise InputError("it is no ML Program: a neural network in the old format ends in .mlmodel")
    milproto = importlib.import_module("coremltools.converters.mil.frontend.milproto.load")
    with _listening():
        program = Program(milproto.load(spec, spec.specificationVersion, saved.weights_dir).functions["main"])
    classify = [op for op in program.steps if op.op_type == "classify"]
    class_names = [str(name) for name in classify[0].inputs["classes"].val] if classify else []
    faults = _image_faults(spec, trained, class_names)
    return _opened(path, trained, program, program.constants, faults)


def _opened(path: Path, trained: Trained, evaluate: Program | Network, tensors: dict[str, Tensor], faults: list[str]) -> Opened:
    """A saved model, run by Core ML where there is one."""
    if sys.platform == "darwin":
        return Opened(run=_predictor(path, trained), tensors=tensors, faults=faults, takes_batches=False, is_centred=True)
    unknown = evaluate.unknown_operators()
    if unknown:
        faults = [*faults, f"it holds operators that can be checked on macOS alone: {', '.join(unknown)}"]
    run = functools.partial(_evaluate, evaluate, trained)
    return Opened(run=run, tensors=tensors, faults=faults, unchecked=[NOT_RUN], takes_batches=False)


def _evaluate(evaluate: Program | Network, trained: Trained, images: Tensor) -> Tensor:
    return evaluate(to_pixels(images, trained))


def _predictor(path: Path, trained: Trained) -> Callable[[Tensor], Tensor]:
    """Core ML itself: normalised images (1, 3, H, W) of whole pixels -> logarithms of probabilities (1, C)."""
    loaded = load_coremltools().models.MLModel(str(path))
    names = labels(trained)

    def run(images: Tensor) -> Tensor:
        from PIL import Image

        pixels = to_pixels(images[0], trained).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        outputs = loaded.predict({"image": Image.fromarray(pixels)})
        (found,) = [value for value in outputs.values() if isinstance(value, dict)]
        return torch.tensor([[found[name] for name in names]]).clamp(min=1e-30).log()

    return run


def _weight_arrays(message, prefix: str):
    """(name, tensor) of every weight in a message of the old format, however deep."""
    if message.DESCRIPTOR.name == "WeightParams":
        yield prefix, weights_of(message)
        return
    for field, value in message.ListFields():
        parts = value if isinstance(value, list) or hasattr(value, "add") else [value]
        for i, part in enumerate(parts):
            if hasattr(part, "DESCRIPTOR"):
                yield from _weight_arrays(part, f"{prefix}.{field.name}{i if len(parts) > 1 else ''}")


def _open_legacy(path: Path, trained: Trained) -> Opened:
    spec = _open_spec(path).get_spec()
    if spec.WhichOneof("Type") != "neuralNetworkClassifier":
        raise InputError("it is no neural-network classifier in Core ML's old format")
    network = spec.neuralNetworkClassifier
    faults = _image_faults(spec, trained, list(network.stringClassLabels.vector))
    tensors = dict(itertools.chain.from_iterable(_weight_arrays(layer, layer.name) for layer in network.layers))
    return _opened(path, trained, Network(network), tensors, faults)


PROGRAM = Format("Core ML program", {"mlprogram": _write("mlprogram")}, _open_program, takes_pixels=True)
LEGACY = Format("Core ML neural network", {"neuralnetwork": _write("neuralnetwork")}, _open_legacy, takes_pixels=True)
