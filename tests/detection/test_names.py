"""Published checkpoint names: what is loaded is the file's bits, what is written loads again; background rows move."""

import pytest
import torch

from detection import names, networks
from run import checkpoint
from run.errors import InputError

# (name here, name there), of the layers that the published text lists
PAIRS = {
    "mask_rcnn": [
        ("backbone.body.model.stem.stem.0.conv.weight", "backbone.stem.stem.0.conv.weight"),
        ("backbone.fpn.inner_blocks.3.0.bias", "neck.lateral_convs.3.conv.bias"),
        ("backbone.fpn.layer_blocks.0.0.weight", "neck.fpn_convs.0.conv.weight"),
        ("rpn.head.conv.0.0.weight", "rpn_head.rpn_conv.weight"),
        ("rpn.head.cls_logits.bias", "rpn_head.rpn_cls.bias"),
        ("rpn.head.bbox_pred.weight", "rpn_head.rpn_reg.weight"),
        ("roi_heads.box_head.fc6.weight", "roi_head.bbox_head.shared_fcs.0.weight"),
        ("roi_heads.box_head.fc7.bias", "roi_head.bbox_head.shared_fcs.1.bias"),
        ("roi_heads.mask_head.3.0.weight", "roi_head.mask_head.convs.3.conv.weight"),
        ("roi_heads.mask_predictor.conv5_mask.weight", "roi_head.mask_head.upsample.weight"),
    ],
    "lsnet": [
        ("backbone.fpn.enlarge.weight", "neck.extra_trans_convs.0.conv.weight"),
        ("backbone.fpn.fine_block.bias", "neck.extra_fpn_convs.0.conv.bias"),
    ],
    "retinanet": [
        ("backbone.fpn.extra_blocks.convs.0.weight", "neck.fpn_convs.4.conv.weight"),
        ("head.classification_head.conv.2.0.weight", "bbox_head.cls_convs.2.conv.weight"),
        ("head.regression_head.conv.0.0.bias", "bbox_head.reg_convs.0.conv.bias"),
        ("head.classification_head.cls_logits.weight", "bbox_head.retina_cls.weight"),
        ("head.regression_head.bbox_reg.bias", "bbox_head.retina_reg.bias"),
    ],
}
KINDS = {"mask_rcnn": ("mask_rcnn", "recnext_m0"), "lsnet": ("mask_rcnn", "lsnet_t"), "retinanet": ("retinanet", "lsnet_t")}


def build(kind: str):
    return networks.build(*KINDS[kind], 3, channels=8, rois_per_image=8).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_file_loads_bit_equal_and_is_written_back(kind, tmp_path):
    """The file is made of names and shapes alone, as somebody else would have written it."""
    net = build(kind)
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value for name, value in names.to_published(net).items()}
    torch.save({"meta": {"epoch": 12}, "state_dict": made}, tmp_path / "published.pth")
    saved = checkpoint.read(str(tmp_path / "published.pth"))
    assert names.num_classes(saved, where="published.pth") == 3
    names.load(net, saved, where="published.pth")
    own, again = net.state_dict(), names.to_published(net)
    assert list(again) == list(made)
    assert all(torch.equal(value, made[name]) for name, value in again.items())
    for here, there in PAIRS[kind]:
        assert torch.equal(own[here], made[there]), there
    torch.save({"state_dict": again}, tmp_path / "ours.pth")
    other = build(kind)
    names.load(other, checkpoint.read(str(tmp_path / "ours.pth")), where="ours.pth")
    x = torch.randn(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        for one, two in zip(net(x, [(64, 64)]), other(x, [(64, 64)]), strict=True):
            assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_background_is_the_last_score_there_and_row_0_with_nothing_else_here():
    net = build("mask_rcnn")
    there = names.to_published(net)
    head, masks = "roi_head.bbox_head", "roi_head.mask_head.conv_logits"
    assert [len(there[f"{name}.bias"]) for name in (f"{head}.fc_cls", f"{head}.fc_reg", masks)] == [4, 12, 3]
    there[f"{head}.fc_cls.bias"] = torch.tensor([1.0, 2.0, 3.0, 9.0])
    there[f"{head}.fc_reg.bias"] = torch.arange(1.0, 13.0)
    there[f"{masks}.bias"] = torch.tensor([5.0, 6.0, 7.0])
    names.load(net, {"state_dict": there}, where="made.pth")
    predictor = net.roi_heads.box_predictor
    assert predictor.cls_score.bias.tolist() == [9, 1, 2, 3]
    assert predictor.bbox_pred.bias.tolist() == [0] * 4 + list(range(1, 13))
    assert net.roi_heads.mask_predictor.mask_fcn_logits.bias.tolist() == [0, 5, 6, 7]


def test_our_own_names_load_and_what_does_not_fit_is_explained():
    net, other = (networks.build("retinanet", "recnext_m0", 3, channels=8) for _ in range(2))
    names.load(other, {"model": net.state_dict()}, where="own.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())
    assert names.num_classes({"model": net.state_dict()}, where="own.pth") == 3
    assert names.num_classes({"state_dict": {"fc.weight": torch.zeros(1)}}, where="other.pth") is None
    there = names.to_published(net)
    del there["bbox_head.retina_reg.bias"]
    with pytest.raises(InputError, match="half.pth does not fit RetinaNet.*bbox_reg.bias is missing"):
        names.load(net, {"state_dict": there}, where="half.pth")
