"""Clipping against timm's, tensor by tensor, and against hand-worked numbers."""

import math

import pytest
import timm.utils
import torch
from torch import nn

import model
from run import clipping, config


def build(*flags: str):
    return clipping.build_clipping(config.parse(["--data-set", "DIGITS", *flags])[0])


def test_agc_bounds_the_update_of_each_unit():
    """A gradient's norm per output unit is at most clip * max(weight norm, 1e-3)."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    weight.grad = torch.tensor([[30.0, 40.0], [1.0, 0.0]])
    norm = build("--clip-grad", "0.1")([weight])
    assert torch.allclose(weight.grad, torch.tensor([[0.3, 0.4], [1e-4, 0.0]]), rtol=1e-4)
    assert norm.item() == pytest.approx(math.sqrt(2501))


@pytest.mark.parametrize("name", model.list_models())
def test_agc_is_timms_for_the_parameters_of_every_network(name):
    """Gradients around the bound: some units of a tensor are clipped, some not, some tensors as a whole."""
    with torch.device("meta"):
        shapes = {(tuple(parameter.shape), parameter.ndim) for parameter in model.create_model(name).parameters()}
    torch.manual_seed(0)
    ours, theirs = [], []
    for i, (shape, ndim) in enumerate(sorted(shapes)):
        weight, gradient = torch.randn(shape), torch.randn(shape) * 0.02 * (i % 3) * torch.rand(shape[:1] + (1,) * (ndim - 1)) * 2
        layout = {"memory_format": torch.channels_last} if ndim == 4 else {}
        ours.append(nn.Parameter(weight.clone(**layout)))
        ours[-1].grad = gradient.clone(**layout)
        theirs.append(nn.Parameter(weight))
        theirs[-1].grad = gradient.clone()
    ours.append(nn.Parameter(torch.ones(3)))  # has no gradient
    norm = build("--clip-grad", "0.02")(ours)
    assert norm.item() == pytest.approx(nn.utils.get_total_norm([one.grad.double() for one in theirs]).item(), rel=1e-4)
    timm.utils.adaptive_clip_grad(theirs, 0.02)
    for one, other in zip(ours, theirs, strict=False):
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-6, atol=0)


def test_a_clipped_single_number_and_gradients_that_are_not_finite():
    scalar, broken = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(2, 2))
    scalar.grad, broken.grad = torch.tensor(5.0), torch.tensor([[1e-3, 0.0], [math.inf, 1.0]])
    norm = build("--clip-grad", "0.1")([scalar, broken])
    assert scalar.grad.item() == pytest.approx(0.2) and not norm.isfinite()
    assert broken.grad[0].tolist() == pytest.approx([1e-3, 0]) and not broken.grad[1].isfinite().all()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["--clip-mode", "norm", "--clip-grad", "1"], [0.6, 0.8]), (["--clip-mode", "value", "--clip-grad", "3.5"], [3, 3.5]), (["--clip-grad", "none"], [3, 4])],
)
def test_other_modes_return_the_norm_before_clipping_too(flags, expected):
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert build(*flags)(iter([weight])).item() == 5
    assert weight.grad.tolist() == pytest.approx(expected)
