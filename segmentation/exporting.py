"""A segmenter as the export commands take a network: normalised images -> logits at the stride of its finest map, which whoever runs the file
enlarges, bilinear, to the picture."""

from deployment.options import require_square
from deployment.weights import Trained
from deployment.weights import load_trained as load_classifier
from features.exporting import FEATURES, describe, load_features, own_args
from run import checkpoint
from run.errors import InputError
from segmentation import networks
from segmentation.batches import CROP_SIZE
from segmentation.classes import ADE20K, read_classes
from segmentation.saved import build

PREFIX = "fpn_"  # of a segmenter's name, before its backbone's, as in published configurations


def load_trained(model: str | None, source: str | None, *, img_size: int | tuple[int, int] | None = None) -> Trained:
    """The segmenter in a checkpoint of ours, or a published one, which needs `model`, its backbone; for images of `img_size`, or of the
    side of training's crops. Without `source` random weights for ADE20K's classes, for measuring only. InputError where the file cannot be read
    or does not fit."""
    saved = checkpoint.read(source) if source else {}
    if source:
        opened = build(saved, where=source, model=model)
        net, model, classes = opened.net, opened.model, opened.classes
    else:
        classes = read_classes(ADE20K)
        net = networks.build(model, len(classes))
    size = img_size or own_args(saved).get("crop_size") or CROP_SIZE
    return describe(net, saved, name=f"{PREFIX}{model}", class_names=classes.names, input_size=size, source=source)


def load_named(name: str, source: str | None, *, use_ema: bool, img_size: int | tuple[int, int] | None) -> Trained:
    """A network by its name: a segmenter where that is `fpn_` and a backbone's, the feature maps where it is `features_` and one, else a classifier.

    InputError where there is none, or it does not take the size or the weights."""
    if name.startswith(PREFIX):
        return load_trained(name.removeprefix(PREFIX), source, img_size=img_size)
    if name.startswith(FEATURES):
        if source:
            raise InputError(f"--resume {source} is for whole networks: {name} is measured with random weights, drop it")
        return load_features(name.removeprefix(FEATURES), img_size=img_size)
    require_square(img_size, "--img-size")
    return load_classifier(name, source, use_ema=use_ema, img_size=img_size)
