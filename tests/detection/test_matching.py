"""Anchors, matching and sampling, where torchvision's differ: by hand-worked numbers."""

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from detection.matching import Anchors, KeyedSampler, Matcher, shared_count


def anchors_of(generator: Anchors, shapes: list[tuple[int, int]], image_size: tuple[int, int]) -> Tensor:
    maps = [torch.zeros(1, 1, *shape) for shape in shapes]
    return generator(ImageList(torch.zeros(1, 3, *image_size), [image_size]), maps)[0]


def test_anchors_are_not_rounded_and_centred_on_multiples_of_the_stride():
    boxes = anchors_of(Anchors([(32.0,)], [4]), [(2, 3)], (8, 12))
    assert boxes.shape == (2 * 3 * 3, 4)
    # ratio 1/2: 32 * sqrt(2) wide, 32 / sqrt(2) high, around 0; the next position is 4 to the right, the next row 4 below
    torch.testing.assert_close(boxes[0], torch.tensor([-22.6274, -11.3137, 22.6274, 11.3137]), atol=1e-4, rtol=0)
    assert boxes[1].tolist() == [-16, -16, 16, 16]
    torch.testing.assert_close(boxes[2], torch.tensor([-11.3137, -22.6274, 11.3137, 22.6274]), atol=1e-4, rtol=0)
    assert boxes[4].tolist() == [-12, -16, 20, 16]
    assert boxes[3 * 3 + 1].tolist() == [-16, -12, 16, 20]


def test_anchors_keep_their_stride_where_a_map_was_rounded_up():
    """800 pixels by stride 64 are 12.5, so 13, positions: torchvision would put them 800 // 13 = 61 apart."""
    boxes = anchors_of(Anchors([(512.0,)], [64]), [(13, 1)], (800, 64))
    assert boxes[1 + 3 * 12].tolist() == [-256, 12 * 64 - 256, 256, 12 * 64 + 256]


def test_retinanet_sizes_come_ratio_by_ratio():
    boxes = anchors_of(Anchors([(32.0, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3))], [8]), [(1, 1)], (8, 8))
    widths = boxes[:, 2] - boxes[:, 0]
    expected = [45.2548, 57.0175, 71.8376, 32, 40.3175, 50.7968, 22.6274, 28.5088, 35.9188]  # 32, 40.3, 50.8 by sqrt(2), 1, 1 / sqrt(2)
    torch.testing.assert_close(widths, torch.tensor(expected), atol=1e-3, rtol=0)


def test_an_objects_best_anchors_count_from_an_overlap_of_0_3_on_with_all_ties():
    quality = torch.tensor(
        [  # object by anchor
            [0.75, 0.65, 0.20, 0.00, 0.00, 0.00],
            [0.00, 0.10, 0.40, 0.40, 0.30, 0.00],  # best 0.4, twice
            [0.00, 0.00, 0.00, 0.00, 0.00, 0.29],  # best below 0.3: nobody is for it
        ]
    )
    matcher = Matcher(0.7, 0.3, min_quality=0.3)
    assert matcher(quality).tolist() == [0, matcher.BETWEEN_THRESHOLDS, 1, 1, matcher.BETWEEN_THRESHOLDS, matcher.BELOW_LOW_THRESHOLD]


def draw(labels: list[Tensor], seeds: list[int], size: int = 8) -> list[Tensor]:
    sampler = KeyedSampler(size, 0.5)
    sampler.seeds = seeds
    return [positive.int() - negative.int() for positive, negative in zip(*sampler(labels), strict=True)]


def test_sampling_takes_at_most_half_positives_and_fills_up_with_negatives():
    few = torch.tensor([1.0] * 2 + [0.0] * 20 + [-1.0] * 5)
    many = torch.tensor([1.0] * 20 + [0.0] * 20)
    drawn = draw([few, many], [1, 2])
    assert [(int((one == 1).sum()), int((one == -1).sum())) for one in drawn] == [(2, 6), (4, 4)]
    assert (drawn[0][22:] == 0).all()


def test_sampling_depends_on_each_images_seed_alone():
    labels = torch.tensor([1.0] * 30 + [0.0] * 30)
    torch.manual_seed(1)
    first, second = draw([labels, labels], [5, 6])
    torch.manual_seed(2)
    (again,) = draw([labels], [6])
    assert torch.equal(second, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("count", "expected"), [(0, 1.0), (7, 7.0), (torch.tensor(7), 7.0)])
def test_a_single_process_divides_by_the_count_but_not_by_nothing(count, expected):
    assert shared_count(count, torch.device("cpu")).item() == expected
