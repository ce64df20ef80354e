"""From a checkpoint to a file for use elsewhere: load, fuse, write, verify. What publish.py, upload.py and the export commands share."""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

import utils
from loading import augment
from run import checkpoint, integrity, network
from run.config import FAST_INTERPOLATIONS, Config, epochs_of_run
from run.errors import InputError
from run.watch import require_finite_weights

FACTS_NAME = "facts.json"  # of the entry in a TorchScript file, and in safetensors' metadata, that holds `Trained.facts()`


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network in evaluation mode with a checkpoint's weights, not fused unless the checkpoint is, and what its user must know.

    `which` names the weights (`model`, `model_ema`, `random`, ...); `mean` and `std` are of pixels from 0 to 1; `input_size` is the
    side of the square images, or height and width of others, which classifiers do not take; `model_kwargs` are further arguments the network was built with;
    `made_from`: from which checkpoints it was made, where it was not trained as it is."""

    net: nn.Module
    name: str
    num_classes: int
    class_names: list[str] | None
    input_size: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    which: str
    source: str | None = None
    epoch: int | None = None
    metrics: dict = dataclasses.field(default_factory=dict)
    args: dict = dataclasses.field(default_factory=dict)
    is_fused: bool = False
    model_kwargs: dict = dataclasses.field(default_factory=dict)
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    made_from: dict = dataclasses.field(default_factory=dict)

    @property
    def loader(self) -> str:
        """The loader that has the resampling: the fast one, where it can."""
        return "fast" if self.interpolation in FAST_INTERPOLATIONS else "reference"

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.input_size, self.input_size) if isinstance(self.input_size, int) else self.input_size


def load_torchscript(path: Path) -> tuple[torch.jit.ScriptModule, dict]:
    """The program in a TorchScript file, on the CPU, and the facts stored in it. InputError where it is damaged."""
    integrity.require_intact(path)
    extra = {FACTS_NAME: ""}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", FutureWarning)
            net = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    except RuntimeError as error:
        raise InputError(f"{path} is no complete TorchScript file: write it again with publish.py --fused or export_onnx.py --format torchscript") from error
    return net, json.loads(extra[FACTS_NAME] or "{}")


def read_file(source: str) -> dict:
    """A checkpoint as `checkpoint.read` gives it; of a TorchScript file the state dict, and the facts stored in that or in safetensors."""
    path = checkpoint.fetch(source)
    if isinstance(path, dict):
        return path
    if checkpoint.is_torchscript(path):
        net, facts = load_torchscript(path)
        return {**facts, "model": net.state_dict()}
    saved = checkpoint.read(source)
    if path.suffix != ".safetensors":
        return saved
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = json.loads((file.metadata() or {}).get(FACTS_NAME, "{}"))
    return {**facts, "model": saved}


def _own_args(saved: dict) -> dict:
    """Settings of the run that wrote the checkpoint; none where it was not one of ours."""
    return saved["args"] if isinstance(saved.get("args"), dict) else {}


def _which_weights(saved: dict, *, use_ema: bool) -> str:
    names = ("model_ema", "state_dict_ema") if use_ema else ("model", "state_dict", "model_ema", "state_dict_ema")
    return saved.get("which") or next((name for name in names if saved.get(name) is not None), "bare state dict")


def _options(name: str, args: dict, img_size: int | None) -> dict:
    """Further arguments of the network: those it was trained with; the image size where its weights depend on it."""
    if args.get("model") == name:
        return checkpoint.model_options(args)
    cfg = timm.get_pretrained_cfg(name)
    is_tied = cfg is not None and cfg.fixed_input_size
    return {"img_size": img_size} if is_tied and img_size not in (None, cfg.input_size[-1]) else {}


def _build(cfg: Config, state: dict[str, Tensor], num_classes: int, change: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, bool]:
    """The network of `cfg`, changed, in the form (fused or not) that `state` is of, in evaluation mode; whether fused."""
    net = change(network.build(cfg, num_classes, distillation=any("dist" in key for key in state))).eval()
    is_fused = not _has_statistics(state) and _has_statistics(net.state_dict())
    return utils.replace_batchnorm(net) if is_fused else net, is_fused


def _has_statistics(state: dict[str, Tensor]) -> bool:
    return any(key.endswith("running_mean") for key in state)


def _count_classes(net: nn.Module, state: dict[str, Tensor], built: int) -> int:
    """Number of classes of `state`: the length of a head's weight there that has `built` rows here."""
    for key, own in net.state_dict().items():
        if own.ndim > 1 and len(own) == built and key in state and state[key].shape[1:] == own.shape[1:]:
            return len(state[key])
    return built


def load_trained(
    name: str | None,
    source: str | None,
    *,
    use_ema: bool = False,
    img_size: int | None = None,
    num_classes: int | None = None,
    change: Callable[[nn.Module], nn.Module] = nn.Module.eval,
) -> Trained:
    """The network `name` with the weights in `source`: file, URL or hf-hub:name; None: random weights, for measuring only.

    Reads checkpoints of this project, the published ones, bare state dicts, safetensors, and fused files, which give a fused network.
    Without `name` it is the checkpoint's own. The class count is the head's; `num_classes` counts for random weights alone.
    `change` makes another network of it before it gets weights.
    InputError where the file cannot be read or does not fit."""
    saved = read_file(source) if source else {}
    args = _own_args(saved)
    name = name or args.get("model") or saved.get("model_name")
    if name is None:
        raise InputError(f"{source} does not say what network it is of: add --model NAME")
    pretrained_cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    size = img_size or saved.get("input_size") or (pretrained_cfg.input_size[-1] if pretrained_cfg else 224)
    options = _options(name, args, img_size)
    cfg = Config(model=name, input_size=size, model_kwargs=options)
    built = num_classes or 1000
    if source is None:
        net, is_fused, which = change(network.build(cfg, built, distillation=False)).eval(), False, "random"
    else:
        state, which = checkpoint.weights(saved, use_ema=use_ema, where=source), _which_weights(saved, use_ema=use_ema)
        net, is_fused = _build(cfg, state, built, change)
        count = _count_classes(net, state, built)
        if count != built:
            net, built = _build(cfg, state, count, change)[0], count
        require_finite_weights(state, where=source)
        checkpoint.load_weights(net, state, where=source)
    names = saved.get("class_names")
    if names is not None and not len(names) == len(set(names)) == built:
        raise InputError(f"{source} names {len(set(names))} different classes, its network has {built}: the file is damaged, use another")
    return Trained(
        net=net,
        name=name,
        num_classes=built,
        class_names=names,
        input_size=size,
        mean=tuple(saved.get("mean", augment.MEAN)),
        std=tuple(saved.get("std", augment.STD)),
        crop_pct=saved.get("crop_pct") or augment.crop_pct(cfg),
        which=which,
        source=source,
        epoch=saved.get("epoch"),
        metrics=saved.get("metrics") or {},
        args=args,
        is_fused=is_fused,
        model_kwargs=options,
        crop_mode=saved.get("crop_mode", "center"),
        interpolation=saved.get("interpolation", "bicubic"),
        made_from=saved.get("made_from") or {},
    )


def eval_transform(trained: Trained) -> augment.Transform:
    """The checkpoint's evaluation: PIL image -> (3, input_size, input_size) float32, normalised with its own mean and deviation."""
    values = augment.Statistics(tuple(trained.mean), tuple(trained.std))
    crop = {"mode": trained.crop_mode, "interpolation": trained.interpolation}
    return augment.eval_transform(trained.input_size, trained.crop_pct, trained.loader, **crop, values=values)


def distillation(trained: Trained) -> str | None:
    """How the network was distilled: `none`, `soft` or `hard`, as its run's settings or its published file name say; None where neither does.

    Its weights do not tell: many networks have a second head either way."""
    if "distillation_type" in trained.args:
        return trained.args["distillation_type"] or ("none" if trained.args.get("finetune") else "hard")
    stem = Path(trained.source).stem if trained.source else ""
    return "none" if "_without_distill" in stem else "hard" if "_distill" in stem else None


def fused(trained: Trained) -> nn.Module:
    """A fused copy of the network; the original stays as it is."""
    return utils.replace_batchnorm(copy.deepcopy(trained.net))


# ---- what a file's user must know

KEPT_ARGS = ("model", "model_kwargs", "epochs", "lr_cycle_limit", "lr_cycle_mul", "distillation_type", "finetune", "data_set")


def facts(trained: Trained) -> dict:
    """What the checkpoint says of its classes, images and training; goes into every file that can hold it."""
    args = {key: trained.args[key] for key in KEPT_ARGS if key in trained.args}
    known = {"class_names": trained.class_names, "epoch": trained.epoch, "metrics": trained.metrics, "args": args, "made_from": trained.made_from}
    fixed = {"input_size": trained.input_size, "mean": list(trained.mean), "std": list(trained.std), "crop_pct": trained.crop_pct}
    fixed |= {"crop_mode": trained.crop_mode, "interpolation": trained.interpolation, "which": trained.which}
    return {**{key: value for key, value in known.items() if value}, **fixed, **({"epoch": 0} if trained.epoch == 0 else {})}


def labels(trained: Trained) -> list[str]:
    """A name per class for people to read, no two alike: the checkpoint's, with ImageNet's words for its folders.

    A checkpoint of 1000 classes without names is taken for ImageNet's; other classes without names have their numbers."""
    names = trained.class_names
    if names is None and trained.num_classes != 1000:
        return [str(i) for i in range(trained.num_classes)]
    info = ImageNetInfo()
    keys = names or info.label_names()
    words = dict(zip(info.label_names(), info.label_descriptions(), strict=True))
    readable = [words.get(key, key) for key in keys]
    return [f"{word} ({key})" if readable.count(word) > 1 else word for word, key in zip(readable, keys, strict=True)]


def describe_weights(trained: Trained) -> str:
    """Which weights these are, as far as the checkpoint tells: raw or EMA, of which epoch, the best or the last of their run."""
    is_ema = trained.which in ("model_ema", "state_dict_ema")
    kind = {"random": "random weights", "bare state dict": "weights of a bare state dict"}.get(trained.which, "EMA weights" if is_ema else "raw weights")
    if trained.epoch is None:
        return f"{kind}, {trained.made_from['what']}" if trained.made_from else kind
    num_epochs = epochs_of_run(trained.args)
    tested, best = ("test_ema_acc1", "best_ema_acc1") if is_ema else ("test_acc1", "best_acc1")
    ranks = ["the last"] if trained.epoch + 1 == num_epochs else []
    if tested in trained.metrics:
        ranks += ["the best so far"] if trained.metrics[tested] == trained.metrics.get(best) else ["not the best so far"]
    return f"{kind} of epoch {trained.epoch}" + (f" (epochs 0 to {num_epochs - 1})" if num_epochs else "") + (f", {' and '.join(ranks)}" if ranks else "")


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all files in a folder with their names."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            total.update(str(file.relative_to(path)).encode() if path.is_dir() else b"")
            total.update(file.read_bytes())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """Versions of python and of the packages that have a part in exporting, where they are installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "coremltools", "executorch", "safetensors", "huggingface_hub"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
