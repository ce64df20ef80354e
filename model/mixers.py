"""Token mixers of several architectures: recursive convolution, linear attention, attention at half the resolution."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, interpolate, relu, scaled_dot_product_attention, softplus

from model.depthwise import DepthwiseConv2d
from model.layers import ConvNorm, keep_layout


def is_half_autocast(x: Tensor) -> bool:
    """Whether operators on x's device run in float16 at present: what they sum up may then pass 65504."""
    device_type = x.device.type
    if device_type == "meta":  # which has no autocast; `is_autocast_available`, which says so, torch 2.11 cannot compile
        return False
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16


def run_in_float32(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of the tensors, in float32 where autocast would have it run in float16."""
    if not is_half_autocast(tensors[0]):
        return function(*tensors)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return function(*(tensor.float() for tensor in tensors))


class RecursiveConv(nn.Module):
    """What the forms of recursive convolution share: (B, dim, H, W) -> (B, dim, H, W).

    A form defines `_mix`, its recursion, and `convs`, the last of which gives the output."""

    def _mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._mix(x)
        # Nothing normalises between the levels, and their running sum can pass float16's 65504.
        return run_in_float32(self._mix, x)

    def scale_output(self, scale: Tensor) -> None:
        """Multiply the output's channels by `scale` (dim,), in place and for good."""
        self.convs[-1].weight *= scale.view(-1, 1, 1, 1)


class RecConv2d(RecursiveConv):
    """Depthwise convolutions over a pyramid of `level` halvings of the input: (B, dim, H, W) -> (B, dim, H, W).

    One strided convolution is shared by all halvings; coming up, each level's convolution sees its input plus the level below, resized by
    `mode`, which is `interpolate`'s."""

    def __init__(self, dim: int, *, kernel_size: int = 5, level: int, mode: str = "bilinear"):
        super().__init__()
        self.level = level
        self.mode = mode
        self.down = DepthwiseConv2d(dim, kernel_size, stride=2, bias=False)
        self.convs = nn.ModuleList([DepthwiseConv2d(dim, kernel_size, bias=False) for _ in range(level + 1)])

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


# ---- linear attention. Shapes: D query and key channels, E value channels, N positions; leading dimensions are batch and head.

ATTN_KERNELS = ("elu", "relu", "softplus", "softmax")


def kernel_feature(x: Tensor, kernel: str) -> Tensor:
    """phi(x) >= 0, elementwise, whose inner products stand in for softmax attention's exponentials."""
    if kernel == "elu":
        return elu(x) + 1
    if kernel == "relu":
        return relu(x)
    return softplus(x, beta=3.5)


def matmul_laid_out_like(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` (..., E, N), in the order in memory that x (..., D, N) has: in channels-last, the channels of a position lie together."""
    if x.stride(-2) == 1 and x.stride(-1) != 1:
        return (b.transpose(-2, -1) @ a.transpose(-2, -1)).transpose(-2, -1)
    return a @ b


def attend_values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention in O(N D E): q and k (..., D, N), not negative, and v (..., E, N) -> (..., E, N).

    Position i's output is the mean over j of q_i k_j v_j, divided by the mean of q_i k_j plus 1e-6. The mean's 1/N is split in two
    factors, without which half precision loses the products' range."""
    scale = k.shape[-1] ** -0.5
    values = (v * scale) @ (k * scale).transpose(-2, -1)
    total = k.mean(-1, keepdim=True).transpose(-2, -1) @ q
    return matmul_laid_out_like(q, values, q) / (total + 1e-6)


def attend_scores_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as `attend_values_first`, in O(N^2 (D + E))."""
    scale = k.shape[-1] ** -0.5
    scores = k.transpose(-2, -1) @ q
    total = scores.mean(-2, keepdim=True)
    return matmul_laid_out_like(v, v * scale, scores / (total + 1e-6) * scale)


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
        qk, x = keep_layout(qk), keep_layout(x)
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
