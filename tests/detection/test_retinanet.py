"""What RetinaNet does otherwise than torchvision's: losses by the batch's positives; by hand-worked numbers."""

import math

import pytest
import torch

from detection import networks
from detection.retinanet import Head

BETWEEN, BELOW = -2, -1


def test_losses_are_sums_by_the_batchs_number_of_positives():
    """Two images, the first with three positives, the second with one; torchvision would divide each by its own."""
    head = Head(8, 9, 2)
    anchors = [torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 4)] * 2
    matched = [torch.tensor([0, 0, 0, BELOW]), torch.tensor([0, BELOW, BETWEEN, BETWEEN])]
    targets = [{"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]), "labels": torch.tensor([1])}] * 2
    logits = torch.zeros(2, 4, 2)
    logits[1, 2:] = 50.0  # between the thresholds: ignored
    deltas = torch.zeros(2, 4, 4)
    deltas[0, :3, 0], deltas[1, 0, 3], deltas[:, 1:, 2:] = 1.0, -5.0, 0.25
    losses = head.compute_loss(targets, {"cls_logits": logits, "bbox_regression": deltas}, anchors, matched)
    at_half = 0.5**2 * math.log(2)  # focal factor and cross-entropy of a probability of 1/2
    # of the 4 x 2 scores of the first image 3 are of a true class, of the 2 x 2 that count of the second 1
    assert losses["loss_cls"].item() == pytest.approx((0.25 * at_half * 4 + 0.75 * at_half * (5 + 3)) / 4, rel=1e-5)
    assert losses["loss_bbox"].item() == pytest.approx((3 * 1 + 2 * 0.5 + 5) / 4)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return networks.build("retinanet", "recnext_m0", 3, channels=8)


def test_assignment_and_testing_are_as_published(net):
    matcher = net.proposal_matcher
    quality = torch.tensor([[0.5, 0.49, 0.39, 0.0, 0.0], [0.0, 0.0, 0.0, 0.1, 0.05]])
    assert matcher(quality).tolist() == [0, BETWEEN, BELOW, 1, BELOW]  # an object's best anchor always is for it
    assert (net.topk_candidates, net.score_thresh, net.nms_thresh, net.detections_per_img) == (1000, 0.05, 0.5, 100)
    assert torch.sigmoid(net.head.classification_head.cls_logits.bias).unique().tolist() == [pytest.approx(0.01)]


def test_images_without_objects_and_with_some_train_and_are_searched(net):
    images, sizes = torch.randn(2, 3, 64, 96), [(64, 96), (50, 96)]
    targets = [
        {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    losses = net.train()(images, sizes, targets)
    networks.total(losses).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
    net.head.classification_head.cls_logits.bias.data.zero_()
    with torch.no_grad():
        found = net.eval()(images, sizes)
    assert [len(one["boxes"]) for one in found] == [100, 100]
    assert found[1]["boxes"][:, 3].max() <= 50
    assert set(found[0]["labels"].tolist()) <= {0, 1, 2}
