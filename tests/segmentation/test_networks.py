"""The semantic head by hand: its wiring, dropout of whole channels, the loss's divisor; any backbone."""

import pytest
import torch
from torch import nn

from run.errors import InputError
from segmentation import networks
from segmentation.networks import IGNORED, SemanticHead, dropped_channels, losses
from tests.features.counts import LSNET, SMALL, conv, conv_norm, lsnet_t, pyramid, recnext, recnext_m_block
from tests.features.test_pyramid import constant
from tests.nets import randomise


def as_identity(head: SemanticHead, value: float) -> None:
    """Make every convolution of the head multiply by `value` and add up its channels' first, and the norms do nothing."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            nn.init.zeros_(module.weight)
            module.weight.data[:, 0, 1, 1] = value
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30  # torch 2.11 refuses 0
    constant(head.conv_seg, 0.0)
    head.conv_seg.weight.data[:, 0] = 1.0


@pytest.mark.parametrize("strides", [[4, 8, 16, 32], [8, 16, 32, 64]])
def test_each_map_is_convolved_once_per_doubling_and_all_are_summed(strides):
    """Each convolution doubles: the maps 1, 10, 100 and 1000 give 2 * 1 + 2 * 10 + 4 * 100 + 8 * 1000."""
    head = SemanticHead(3, strides, 2).eval()
    as_identity(head, 2.0)
    maps = [torch.full((1, 3, 16 // 2**i, 24 // 2**i), 10.0**i) for i in range(4)]
    logits = head(maps, None)
    assert logits.shape == (1, 2, 16, 24)
    assert logits.unique().tolist() == [2 + 20 + 400 + 8000]
    assert [[type(layer).__name__ for layer in one] for one in head.scale_heads] == [
        ["Sequential"],
        ["Sequential", "Upsample"],
        ["Sequential", "Upsample"] * 2,
        ["Sequential", "Upsample"] * 3,
    ]


def test_negative_values_stop_at_each_relu_and_enlarging_is_bilinear():
    head = SemanticHead(1, [4, 8], 1).eval()
    as_identity(head, 1.0)
    fine, coarse = torch.full((1, 1, 2, 4), -5.0), torch.tensor([[[[0.0, 4.0]]]])
    assert head([fine, coarse], None)[0, 0].tolist() == [[0.0, 1.0, 3.0, 4.0]] * 2  # align_corners=False: quarters between the centres


def test_maps_of_odd_sides_are_brought_to_the_finest_ones_size():
    """68 = 544 / 8 rows, of which stride 64 sees 9 and not 8.5."""
    head = SemanticHead(2, [8, 16, 32, 64], 3).eval()
    maps = [torch.randn(1, 2, side, side) for side in (68, 34, 17, 9)]
    assert head(maps, None).shape == (1, 3, 68, 68)


def test_dropout_leaves_out_whole_channels_of_each_image_by_its_word_alone():
    factors = dropped_channels(list(range(400)), 128)
    assert factors.shape == (400, 128, 1, 1)
    values, counts = factors.unique(return_counts=True)
    assert values.tolist() == pytest.approx([0.0, 1 / 0.9])
    assert counts[0] / factors.numel() == pytest.approx(0.1, abs=0.005)
    torch.manual_seed(3)
    assert torch.equal(dropped_channels([7, 5], 128), factors[[7, 5]])
    head = SemanticHead(1, [4], 1)
    as_identity(head, 1.0)
    head.scale_heads[0][0].bn.eval()
    seen = [head([torch.ones(1, 1, 2, 2)], [word]).unique().tolist() for word in range(60)]
    assert {round(value, 4) for (value,) in seen} == {0.0, 1.1111}
    assert head.eval()([torch.ones(1, 1, 2, 2)], None).unique().tolist() == [1.0]


def test_ignored_pixels_cost_nothing_but_count_in_the_mean():
    """Four pixels, two classes with equal logits: ln 2 each for the three that are labelled, over four."""
    labels = torch.tensor([[[0, 1], [0, IGNORED]]], dtype=torch.int32)
    found = losses(torch.zeros(1, 2, 2, 2), labels)
    assert found["decode.loss_ce"].item() == pytest.approx(3 * 0.693147 / 4)
    assert found["decode.acc_seg"].item() == pytest.approx(200 / 3)  # of equal logits the first is taken
    nothing = losses(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), IGNORED))
    assert (nothing["decode.loss_ce"].item(), nothing["decode.acc_seg"].item()) == (0.0, 0.0)


def test_logits_are_enlarged_to_the_labels():
    """One row of logits 0 and 4 for class 1, enlarged to four: 0, 1, 3, 4 against class 0's 0."""
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 1, 0, 1] = 4.0
    expected = sum(torch.log1p(torch.exp(torch.tensor(value))).item() for value in (0.0, 1.0, 3.0, 4.0)) / 4
    assert losses(logits, torch.zeros(1, 1, 4))["decode.loss_ce"].item() == pytest.approx(expected, rel=1e-6)


# 1 + 1 + 2 + 3 convolutions, of which four take the pyramid's channels, and the scores.
HEAD = 4 * conv_norm(256, 128, 3) + 3 * conv_norm(128, 128, 3) + conv(128, 150, 1)
COUNTS = {
    "recnext_m3": recnext(SMALL, (3, 3, 13, 2), 2, recnext_m_block) + pyramid(SMALL) + HEAD,
    "lsnet_t": lsnet_t() + pyramid(LSNET) + HEAD,
}


@pytest.mark.parametrize("backbone", COUNTS)
def test_parameters_are_as_counted_by_hand(backbone):
    with torch.device("meta"):
        net = networks.build(backbone, 150)
    assert sum(parameter.numel() for parameter in net.parameters()) == COUNTS[backbone]
    assert net.num_classes == 150


@pytest.mark.parametrize(("backbone", "stride"), [("recnext_m0", 4), ("lsnet_t", 8), ("recnext_t", 8), ("repnext_m0", 4), ("resnet18", 4)])
def test_logits_have_the_stride_of_the_finest_map_and_every_weight_learns(backbone, stride):
    net = randomise(networks.build(backbone, 3, channels=8)).train()
    logits = net(torch.randn(2, 3, 64, 96), [1, 2])
    assert logits.shape == (2, 3, 64 // stride, 96 // stride)
    losses(logits, torch.randint(0, 3, (2, 64, 96)))["decode.loss_ce"].backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


def test_unfit_backbones_are_explained():
    with pytest.raises(InputError, match="no model"):
        networks.build("recnext_x9", 3)
    with pytest.raises(InputError, match="cannot be a backbone"):
        networks.build("vit_tiny_patch16_224", 3)
