"""What Mask R-CNN does otherwise than torchvision's: losses and their divisors, pooling, proposals, mask targets; by hand-worked numbers."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from detection import networks, rcnn
from detection.matching import KeyedSampler


@pytest.fixture(scope="module")
def net() -> rcnn.RCNN:
    torch.manual_seed(0)
    return networks.build("mask_rcnn", "recnext_m0", 4, channels=8, rois_per_image=32)


def target(*boxes: list[float], size: tuple[int, int] = (64, 96)) -> dict:
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
    return {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.arange(len(boxes)), "masks": masks}


def test_proposal_losses_are_sums_by_the_number_sampled_over_the_batch(net):
    """Three sampled anchors in two images, one positive, off by 2, 0.5, 0 and 1; scores of 0, log 3 and -log 3."""
    sampler = net.rpn.fg_bg_sampler
    net.rpn.fg_bg_sampler = KeyedSampler(2, 0.5)
    net.rpn.fg_bg_sampler.seeds = [0, 1]
    labels = [torch.tensor([1.0, 0.0, -1.0]), torch.tensor([-1.0, 0.0, -1.0])]
    scores = torch.tensor([0.0, math.log(3), 9.0, 9.0, -math.log(3), 9.0]).view(-1, 1)
    deltas = torch.tensor([[2.0, 0.5, 0.0, -1.0]] * 6)
    score_loss, box_loss = net.rpn.compute_loss(scores, deltas, labels, [torch.zeros(3, 4), torch.zeros(3, 4)])
    net.rpn.fg_bg_sampler = sampler
    assert score_loss.item() == pytest.approx((math.log(2) + math.log(4) + math.log(4 / 3)) / 3)
    assert box_loss.item() == pytest.approx((2 + 0.5 + 0 + 1) / 3)  # L1, where torchvision's smooth one has 2 - 1/18 and so on


def test_box_losses_are_sums_by_the_number_sampled():
    """Two sampled boxes of class 2 and background, even scores of three; the true class's deltas off by 1, 2, 3 and 0.02."""
    deltas = torch.zeros(2, 3, 4)
    deltas[0, 2] = torch.tensor([1.0, 2.0, 3.0, 0.02])
    deltas[:, :2] = 77.0  # of other classes, and of a box that is background
    losses = rcnn.box_losses(torch.zeros(2, 3), deltas.flatten(1), [torch.tensor([2]), torch.tensor([0])], [torch.zeros(1, 4), torch.ones(1, 4)])
    assert losses[0].item() == pytest.approx(math.log(3))
    assert losses[1].item() == pytest.approx(6.02 / 2)


def test_mask_targets_are_cut_out_aligned_and_are_0_or_1():
    """A box of 28 pixels around a mask's edge in its 14th column: aligned, target column j is image column 10 + j."""
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[1, :, 24:] = 1
    (cut,) = rcnn.mask_targets(masks, torch.tensor([[10.0, 10.0, 38.0, 38.0]]), torch.tensor([1]))
    assert cut.unique().tolist() == [0.0, 1.0]
    assert cut[0].tolist() == [0.0] * 14 + [1.0] * 14
    # twice as large a box averages 2x2 pixels: of the four columns 22 and 23 | 24 and 25 none is mixed; moved by one, a half rounds up
    (coarse,) = rcnn.mask_targets(masks, torch.tensor([[1.0, 1.0, 57.0, 57.0]]), torch.tensor([1]))
    assert coarse[0].tolist() == [0.0] * 11 + [1.0] * 17  # column 11 sees image columns 23 and 24


def test_mask_loss_is_the_mean_over_positives_and_pixels():
    logits = torch.full((2, 3, 28, 28), 50.0)
    logits[0, 1], logits[1, 2] = 0.0, math.log(3)
    wanted = torch.stack([torch.zeros(28, 28), torch.ones(28, 28)])
    loss = rcnn.mask_loss(logits, torch.tensor([1, 2]), wanted)
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    assert rcnn.mask_loss(logits[:0], torch.zeros(0, dtype=torch.long), wanted[:0]).item() == 0


def test_pooling_is_aligned_and_samples_every_pixel():
    """A ramp along x, f(x) = x at column x's centre x + 0.5: a bin's mean is its centre less 0.5, however large the bin."""
    pool = rcnn.AlignedRoIAlign(7, [4, 8, 16, 32])
    ramp = torch.arange(64.0).expand(1, 1, 64, 64).contiguous()
    maps = {"0": ramp, "1": ramp[..., :32, :32], "2": ramp[..., :16, :16], "3": ramp[..., :8, :8]}
    (cut,) = pool(maps, [torch.tensor([[28.0, 28.0, 84.0, 84.0]])], [(256, 256)])
    assert cut[0, 0].tolist() == pytest.approx([7 + 2 * j + 1 - 0.5 for j in range(7)])  # 7 to 21 on stride 4, bins of 2
    spike = torch.zeros(1, 1, 64, 64)
    spike[..., 10] = 1.0
    (cut,) = pool(maps | {"0": spike}, [torch.tensor([[0.0, 0.0, 84.0, 84.0]])], [(256, 256)])
    assert cut[0, 0].tolist() == pytest.approx([0, 0, 0, 1 / 3, 0, 0, 0])  # bins of three pixels; two samples a bin would see a quarter


def test_boxes_are_cut_out_of_the_map_of_their_size():
    """floor(log2(sqrt(area) / 56)): below 112 on the finest map, from 448 on the last."""
    pool = rcnn.AlignedRoIAlign(1, [4, 8, 16, 32])
    maps = {str(i): torch.full((1, 1, 256 >> i, 256 >> i), float(i)) for i in range(4)}
    sides = [10.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 1000.0]
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in sides])
    assert pool(maps, [boxes], [(1024, 1024)]).flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_training_keeps_1000_proposals_over_all_maps_and_drops_nothing_for_its_size(net):
    assert (net.rpn._pre_nms_top_n, net.rpn._post_nms_top_n) == ({"training": 2000, "testing": 1000}, {"training": 1000, "testing": 1000})
    corners = torch.stack(torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij"), -1).view(-1, 2)
    apart = torch.cat([corners, corners + 1e-4], dim=1)  # 1600 specks that do not overlap
    gone = torch.tensor([[100.0, 5.0, 120.0, 9.0]])  # right of the image: clipping leaves a line
    scores = torch.linspace(0, -80, 1600)  # probabilities down to 1e-35
    net.rpn.train()
    boxes, _ = net.rpn.filter_proposals(torch.cat([gone, apart]).unsqueeze(0), torch.cat([torch.ones(1), scores]), [(64, 64)], [801, 800])
    assert len(boxes[0]) == 1000
    torch.testing.assert_close(boxes[0], apart[:1000])


def test_labels_are_from_0_on_and_torchvisions_background_is_row_0(net):
    """With scores that say class 2 whatever they see, class 2 is found, and sampled boxes of class 2 are the right ones."""
    net.roi_heads.box_predictor.cls_score.weight.data.zero_()
    net.roi_heads.box_predictor.cls_score.bias.data.copy_(20.0 * one_hot(torch.tensor(1 + 2), 5))
    images = torch.zeros(1, 3, 64, 96)
    with torch.no_grad():
        found = net.eval()(images, [(60, 90)])[0]
        losses = net.train()(images, [(60, 90)], [target([8, 8, 40, 40]) | {"labels": torch.tensor([2])}], [(1, 2)])
    assert set(found["labels"].tolist()) == {2}
    assert len(found["boxes"]) <= 100
    assert found["masks"].shape[1:] == (1, 28, 28)
    assert found["boxes"].amax(0)[2] <= 90
    assert found["boxes"].amax(0)[3] <= 60
    assert 0 < losses["acc"] <= 25 + 1e-4  # at most a quarter is positive


def test_a_step_is_a_function_of_its_words_and_of_nothing_drawn_before(net):
    net.eval()  # statistics stay
    net.training = net.rpn.training = net.roi_heads.training = True
    images, targets = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)), [target([8, 8, 40, 40]), target()]

    def losses(words: list[tuple[int, int]]) -> list[float]:
        torch.rand(1)
        return [value.item() for value in net(images, [(64, 96), (64, 96)], targets, words).values()]

    with torch.no_grad():
        first = losses([(1, 2), (3, 4)])
        assert losses([(1, 2), (3, 4)]) == first
        assert losses([(5, 2), (3, 4)])[0] != first[0]
        assert losses([(1, 6), (3, 4)])[0] == first[0]
        assert losses([(1, 6), (3, 4)])[2:] != first[2:]


def test_rows_of_the_background_stay_zero(net):
    net = networks.build("mask_rcnn", "recnext_m0", 2, channels=8, rois_per_image=8)
    networks.total(net(torch.randn(1, 3, 64, 96), [(64, 96)], [target([8, 8, 40, 40])], [(1, 2)])).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
    for layer, rows in ((net.roi_heads.box_predictor.bbox_pred, 4), (net.roi_heads.mask_predictor.mask_fcn_logits, 1)):
        assert not layer.weight[:rows].any()
        assert not layer.weight.grad[:rows].any()
        assert not layer.bias.grad[:rows].any()
