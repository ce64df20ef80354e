"""SKA's CUDA kernels and their gradients; `model.ska` says what SKA is and chooses between the forms.

Each program computes a block of consecutive elements in the order of memory, which is that of x: NCHW or channels last. A neighbour
of an element is then at a fixed distance from it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 256


@triton.jit
def _locate(index, chs, height, width, CHANNELS_LAST: tl.constexpr):
    """Batch, channel, row and column of an element, from its place in memory."""
    if CHANNELS_LAST:
        pixel = index // chs
        return pixel // (height * width), index % chs, pixel // width % height, pixel % width
    return index // (width * height * chs), index // (width * height) % chs, index // width % height, index % width


@triton.jit
def _forward(
    x_ptr, w_ptr, out_ptr, size, chs, num_groups, height, width, stride_b, stride_g, stride_k, stride_y, stride_x,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """SKA with SIGN 1. With SIGN -1 its gradient for x, x_ptr being that of the output: a neighbour's weight for this pixel."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    batch, channel, row, col = _locate(index, chs, height, width, CHANNELS_LAST)
    pixel_step = chs if CHANNELS_LAST else 1
    w_ptr += batch * stride_b + channel % num_groups * stride_g
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(9):
        dy, dx = SIGN * (k // 3 - 1), SIGN * (k % 3 - 1)
        is_inside = (index < size) & (row + dy >= 0) & (row + dy < height) & (col + dx >= 0) & (col + dx < width)
        w_row = row if SIGN == 1 else row + dy
        w_col = col if SIGN == 1 else col + dx
        x = tl.load(x_ptr + index + (dy * width + dx) * pixel_step, is_inside, 0.0)
        w = tl.load(w_ptr + k * stride_k + w_row * stride_y + w_col * stride_x, is_inside, 0.0)
        total += x.to(tl.float32) * w.to(tl.float32)
    tl.store(out_ptr + index, total, index < size)


@triton.jit
def _backward_w(
    x_ptr, grad_ptr, grad_w_ptr, size, chs, num_groups, height, width, stride_b, stride_g, stride_k, stride_y, stride_x,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    """The gradient for w; an element is a pixel and one of the G groups, whose REPEATS channels it sums over."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    batch, group, row, col = _locate(index, num_groups, height, width, CHANNELS_LAST)
    pixel_step = chs if CHANNELS_LAST else 1
    channel_step = 1 if CHANNELS_LAST else height * width
    first_pixel = ((batch * height + row) * width + col) * chs if CHANNELS_LAST else (batch * chs * height + row) * width + col
    first = first_pixel + group * channel_step
    grad_w_ptr += batch * stride_b + group * stride_g + row * stride_y + col * stride_x
    for k in tl.static_range(9):
        dy, dx = k // 3 - 1, k % 3 - 1
        is_inside = (index < size) & (row + dy >= 0) & (row + dy < height) & (col + dx >= 0) & (col + dx < width)
        total = tl.zeros((BLOCK,), tl.float32)
        for repeat in tl.static_range(REPEATS):
            place = first + repeat * num_groups * channel_step
            x = tl.load(x_ptr + place + (dy * width + dx) * pixel_step, is_inside, 0.0)
            grad = tl.load(grad_ptr + place, is_inside, 0.0)
            total += x.to(tl.float32) * grad.to(tl.float32)
        tl.store(grad_w_ptr + k * stride_k, total, index < size)


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


class TritonSKA(torch.autograd.Function):
    """SKA of x (B, C, H, W) and w (B, G, 9, H, W), of one dtype; sums are in float32."""

    @staticmethod
    def _run(x: Tensor, w: Tensor, sign: int) -> Tensor:
        out = torch.empty_like(x)
        _, chs, height, width = x.shape
        is_channels_last = _memory_format(x) == torch.channels_last
        grid = (triton.cdiv(x.numel(), BLOCK),)
        _forward[grid](x, w, out, x.numel(), chs, w.shape[1], height, width, *w.stride(), CHANNELS_LAST=is_channels_last, BLOCK=BLOCK, SIGN=sign)
        return out

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        x = x.contiguous(memory_format=_memory_format(x))
        ctx.save_for_backward(x, w)
        return TritonSKA._run(x, w, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        grad = grad.contiguous(memory_format=_memory_format(x))
        grad_w = torch.empty_like(w)
        _, chs, height, width = x.shape
        num_groups = w.shape[1]
        size = w.numel() // 9
        is_channels_last = _memory_format(x) == torch.channels_last
        grid = (triton.cdiv(size, BLOCK),)
        _backward_w[grid](
            x, grad, grad_w, size, chs, num_groups, height, width, *grad_w.stride(),
            CHANNELS_LAST=is_channels_last, BLOCK=BLOCK, REPEATS=chs // num_groups,
        )  # fmt: skip
        return TritonSKA._run(grad, w, -1), grad_w


def ska_triton(x: Tensor, w: Tensor) -> Tensor:
    """SKA by Triton's kernels."""
    return TritonSKA.apply(x, w)
