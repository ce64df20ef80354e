"""Layers that several architectures share, the network skeleton they hang in, and their registration with timm.

A module that can be fused has timm's method `fuse()`: it returns its replacement (itself, changed, or another module), with
whatever it had to fuse inside fused. `utils.replace_batchnorm` calls it on every module of a network, parents first.
"""

import sys

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights


def _norm_scale_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(C,) scale and (C,) shift that an evaluating BatchNorm applies per channel."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


@torch.no_grad()
def fold_norm_after(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One biased convolution equal to `norm(conv(x))` in evaluation; `conv` stays as it is."""
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    fused = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    fused.weight, fused.bias = nn.Parameter(weight), nn.Parameter(bias)
    return fused.train(conv.training)


@torch.no_grad()
def fold_norm_before(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Conv2d:
    """The biased, ungrouped 1x1 convolution `conv`, changed in place to what `conv(norm(x))` is in evaluation.

    A larger kernel could not take the shift: it would also apply to the padding."""
    assert conv.kernel_size == (1, 1) and conv.groups == 1 and conv.bias is not None
    scale, shift = _norm_scale_shift(norm)
    conv.bias += conv.weight.flatten(1) @ shift
    conv.weight *= scale.view(1, -1, 1, 1)
    return conv


class ConvNorm(nn.Module):
    """Convolution, then BatchNorm: (B, in_chs, H, W) -> (B, out_chs, H', W'). Padding keeps the size at stride 1."""

    def __init__(self, in_chs: int, out_chs: int, kernel_size: int = 1, *, stride: int = 1, groups: int = 1, bias: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out_chs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def fuse(self) -> nn.Conv2d:
        return fold_norm_after(self.conv, self.norm)


class NormLinear(nn.Module):
    """BatchNorm, then a linear layer: (B, in_chs) -> (B, out_chs)."""

    def __init__(self, in_chs: int, out_chs: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(in_chs)
        self.linear = nn.Linear(in_chs, out_chs)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        scale, shift = _norm_scale_shift(self.norm)
        self.linear.bias += self.linear.weight @ shift
        self.linear.weight *= scale
        return self.linear


def mlp(dim: int, mlp_ratio: float, *, bias: bool = False) -> nn.Sequential:
    """Channel mixer of two 1x1 convolutions: (B, dim, H, W) -> (B, dim, H, W)."""
    hidden_dim = int(dim * mlp_ratio)
    return nn.Sequential(ConvNorm(dim, hidden_dim, bias=bias), nn.GELU(), ConvNorm(hidden_dim, dim, bias=bias))


class Classifier(nn.Module):
    """Class head and distillation head: (B, dim) -> (B, num_classes), the mean of both.

    While training with `distillation` it returns the pair (class logits, distillation logits)."""

    def __init__(self, dim: int, num_classes: int, *, distillation: bool):
        super().__init__()
        self.num_classes = num_classes
        self.distillation = distillation
        self.head_drop = nn.Dropout(0.0)
        self.head = NormLinear(dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head_dist = NormLinear(dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor):
        x = self.head_drop(x)
        if self.num_classes == 0:
            return x
        logits, logits_dist = self.head(x), self.head_dist(x)
        if self.training and self.distillation and not torch.jit.is_scripting():
            return logits, logits_dist
        return (logits + logits_dist) / 2

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        head, head_dist = self.head.fuse(), self.head_dist.fuse()
        head.weight.add_(head_dist.weight).div_(2)
        head.bias.add_(head_dist.bias).div_(2)
        return head


class Stage(nn.Module):
    """Downsampling layer (an Identity in the first stage), then blocks at one resolution."""

    def __init__(self, downsample: nn.Module, blocks: nn.Module):
        super().__init__()
        self.downsample = downsample
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class StagedNet(nn.Module):
    """Stem, stages, pooled classifier, with the interface of timm's models: (B, in_chans, H, W) -> (B, num_classes).

    `reductions` says by how much each stage's output is smaller than the image."""

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: list[Stage],
        dims: tuple[int, ...],
        reductions: tuple[int, ...],
        in_chans: int,
        num_classes: int,
        distillation: bool,
        drop_rate: float,
        global_pool: str,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.distillation = distillation
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"} for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """New heads for `num_classes` classes (0: none); `global_pool` is `avg`, or empty for feature maps."""
        if global_pool not in ("", "avg"):
            raise ValueError(f"global_pool is '{global_pool}': it can be 'avg' or '' (none)")
        if global_pool == "" and num_classes > 0:
            raise ValueError("global_pool='' leaves feature maps, which the heads cannot take: use num_classes=0 with it")
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.head = Classifier(self.num_features, num_classes, distillation=self.distillation)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether training returns the pair of logits; timm's name for it."""
        self.distillation = enable
        if isinstance(self.head, Classifier):
            self.head.distillation = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, num_features, h, w): the last stage's feature map."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False):
        """Logits of a feature map or, with `pre_logits`, its pooled features (B, num_features)."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor):
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Feature maps of the stages `indices` (all by default), after the last one's unless `intermediates_only`.

        timm's signature; `norm` changes nothing, these networks have no final norm before pooling."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is '{output_fmt}': these feature maps are NCHW")
        take_indices, last_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop the stages after the last of `indices`, and the heads with `prune_head`; returns the indices kept."""
        take_indices, last_index = feature_take_indices(len(self.stages), indices)
        is_cut = last_index < len(self.stages) - 1
        self.stages = self.stages[: last_index + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last_index]["num_chs"]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        return take_indices


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


def register(variants: dict[str, dict], net_cls: type[nn.Module], pretrained_cfgs: dict[str, dict], *, distillation_tags: tuple[str, str] | None = None) -> None:
    """Make every row of `variants` a model of timm's registry that builds `net_cls` with the row's settings.

    `pretrained_cfgs` maps `name` or `name.tag` to a `pretrained_cfg`. With `distillation_tags` (without, with), a model's
    `distillation` argument chooses between its two published sets of weights. A row's `drop_path_rate` holds without distillation:
    the distilled networks were trained without stochastic depth."""
    module = sys.modules[net_cls.__module__]
    module.default_cfgs = {**getattr(module, "default_cfgs", {}), **generate_default_cfgs(pretrained_cfgs)}

    def build_entry_point(name: str, settings: dict):
        def entry_point(pretrained: bool = False, **kwargs) -> nn.Module:
            kwargs = {**settings, **({"drop_path_rate": 0.0} if kwargs.get("distillation") else {}), **kwargs}
            if distillation_tags and kwargs.get("pretrained_cfg") is None:
                kwargs["pretrained_cfg"] = distillation_tags[bool(kwargs.get("distillation"))]
            return build_model_with_cfg(net_cls, name, pretrained, feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}, **kwargs)

        entry_point.__name__ = entry_point.__qualname__ = name
        entry_point.__module__ = net_cls.__module__
        entry_point.__doc__ = f"{net_cls.__name__} with {settings}."
        return entry_point

    for name, settings in variants.items():
        register_model(build_entry_point(name, settings))
        REGISTERED.append(name)


REGISTERED: list[str] = []  # names of our models, in the order of their registration
