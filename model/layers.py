"""Layers that several architectures share: convolutions with their BatchNorm, heads, and folding the one into the other.

A module that can be fused has timm's method `fuse()`: it returns its replacement (itself, changed, or another module), with
whatever it had to fuse inside fused. `utils.replace_batchnorm` calls it on every module of a network, parents first.
"""

from collections import OrderedDict

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.fusion import fuse_conv_bn_weights

from model.depthwise import DepthwiseConv2d

# ---- folding BatchNorm into its neighbours


def norm_scale_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(C,) scale and (C,) shift that an evaluating BatchNorm applies per channel."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


@torch.no_grad()
def fold_norm_after(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One biased convolution equal to `norm(conv(x))` in evaluation; `conv` stays as it is."""
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    if isinstance(conv, DepthwiseConv2d):
        fused = DepthwiseConv2d(conv.in_channels, conv.kernel_size, out_chs=conv.out_channels, stride=conv.stride)
    else:
        fused = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
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


# ---- layouts in memory


class _KeepLayout(torch.autograd.Function):
    """The identity, whose gradient it lays out like its input: channels-last, or contiguous."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.memory_format = layout(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous(memory_format=ctx.memory_format)


def layout(x: Tensor) -> torch.memory_format:
    """The memory format that x (B, C, H, W) has, or whose part it is."""
    return torch.channels_last if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format


def keep_layout(x: Tensor) -> Tensor:
    """`x`, whose gradient has the memory format of x.

    For what hands back a gradient in another: the layers before it would go on in that, or go through memory against the grain."""
    if torch.jit.is_scripting():
        return x
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or not x.requires_grad:
        return x
    return _KeepLayout.apply(x)


def dense(x: Tensor) -> Tensor:
    """`x`, where it is a part of another map's channels, copied into one piece: once, and not by every layer that reads it."""
    if torch.jit.is_scripting():
        return x
    return keep_layout(x.contiguous(memory_format=layout(x)))


def average_pool(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C): mean over all positions."""
    return keep_layout(x).mean((2, 3))


# ---- convolutions and heads


class ChannelScale(nn.Conv2d):
    """Depthwise 1x1 convolution, as what it is: a factor and a shift per channel of (B, dim, H, W).

    Torch's convolution on a CPU would run through the channels one by one."""

    def __init__(self, dim: int, *, bias: bool = True):
        super().__init__(dim, dim, 1, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x is in half precision, like a convolution's result.
        out = x * self.weight.flatten(1).unsqueeze(2).to(x.dtype)
        bias = self.bias
        return out if bias is None else out + bias.view(-1, 1, 1).to(x.dtype)


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
        elif groups == in_chs and out_chs % in_chs == 0:
            conv = DepthwiseConv2d(in_chs, kernel_size, out_chs=out_chs, stride=stride, bias=bias)
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

    While training with `distillation` it returns the pair (class logits, distillation logits); scripted, the mean there too, as timm's do."""

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

    def fuse(self) -> nn.Module:
        return average_heads(self.head.fuse(), self.head_dist.fuse()) if self.num_classes > 0 else nn.Identity()
