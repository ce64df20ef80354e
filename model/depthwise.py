"""Depthwise convolution, quick in channels-last on a CPU too, where torch (oneDNN) has no kernels of its own for some of it.

Several kernels per channel, it runs as a matrix product per channel: here each of them is a convolution with one kernel per channel. The gradient
for the weights of a kernel wider than 3, it computes as a dense convolution's, in blocks of 8 channels of which it keeps the diagonal: here it is
a depthwise convolution of the input with the output's gradient, image by image. Results are the same up to the order of their sums.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d

WIDEST_QUICK_KERNEL = 3
FEW_POSITIONS = 25  # of an output map, up to which the gradient for the weights is also quicker here with a stride
TOO_FEW_POSITIONS = 4  # up to which torch's own is the quicker one
CHUNK = 2**18  # elements of the images that are convolved with their gradients at once: they stay in the cache


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    return conv2d(x, weight, bias, stride, padding, groups=x.shape[1])


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, stride, padding, needed: list[bool]) -> tuple[Tensor | None, ...]:
    """Torch's own, for x, weight and bias, those of them that are `needed`."""
    bias_sizes = [weight.shape[0]]
    return torch.ops.aten.convolution_backward(grad, x, weight, bias_sizes, stride, padding, [1, 1], False, [0, 0], x.shape[1], needed)


def weight_gradient(grad: Tensor, x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """(C, 1, k, l) from grad (B, C, h, w) and x (B, C, H, W): each channel of x convolved with its own output's gradient.

    Taps of a convolution with a stride lie next to each other, its outputs a stride apart: stride and dilation change places."""
    total = 0
    num_images = max(1, CHUNK // x[0].numel())
    for x_part, grad_part in zip(x.split(num_images), grad.split(num_images), strict=True):
        images = x_part.reshape(1, -1, *x.shape[2:])
        kernels = grad_part.reshape(-1, 1, *grad.shape[2:])
        taps = conv2d(images, kernels, None, 1, padding, stride, groups=images.shape[1])[:, :, : kernel_size[0], : kernel_size[1]]
        total = total + taps.unflatten(1, (len(x_part), -1)).sum((0, 1))
    return total.unsqueeze(1)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = stride, padding
        return _convolve(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        is_own = ctx.needs_input_grad[1] and _is_slow_weight(weight, grad, ctx.settings[0])
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not is_own, ctx.needs_input_grad[2]]
        grad_x, grad_weight, grad_bias = _gradients(grad, x, weight, *ctx.settings, needed)
        if is_own:
            grad_weight = weight_gradient(grad, x, weight.shape[2:], *ctx.settings)
        return grad_x, grad_weight, grad_bias, None, None


def _is_slow_weight(weight: Tensor, grad: Tensor, stride) -> bool:
    positions = grad.shape[2] * grad.shape[3]
    return min(weight.shape[2:]) > WIDEST_QUICK_KERNEL and positions > TOO_FEW_POSITIONS and (max(stride) == 1 or positions <= FEW_POSITIONS)


def interleave(parts: list[Tensor]) -> Tensor:
    """(B, C, H, W) each -> (B, n C, H, W), channels-last: first each one's first channel, then each one's second, and so on."""
    return torch.stack([part.permute(0, 2, 3, 1) for part in parts], dim=-1).flatten(3).permute(0, 3, 1, 2)


def _is_quick(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's convolution is the best there is, or the only one that may be used here."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return True
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous(memory_format=torch.channels_last):
        return True
    return len(weight) == x.shape[1] and min(weight.shape[2:]) <= WIDEST_QUICK_KERNEL


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Convolution of x (B, C, H, W), each channel with its n kernels of weight (n C, 1, k, l); bias (n C,) or None -> (B, n C, h, w)."""
    if _is_quick(x, weight):
        return _convolve(x, weight, bias, stride, padding)
    num_kernels = len(weight) // x.shape[1]
    if num_kernels == 1:
        return _Depthwise.apply(x, weight, bias, stride, padding)
    biases = [None if bias is None else bias[i::num_kernels] for i in range(num_kernels)]
    return interleave([_Depthwise.apply(x, weight[i::num_kernels], biases[i], stride, padding) for i in range(num_kernels)])


class DepthwiseConv2d(nn.Conv2d):
    """(B, in_chs, H, W) -> (B, out_chs, H', W'): `out_chs` / `in_chs` kernels per channel. Padding keeps the size at stride 1."""

    def __init__(self, in_chs: int, kernel_size: int | tuple[int, int], *, out_chs: int | None = None, stride: int = 1, bias: bool = True):
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        super().__init__(in_chs, out_chs or in_chs, (height, width), stride, (height // 2, width // 2), groups=in_chs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        return depthwise_conv2d(x, self.weight, self.bias, self.stride, self.padding)
