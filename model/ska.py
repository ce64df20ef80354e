"""Small-kernel aggregation, LSNet's operator: a 3x3 convolution whose weights differ from pixel to pixel.

Shapes: x (B, C, H, W); w (B, G, 9, H, W), G dividing C; result (B, C, H, W). Output pixel p of channel c is the sum over p's 3x3 neighbourhood,
row by row, of x times w[:, c mod G, :, p]; outside the image x is 0.
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, unfold


def ska_unfold(x: Tensor, w: Tensor) -> Tensor:
    """SKA from plain operators of at most five dimensions, which is Core ML's limit, for exported graphs: it holds nine copies of x."""
    batch, chs, height, width = x.shape
    num_groups = w.shape[1]
    patches = unfold(x, kernel_size=[3, 3], padding=[1, 1]).reshape(batch, chs // num_groups, num_groups, 9, height * width)
    weights = w.reshape(batch, 1, num_groups, 9, height * width)
    return (patches * weights).sum(3).reshape(batch, chs, height, width)


def _padded_channels_last(x: Tensor, num_groups: int) -> Tensor:
    """(B, C, H, W) -> (B, H + 2, W + 2, C / G, G), zeros around the image."""
    return pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).unflatten(-1, (-1, num_groups))


def _taps(padded: Tensor) -> list[Tensor]:
    """Nine views (B, H, W, ...) of (B, H + 2, W + 2, ...): each pixel's neighbours, in the order of SKA's weights."""
    height, width = padded.shape[1] - 2, padded.shape[2] - 2
    return [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]


class LeanSKA(torch.autograd.Function):
    """SKA tap by tap, channels last: it saves x and w alone for backward, and moves a third to a seventh of unfold's memory."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        w_KBHWG = w.permute(2, 0, 3, 4, 1).contiguous()
        ctx.save_for_backward(x, w_KBHWG)
        ctx.is_w_channels_last = w.stride(2) == 1
        taps = _taps(_padded_channels_last(x, w.shape[1]))
        out = torch.zeros_like(taps[0], memory_format=torch.contiguous_format)
        for tap, weight in zip(taps, w_KBHWG, strict=True):
            out.addcmul_(tap, weight.unsqueeze(3))
        return out.flatten(3).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w_KBHWG = ctx.saved_tensors
        num_groups = w_KBHWG.shape[-1]
        grad = grad.permute(0, 2, 3, 1).contiguous().unflatten(-1, (-1, num_groups))
        padded = _padded_channels_last(x, num_groups)
        grad_padded = torch.zeros_like(padded)
        grad_w = torch.empty_like(w_KBHWG)
        for tap, grad_tap, weight, grad_weight in zip(_taps(padded), _taps(grad_padded), w_KBHWG, grad_w, strict=True):
            grad_tap.addcmul_(grad, weight.unsqueeze(3))
            torch.sum(grad * tap, 3, out=grad_weight)
        grad_w = grad_w.permute(1, 4, 0, 2, 3)
        if ctx.is_w_channels_last:  # what w was made of is so too, and its gradient is a view of this one's
            grad_w = grad_w.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        return grad_padded[:, 1:-1, 1:-1].flatten(3).permute(0, 3, 1, 2), grad_w


def ska_lean(x: Tensor, w: Tensor) -> Tensor:
    """SKA without nine copies of x; the result has x's memory format."""
    out = LeanSKA.apply(x, w)
    return out.contiguous() if x.is_contiguous() else out


@functools.cache
def _triton_ska():
    """The CUDA kernel, or None where Triton is not installed."""
    try:
        from model.ska_triton import ska_triton
    except ImportError:
        return None
    return ska_triton


@torch.jit.unused
def _ska_eager(x: Tensor, w: Tensor) -> Tensor:
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return ska_unfold(x, w)
    dtype = torch.promote_types(x.dtype, w.dtype)  # autocast leaves w in float32, out of a GroupNorm
    x, w = x.to(dtype), w.to(dtype)
    kernel = _triton_ska() if x.is_cuda and dtype != torch.float64 else None
    return kernel(x, w) if kernel else ska_lean(x, w)


def ska(x: Tensor, w: Tensor) -> Tensor:
    """SKA in the form that is best here: unfold in exported graphs, Triton's kernel on CUDA, else tap by tap."""
    if torch.jit.is_scripting():
        return ska_unfold(x, w)
    return _ska_eager(x, w)
