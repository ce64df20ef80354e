"""Checkpoints of detectors with the published names: `{"state_dict": ...}`, in both directions and without changing a bit.

There the background is the last class score and has no deltas and no mask; here it is row 0 of all three, with zeros where there is nothing."""

import functools
import re

import torch
from torch import Tensor, nn

from features import names
from run import checkpoint

# Modules here, and there; what follows the first match of a pattern is the same.
_RENAMED = (
    *names.BACKBONE,
    (r"backbone\.fpn\.enlarge\.", "neck.extra_trans_convs.0.conv."),
    (r"backbone\.fpn\.fine_block\.", "neck.extra_fpn_convs.0.conv."),
    (r"rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
    (r"rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
    (r"roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (r"roi_heads\.mask_head\.(\d+)\.0\.", "roi_head.mask_head.convs.{}.conv."),
    (r"roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
    (r"head\.classification_head\.conv\.(\d+)\.0\.", "bbox_head.cls_convs.{}.conv."),
    (r"head\.classification_head\.cls_logits\.", "bbox_head.retina_cls."),
    (r"head\.regression_head\.conv\.(\d+)\.0\.", "bbox_head.reg_convs.{}.conv."),
    (r"head\.regression_head\.bbox_reg\.", "bbox_head.retina_reg."),
)
_SCORES = "roi_head.bbox_head.fc_cls."
_NUM_BACKGROUND_ROWS = {"roi_head.bbox_head.fc_reg.": 4, "roi_head.mask_head.conv_logits.": 1}  # here, in front of the classes'


def published_name(name: str, num_laterals: int) -> str:
    """The published name of our tensor `name`, of a detector whose pyramid has that many lateral convolutions."""
    coarse = re.match(r"backbone\.fpn\.extra_blocks\.convs\.(\d+)\.", name)
    if coarse:
        return f"neck.fpn_convs.{num_laterals + int(coarse[1])}.conv.{name[coarse.end() :]}"
    return names.renamed(name, _RENAMED)


def to_published(net: nn.Module) -> dict[str, Tensor]:
    """The detector's state dict in the published names, shapes and order of classes."""
    num_laterals = len(net.backbone.fpn.inner_blocks)
    state = {published_name(name, num_laterals): value for name, value in net.state_dict().items()}
    for name, value in state.items():
        if name.startswith(_SCORES):
            state[name] = torch.cat([value[1:], value[:1]])
        for prefix, num_rows in _NUM_BACKGROUND_ROWS.items():
            if name.startswith(prefix):
                state[name] = value[num_rows:].clone()
    return state


def from_published(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict in our names, shapes and order of classes, as far as it has the detector's tensors; others keep their names."""
    num_laterals = len(net.backbone.fpn.inner_blocks)
    ours = {published_name(name, num_laterals): name for name in net.state_dict()}
    converted = {}
    for name, value in state.items():
        if name.startswith(_SCORES):
            value = torch.cat([value[-1:], value[:-1]])
        for prefix, num_rows in _NUM_BACKGROUND_ROWS.items():
            if name.startswith(prefix):
                value = torch.cat([value.new_zeros(num_rows, *value.shape[1:]), value])
        converted[ours.get(name, name)] = value
    return converted


load = functools.partial(names.load, from_published=from_published)
load_finetune = functools.partial(names.load_finetune, from_published=from_published)


def num_classes(saved: dict, *, where: str) -> int | None:
    """Number of classes of the detector in a checkpoint, ours or published; None where it holds no head that tells."""
    state = checkpoint.weights(saved, where=where)
    for name, per_class, extra in (
        ("roi_heads.box_predictor.cls_score.bias", 1, 1),
        ("roi_head.bbox_head.fc_cls.bias", 1, 1),
        ("head.classification_head.cls_logits.bias", 9, 0),
        ("bbox_head.retina_cls.bias", 9, 0),
    ):
        if name in state:
            return len(state[name]) // per_class - extra
    return None


def detector(saved: dict, *, where: str) -> str:
    """What detector a checkpoint holds, ours or published, of `detection.config.DETECTORS`, by its heads."""
    state = checkpoint.weights(saved, where=where)
    if any(name.startswith(("roi_heads.mask_head.", "roi_head.mask_head.")) for name in state):
        return "mask_rcnn"
    return "faster_rcnn" if any(name.startswith(("roi_heads.", "roi_head.")) for name in state) else "retinanet"
