"""Segmenters out of checkpoint files, ready to look at pictures: network, classes, image size."""

from dataclasses import dataclass

import numpy as np
from torch import nn

from features.names import num_channels
from run import checkpoint
from run.errors import InputError
from segmentation import names, networks
from segmentation.classes import ADE20K, Classes, numbered, read_classes
from segmentation.cropping import MAX_SIZE


@dataclass(frozen=True)
class Saved:
    """A segmenter in evaluation mode, on the CPU; its backbone's name and its classes; what pictures are resized to fit into, (long, short) side.

    `skips_zero`: class k has the value k + 1 in its label images, in which 0 is to be ignored."""

    net: nn.Module
    model: str
    classes: Classes
    max_size: tuple[int, int]
    skips_zero: bool


def is_segmenter(saved: dict) -> bool:
    """Whether a checkpoint, as `run.checkpoint.read` gives it, is a segmenter's, ours or a published one."""
    return names.num_classes(saved, where="the checkpoint") is not None


def classes_of(saved: dict, *, where: str) -> Classes:
    """The classes of a segmenter's checkpoint: its own, ADE20K's where it has none and 150 outputs, as published ones have, else numbers.

    InputError where it holds no segmenter, or names another number of classes than its head has."""
    num_classes = names.num_classes(saved, where=where)
    if num_classes is None:
        raise InputError(f"{where} holds no segmenter", "classifiers are for main.py --eval, detectors for python -m detection --eval")
    if saved.get("class_names") is None:
        published = read_classes(ADE20K)
        return published if len(published) == num_classes else numbered(num_classes)
    palette = saved.get("palette") or numbered(num_classes).palette
    if not len(saved["class_names"]) == len(palette) == num_classes:
        raise InputError(f"{where} names {len(saved['class_names'])} classes, its network has {num_classes}: the file is damaged, use another")
    return Classes(list(saved["class_names"]), np.array(palette, np.uint8))


def build(saved: dict, *, where: str, model: str | None = None) -> Saved:
    """The segmenter in a checkpoint, as `run.checkpoint.read` gives it from `where`, ours or a published one, which does not say what backbone
    it has: then `model` does. InputError where that is missing, or what there is does not fit."""
    classes, args = classes_of(saved, where=where), saved.get("args") if isinstance(saved.get("args"), dict) else {}
    model = args.get("model", model)
    if model is None:
        raise InputError(f"{where} does not say what backbone its segmenter has", "add --model NAME")
    net = networks.build(model, len(classes), channels=num_channels(saved, where=where))
    names.load(net, saved, where=where)
    return Saved(net.eval(), model, classes, tuple(saved.get("max_size") or MAX_SIZE), saved.get("reduce_zero_label", True))


def open_checkpoint(source: str, *, model: str | None = None) -> Saved:
    """`build` of a checkpoint file, URL or hub's name."""
    return build(checkpoint.read(source), where=source, model=model)
