"""Backbones and pyramids: any network, the maps by hand, BatchNorm in and out of training."""

import pytest
import torch
from torch import nn

from features.pyramid import CoarseMaps, FinePyramid, build_backbone


def test_laterals_maps_and_strides_follow_the_backbone():
    for backbone, kind, shapes in (
        ("recnext_m0", "semantic", [(24, 32), (12, 16), (6, 8), (3, 4)]),
        ("lsnet_t", "semantic", [(12, 16), (6, 8), (3, 4), (2, 2)]),
        ("recnext_m0", "rcnn", [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]),
        ("lsnet_t", "rcnn", [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]),
        ("lsnet_t", "retinanet", [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]),
        ("resnet18", "retinanet", [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]),
    ):
        net = build_backbone(backbone, 8, kind=kind).eval()
        with torch.no_grad():
            maps = list(net(torch.zeros(1, 3, 96, 128)).values())
        assert [tuple(one.shape[1:]) for one in maps] == [(8, *shape) for shape in shapes]
        assert net.strides == [96 // shapes[0][0] * 2**i for i in range(len(shapes))]


def constant(layer: nn.Module, value: float, bias: float = 0.0) -> None:
    nn.init.constant_(layer.weight, value)
    nn.init.constant_(layer.bias, bias)


def test_the_fine_map_is_made_of_the_finest_lateral_after_the_top_down_pass():
    net = FinePyramid([1, 1], 1)
    for block, value in zip(net.inner_blocks, (2.0, 3.0), strict=True):
        constant(block[0], value)
    for block in net.layer_blocks:
        constant(block[0], 0.0, bias=5.0)  # what comes out of the pyramid must not matter
    constant(net.enlarge, 10.0, bias=1.0)
    constant(net.fine_block, 0.0)
    net.fine_block.weight.data[..., 1, 1] = 1.0
    maps = net({"a": torch.ones(1, 1, 2, 3), "b": torch.ones(1, 1, 1, 2)})
    assert [tuple(one.shape[2:]) for one in maps.values()] == [(4, 6), (2, 3), (1, 2)]
    assert maps["0"].unique().tolist() == [10 * (2 + 3) + 1]


def test_coarse_maps_come_of_the_backbones_last_map_one_by_one():
    block = CoarseMaps(1, 1, 2)
    for layer, value in zip(block.convs, (2.0, 10.0), strict=True):
        constant(layer, 0.0)
        layer.weight.data[..., 1, 1] = value
    results, names = block([torch.zeros(1, 1, 9, 9)], [torch.zeros(1, 1, 9, 9), torch.full((1, 1, 5, 5), -1.0)], ["0"])
    assert [tuple(one.shape[2:]) for one in results] == [(9, 9), (3, 3), (2, 2)]
    assert [one.unique().tolist() for one in results[1:]] == [[-2.0], [-20.0]]  # and no ReLU between
    assert names == ["0", "1", "2"]


@pytest.mark.parametrize("backbone", ["lsnet_t", "recnext_m0"])
def test_batchnorm_learns_and_keeps_its_statistics_in_lsnet_alone(backbone):
    net = build_backbone(backbone, 8, kind="rcnn").train()
    norms = [module for module in net.body.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    sum(one.sum() for one in net(torch.randn(2, 3, 64, 64)).values()).backward()
    kept = [torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True)]
    assert set(kept) == {backbone == "lsnet_t"}
    assert all(norm.weight.grad is not None and norm.weight.requires_grad for norm in norms)
    assert net.eval().train().body.training
