"""Networks on a classifier's features as the export and timing commands take them; their bare feature maps, for measuring."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from deployment.weights import Trained
from features.pyramid import build_body
from loading import augment

FEATURES = "features_"  # of a name, before a classifier's: its last four feature maps, without head or pyramid


def describe(net: nn.Module, saved: dict, *, name: str, class_names: list[str], input_size: int | tuple[int, int], source: str | None) -> Trained:
    """The network with what `saved`, the checkpoint that it was loaded from (empty: random weights), says of its images and training."""
    return Trained(
        net=net.eval(),
        name=name,
        num_classes=len(class_names),
        class_names=class_names,
        input_size=input_size,
        mean=tuple(saved.get("mean", augment.MEAN)),
        std=tuple(saved.get("std", augment.STD)),
        crop_pct=1.0,
        which="random" if source is None else "model" if "model" in saved else "state_dict",
        source=source,
        epoch=saved.get("epoch"),
        metrics=saved.get("metrics") or {},
        args=own_args(saved),
    )


def own_args(saved: dict) -> dict:
    """Settings of the run that wrote a checkpoint; none where it was not one of ours."""
    return saved["args"] if isinstance(saved.get("args"), dict) else {}


class Joined(nn.Module):
    """Feature maps as one tensor, for what takes one output: (B, 3, H, W) -> (B, sum over maps of channels x height x width)."""

    def __init__(self, maps: nn.Module):
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        return torch.cat([one.flatten(1) for one in (maps.values() if isinstance(maps, OrderedDict) else maps)], dim=1)


def load_features(model: str, *, img_size: int | tuple[int, int] | None) -> Trained:
    """The feature maps of `model` with random weights, for measuring at `img_size`, by default 512 pixels. InputError where it has none for a pyramid."""
    return describe(Joined(build_body(model)), {}, name=FEATURES + model, class_names=[], input_size=img_size or 512, source=None)
