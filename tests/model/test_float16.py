"""Where the mixers' sums leave float16's range in the largest networks, and that the networks as they are go on from there.

Plain means float16 throughout, as autocast would have it. Magnitudes were found by bisection on initial weights at 224 pixels."""

import copy

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import model
from model import mixers

LARGEST = 65504.0  # of float16


@pytest.fixture(scope="module")
def m5() -> nn.Module:
    torch.manual_seed(0)
    return model.create_model("recnext_m5", num_classes=10).eval()


@pytest.fixture(scope="module")
def a5() -> nn.Module:
    torch.manual_seed(0)
    return model.create_model("recnext_a5", num_classes=10).eval()


@torch.no_grad()
def in_half(net: nn.Module, x: Tensor, *, is_plain: bool, monkeypatch) -> Tensor:
    """Output under float16 autocast; plainly, with the mixers in float16 too."""
    with monkeypatch.context() as patch, torch.autocast("cpu", torch.float16):
        if is_plain:
            patch.setattr(mixers, "run_in_float32", lambda function, *tensors: function(*tensors))
        return net(x).float()


def first(net: nn.Module, stage: int, kind: type) -> nn.Module:
    return next(module for module in net.stages[stage].modules() if isinstance(module, kind))


def worst_input(mixer: mixers.RecConv2d, side: int) -> Tensor:
    """(1, dim, side, side) of 1 and -1: what makes the middle of the output largest."""
    x = torch.zeros(1, mixer.down.in_channels, side, side, requires_grad=True)
    middle = mixer(x)[0, :, side // 2, side // 2].sum()  # depthwise: channels do not meet
    return torch.autograd.grad(middle, x)[0].sign()


@pytest.mark.parametrize(("stage", "magnitude"), list(enumerate([7554, 10416, 13700, 18400])))
def test_recursive_sums_of_m5_overflow_from_this_magnitude_on(m5, stage, magnitude, monkeypatch):
    """The more levels, the lower, and always before the input itself would."""
    mixer = first(m5, stage, mixers.RecConv2d)
    x = worst_input(mixer, 56 >> stage)
    assert in_half(mixer, 0.95 * magnitude * x, is_plain=True, monkeypatch=monkeypatch).isfinite().all()
    for factor in (1.05, LARGEST / magnitude):
        assert not in_half(mixer, factor * magnitude * x, is_plain=True, monkeypatch=monkeypatch).isfinite().all()
        out = in_half(mixer, factor * magnitude * x, is_plain=False, monkeypatch=monkeypatch)
        torch.testing.assert_close(out, mixer(factor * magnitude * x).detach())
        assert out.abs().max() > LARGEST


@pytest.mark.parametrize(("stage", "magnitude"), list(enumerate([79, 62, 56, 203])))
def test_attention_sums_of_a5_overflow_from_this_magnitude_on(a5, stage, magnitude, monkeypatch):
    """Products of three activations are summed, so normally distributed input of a standard deviation below 100 is enough."""
    torch.manual_seed(0)
    mixer = first(a5, stage, mixers.RecAttn2d)
    x = torch.randn(1, mixer.conv[0].in_channels, 56 >> stage, 56 >> stage)
    assert in_half(mixer, magnitude / 4 * x, is_plain=True, monkeypatch=monkeypatch).isfinite().all()
    for factor in (2, 8192 / magnitude):
        assert not in_half(mixer, factor * magnitude * x, is_plain=True, monkeypatch=monkeypatch).isfinite().all()
        out, expected = in_half(mixer, factor * magnitude * x, is_plain=False, monkeypatch=monkeypatch), mixer(factor * magnitude * x).detach()
        assert (out - expected).norm() < 0.01 * expected.norm()


def test_a5_survives_images_on_which_plain_float16_does_not(a5, monkeypatch):
    torch.manual_seed(0)
    x = 1024 * torch.randn(1, 3, 64, 64)
    assert not in_half(a5, x, is_plain=True, monkeypatch=monkeypatch).isfinite().all()
    with torch.no_grad():
        expected = a5(x)
    assert (in_half(a5, x, is_plain=False, monkeypatch=monkeypatch) - expected).norm() < 0.05 * expected.norm()


def test_m5_survives_weights_with_which_plain_float16_does_not(m5, monkeypatch):
    """BatchNorm follows each mixer, so in training the scale of its weights is of no account, and nothing holds it down."""
    net = copy.deepcopy(m5).train()
    for module in net.modules():
        if isinstance(module, mixers.RecConv2d):
            for conv in (module.down, *module.convs):
                conv.weight.data *= 8
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
    assert (in_half(net, x, is_plain=False, monkeypatch=monkeypatch) - expected).norm() < 0.1 * expected.norm()
    assert not in_half(net, x, is_plain=True, monkeypatch=monkeypatch).isfinite().all()
