"""The downsampling ablation: published size, and timm's ConvNeXt everywhere else."""

import pytest
import timm
import torch

import model
from tests.nets import images, randomise, relative_error


@pytest.mark.parametrize("name", ["convnext_femto_downsample_a", "convnext_femto_downsample_b"])
def test_only_the_downsampling_differs_from_timms_network(name):
    net = randomise(model.create_model(name, num_classes=7)).eval()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert sum(parameter.numel() for parameter in net.parameters()) == 5_252_728 - 993 * 385
    twin = timm.create_model("convnext_femto", num_classes=7).eval()
    assert sum(parameter.numel() for parameter in twin.parameters()) == 5_217_784 - 993 * 385
    for stage, other in zip(list(net.stages)[1:], list(twin.stages)[1:], strict=True):
        other.downsample = stage.downsample
    twin.load_state_dict(net.state_dict())
    assert relative_error(net(images()), twin(images())) < 1e-5


def test_designs_differ_in_what_the_shortcut_bypasses():
    torch.manual_seed(0)
    x = torch.randn(2, 48, 6, 8)
    for name in ("convnext_femto_downsample_a", "convnext_femto_downsample_b"):
        layer = model.create_model(name).stages[1].downsample
        torch.nn.init.zeros_(layer.pwconv2.weight)
        conv = layer.dwconv(x)
        normed = layer.norm(conv.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(layer(x), conv if name.endswith("_a") else normed)
