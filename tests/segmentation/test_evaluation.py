"""Mean IoU by hand, with an absent class; confusion matrices that add up; labels at the picture's size."""

import pytest
import torch
from torch.nn.functional import interpolate

from segmentation import evaluation
from segmentation.batches import Batch
from segmentation.evaluation import confusion, count, predicted, summary
from segmentation.networks import IGNORED

CPU = torch.device("cpu")
LABELS = torch.tensor([[0, 0, 1, 1], [0, 0, 2, IGNORED]], dtype=torch.int32)
FOUND = torch.tensor([[0, 0, 1, 0], [0, 1, 3, 2]])


def test_figures_by_hand_with_an_absent_class_and_one_that_is_found_alone():
    """Class 0: 3 of 4, and one pixel of class 1 taken for it: 3/5. Class 1: 1 of 2, and one of class 0: 1/3. Class 2: 0 of 1. Class 3 is found
    where it is not: overlap 0, no accuracy. Class 4 occurs nowhere. The ignored pixel, found as class 2, counts nowhere."""
    matrix = confusion(LABELS, FOUND, 5)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[3, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0] * 5, [0] * 5]
    figures, per_class = summary(matrix, list("abcde"))
    assert figures == {
        "mIoU": pytest.approx((3 / 5 + 1 / 3) / 4, abs=1e-6),
        "mAcc": pytest.approx((3 / 4 + 1 / 2) / 3, abs=1e-6),
        "aAcc": pytest.approx(4 / 7, abs=1e-6),
    }
    assert list(figures) == ["mIoU", "mAcc", "aAcc"]
    assert per_class["IoU"] == pytest.approx({"a": 0.6, "b": 1 / 3, "c": 0.0, "d": 0.0})
    assert per_class["Acc"] == pytest.approx({"a": 0.75, "b": 0.5, "c": 0.0})


def test_intersections_are_summed_over_the_set_and_not_averaged_over_pictures():
    """Class 1 is 1 of 1 in the first and 0 of 3 in the second: 1/4, not 1/2."""
    first = confusion(torch.tensor([[1]]), torch.tensor([[1]]), 2)
    second = confusion(torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 0]]), 2)
    assert summary(first + second, ["a", "b"])[1]["IoU"] == {"a": 0.0, "b": 0.25}


def test_nothing_labelled_gives_zeros():
    assert summary(confusion(torch.full((2, 2), IGNORED), torch.zeros(2, 2, dtype=torch.int64), 2), ["a", "b"])[0] == {"mIoU": 0.0, "mAcc": 0.0, "aAcc": 0.0}


@pytest.mark.parametrize("num_scores", [2**26, 1, 8000])
def test_logits_go_back_by_way_of_the_images_size_a_few_classes_at_a_time(monkeypatch, num_scores):
    monkeypatch.setattr(evaluation, "_NUM_SCORES", num_scores)
    logits = torch.randn(1, 7, 8, 16, generator=torch.Generator().manual_seed(0))
    expected = interpolate(interpolate(logits, (32, 64), mode="bilinear"), (50, 70), mode="bilinear").argmax(1)[0]
    assert torch.equal(predicted(logits, (32, 64), (50, 70)), expected)


class Painted(torch.nn.Module):
    """Stands for a segmenter: class 1 where the image is bright, at a quarter of its size."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = interpolate(images.mean(1, keepdim=True), scale_factor=0.25, mode="nearest-exact")
        return torch.cat([-bright, bright], dim=1)


def test_counting_compares_at_the_labels_own_size():
    """The right half is bright; the labels, half as large, say so but for one column."""
    images = torch.full((1, 3, 32, 64), -1.0)
    images[..., 32:] = 1.0
    labels = torch.zeros(1, 16, 32, dtype=torch.int32)
    labels[..., 15:] = 1
    matrix = count(Painted().train(), [Batch(images, labels, [(32, 64)], [0])], 2, CPU)
    assert matrix.tolist() == [[15 * 16, 0], [16, 16 * 16]]
