"""A detector as the export commands take it: a normalised image of one fixed size -> its objects; or its backbone and pyramid alone.

torch's newer exporter does not follow what depends on how many objects there are, so the older one, which traces one image, writes these files."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deployment import formats
from deployment.prediction import find_images
from deployment.verify import NUM_RANDOM, NUM_REAL, REPEAT_TOLERANCE, TOLERANCE, Format, Opened, Probe, make_noise
from deployment.weights import Trained
from detection.matching import MAX_OBJECTS, MIN_SCORE
from detection.rcnn import RCNN
from detection.saved import build
from features import pictures
from features.exporting import describe
from loading.sized import normalised, padded, to_size, written
from run import checkpoint
from run.errors import InputError, first_line

PARTS = ("detector", "pyramid")


class WholeImages(nn.Module):
    """A detector of images without padding: (1, 3, H, W) -> boxes (n, 4), scores (n,), labels (n,) and, with masks, masks (n, 1, 28, 28), at most 100."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        has_masks = isinstance(net, RCNN) and net.roi_heads.has_mask()
        self.output_names = ["boxes", "scores", "labels", *(["masks"] if has_masks else [])]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.net(image, [(int(image.shape[-2]), int(image.shape[-1]))])
        return tuple(found[name] for name in self.output_names)


class Pyramid(nn.Module):
    """Backbone and pyramid of a detector: (1, 3, H, W) -> its maps (1, C, h, w), finest first."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.backbone = net.backbone

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(image).values())


def load_trained(model: str | None, source: str, *, img_size: int | tuple[int, int] | None = None, part: str = "detector") -> Trained:
    """That part, of `PARTS`, of the detector in a checkpoint of ours, or a published one, which needs `model`, its backbone.

    It is for images of `img_size`: by default that of a wide image, as it is resized and padded in evaluation. InputError where the file cannot be
    read or does not fit."""
    saved = checkpoint.read(source)
    opened = build(saved, where=source, model=model)
    size = img_size or padded([opened.max_size[::-1]])
    name, net = f"{opened.detector}_{opened.model}", WholeImages(opened.net)
    if part == "pyramid":
        name, net = f"{name}_pyramid", Pyramid(opened.net)
    return describe(net, saved, name=name, class_names=opened.class_names, input_size=size, source=source)


# ---- what a file is tried with


def _real_images(trained: Trained, data_path: str | None) -> tuple[list[np.ndarray], str]:
    """Pictures, resized to the network's size, of the folder --data-path or, without one, scikit-learn's two photographs; and what they are."""
    if data_path is None:
        from sklearn.datasets import load_sample_images

        found, origin = [np.array(one) for one in load_sample_images().images], "scikit-learn's photographs"
    else:
        files = find_images([data_path])
        found, origin = [pictures.read_picture(file) for file in files[:: max(1, len(files) // NUM_REAL)][:NUM_REAL]], data_path
    return [to_size(picture, trained.image_size) for picture in found], origin


@torch.no_grad()
def make_probe(trained: Trained, data_path: str | None = None, *, num_random: int = NUM_RANDOM, is_pixels: bool = False) -> Probe:
    """Real images and random ones, with what the eager network makes of each."""
    views, origin = _real_images(trained, data_path)
    real = normalised(written(views, trained.image_size), [trained.image_size] * len(views))
    images = torch.cat([real, make_noise(trained, num_random)])
    return Probe(images=images, reference=[trained.net(image[None]) for image in images], num_real=len(views), origin=origin)


# ---- how a file must agree


def _run(opened: Opened, image: Tensor, num_outputs: int) -> list[Tensor]:
    try:
        outputs = opened.run(image[None])
    except Exception as error:  # each runtime raises its own kinds, all of which mean: it does not run
        size = " x ".join(map(str, image.shape))
        raise InputError(f"it does not run on an image of {size} ({first_line(error)}): another model, another input size, or a damaged file") from error
    outputs = [outputs] if isinstance(outputs, Tensor) else [torch.from_numpy(one) for one in outputs]
    if len(outputs) != num_outputs:
        raise InputError(f"it gives {len(outputs)} outputs where {num_outputs} are due: another kind of network")
    return outputs


def _outputs(opened: Opened, probe: Probe) -> list[list[Tensor]]:
    """What a file gives for each image of the probe; InputError where it is at fault, or gives something else when it runs again."""
    if opened.faults:
        raise InputError("; ".join(opened.faults))
    found = [_run(opened, image, len(reference)) for image, reference in zip(probe.images, probe.reference, strict=True)]
    for first, again in zip(found[0], _run(opened, probe.images[0], len(found[0])), strict=True):
        if first.shape != again.shape or not torch.allclose(first.float(), again.float(), rtol=REPEAT_TOLERANCE, atol=REPEAT_TOLERANCE, equal_nan=True):
            raise InputError("it gives other results when run again: it was exported in training mode")
    return found


def _figures(probe: Probe, error: float, *, count: int, what: str, relative_to: str) -> dict:
    tolerance = TOLERANCE[torch.float32]
    if not error <= tolerance:
        raise InputError(f"it differs from the network by {error:.1e} of {relative_to}, above {tolerance:.0e}: other weights, or a wrong exporter")
    return {
        "precision": "float32",
        "largest_relative_difference": error,
        "relative_to": relative_to,
        "tolerance": tolerance,
        "same_top1": count,
        "top1_of": f"{count} {what}",
        "real_images": probe.num_real,
        "real_images_from": probe.origin,
        "random_images": len(probe.images) - probe.num_real,
        "batch_sizes": [1],
        "not_checked": [],
    }


def compare_maps(opened: Opened, probe: Probe) -> dict:
    """As `deployment.verify.compare`, of feature maps; the top class of a place is its highest channel, where that is clear."""
    error, num_places = 0.0, 0
    for found, reference in zip(_outputs(opened, probe), probe.reference, strict=True):
        for one, wanted in zip(found, reference, strict=True):
            if one.shape != wanted.shape:
                raise InputError(f"it gives a map {list(one.shape)} where {list(wanted.shape)} is due: another model")
            error = max(error, ((one - wanted).abs().max() / wanted.abs().max()).item())
            num_places += wanted[:, 0].numel()
    return _figures(probe, error, count=num_places, what="places in maps", relative_to="the largest value of a map")


def match(found: list[Tensor], wanted: list[Tensor], *, scale: float, tolerance: float, edge: float) -> list[tuple[int, int, float]]:
    """(place in `found`, place in `wanted`, difference) of the objects of an image, each with the most alike one of its class.

    A difference is the largest of box sides over `scale`, score and mask. InputError where an object has no other within `tolerance`, but where its
    score is so close to `edge`, the least that is kept, that rounding decides."""
    pairs, free = [], set(range(len(found[1])))
    for place in range(len(wanted[1])):
        alike = [other for other in free if found[2][other] == wanted[2][place]]
        errors = {other: _difference([one[other] for one in found], [one[place] for one in wanted], scale) for other in alike}
        best = min(errors, key=errors.get, default=None)
        if best is not None and errors[best] <= tolerance:
            free.remove(best)
            pairs.append((best, place, errors[best]))
        elif wanted[1][place] > edge + tolerance:
            nearest = "is not found" if best is None else f"differs by {errors[best]:.1e} from the most alike one that is found, above {tolerance:.0e}"
            raise InputError(f"an object of score {wanted[1][place]:.3f} {nearest}: other weights, or a wrong exporter")
    surplus = [found[1][other].item() for other in free if found[1][other] > edge + tolerance]
    if surplus:
        raise InputError(f"it finds {len(surplus)} objects that the network does not, the best of score {max(surplus):.3f}: other weights, or a wrong exporter")
    return pairs


def _difference(one: list[Tensor], other: list[Tensor], scale: float) -> float:
    """The largest difference of two objects' box sides over `scale`, scores and masks; infinite where one is no number."""
    (box, score, _, *mask), (own_box, own_score, _, *own_mask) = one, other
    pairs = [(box / scale, own_box / scale), (score, own_score), *zip(mask, own_mask, strict=True)]
    error = max((first - second).abs().max().item() for first, second in pairs)
    return error if math.isfinite(error) else math.inf


def compare_objects(opened: Opened, probe: Probe) -> dict:
    """As `deployment.verify.compare`, of objects: each of the network's is to be found by the file, and no other."""
    scale, tolerance = max(probe.images.shape[-2:]), TOLERANCE[torch.float32]
    errors = []
    for found, wanted in zip(_outputs(opened, probe), probe.reference, strict=True):
        edge = max([MIN_SCORE] + [one[1].min().item() for one in (found, wanted) if len(one[1]) == MAX_OBJECTS])
        errors += [error for *_, error in match(found, list(wanted), scale=scale, tolerance=tolerance, edge=edge)]
    if not errors:
        raise InputError(f"nothing was compared, for the network finds no object in {probe.origin}: add --data-path with a folder of pictures that have some")
    return _figures(probe, max(errors), count=len(errors), what="objects", relative_to="the image's long side, the scores and the masks")


# ---- the files


def _write(trained: Trained, path: Path, dtype: torch.dtype) -> dict:
    if dtype != torch.float32:
        raise InputError("detectors are written in float32 alone, for boxes in float16 would be off by pixels: drop --float16")
    image = make_noise(trained, 1)
    if isinstance(trained.net, Pyramid):
        strides = trained.net.backbone.strides
        return formats.export_legacy(formats.prepared(trained, dtype), image, path, outputs=[f"stride{stride}" for stride in strides], varying={})
    names = trained.net.output_names
    return formats.export_legacy(formats.prepared(trained, dtype), image, path, outputs=names, varying=dict.fromkeys(names, "objects"))


_WAYS = {"TorchScript exporter": _write}
FORMATS = {
    "detector": Format("ONNX", _WAYS, formats.ONNX.open, probe=make_probe, compare=compare_objects),
    "pyramid": Format("ONNX", _WAYS, formats.ONNX.open, probe=make_probe, compare=compare_maps),
}
