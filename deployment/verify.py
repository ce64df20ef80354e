"""Files that have been run: write one, open it again, compare it with the network it came from, and only then put it in place.

Also what the export commands share: their options, and how they report."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision import transforms

from deployment.weights import Trained, describe_weights, digest, eval_transform, facts, labels, versions
from run.config import Config
from run.errors import InputError, first_line
from sources.finding import open_first
from sources.sets import load_digits

# ---- does a file compute what was trained?

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.int8: 0.2}  # largest difference, as a fraction of the largest logit
TOO_COARSE = {torch.float16: ", or float16 is too coarse for it: use float32", torch.int8: ", or int8 is too coarse for it: calibrate on more images"}
WEIGHT_TOLERANCE = 1e-5  # of a stored tensor's largest value: fusing on another machine rounds differently
REPEAT_TOLERANCE = 1e-6
NUM_REAL, NUM_RANDOM = 4, 4


@dataclasses.dataclass(frozen=True)
class Probe:
    """Images (N, 3, H, W), normalised float32, the first `num_real` of them photographs from `origin`, and the eager network's logits: (N, C), or
    (N, C, H, W) where each place has a class of its own."""

    images: Tensor
    reference: Tensor
    num_real: int
    origin: str


@dataclasses.dataclass(frozen=True)
class Opened:
    """A written file, opened again.

    `run` gives the logits of a batch of normalised float32 images; `tensors` are its weights and constants by name; `faults` says what
    disqualifies it whatever it computes, `unchecked` what could not be looked at here. `takes_batches` is false where it takes single images;
    `is_centred` where its logits are only known up to a constant per image."""

    run: Callable[[Tensor], Tensor]
    tensors: dict[str, Tensor]
    faults: list[str]
    unchecked: list[str] = dataclasses.field(default_factory=list)
    takes_batches: bool = True
    is_centred: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """int8 or float16 where the file stores any weights so, else float32."""
        stored = {tensor.dtype for tensor in self.tensors.values()}
        return next((dtype for dtype in (torch.int8, torch.float16) if dtype in stored), torch.float32)


def _real_images(data_path: str | None, count: int = NUM_REAL, splits: tuple[str, ...] = ("val", "test", "train")) -> tuple[list, str]:
    """Up to `count` photographs spread over the classes of --data-path, of the first of the `splits` that there is, or, without one, scikit-learn's
    digits; and what they are."""
    if data_path is None:
        images, origin = load_digits()[splits[0] == "val"], "scikit-learn's digits"
    else:
        images = open_first(Config(data_path=data_path), splits)
        if images is None:
            raise InputError(f"--data-path {data_path} holds neither images of {', of '.join(splits[:-1])} nor of {splits[-1]}")
        origin = data_path
    order = sorted(range(len(images)), key=lambda i: images.targets[i])
    step = max(1, len(order) // count)
    return [images[i][0] for i in order[::step][:count]], origin


def _probe_transform(trained: Trained) -> Callable:
    """What evaluation makes of a photograph: normalised (3, H, W)."""
    if isinstance(trained.input_size, int):
        return eval_transform(trained)
    return transforms.Compose([transforms.Resize(trained.image_size), transforms.ToTensor(), transforms.Normalize(trained.mean, trained.std)])


def calibration_images(trained: Trained, data_path: str | None, count: int) -> tuple[Tensor, str]:
    """Normalised images (N, 3, H, W), N up to `count`, of train rather than val, as in evaluation; and what they are."""
    pictures, origin = _real_images(data_path, count, ("train", "val", "test"))
    return torch.stack([_probe_transform(trained)(picture) for picture in pictures]), origin


def to_pixels(images: Tensor, trained: Trained) -> Tensor:
    """Normalised images (B, 3, H, W) as float pixels from 0 to 255."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (trained.mean, trained.std))
    return (images * std + mean) * 255


def from_pixels(pixels: Tensor, trained: Trained) -> Tensor:
    """Pixels from 0 to 255 (B, 3, H, W) as normalised images."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (trained.mean, trained.std))
    return (pixels / 255 - mean) / std


def make_noise(trained: Trained, count: int) -> Tensor:
    """Random images (count, 3, H, W), the same every time."""
    return torch.randn(count, 3, *trained.image_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def make_probe(trained: Trained, data_path: str | None = None, *, num_random: int = NUM_RANDOM, is_pixels: bool = False) -> Probe:
    """Real images as in evaluation, and random ones, with what the eager network makes of them in full precision.

    With `is_pixels` all are of whole pixels from 0 to 255, as photographs are."""
    pictures, origin = _real_images(data_path)
    images = torch.cat((torch.stack([_probe_transform(trained)(picture) for picture in pictures]), make_noise(trained, num_random)))
    if is_pixels:
        images = from_pixels(to_pixels(images, trained).round().clamp(0, 255), trained)
    return Probe(images=images, reference=trained.net(images), num_real=len(pictures), origin=origin)


def _run(opened: Opened, images: Tensor, shape: torch.Size) -> Tensor:
    """Logits of the images, each of that shape."""
    try:
        with torch.no_grad():
            out = opened.run(images)
    except Exception as error:  # each runtime raises its own kinds, all of which mean: it does not run
        size = " x ".join(map(str, images.shape))
        raise InputError(f"it does not run on images of {size} ({first_line(error)}): another model, another input size, or a damaged file") from error
    if not isinstance(out, Tensor):
        raise InputError(f"it gives {len(out)} outputs where one is due: a network in training mode, or with its distillation pair left in")
    if out.shape != (len(images), *shape):
        raise InputError(f"it gives {list(out.shape)} for {len(images)} images where {[len(images), *shape]} are due: another model or class count")
    out = out.float()
    return out - out.mean(dim=1, keepdim=True) if opened.is_centred else out


def compare(opened: Opened, probe: Probe) -> dict:
    """Figures of how a file agrees with the eager network; InputError where it does not, or where it acts differently from run to run."""
    if opened.faults:
        raise InputError("; ".join(opened.faults))
    num_images, *shape = probe.reference.shape
    reference = probe.reference - probe.reference.mean(dim=1, keepdim=True) if opened.is_centred else probe.reference
    parts = (1, 3, num_images - 4) if opened.takes_batches else (1,) * num_images
    out = torch.cat([_run(opened, images, shape) for images in probe.images.split(parts)])
    again = _run(opened, probe.images[: parts[0]], shape)
    scale = reference.abs().max()
    if not (again - out[: parts[0]]).abs().max() <= REPEAT_TOLERANCE * scale:
        raise InputError("it gives other results when run again: dropout or stochastic depth is at work, it was exported in training mode")
    errors = (out - reference).abs().amax(dim=1)
    relative = (errors.max() / scale).item()
    tolerance = TOLERANCE[opened.dtype]
    if not relative <= tolerance:
        raise InputError(
            f"it differs from the network by {relative:.1e} of the largest logit, above {tolerance:.0e}: other weights, exported in training mode, or by an "
            f"exporter that is wrong for this network{TOO_COARSE.get(opened.dtype, '')}"
        )
    top2 = reference.topk(min(2, shape[0]), dim=1)
    clear = top2.values[:, 0] - top2.values[:, -1] > errors
    same, what = out.argmax(dim=1) == top2.indices[:, 0], "images" if len(shape) == 1 else "places in images"
    if (clear & ~same).any():
        raise InputError(f"its top class differs on {int((clear & ~same).sum())} of {same.numel()} {what} whose margin is larger than the error")
    return {
        "precision": str(opened.dtype).removeprefix("torch."),
        "largest_relative_difference": relative,
        "tolerance": tolerance,
        "same_top1": int(same.sum()),
        "top1_of": f"{same.numel()} {what}",
        "real_images": probe.num_real,
        "real_images_from": probe.origin,
        "random_images": num_images - probe.num_real,
        "batch_sizes": sorted(set(parts)),
        "not_checked": opened.unchecked,
    }


def different_tensors(opened: Opened, fresh: Opened) -> list[str] | None:
    """Names of the tensors that differ from those of a fresh export; None where the two are not built alike, so that none can be compared."""
    if {name: (value.shape, value.dtype) for name, value in opened.tensors.items()} != {
        name: (value.shape, value.dtype) for name, value in fresh.tensors.items()
    }:
        return None
    return [name for name, value in opened.tensors.items() if not _is_close(value, fresh.tensors[name])]


def _is_close(value: Tensor, expected: Tensor) -> bool:
    if expected.dtype == torch.int8:  # a sum rounded differently may round to the next step
        return bool(((value.int() - expected.int()).abs() <= 1).all())
    if torch.equal(value, expected) or not expected.is_floating_point():
        return torch.equal(value, expected)
    one_step = 0.0 if expected.dtype == torch.float32 else torch.finfo(expected.dtype).eps  # a sum rounded differently may round to the next half
    value, expected = value.double(), expected.double()
    return bool(((value - expected).abs() <= WEIGHT_TOLERANCE * expected.abs().max() + one_step * expected.abs()).all())


# ---- writing


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file. `ways` of writing it are tried in order until one passes: each writes a network's file and returns what to note of it.

    `probe` and `compare`: what it is tried with, and how it must agree, where that is not `make_probe` and `compare`."""

    name: str
    ways: dict[str, Callable[[Trained, Path, torch.dtype], dict]]
    open: Callable[[Path, Trained], Opened]
    takes_pixels: bool = False  # rather than normalised images
    probe: Callable[..., Probe] = make_probe
    compare: Callable[[Opened, Probe], dict] = compare


@contextlib.contextmanager
def staging(target: Path):
    """A folder beside `target` to write in, which is gone afterwards, so that nothing half done stays. InputError where it cannot be made."""
    folder = target.parent / f".{target.name}.partial"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror or first_line(error)}): choose another place, or make room") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put(staged: Path, target: Path) -> None:
    """Move a file or folder to where it belongs, in place of what was there."""
    if target.is_dir():
        os.replace(target, staged.with_name(staged.name + ".old"))
    os.replace(staged, target)


def sidecar_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def sidecar(trained: Trained, path: Path, figures: dict) -> dict:
    """What is written beside a file: what it is, of what weights, how it was checked and with what."""
    source = Path(trained.source).expanduser() if trained.source else None
    known = facts(trained)
    return {
        "file": path.name,
        "sha256": digest(path),
        "model": trained.name,
        "num_classes": trained.num_classes,
        "weights": describe_weights(trained),
        "source": trained.source,
        "source_sha256": digest(source) if source and source.is_file() else None,
        "compared_with": "the network as trained, eager" if not trained.is_fused else "the fused network, eager: its file holds no other",
        "verified": figures,
        "input": {key: known[key] for key in ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")},
        "class_names": labels(trained),
        "epoch": trained.epoch,
        "versions": versions(),
    }


def _try_way(fmt: Format, way: str, trained: Trained, path: Path, dtype: torch.dtype) -> dict:
    """Write a file one way; InputError where the exporter does not manage, or a package is missing."""
    try:
        return fmt.ways[way](trained, path, dtype)
    except (InputError, OSError):
        raise
    except Exception as error:  # exporters raise many kinds, all of which mean: not this way
        raise InputError(f"it cannot be exported ({type(error).__name__}: {first_line(error)})") from error


def write_verified(
    trained: Trained,
    target: Path,
    fmt: Format,
    *,
    data_path: str | None = None,
    dtype: torch.dtype = torch.float32,
    also: Callable[[Path], dict] = lambda path: {},
) -> dict:
    """Write `target`, run it, and only if it computes what was trained put it in place, with its sidecar, which is returned.

    `also` measures the written file further, for the sidecar. InputError, and no file, where no way of writing it gives a file that does."""
    if target.is_dir() and not (target.suffix == ".mlpackage" and (target / "Manifest.json").is_file()):
        raise InputError(f"{target} is a folder: name a file to write")
    refused = []
    probe = fmt.probe(trained, data_path, is_pixels=fmt.takes_pixels)
    with staging(target) as folder:
        staged = folder / target.name
        for way in fmt.ways:
            try:
                noted = _try_way(fmt, way, trained, staged, dtype)
                figures = fmt.compare(fmt.open(staged, trained), probe)
                break
            except InputError as error:
                refused.append(f"{way}: {error}")
        else:
            raise InputError(f"{target} was not written. " + "; ".join(refused))
        notes = {"format": fmt.name, "way": way, **noted, **({"ways_refused": refused} if refused else {})}
        described = {**notes, **sidecar(trained, staged, figures), **also(staged)}
        beside = sidecar_path(staged)
        beside.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        put(beside, sidecar_path(target))
        put(staged, target)
    return described


def read_sidecar(path: Path) -> dict:
    """What was written beside `path`; empty where there is nothing. InputError where it is not ours."""
    beside = sidecar_path(path)
    if not beside.is_file():
        return {}
    try:
        described = json.loads(beside.read_text(encoding="utf-8"))
        return {"sha256": described["sha256"], **described}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{beside} is no sidecar of this project ({first_line(error)}): remove it, or export again") from error


def verify(path: Path, trained: Trained, fmt: Format, *, data_path: str | None = None) -> dict:
    """Figures of a file that computes what `trained` does, from weights that are those of `trained`; InputError where it is not so.

    Its weights are compared with a fresh export's. Where those are built differently, say by another version of an exporter, four times
    as many images are compared instead, and `weights` in the figures says so."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    try:
        opened = fmt.open(path, trained)
        figures = fmt.compare(opened, fmt.probe(trained, data_path, is_pixels=fmt.takes_pixels))
        figures["weights"] = _compare_weights(path, opened, trained, fmt)
        if figures["weights"] is None:
            num_random = 4 * (NUM_REAL + NUM_RANDOM) - NUM_REAL
            figures = fmt.compare(opened, fmt.probe(trained, data_path, num_random=num_random, is_pixels=fmt.takes_pixels))
            reason = "the file is built otherwise than an export made here" if opened.tensors else "the file does not show them"
            figures["weights"] = f"not compared: {reason}; more images were run instead"
        if read_sidecar(path).get("sha256", digest(path)) != digest(path):
            raise InputError(f"it was changed since it was written and verified: its SHA-256 is not that in {sidecar_path(path).name}")
    except InputError as error:
        raise InputError(f"{path} is refused: {str(error).removeprefix(f'{path} is refused: ')}") from error
    except (TypeError, ValueError, KeyError, IndexError) as error:  # parts that no file of ours has
        raise InputError(f"{path} is refused: it is built in a way that cannot be compared ({first_line(error)})") from error
    return figures


def _compare_weights(path: Path, opened: Opened, trained: Trained, fmt: Format) -> str | None:
    if not opened.tensors:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for way in fmt.ways:
            fresh_path = Path(folder) / way.replace(" ", "_") / path.name
            fresh_path.parent.mkdir()
            try:
                _try_way(fmt, way, trained, fresh_path, opened.dtype)
                different = different_tensors(opened, fmt.open(fresh_path, trained))
            except InputError:  # the file itself runs, so it came another way
                continue
            if different:
                raise InputError(f"{len(different)} of its {len(opened.tensors)} stored tensors are not the checkpoint's, first: {different[0]}")
            if different is not None:
                return f"all {len(opened.tensors)} stored tensors are the checkpoint's"
    return None


# ---- what the export commands share


def default_target(trained: Trained, suffix: str) -> Path:
    """pretrain/<name><suffix>; <name> is the checkpoint's where that starts with the model's, as published ones do, else the model's."""
    stem = Path(trained.source).name.partition(".")[0]
    return Path("pretrain") / f"{stem if stem.startswith(trained.name) else trained.name}{suffix}"


def summary(figures: dict) -> str:
    """The figures of `compare` in a line; what could not be checked in another."""
    relative_to = figures.get("relative_to", "the largest logit")
    line = (
        f"verified on {figures['real_images']} images of {figures['real_images_from']} and {figures['random_images']} random ones, in batches of "
        f"{', '.join(map(str, figures['batch_sizes']))}: largest difference {figures['largest_relative_difference']:.1e} of {relative_to} "
        f"(tolerance {figures['tolerance']:.0e}, {figures['precision']}), same top class on {figures['same_top1']} of {figures['top1_of']}"
    )
    return "\n".join([line, *(f"not checked: {text}" for text in figures["not_checked"])])


def report(target: Path, described: dict) -> str:
    """What a command says of a file it wrote."""
    opset = f", opset {described['opset']}" if "opset" in described else ""
    refused = [f"refused: {text}" for text in described.get("ways_refused", [])]
    size = sum(file.stat().st_size for file in ([target] if target.is_file() else target.rglob("*")) if file.is_file())
    head = f"{target}: {described['format']} ({described['way']}{opset}), {size / 1e6:.1f} MB, {described['model']}, {described['weights']}"
    return "\n".join([head, *refused, summary(described["verified"]), f"figures: {sidecar_path(target)}"])
