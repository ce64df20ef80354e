"""ReXNet: the channel rules by hand, any width, and the modules of the published README."""

import pytest
import torch
from timm.models.rexnet import RexNet

import model
import rexnetv1
import rexnetv1_lite
from model.rexnet import Bottleneck, multiple_of_8
from tests.golden.golden import load_golden_weights


def out_channels(net) -> list[int]:
    return [info.out[-2].out_channels for info in net.features if isinstance(info, Bottleneck)]


def test_channels_grow_linearly():
    with torch.device("meta"):
        assert out_channels(rexnetv1.ReXNetV1(width_mult=1.0)) == [16, 27, 38, 50, 61, 72, 84, 95, 106, 117, 128, 140, 151, 162, 174, 185]
        assert out_channels(rexnetv1_lite.ReXNetV1_lite(multiplier=1.0))[:6] == [16, 32, 40, 48, 64, 72]
        narrow = rexnetv1.ReXNetV1(width_mult=0.5)
    assert out_channels(narrow)[0] == 16
    assert narrow.features[0].out_channels == 32
    assert narrow.num_features == 640


def test_width_without_a_golden_is_timms_network():
    """2.2 times as wide, with the same tensors in the same order under timm's names."""
    net = load_golden_weights(model.create_model("rexnetv1_2_2", num_classes=7)).eval()
    other = RexNet(width_mult=2.2, num_classes=7).eval()
    weights = zip(other.state_dict().items(), net.state_dict().values(), strict=True)
    other.load_state_dict({name: ours.reshape(theirs.shape) for (name, theirs), ours in weights})
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(net(x), other(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("chs", "rounded"), [(3, 8), (27, 32), (35, 32), (19, 24), (44, 48), (36, 40)])
def test_channels_of_lite_are_multiples_of_8_and_lose_a_tenth_at_most(chs, rounded):
    assert multiple_of_8(chs) == rounded


def test_published_readme_loads_and_runs(tmp_path):
    for registered, net in (
        ("rexnetv1_1_0", rexnetv1.ReXNetV1(width_mult=1.0)),
        ("rexnetv1_lite_1_0", rexnetv1_lite.ReXNetV1_lite(multiplier=1.0)),
    ):
        torch.save(model.create_model(registered).state_dict(), tmp_path / "net.pth")
        net.load_state_dict(torch.load(tmp_path / "net.pth"))
        net.eval()
        assert net(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def test_width_is_an_option_of_the_registered_names():
    with torch.device("meta"):
        wide = model.create_model("rexnetv1", width_mult=1.3)
        assert wide.state_dict().keys() == model.create_model("rexnetv1_1_3").state_dict().keys()
        assert out_channels(wide) == out_channels(model.create_model("rexnetv1_1_3"))
        assert out_channels(model.create_model("rexnetv1_lite", multiplier=1.5)) == out_channels(model.create_model("rexnetv1_lite_1_5"))


def test_deeper_networks_have_more_bottlenecks_per_group():
    net = rexnetv1.ReXNetV1(depth_mult=1.5, num_classes=7)
    assert len(out_channels(net)) == 2 + 3 + 3 + 5 + 5 + 8
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_shortcut_reaches_the_first_channels_only():
    torch.manual_seed(0)
    block = Bottleneck(4, 6, expansion=6, stride=1, use_se=False, act_layer=torch.nn.SiLU, drop_path_rate=0.0).eval()
    x = torch.randn(2, 4, 5, 5)
    out, branch = block(x), block.out(x)
    torch.testing.assert_close(out[:, :4], branch[:, :4] + x)
    assert torch.equal(out[:, 4:], branch[:, 4:])
    assert not Bottleneck(6, 4, expansion=6, stride=1, use_se=False, act_layer=torch.nn.SiLU, drop_path_rate=0.0).has_shortcut
