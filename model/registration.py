"""How architectures become models of timm's registry."""

import sys

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn


def pretrained_cfg(first_conv: str, classifier: tuple[str, ...] | str, **settings) -> dict:
    """timm's description of weights trained on ImageNet-1k at 224 pixels; `settings` adds the hub id and what differs."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
        **settings,
    }


DISTILLATION_TAGS = ("base_300e_in1k", "dist_300e_in1k")  # of the RecNeXt and RepNeXt weights, without and with distillation


def staged_pretrained_cfgs(names, **settings) -> dict[str, dict]:
    """`pretrained_cfg` of both published sets of weights of each `StagedNet` in `names`."""
    return {
        f"{name}.{tag}": pretrained_cfg("stem.stem.0.conv", ("head.head.linear", "head.head_dist.linear"), hf_hub_id=f"suous/{name}.{tag}", **settings)
        for name in names
        for tag in DISTILLATION_TAGS
    }


def register(
    variants: dict[str, dict],
    net_cls: type[nn.Module],
    pretrained_cfgs: dict[str, dict],
    *,
    distillation_tags: tuple[str, str] | None = None,
    has_distillation: bool = True,
) -> None:
    """Make every row of `variants` a model of timm's registry that builds `net_cls` with the row's settings.

    `pretrained_cfgs` maps `name` or `name.tag` to a `pretrained_cfg`. With `distillation_tags` (without, with), a model's
    `distillation` argument chooses between its two published sets of weights. A row's `drop_path_rate` holds without distillation:
    the distilled networks were trained without stochastic depth. Every model takes `distillation`; those of a family without
    `has_distillation` have one output for both terms of the loss, and do not need to be told."""
    module = sys.modules[net_cls.__module__]
    module.default_cfgs = {**getattr(module, "default_cfgs", {}), **generate_default_cfgs(pretrained_cfgs)}

    def build_entry_point(name: str, settings: dict):
        def entry_point(pretrained: bool = False, *, distillation: bool = False, **kwargs) -> nn.Module:
            kwargs = {**settings, **({"drop_path_rate": 0.0} if distillation else {}), **kwargs}
            if has_distillation:
                kwargs["distillation"] = distillation
            if distillation_tags and kwargs.get("pretrained_cfg") is None:
                kwargs["pretrained_cfg"] = distillation_tags[bool(distillation)]
            return build_model_with_cfg(net_cls, name, pretrained, feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}, **kwargs)

        entry_point.__name__ = entry_point.__qualname__ = name
        entry_point.__module__ = net_cls.__module__
        entry_point.__doc__ = f"{net_cls.__name__} with {settings}."
        return entry_point

    for name, settings in variants.items():
        setattr(module, name, register_model(build_entry_point(name, settings)))
        REGISTERED[name] = (net_cls, settings)


REGISTERED: dict[str, tuple[type[nn.Module], dict]] = {}  # our models by name: class and settings, in the order of their registration
