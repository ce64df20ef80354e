"""A segmenter as the export commands take a network: normalised images -> logits at the stride of its finest map, which whoever runs the file
enlarges, bilinear, to the picture."""

from deployment.weights import Trained
from deployment.weights import load_trained as load_classifier
from loading import augment
from run import checkpoint
from segmentation import networks
from segmentation.batches import CROP_SIZE
from segmentation.classes import ADE20K, read_classes
from segmentation.saved import build

PREFIX = "fpn_"  # of a segmenter's name, before its backbone's, as in published configurations


def load_trained(model: str | None, source: str | None, *, img_size: int | None = None) -> Trained:
    """The segmenter in a checkpoint of ours, or a published one, which needs `model`, its backbone; for square images of `img_size`, or the
    side of training's crops. Without `source` random weights for ADE20K's classes, for measuring only. InputError where the file cannot be read
    or does not fit."""
    saved = checkpoint.read(source) if source else {}
    args = saved["args"] if isinstance(saved.get("args"), dict) else {}
    if source:
        opened = build(saved, where=source, model=model)
        net, model, classes = opened.net, opened.model, opened.classes
    else:
        classes = read_classes(ADE20K)
        net = networks.build(model, len(classes)).eval()
    return Trained(
        net=net,
        name=f"{PREFIX}{model}",
        num_classes=len(classes),
        class_names=classes.names,
        input_size=img_size or args.get("crop_size") or CROP_SIZE,
        mean=tuple(saved.get("mean", augment.MEAN)),
        std=tuple(saved.get("std", augment.STD)),
        crop_pct=1.0,
        which="random" if source is None else "model" if "model" in saved else "state_dict",
        source=source,
        epoch=saved.get("epoch"),
        metrics=saved.get("metrics") or {},
        args=args,
    )


def load_named(name: str, source: str | None, *, use_ema: bool, img_size: int | None) -> Trained:
    """A network by its name: a segmenter where that is `fpn_` and a backbone's, else a classifier. InputError where there is none."""
    if not name.startswith(PREFIX):
        return load_classifier(name, source, use_ema=use_ema, img_size=img_size)
    return load_trained(name.removeprefix(PREFIX), source, img_size=img_size)
