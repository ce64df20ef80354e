"""RecNeXt: stochastic depth per variant, float16, the attention kernel option, shared channels."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn

import model
from model.mixers import ATTN_KERNELS, RecConv2d
from model.nets import MixerBlock
from model.recnext_t import BorrowingBlock, Downsample


def drop_path_rates(name: str, **kwargs) -> list[float]:
    with torch.device("meta"):
        net = model.create_model(name, **kwargs)
    return [module.drop_prob for module in net.modules() if isinstance(module, DropPath)]


def test_only_the_large_base_variants_drop_paths():
    assert set(drop_path_rates("recnext_m4")) == set(drop_path_rates("recnext_a4")) == {0.2}
    assert set(drop_path_rates("recnext_m5")) == set(drop_path_rates("recnext_a5")) == {0.3}
    for name in ("recnext_m3", "recnext_a3", "recnext_t", "recnext_t_share_channel", "repnext_m5"):
        assert set(drop_path_rates(name)) == {0.0}
    for name in ("recnext_m4", "recnext_a5", "recnext_b"):
        assert set(drop_path_rates(name, distillation=True)) == {0.0}
    assert set(drop_path_rates("recnext_m4", drop_path_rate=0.05)) == {0.05}
    assert set(drop_path_rates("recnext_m4", distillation=True, drop_path_rate=0.05)) == {0.05}


@pytest.mark.parametrize(("name", "last"), [("recnext_s", 0.1), ("recnext_s_share_channel", 0.1), ("recnext_b", 0.2), ("recnext_b_share_channel", 0.2)])
def test_small_nets_drop_paths_on_a_ramp_with_the_downsampling_at_its_stages_first_rate(name, last):
    with torch.device("meta"):
        net = model.create_model(name)
    blocks = [block for stage in net.stages for block in stage.blocks]
    rates = [block.drop_path.drop_prob for block in blocks]
    assert rates == pytest.approx([last * i / (len(blocks) - 1) for i in range(len(blocks))], abs=1e-7)
    for stage in net.stages[1:]:
        assert isinstance(stage.downsample, Downsample)
        assert stage.downsample.drop_path.drop_prob == stage.blocks[0].drop_path.drop_prob


def test_recursive_convolution_survives_float16_autocast_where_its_sums_do_not():
    torch.manual_seed(0)
    mixer = RecConv2d(4, level=4).eval()
    nn.init.constant_(mixer.down.weight, 1.0)
    for conv in mixer.convs:
        nn.init.constant_(conv.weight, 0.5)
    x = torch.ones(1, 4, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert not mixer._mix(x).isfinite().all()
        out = mixer(x)
    torch.testing.assert_close(out, mixer(x))


def test_fused_block_survives_float16_autocast_too():
    torch.manual_seed(0)
    block = MixerBlock(RecConv2d(4, level=4), 4, 2, drop_path_rate=0.0)
    nn.init.constant_(block.token_mixer.down.weight, 1.0)
    for conv in block.token_mixer.convs:
        nn.init.constant_(conv.weight, 0.5)
    x = torch.ones(2, 4, 64, 64) + torch.randn(2, 4, 64, 64)
    block.norm.momentum = 1.0
    block(x)  # sets the norm's statistics to those of sums beyond float16
    assert block.norm.running_mean.max() > 65504
    reference = block.eval()(x)
    fused = block.fuse()
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        out = fused(x)
    assert isinstance(fused.norm, nn.Identity)
    torch.testing.assert_close(out.float(), reference, rtol=0.05, atol=0.05)


def test_recursive_convolution_of_one_level_by_its_definition():
    torch.manual_seed(0)
    mixer = RecConv2d(3, level=1).double()
    x = torch.randn(2, 3, 9, 6, dtype=torch.float64)
    low = mixer.convs[0](mixer.down(x))
    up = nn.functional.interpolate(low, size=(9, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(mixer(x), mixer.convs[1](x + up))


@pytest.mark.parametrize("kernel", ATTN_KERNELS)
def test_attention_kernel_is_an_option_that_acts_in_every_attention(kernel):
    torch.manual_seed(0)
    net = model.create_model("recnext_t_share_channel", num_classes=5, attn_kernel=kernel).eval()
    assert {module.kernel for module in net.modules() if hasattr(module, "kernel")} == {kernel}
    default = model.create_model("recnext_t_share_channel", num_classes=5).eval()
    default.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 64, 128)
    assert torch.equal(net(x), default(x)) == (kernel == "elu")


def test_unknown_attention_kernel_is_an_error():
    with pytest.raises(ValueError, match="elu, relu, softplus, softmax"):
        model.create_model("recnext_t", attn_kernel="cosine")


def test_shared_channels_are_the_attention_of_the_four_blocks_before():
    torch.manual_seed(0)
    net = model.create_model("recnext_t_share_channel", num_classes=5).eval()
    stage = net.stages[3]
    assert [i for i, block in enumerate(stage.blocks) if isinstance(block, BorrowingBlock)] == [4, 9]
    attended, mixed = [], []
    for block in stage.blocks[:4]:
        block.token_mixer.attn.register_forward_hook(lambda _module, _inputs, out: attended.append(out))
    borrowing = stage.blocks[4]
    borrowing.rep_mixer.register_forward_hook(lambda _module, _inputs, out: mixed.append(out))
    borrowing.channel_mixer.register_forward_pre_hook(lambda _module, inputs: mixed.append(inputs[0]))
    net(torch.randn(1, 3, 64, 128))
    before, after = mixed
    assert torch.equal(after, before + torch.cat(attended, dim=1))
