"""Detectors out of checkpoint files, ready to find objects: network, class names, image size."""

from dataclasses import dataclass

from torch import nn

from detection import names, networks
from detection.batches import MAX_SIZE
from features.names import num_channels
from run import checkpoint
from run.errors import InputError


@dataclass(frozen=True)
class Saved:
    """A detector in evaluation mode, on the CPU; names of its classes by label; what its images are resized to fit into, (long, short) side."""

    net: nn.Module
    class_names: list[str]
    max_size: tuple[int, int]


def is_detector(saved: dict) -> bool:
    """Whether a checkpoint, as `run.checkpoint.read` gives it, is a detector's, ours or a published one."""
    return names.num_classes(saved, where="the checkpoint") is not None


def build(saved: dict, *, where: str, detector: str | None = None, model: str | None = None) -> Saved:
    """The detector in a checkpoint, as `run.checkpoint.read` gives it from `where`, ours or a published one, which does not say what it is:
    then `detector` and `model` do, and classes have numbers for names. InputError where these are missing, or what there is does not fit."""
    num_classes = names.num_classes(saved, where=where)
    if num_classes is None:
        raise InputError(f"{where} holds no detector", "classifiers are for predict.py and main.py --eval")
    args = saved.get("args") if isinstance(saved.get("args"), dict) else {}
    detector, model = args.get("detector", detector), args.get("model", model)
    if detector is None or model is None:
        raise InputError(f"{where} does not say what detector it holds", "add --detector mask_rcnn or retinanet, and --model, its backbone")
    net = networks.build(detector, model, num_classes, channels=num_channels(saved, where=where))
    names.load(net, saved, where=where)
    return Saved(net.eval(), saved.get("class_names") or [str(i) for i in range(num_classes)], tuple(saved.get("max_size") or MAX_SIZE))


def open_checkpoint(source: str, *, detector: str | None = None, model: str | None = None) -> Saved:
    """`build` of a checkpoint file, URL or hub's name."""
    return build(checkpoint.read(source), where=source, detector=detector, model=model)
