"""Depthwise convolution against torch's own in float64, and where it leaves the work to it."""

import copy

import pytest
import torch
from torch import nn

import utils
from model import depthwise
from model.depthwise import DepthwiseConv2d
from model.layers import ConvNorm
from tests.nets import relative_error

CASES = [  # kernel, kernels per channel, stride, image
    (5, 1, 1, (14, 9)),
    (5, 1, 2, (14, 9)),  # more output positions than few: torch's own weight gradient
    (5, 1, 2, (7, 8)),
    (5, 1, 1, (1, 2)),
    (7, 2, 2, (13, 10)),
    (7, 3, 1, (4, 4)),
    (3, 2, 2, (6, 6)),
    ((5, 7), 1, 1, (8, 6)),
    ((1, 11), 1, 1, (6, 12)),
]


def outputs_and_gradients(conv: nn.Conv2d, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = conv(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *conv.parameters()])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel_size", "num_kernels", "stride", "size"), CASES)
def test_results_and_gradients_are_those_of_torchs_convolution(kernel_size, num_kernels, stride, size, bias):
    torch.manual_seed(0)
    conv = DepthwiseConv2d(6, kernel_size, out_chs=6 * num_kernels, stride=stride, bias=bias)
    reference = nn.Conv2d(6, 6 * num_kernels, kernel_size, stride, conv.padding, groups=6, bias=bias).double()
    reference.load_state_dict(conv.state_dict())
    x = torch.randn(3, 6, *size)
    expected = outputs_and_gradients(reference, x.double())
    for memory_format in (torch.channels_last, torch.contiguous_format):
        found = outputs_and_gradients(conv.to(memory_format=memory_format), x.to(memory_format=memory_format))
        assert found[0].is_contiguous(memory_format=memory_format) and found[1].is_contiguous(memory_format=memory_format)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one.double(), other) < 2e-6


def test_weight_gradients_are_taken_image_by_image_where_torch_is_slow(monkeypatch):
    taken, weight_gradient = [], depthwise.weight_gradient
    monkeypatch.setattr(depthwise, "weight_gradient", lambda *args: taken.append(args[2]) or weight_gradient(*args))
    x = torch.randn(2, 4, 12, 12).contiguous(memory_format=torch.channels_last)
    for kernel_size, stride in ((5, 1), (3, 1), (5, 2), ((1, 11), 1), (7, 3)):
        DepthwiseConv2d(4, kernel_size, stride=stride)(x).sum().backward()
    DepthwiseConv2d(4, 5)(x[:, :, :2, :2].contiguous(memory_format=torch.channels_last)).sum().backward()  # of four positions, torch is quicker
    assert taken == [(5, 5), (7, 7)]


def test_chunks_of_images_add_up(monkeypatch):
    torch.manual_seed(0)
    x, grad = torch.randn(5, 3, 6, 6), torch.randn(5, 3, 6, 6)
    whole = depthwise.weight_gradient(grad, x, (5, 5), (1, 1), (2, 2))
    monkeypatch.setattr(depthwise, "CHUNK", 2 * x[0].numel())
    torch.testing.assert_close(depthwise.weight_gradient(grad, x, (5, 5), (1, 1), (2, 2)), whole)


def test_no_gradient_is_computed_that_nobody_asked_for():
    conv = DepthwiseConv2d(4, 5).requires_grad_(False)
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    conv(x).sum().backward()
    assert x.grad is not None and conv.weight.grad is None
    conv.requires_grad_(True)(x.detach()).sum().backward()
    assert conv.weight.grad is not None and conv.bias.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.(trace|trace_method|script|script_method)` is deprecated:FutureWarning")
def test_exported_graphs_and_half_precision_have_one_convolution():
    conv, x = DepthwiseConv2d(4, 7, out_chs=8, stride=2), torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    assert str(torch.jit.trace(conv, x).inlined_graph).count("aten::_convolution") == 1
    assert str(torch.export.export(conv, (x,)).graph).count("conv2d.default") == 1
    torch.testing.assert_close(torch.jit.script(conv)(x), conv(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16


def test_fused_layers_keep_the_quick_form():
    torch.manual_seed(0)
    layer = ConvNorm(4, 8, 7, stride=2, groups=4).eval()
    fused = utils.replace_batchnorm(copy.deepcopy(layer))
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    assert isinstance(fused, DepthwiseConv2d)
    torch.testing.assert_close(fused(x), layer(x), rtol=1e-5, atol=1e-5)
