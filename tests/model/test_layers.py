"""Shared layers against torch's own operators and against hand-worked numbers."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from model import mixers
from model.depthwise import DepthwiseConv2d
from model.layers import ChannelScale, ConvNorm
from model.mixers import attend_scores_first, attend_values_first, build_attention, kernel_feature, linear_attention


def attention_by_definition(q, k, v):
    """Weights q_i k_j, normalised over j, position by position."""
    weights = torch.einsum("bdi,bdj->bij", q, k)
    weights = weights / (weights.sum(-1, keepdim=True) + q.shape[-1] * 1e-6)
    return torch.einsum("bij,bej->bei", weights, v)


@pytest.mark.parametrize(("num_positions", "qk_chs", "v_chs"), [(3, 8, 8), (40, 4, 4), (7, 4, 12)])
def test_linear_attention_is_its_definition_in_either_order(num_positions, qk_chs, v_chs):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.rand(2, qk_chs, num_positions, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, v_chs, num_positions, generator=generator, dtype=torch.float64)
    reference = attention_by_definition(q, k, v)
    for form in (attend_values_first, attend_scores_first, linear_attention):
        torch.testing.assert_close(form(q, k, v), reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("num_positions", "chosen"), [(784, "attend_values_first"), (16, "attend_scores_first")])
def test_linear_attention_takes_the_cheaper_order(num_positions, chosen, monkeypatch):
    taken = []
    for name in ("attend_values_first", "attend_scores_first"):
        monkeypatch.setattr(mixers, name, lambda q, k, v, name=name: taken.append(name))
    linear_attention(*(torch.zeros(1, 2, 20, num_positions) for _ in range(3)))
    assert taken == [chosen]


def test_kernels_by_hand():
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    e = torch.e
    assert kernel_feature(x, "elu").tolist() == pytest.approx([1 / e, 1, 3])
    assert kernel_feature(x, "relu").tolist() == [0, 0, 2]
    softplus = [torch.log(1 + torch.exp(3.5 * value)).item() / 3.5 for value in x]
    assert kernel_feature(x, "softplus").tolist() == pytest.approx(softplus)


def test_softmax_kernel_is_softmax_attention():
    torch.manual_seed(0)
    attention = build_attention(8, qk_dim=4, qk_groups=1, kernel="softmax").eval()
    x = torch.randn(2, 8, 3, 5)
    q, k = attention.qk(x).flatten(2).transpose(1, 2).chunk(2, dim=2)
    reference = scaled_dot_product_attention(q, k, x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x) - attention.pe(x), reference, rtol=1e-4, atol=1e-5)


def test_unknown_kernel_is_refused_by_name():
    with pytest.raises(ValueError, match="attn_kernel is 'gelu': it can be elu, relu, softplus, softmax"):
        build_attention(8, qk_dim=8, qk_groups=2, kernel="gelu")


def test_attention_survives_float16_autocast_where_its_sums_do_not():
    torch.manual_seed(0)
    attention = build_attention(8, qk_dim=8, qk_groups=2).eval()
    attention.qk.norm.weight.data.fill_(2000.0)  # phi(q) phi(k) passes 65504
    x = torch.randn(1, 8, 2, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        q, k = (kernel_feature(part, "elu") for part in attention.qk(x).flatten(2).chunk(2, dim=1))
        assert not (k.transpose(1, 2) @ q).isfinite().all()
        out = attention(x)
    torch.testing.assert_close(out.float(), attention(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bias", [True, False])
def test_channel_scale_is_the_depthwise_convolution_it_replaces(bias):
    torch.manual_seed(0)
    scale = ChannelScale(6, bias=bias).double()
    conv = nn.Conv2d(6, 6, 1, groups=6, bias=bias).double()
    conv.load_state_dict(scale.state_dict())
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(scale(x), conv(x))
    scale(x).square().sum().backward()
    conv(x).square().sum().backward()
    for name, parameter in scale.named_parameters():
        torch.testing.assert_close(parameter.grad, conv.get_parameter(name).grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert scale(x.bfloat16()).dtype == torch.bfloat16


def test_conv_norm_keeps_the_published_names_and_the_size():
    layer = ConvNorm(4, 8, 5, groups=2, bias=True, norm_init=0.0, names=("c", "bn"))
    assert [name for name, _ in layer.named_parameters()] == ["c.weight", "c.bias", "bn.weight", "bn.bias"]
    assert layer.bn.weight.abs().sum() == 0
    assert layer(torch.zeros(2, 4, 7, 9)).shape == (2, 8, 7, 9)
    assert ConvNorm(4, 4, groups=4).conv.__class__ is ChannelScale
    assert ConvNorm(4, 4, groups=4, stride=2).conv.__class__ is DepthwiseConv2d
    assert ConvNorm(4, 8, 3, groups=2).conv.__class__ is nn.Conv2d
