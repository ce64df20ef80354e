"""Detectors by name: parameters by hand, any backbone, pyramids, BatchNorm, weights of backbones, several processes."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import model
from detection import networks
from features import weights
from features.pyramid import CoarseMaps, FinePyramid, build_backbone
from run.errors import InputError
from tests.conftest import ROOT
from tests.nets import randomise

# ---- parameters, counted by hand from the networks' descriptions


def conv(in_chs: int, out_chs: int, kernel_size: int, groups: int = 1) -> int:
    return in_chs * out_chs * kernel_size**2 // groups + out_chs


def conv_norm(in_chs: int, out_chs: int, kernel_size: int, groups: int = 1) -> int:
    """A convolution without bias, and BatchNorm."""
    return in_chs * out_chs * kernel_size**2 // groups + 2 * out_chs


def mlp(chs: int, ratio: float) -> int:
    return conv_norm(chs, int(chs * ratio), 1) + conv_norm(int(chs * ratio), chs, 1)


def recnext_m_block(chs: int, stage: int) -> int:
    return (1 + 5 - stage) * chs * 5**2 + 2 * chs + mlp(chs, 2)  # one shared `down`, a convolution per level and one; norm; MLP


def recnext_a_block(chs: int, stage: int) -> int:
    attention = conv_norm(chs, 2 * chs, 1, groups=2) + conv_norm(chs, chs, 3, groups=chs)
    return 2 * conv_norm(chs, chs, 5, groups=chs) + attention + mlp(chs, 1.875)


def recnext(dims: tuple[int, ...], depths: tuple[int, ...], ratio: float, block) -> int:
    count = conv_norm(3, dims[0] // 2, 3) + conv_norm(dims[0] // 2, dims[0], 3)
    for stage, (chs, depth) in enumerate(zip(dims, depths, strict=True)):
        downsample = conv(dims[stage - 1], chs, 7, groups=dims[stage - 1]) + 2 * chs + mlp(chs, ratio) if stage else 0
        count += downsample + depth * block(chs, stage)
    return count


def lsnet_t() -> int:
    dims, depths = (64, 128, 256, 384), (0, 2, 8, 10)
    count = conv_norm(3, 16, 3) + conv_norm(16, 32, 3) + conv_norm(32, 64, 3)
    for stage, (chs, depth) in enumerate(zip(dims, depths, strict=True)):
        count += conv_norm(dims[stage - 1], dims[stage - 1], 3, dims[stage - 1]) + conv_norm(dims[stage - 1], chs, 1) if stage else 0
        half, num_even = chs // 2, depth // 2
        squeezed = int(chs * 0.25)
        even = conv_norm(chs, chs, 3, chs) + conv_norm(chs, chs, 1, chs) + conv(chs, squeezed, 1) + conv(squeezed, chs, 1)
        perception = conv_norm(chs, half, 1) + conv_norm(half, half, 7, half) + conv_norm(half, half, 1) + conv(half, 9 * chs // 8, 1) + 2 * 9 * chs // 8
        attention = conv_norm(chs, 64 + 64 + chs, 1) + conv_norm(64, 64, 3, 64) + conv_norm(chs, chs, 1) + 4 * 16  # 4 x 4 positions: 16 offsets
        odd = attention if stage == 3 else perception + 2 * chs
        count += num_even * (even + odd) + depth * mlp(chs, 2)
    return count


def pyramid(dims: tuple[int, ...]) -> int:
    return sum(conv(chs, 256, 1) + conv(256, 256, 3) for chs in dims)


PROPOSALS = conv(256, 256, 3) + conv(256, 3, 1) + conv(256, 12, 1)
BOXES = (256 * 49 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 * 81 + 81) + (1024 * 81 * 4 + 81 * 4)  # with zero rows for the background's deltas
MASKS = 4 * conv(256, 256, 3) + conv(256, 256, 2) + conv(256, 81, 1)  # with a zero row for the background's mask
RETINANET = 8 * conv(256, 256, 3) + conv(256, 9 * 80, 3) + conv(256, 9 * 4, 3)

SMALL, LARGE, LSNET = (64, 128, 256, 512), (80, 160, 320, 640), (64, 128, 256, 384)
COUNTS = {
    ("mask_rcnn", "recnext_m3"): recnext(SMALL, (3, 3, 13, 2), 2, recnext_m_block) + pyramid(SMALL) + PROPOSALS + BOXES + MASKS,
    ("mask_rcnn", "recnext_m4"): recnext(SMALL, (5, 5, 25, 4), 2, recnext_m_block) + pyramid(SMALL) + PROPOSALS + BOXES + MASKS,
    ("mask_rcnn", "recnext_m5"): recnext(LARGE, (7, 7, 35, 2), 2, recnext_m_block) + pyramid(LARGE) + PROPOSALS + BOXES + MASKS,
    ("mask_rcnn", "recnext_a3"): recnext(SMALL, (3, 3, 13, 2), 1.875, recnext_a_block) + pyramid(SMALL) + PROPOSALS + BOXES + MASKS,
    ("mask_rcnn", "lsnet_t"): lsnet_t() + pyramid(LSNET) + conv(256, 256, 2) + conv(256, 256, 3) + PROPOSALS + BOXES + MASKS,
    ("retinanet", "lsnet_t"): lsnet_t() + pyramid(LSNET) + conv(384, 256, 3) + RETINANET,
}


@pytest.mark.parametrize(("detector", "backbone"), COUNTS)
def test_parameters_are_as_counted_by_hand(detector, backbone):
    with torch.device("meta"):
        net = networks.build(detector, backbone, 80)
    assert sum(parameter.numel() for parameter in net.parameters()) == COUNTS[detector, backbone]


# ---- backbones and pyramids


def test_laterals_maps_and_strides_follow_the_backbone():
    for backbone, kind, shapes in (
        ("recnext_m0", "rcnn", [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]),
        ("lsnet_t", "rcnn", [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]),
        ("lsnet_t", "retinanet", [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]),
        ("resnet18", "retinanet", [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]),
    ):
        net = build_backbone(backbone, 8, kind=kind).eval()
        with torch.no_grad():
            maps = list(net(torch.zeros(1, 3, 96, 128)).values())
        assert [tuple(one.shape[1:]) for one in maps] == [(8, *shape) for shape in shapes]
        assert net.strides == [(8 if kind == "retinanet" else 4) * 2**i for i in range(5)]


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


@pytest.mark.parametrize(
    ("detector", "backbone", "word"),
    [
        ("yolo", "recnext_m0", "mask_rcnn, faster_rcnn, retinanet"),
        ("retinanet", "recnext_x9", "no model"),
        ("retinanet", "vit_tiny_patch16_224", "cannot be a backbone"),
    ],
)
def test_unfit_names_are_explained(detector, backbone, word):
    with pytest.raises(InputError, match=word):
        networks.build(detector, backbone, 3)


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


def test_weight_decay_spares_attention_biases_alone():
    with torch.device("meta"):
        spared = weights.no_weight_decay(networks.build("retinanet", "lsnet_t", 3))
        assert weights.no_weight_decay(networks.build("retinanet", "recnext_m0", 3)) == set()
    assert len(spared) == 5
    assert all(name.startswith("backbone.body.") and name.endswith("attention_biases") for name in spared)


@pytest.mark.parametrize(("name", "options"), [("recnext_m0", {"distillation": True}), ("lsnet_t", {"distillation": True}), ("convnext_atto", {})])
def test_backbone_weights_load_but_for_their_heads(name, options, tmp_path):
    source = randomise(model.create_model(name, **options))
    torch.save({"model": source.state_dict()}, tmp_path / f"{name}_distill_300e.pth")
    net = networks.build("faster_rcnn", name, 3, channels=8)
    dropped = weights.load_backbone(net, name, str(tmp_path / f"{name}_distill_300e.pth"))
    state, loaded = source.state_dict(), net.backbone.body.model.state_dict()
    assert set(dropped) == set(state) - set(loaded) != set()
    assert all(key.startswith(("head", "fc")) for key in dropped)
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_backbone_weights_that_lack_or_exceed_anything_else_are_refused(tmp_path):
    state = model.create_model("recnext_m0").state_dict()
    net = networks.build("faster_rcnn", "recnext_m0", 3, channels=8)
    first = next(iter(state))
    for wrong in ({key: value for key, value in state.items() if key != first}, state | {"stages.9.weight": torch.zeros(1)}):
        torch.save({"model": wrong}, tmp_path / "wrong.pth")
        with pytest.raises(InputError, match="does not fit"):
            weights.load_backbone(net, "recnext_m0", str(tmp_path / "wrong.pth"))


def test_bfloat16_keeps_boxes_in_full_precision():
    net = networks.build("mask_rcnn", "recnext_m0", 3, channels=8, rois_per_image=8)
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([2]), "masks": torch.ones(1, 64, 96, dtype=torch.uint8)}]
    with torch.autocast("cpu", torch.bfloat16):
        losses = net(torch.randn(1, 3, 64, 96), [(64, 96)], targets, [(1, 2)])
        with torch.no_grad():
            (found,) = net.eval()(torch.randn(1, 3, 64, 96), [(64, 96)])
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert found["boxes"].dtype == torch.float32


def test_detections_are_taken_back_to_the_image_as_it_was():
    """Half as high and a quarter as wide: a mask of its box's left half covers columns 10 to 20 of the image."""
    half = torch.zeros(1, 1, 28, 28)
    half[..., :14] = 1.0
    found = {"boxes": torch.tensor([[40.0, 20.0, 120.0, 60.0]]), "labels": torch.tensor([0]), "scores": torch.tensor([0.9]), "masks": half}
    found = networks.restored(found, (100, 200), (50, 50))
    assert found["boxes"].tolist() == [[10.0, 10.0, 30.0, 30.0]]
    (mask,) = networks.pasted(found, (50, 50))
    assert mask.shape == (50, 50)
    rows, columns = torch.where(mask)
    assert abs(int(rows.min()) - 10) <= 1
    assert abs(int(rows.max()) - 29) <= 1
    assert abs(int(columns.min()) - 10) <= 1
    assert abs(int(columns.max()) - 19) <= 1


def test_two_processes_compute_one_steps_losses_gradients_and_statistics():
    done = subprocess.run([sys.executable, "tests/programs/detectors.py"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for one in json.loads(done.stdout):
        assert one["loss"] < 1e-5, one
        assert one["gradient"] < 1e-4, one
        assert one["statistics"] < 1e-5, one
