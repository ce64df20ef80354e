"""Detectors by name: parameters by hand, names that do not fit, precision, the way back to the image, several processes."""

import json

import pytest
import torch

from detection import networks
from run.errors import InputError
from tests.conftest import run_forked
from tests.features.counts import LARGE, LSNET, SMALL, conv, lsnet_t, pyramid, recnext, recnext_a_block, recnext_m_block

PROPOSALS = conv(256, 256, 3) + conv(256, 3, 1) + conv(256, 12, 1)
BOXES = (256 * 49 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 * 81 + 81) + (1024 * 81 * 4 + 81 * 4)  # with zero rows for the background's deltas
MASKS = 4 * conv(256, 256, 3) + conv(256, 256, 2) + conv(256, 81, 1)  # with a zero row for the background's mask
RETINANET = 8 * conv(256, 256, 3) + conv(256, 9 * 80, 3) + conv(256, 9 * 4, 3)
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
    done = run_forked("tests/programs/detectors.py")
    assert done.returncode == 0, done.stderr
    for one in json.loads(done.stdout):
        assert one["loss"] < 1e-5, one
        assert one["gradient"] < 1e-4, one
        assert one["statistics"] < 1e-5, one
