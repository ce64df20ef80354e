"""A segmenter as the export commands take a network: normalised images -> logits at the stride of its finest map, which whoever runs the file
enlarges, bilinear, to the picture."""

from deployment.weights import Trained
from loading import augment
from run import checkpoint
from segmentation.batches import CROP_SIZE
from segmentation.saved import build


def load_trained(model: str | None, source: str, *, img_size: int | None = None) -> Trained:
    """The segmenter in a checkpoint of ours, or a published one, which needs `model`, its backbone; for square images of `img_size`, or the
    side of training's crops. InputError where the file cannot be read or does not fit."""
    saved = checkpoint.read(source)
    args = saved["args"] if isinstance(saved.get("args"), dict) else {}
    opened = build(saved, where=source, model=model)
    return Trained(
        net=opened.net,
        name=opened.model,
        num_classes=len(opened.classes),
        class_names=opened.classes.names,
        input_size=img_size or args.get("crop_size") or CROP_SIZE,
        mean=tuple(saved.get("mean", augment.MEAN)),
        std=tuple(saved.get("std", augment.STD)),
        crop_pct=1.0,
        which="model" if "model" in saved else "state_dict",
        source=source,
        epoch=saved.get("epoch"),
        metrics=saved.get("metrics") or {},
        args=args,
    )
