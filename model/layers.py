"""Layers that several architectures share, the network skeleton they hang in, and their registration with timm.

A module that can be fused has timm's method `fuse()`: it returns its replacement (itself, changed, or another module), with
whatever it had to fuse inside fused. `utils.replace_batchnorm` calls it on every module of a network, parents first.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.functional import elu, interpolate, pad, relu, scaled_dot_product_attention, softplus
from torch.nn.utils.fusion import fuse_conv_bn_weights

# ---- folding BatchNorm into its neighbours


def norm_scale_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
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
def add_identity_and_1x1(conv: nn.Conv2d, conv_1x1: nn.Conv2d) -> nn.Conv2d:
    """The depthwise 3x3 `conv`, changed in place to what `conv(x) + conv_1x1(x) + x` is; both are biased and have stride 1."""
    conv.weight += pad(conv_1x1.weight + 1, [1, 1, 1, 1])
    conv.bias += conv_1x1.bias
    return conv


@torch.no_grad()
def average_heads(head: nn.Linear, head_dist: nn.Linear) -> nn.Linear:
    """`head`, changed in place to the mean of both."""
    head.weight.add_(head_dist.weight).div_(2)
    head.bias.add_(head_dist.bias).div_(2)
    return head


# ---- convolutions and heads


class ChannelScale(nn.Conv2d):
    """Depthwise 1x1 convolution, as what it is: a factor and a shift per channel of (B, dim, H, W).

    Torch's convolution on a CPU would run through the channels one by one."""

    def __init__(self, dim: int, *, bias: bool = True):
        super().__init__(dim, dim, 1, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x is in half precision, like a convolution's result.
        out = x * self.weight.flatten(1).unsqueeze(2).to(x.dtype)
        return out if self.bias is None else out + self.bias.view(-1, 1, 1).to(x.dtype)


class ConvNorm(nn.Sequential):
    """Convolution, then BatchNorm: (B, in_chs, H, W) -> (B, out_chs, H', W'). Padding keeps the size at stride 1.

    `names` are those of the two children in published checkpoints; `norm_init` is the BatchNorm's first weight."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm_init: float = 1.0,
        names: tuple[str, str] = ("conv", "norm"),
    ):
        if kernel_size == stride == 1 and groups == in_chs == out_chs:
            conv = ChannelScale(in_chs, bias=bias)
        else:
            conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)
        norm = nn.BatchNorm2d(out_chs)
        nn.init.constant_(norm.weight, norm_init)
        super().__init__(OrderedDict(zip(names, (conv, norm), strict=True)))

    def fuse(self) -> nn.Conv2d:
        conv, norm = self
        return fold_norm_after(conv, norm)


class NormLinear(nn.Sequential):
    """BatchNorm, then a linear layer: (B, in_chs) -> (B, out_chs). `names` are those of the two children."""

    def __init__(self, in_chs: int, out_chs: int, *, names: tuple[str, str] = ("norm", "linear")):
        linear = nn.Linear(in_chs, out_chs)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        super().__init__(OrderedDict(zip(names, (nn.BatchNorm1d(in_chs), linear), strict=True)))

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        norm, linear = self
        scale, shift = norm_scale_shift(norm)
        fused = nn.Linear(linear.in_features, linear.out_features, device=scale.device, dtype=scale.dtype)
        fused.weight = nn.Parameter(linear.weight * scale)
        fused.bias = nn.Parameter(linear.bias + linear.weight @ shift)
        return fused.train(self.training)


LEVIT_CONV_NAMES, LEVIT_HEAD_NAMES = ("c", "bn"), ("bn", "l")  # of the families that descend from LeViT


class FoldingSequential(nn.Sequential):
    """Layers in a row, among them convolutions directly followed by their BatchNorm. Fused, each BatchNorm leaves an Identity."""

    def fuse(self) -> "FoldingSequential":
        for i in range(len(self) - 1):
            if isinstance(self[i], nn.Conv2d) and isinstance(self[i + 1], nn.BatchNorm2d):
                self[i], self[i + 1] = fold_norm_after(self[i], self[i + 1]), nn.Identity()
        return self


class ScaleShift(nn.Module):
    """What a BatchNorm is in evaluation, where nothing before it can absorb it: scale and shift per channel of (B, C, H, W)."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        scale, shift = norm_scale_shift(norm)
        self.weight = nn.Parameter(scale.detach().view(-1, 1, 1))
        self.bias = nn.Parameter(shift.detach().view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Residual(nn.Module):
    """x + drop_path(m(x)); the child is called `m` in published checkpoints."""

    def __init__(self, m: nn.Module, *, drop_path_rate: float = 0.0):
        super().__init__()
        self.m = m
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.m(x))


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
        if self.training and self.distillation:
            return logits, logits_dist
        return (logits + logits_dist) / 2

    def fuse(self) -> nn.Module:
        return average_heads(self.head.fuse(), self.head_dist.fuse()) if self.num_classes > 0 else nn.Identity()


# ---- blocks of the RecNeXt and RepNeXt families


def mlp(dim: int, mlp_ratio: float, *, bias: bool = False) -> nn.Sequential:
    """Channel mixer of two 1x1 convolutions: (B, dim, H, W) -> (B, dim, H, W)."""
    hidden_dim = int(dim * mlp_ratio)
    return nn.Sequential(ConvNorm(dim, hidden_dim, bias=bias), nn.GELU(), ConvNorm(hidden_dim, dim, bias=bias))


class Stem(nn.Module):
    """Two strided convolutions: (B, in_chans, H, W) -> (B, dim, H/4, W/4)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(in_chans, dim // 2, 3, stride=2), nn.GELU(), ConvNorm(dim // 2, dim, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


class MixerBlock(nn.Module):
    """Residual block of a token mixer, BatchNorm and an MLP: (B, dim, H, W) -> (B, dim, H, W).

    Fused, the 1x1 convolution after the norm has taken it up; a larger kernel could not, since the shift would also apply to padding. A mixer
    with a method `scale_output(scale)` takes the scale instead, so that its output has the norm's range in half precision too."""

    def __init__(self, token_mixer: nn.Module, dim: int, mlp_ratio: float, *, drop_path_rate: float):
        super().__init__()
        self.token_mixer = token_mixer
        self.norm = nn.BatchNorm2d(dim)
        self.channel_mixer = mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.channel_mixer(self.norm(self.token_mixer(x))))

    @torch.no_grad()
    def fuse(self) -> "MixerBlock":
        if isinstance(self.norm, nn.BatchNorm2d):
            scale, shift = norm_scale_shift(self.norm)
            conv = self.channel_mixer[0].fuse()
            conv.bias += conv.weight.flatten(1) @ shift
            if hasattr(self.token_mixer, "scale_output"):
                self.token_mixer.scale_output(scale)
            else:
                conv.weight *= scale.view(1, -1, 1, 1)
            self.channel_mixer[0], self.norm = conv, nn.Identity()
        return self


class Downsample(nn.Module):
    """A token mixer that halves the resolution and doubles the channels, BatchNorm, a residual MLP.

    (B, in_chs, H, W) -> (B, 2 in_chs, H/2, W/2). The mixer is a convolution, or has a method `fold_norm(norm)` for fusing."""

    def __init__(self, token_mixer: nn.Module, in_chs: int, mlp_ratio: float):
        super().__init__()
        self.token_mixer = token_mixer
        self.norm = nn.BatchNorm2d(2 * in_chs)
        self.channel_mixer = mlp(2 * in_chs, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.token_mixer(x))
        return x + self.channel_mixer(x)

    def fuse(self) -> "Downsample":
        if isinstance(self.norm, nn.BatchNorm2d):
            mixer = self.token_mixer
            self.token_mixer = fold_norm_after(mixer, self.norm) if isinstance(mixer, nn.Conv2d) else mixer.fold_norm(self.norm)
            self.norm = nn.Identity()
        return self


def strided_conv(in_chs: int) -> nn.Conv2d:
    """7x7 convolution with two kernels per channel: (B, in_chs, H, W) -> (B, 2 in_chs, H/2, W/2)."""
    return nn.Conv2d(in_chs, 2 * in_chs, 7, stride=2, padding=3, groups=in_chs)


def is_half_autocast(x: Tensor) -> bool:
    """Whether operators on x's device run in float16 at present: what they sum up may then pass 65504."""
    device_type = x.device.type
    if not torch.amp.is_autocast_available(device_type):
        return False
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16


def run_in_float32(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of the tensors, in float32 where autocast would have it run in float16."""
    if not is_half_autocast(tensors[0]):
        return function(*tensors)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return function(*(tensor.float() for tensor in tensors))


class RecConv2d(nn.Module):
    """Depthwise convolutions over a pyramid of `level` halvings of the input: (B, dim, H, W) -> (B, dim, H, W).

    One strided convolution is shared by all halvings; coming up, each level's convolution sees its input plus the level below, resized by
    `mode`, which is `interpolate`'s."""

    def __init__(self, dim: int, *, kernel_size: int = 5, level: int, mode: str = "bilinear"):
        super().__init__()
        self.level = level
        self.mode = mode
        settings = {"kernel_size": kernel_size, "padding": kernel_size // 2, "groups": dim, "bias": False}
        self.down = nn.Conv2d(dim, dim, stride=2, **settings)
        self.convs = nn.ModuleList([nn.Conv2d(dim, dim, **settings) for _ in range(level + 1)])

    def _mix(self, x: Tensor) -> Tensor:
        pyramid = [x]
        for _ in range(self.level):
            pyramid.append(self.down(pyramid[-1]))
        x = pyramid.pop()
        for i, conv in enumerate(self.convs):
            if i > 0:
                finer = pyramid.pop()
                x = finer + interpolate(x, size=finer.shape[2:], mode=self.mode)
            x = conv(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._mix(x)
        # Nothing normalises between the levels, and their running sum can pass float16's 65504.
        return run_in_float32(self._mix, x)

    def scale_output(self, scale: Tensor) -> None:
        """Multiply the output's channels by `scale` (dim,), in place and for good."""
        self.convs[-1].weight *= scale.view(-1, 1, 1, 1)


# ---- linear attention. Shapes: D query and key channels, E value channels, N positions; leading dimensions are batch and head.

ATTN_KERNELS = ("elu", "relu", "softplus", "softmax")


def kernel_feature(x: Tensor, kernel: str) -> Tensor:
    """phi(x) >= 0, elementwise, whose inner products stand in for softmax attention's exponentials."""
    if kernel == "elu":
        return elu(x) + 1
    if kernel == "relu":
        return relu(x)
    return softplus(x, beta=3.5)


def attend_values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention in O(N D E): q and k (..., D, N), not negative, and v (..., E, N) -> (..., E, N).

    Position i's output is the mean over j of q_i k_j v_j, divided by the mean of q_i k_j plus 1e-6. The mean's 1/N is split in two
    factors, without which half precision loses the products' range."""
    scale = k.shape[-1] ** -0.5
    values = (v * scale) @ (k * scale).transpose(-2, -1)
    total = k.mean(-1, keepdim=True).transpose(-2, -1) @ q
    return (values @ q) / (total + 1e-6)


def attend_scores_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as `attend_values_first`, in O(N^2 (D + E))."""
    scale = k.shape[-1] ** -0.5
    scores = k.transpose(-2, -1) @ q
    total = scores.mean(-2, keepdim=True)
    return (v * scale) @ (scores / (total + 1e-6) * scale)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The cheaper of both orders of evaluation for these shapes: q and k (..., D, N), v (..., E, N) -> (..., E, N)."""
    qk_chs, num_positions, v_chs = k.shape[-2], k.shape[-1], v.shape[-2]
    if 2 * qk_chs * v_chs <= num_positions * (qk_chs + v_chs):
        return attend_values_first(q, k, v)
    return attend_scores_first(q, k, v)


class LinearAttention(nn.Module):
    """Attention of all positions to all, with a convolution for their places: (B, dim, H, W) -> (B, dim, H, W).

    `qk` gives the channels of q, then those of k; v is the input itself, which `pe` convolves. `kernel` is one of ATTN_KERNELS."""

    def __init__(self, qk: nn.Module, pe: nn.Module, *, num_heads: int = 1, kernel: str = "elu"):
        super().__init__()
        if kernel not in ATTN_KERNELS:
            raise ValueError(f"attn_kernel is '{kernel}': it can be {', '.join(ATTN_KERNELS)}")
        self.num_heads = num_heads
        self.kernel = kernel
        self.qk = qk
        self.pe = pe

    def _attend(self, qk: Tensor, x: Tensor) -> Tensor:
        """(B, 2 qk_dim, H, W) and (B, dim, H, W) -> (B, dim, H, W)."""
        batch, _, height, width = x.shape
        q, k = qk.reshape(batch, 2 * self.num_heads, -1, height * width).chunk(2, dim=1)
        v = x.reshape(batch, self.num_heads, -1, height * width)
        if self.kernel == "softmax":
            out = scaled_dot_product_attention(q.transpose(-2, -1), k.transpose(-2, -1), v.transpose(-2, -1)).transpose(-2, -1)
        else:
            out = linear_attention(kernel_feature(q, self.kernel), kernel_feature(k, self.kernel), v)
        return out.reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.pe(x) + self._attend(self.qk(x), x)
        return self.pe(x) + run_in_float32(self._attend, self.qk(x), x)


class RecAttn2d(nn.Module):
    """Attention at half the resolution, added to the input, then a convolution: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, down: nn.Module, attention: nn.Module, conv: nn.Module):
        super().__init__()
        self.down = nn.Sequential(down, attention)
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + interpolate(self.down(x), size=x.shape[2:], mode="nearest"))


def build_attention(dim: int, *, qk_dim: int, qk_groups: int, num_heads: int = 1, kernel: str = "elu", bias: bool = False) -> LinearAttention:
    """RecNeXt's attention, with `qk_dim` channels each of q and k."""
    qk = ConvNorm(dim, 2 * qk_dim, groups=qk_groups, bias=bias)
    return LinearAttention(qk, ConvNorm(dim, dim, 3, groups=dim, bias=bias), num_heads=num_heads, kernel=kernel)


def build_rec_attention(dim: int, *, num_heads: int = 1, kernel: str = "elu", bias: bool = False) -> RecAttn2d:
    """RecNeXt's attention at half the resolution."""
    return RecAttn2d(
        ConvNorm(dim, dim, 5, stride=2, groups=dim, bias=bias),
        build_attention(dim, qk_dim=dim, qk_groups=2, num_heads=num_heads, kernel=kernel, bias=bias),
        ConvNorm(dim, dim, 5, groups=dim, bias=bias),
    )


# ---- networks


class PooledNet(nn.Module):
    """A trunk of layers, global average pooling and heads, with the interface of timm's models.

    Maps (B, in_chans, H, W) to (B, num_classes). A family names its modules as its published checkpoints do and defines
    `trunk` and `cut_trunk`, `forward_features`, `forward_head`, `get_classifier` and `_build_heads`.
    `features` describes the maps that `features_only` gives: (channels, reduction of the image's sides, module, trunk layers up to it)."""

    def __init__(self, *, in_chans: int, features: list[tuple[int, int, str, int]], num_features: int, distillation: bool):
        super().__init__()
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = num_features
        self.distillation = distillation
        self.feature_info = [{"num_chs": chs, "reduction": reduction, "module": module} for chs, reduction, module, _ in features]
        self.feature_depths = [depth for *_, depth in features]

    def trunk(self) -> list[nn.Module]:
        """The layers before pooling, in order."""
        raise NotImplementedError

    def cut_trunk(self, length: int) -> None:
        """Keep the trunk's first `length` layers."""
        raise NotImplementedError

    def _build_heads(self, num_classes: int) -> tuple[nn.Module, ...]:
        """Set the modules behind pooling; returns the new ones."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """New heads for `num_classes` classes (0: none); `global_pool` is `avg`, or empty for feature maps."""
        if global_pool not in ("", "avg"):
            raise ValueError(f"global_pool is '{global_pool}': it can be 'avg' or '' (none)")
        if global_pool == "" and num_classes > 0:
            raise ValueError("global_pool='' leaves feature maps, which the heads cannot take: use num_classes=0 with it")
        self.num_classes = num_classes
        self.global_pool = global_pool
        for head in self._build_heads(num_classes):
            head.train(self.training)

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
        """Feature maps `indices` (all by default), after the trunk's output unless `intermediates_only`.

        timm's signature; `norm` changes nothing, these networks have no final norm before pooling."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is '{output_fmt}': these feature maps are NCHW")
        take_indices, last_index = feature_take_indices(len(self.feature_info), indices)
        take_depths = [self.feature_depths[i] for i in take_indices]
        layers = self.trunk()
        intermediates = []
        for depth, layer in enumerate(layers[: self.feature_depths[last_index]] if stop_early else layers, start=1):
            x = layer(x)
            if depth in take_depths:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop the layers after the last of `indices`, and the heads with `prune_head`; returns the indices kept."""
        take_indices, last_index = feature_take_indices(len(self.feature_info), indices)
        depth = self.feature_depths[last_index]
        is_cut = depth < len(self.trunk())
        if is_cut:
            self.cut_trunk(depth)
            self.num_features = self.head_hidden_size = self.feature_info[last_index]["num_chs"]
            self.feature_info, self.feature_depths = self.feature_info[: last_index + 1], self.feature_depths[: last_index + 1]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        return take_indices


class Stage(nn.Module):
    """Downsampling layer (an Identity in the first stage), then blocks at one resolution."""

    def __init__(self, downsample: nn.Module, blocks: nn.Module):
        super().__init__()
        self.downsample = downsample
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class StagedNet(PooledNet):
    """Stem, stages and `Classifier`: the skeleton of the RecNeXt and RepNeXt families.

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
        features = [(dim, reduction, f"stages.{i}", i + 2) for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))]
        super().__init__(in_chans=in_chans, features=features, num_features=dims[-1], distillation=distillation)
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def trunk(self) -> list[nn.Module]:
        return [self.stem, *self.stages]

    def cut_trunk(self, length: int) -> None:
        self.stages = self.stages[: length - 1]

    def _build_heads(self, num_classes: int) -> tuple[nn.Module, ...]:
        self.head = Classifier(self.num_features, num_classes, distillation=self.distillation)
        return (self.head,)

    def get_classifier(self) -> nn.Module:
        return self.head

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


# ---- registration with timm


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
