"""Detectors out of checkpoint files, ready to find objects: network, class names, image size."""

from dataclasses import dataclass

from torch import nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from detection import names, networks
from detection.batches import MAX_SIZE
from features.names import num_channels
from run import checkpoint
from run.errors import InputError


@dataclass(frozen=True)
class Saved:
    """A detector in evaluation mode, on the CPU, its kind (of `detection.config.DETECTORS`) and its backbone's name; names of its classes by label;
    what its images are resized to fit into, (long, short) side."""

    net: nn.Module
    detector: str
    model: str
    class_names: list[str]
    max_size: tuple[int, int]


def is_detector(saved: dict) -> bool:
    """Whether a checkpoint, as `run.checkpoint.read` gives it, is a detector's, ours or a published one."""
    return names.num_classes(saved, where="the checkpoint") is not None


def class_names(saved: dict, num_classes: int, *, where: str) -> list[str]:
    """Names of a detector's classes: the checkpoint's, COCO's where it has none and 80 classes, as published ones have, else numbers.

    InputError where it names another number of classes than its head has."""
    found = saved.get("class_names")
    if found is None:
        published = [name for name in MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"] if name not in ("__background__", "N/A")]
        return published if len(published) == num_classes else [str(i) for i in range(num_classes)]
    if len(found) != num_classes:
        raise InputError(f"{where} names {len(found)} classes, its network has {num_classes}: the file is damaged, use another")
    return list(found)


def build(saved: dict, *, where: str, model: str | None = None) -> Saved:
    """The detector in a checkpoint, as `run.checkpoint.read` gives it from `where`, ours or a published one, which does not say what backbone
    it has: then `model` does. InputError where that is missing, or what there is does not fit."""
    num_classes, detector = names.num_classes(saved, where=where), names.detector(saved, where=where)
    if num_classes is None:
        raise InputError(f"{where} holds no detector", "classifiers are for main.py --eval, segmenters for python -m segmentation --eval")
    args = saved.get("args") if isinstance(saved.get("args"), dict) else {}
    model = args.get("model", model)
    if model is None:
        raise InputError(f"{where} does not say what backbone its detector has", "add --model NAME")
    net = networks.build(detector, model, num_classes, channels=num_channels(saved, where=where))
    names.load(net, saved, where=where)
    return Saved(net.eval(), detector, model, class_names(saved, num_classes, where=where), tuple(saved.get("max_size") or MAX_SIZE))


def open_checkpoint(source: str, *, model: str | None = None) -> Saved:
    """`build` of a checkpoint file, URL or hub's name."""
    return build(checkpoint.read(source), where=source, model=model)
