"""The criterion that a recipe's settings make, against numbers worked out here."""

import pytest
import torch
from torch.nn import functional as F

import losses
from run import config

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
CLASSES = torch.tensor([0, 2])
MIXED = torch.tensor([[0.7, 0.3, 0.0], [0.05, 0.15, 0.8]])  # of mixup
NO_MIXING = ["--mixup=0", "--cutmix=0"]


def criterion(*flags: str):
    return losses.build_criterion(config.parse(["--data-set=DIGITS", "--bce-loss", *flags])[0])


def by_hand(targets: torch.Tensor) -> torch.Tensor:
    """(B, C) of -t log p - (1 - t) log(1 - p)."""
    return -targets * F.logsigmoid(LOGITS) - (1 - targets) * F.logsigmoid(-LOGITS)


@pytest.mark.parametrize(
    ("flags", "targets", "expected"),
    [
        ([], MIXED, by_hand(MIXED).mean()),
        (["--bce-sum"], MIXED, by_hand(MIXED).sum() / 2),
        (["--bce-target-thresh=0.2"], MIXED, by_hand((MIXED > 0.2).float()).mean()),
        ([*NO_MIXING, "--smoothing=0"], CLASSES, by_hand(torch.eye(3)[CLASSES]).mean()),
        ([*NO_MIXING, "--smoothing=0.3"], CLASSES, by_hand(0.7 * torch.eye(3)[CLASSES] + 0.1).mean()),
        ([*NO_MIXING, "--smoothing=0.3", "--bce-target-thresh=0"], CLASSES, by_hand(torch.ones(2, 3)).mean()),
    ],
)
def test_binary_cross_entropy(flags, targets, expected):
    assert criterion("--distillation-type=none", *flags)(LOGITS, targets, None) == pytest.approx(expected.item(), rel=1e-6)


def test_binary_cross_entropy_is_the_base_term_of_distillation():
    outputs, teacher = (LOGITS, LOGITS.flip(1)), torch.tensor([1, 1])
    expected = 0.75 * by_hand(MIXED).mean() + 0.25 * F.cross_entropy(LOGITS.flip(1), teacher)
    assert criterion("--distillation-type=hard", "--distillation-alpha=0.25")(outputs, MIXED, teacher) == pytest.approx(expected.item(), rel=1e-6)


def test_half_precision_logits_leave_targets_whole():
    """In bfloat16, smoothed targets of 0.9 would be 0.8984."""
    half = LOGITS.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion("--distillation-type=none", *NO_MIXING)(half, CLASSES, None)
    smooth = 0.9 * torch.eye(3)[CLASSES] + 0.1 / 3
    assert found.dtype == torch.float32 and found == pytest.approx(F.binary_cross_entropy_with_logits(half.float(), smooth).item(), rel=1e-6)
