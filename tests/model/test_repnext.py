"""RepNeXt's merged kernels and its single-branch twins."""

import copy

import pytest
import torch
from torch import nn

import model
import utils
from benchmarks.models import to_plain
from model.repnext import ChunkConv, CopyConv, merge_chunks, to_single_branch
from tests.nets import images, randomise, relative_error


def double_net(*, zero_bias: bool, num_classes: int = 7) -> nn.Module:
    net = randomise(model.create_model("repnext_m0", num_classes=num_classes)).double()
    for module in net.modules():
        if isinstance(module, ChunkConv) and zero_bias:
            nn.init.zeros_(module.conv_l[0].bias)
    return net


@pytest.mark.parametrize(("name", "num_parameters"), [("repnext_m0e", 2_876_420), ("repnext_m1e", 5_655_944), ("repnext_m2e", 7_437_148)])
def test_twins_have_the_published_size(name, num_parameters):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in model.create_model(name).parameters()) == num_parameters


@pytest.mark.parametrize("mixer", [ChunkConv(8), CopyConv(8)], ids=["chunk", "copy"])
def test_merged_branches_are_the_branches(mixer):
    mixer = mixer.double()
    x = torch.randn(2, 8, 13, 10, dtype=torch.float64)
    out, plain = mixer(x), to_plain(mixer)(x)
    assert relative_error(out, plain) < 1e-14
    assert out.shape[2:] == ((13, 10) if isinstance(mixer, ChunkConv) else (7, 5))


@pytest.mark.parametrize("is_training", [False, True])
def test_conversion_is_exact_where_the_inner_bias_is_zero(is_training):
    net = double_net(zero_bias=True)
    twin = to_single_branch(net)
    assert sum(parameter.numel() for parameter in twin.parameters()) > sum(parameter.numel() for parameter in net.parameters())
    x = images(size=(65, 96), dtype=torch.float64)
    assert relative_error(twin.train(is_training)(x), net.train(is_training)(x)) < 1e-12


def test_conversion_permutes_channels_from_the_first_downsampling_on():
    net = double_net(zero_bias=True).eval()
    twin = to_single_branch(net)
    x = images(dtype=torch.float64)
    features, twin_features = (one.forward_intermediates(x, intermediates_only=True) for one in (net, twin))
    torch.testing.assert_close(twin_features[0], features[0])
    half = features[1].shape[1] // 2
    torch.testing.assert_close(twin_features[1][:, 0::2], features[1][:, :half])
    torch.testing.assert_close(twin_features[1][:, 1::2], features[1][:, half:])


def test_conversion_is_approximate_otherwise_at_the_border_rows_alone():
    chunk = ChunkConv(8).double()
    x = torch.randn(1, 8, 24, 9, dtype=torch.float64)
    error = (chunk.to_single_conv()(x) - chunk(x)).abs().amax((0, 1, 3))
    assert error[5:-5].max() < 1e-12
    assert error[:5].min() > 1e-6
    assert error[-5:].min() > 1e-6
    net = double_net(zero_bias=False).eval()
    assert 1e-6 < relative_error(to_single_branch(net)(images(dtype=torch.float64)), net(images(dtype=torch.float64))) < 0.1


def test_twin_keeps_the_settings_and_loads_into_the_registered_model():
    net = double_net(zero_bias=True, num_classes=0).eval()
    assert to_single_branch(net)(images(dtype=torch.float64)).shape == (2, 320)
    twin = to_single_branch(model.create_model("repnext_m0", num_classes=7, distillation=True))
    registered = model.create_model("repnext_m0e", num_classes=7, distillation=True)
    registered.load_state_dict(twin.state_dict())
    assert len(twin.train()(images())) == 2


def test_one_convolution_per_block_is_opt_in():
    net = double_net(zero_bias=True).eval()
    fused = utils.replace_batchnorm(copy.deepcopy(net))
    assert any(isinstance(module, ChunkConv) for module in fused.modules())
    x = images(dtype=torch.float64)
    for one in (copy.deepcopy(net), fused):
        merged = merge_chunks(one)
        assert not any(isinstance(module, ChunkConv) for module in merged.modules())
        assert relative_error(merged(x), net(x)) < 1e-12
