"""What a network said of each image of an evaluation, and what follows from it: accuracy by class, confused pairs, confident mistakes, calibration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NUM_BINS = 15  # of confidence, as in the paper


@dataclass(frozen=True)
class Outcomes:
    """Of N images, in any order: `places` in the set, `targets`, `predictions` (all (N,) int), and the probabilities that the network gave its
    `predictions` and the `targets` (both (N,) float, from 0 to 1)."""

    places: np.ndarray
    targets: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    target_confidences: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    @property
    def is_right(self) -> np.ndarray:
        """(N,) whether the class was recognised."""
        return self.predictions == self.targets


def joined_outcomes(parts: Sequence[Outcomes]) -> Outcomes:
    """The outcomes of several processes together, in the order of places."""
    names = Outcomes.__dataclass_fields__
    whole = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    order = np.argsort(whole["places"], kind="stable")
    return Outcomes(**{name: values[order] for name, values in whole.items()})


class Bin(NamedTuple):
    """Images of a confidence above `low` up to `high`: how many, their mean confidence and accuracy; all from 0 to 1."""

    low: float
    high: float
    num_images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How far confidence and accuracy are apart. `ece`: expected calibration error over `bins`, from 0 to 1, after Guo et al.
    (arXiv:1706.04599): bins of equal width, each weighed by its images; `confidence` and `accuracy` are means over all images."""

    ece: float
    confidence: float
    accuracy: float
    bins: list[Bin]

    def facts(self) -> dict:
        """For a JSON file; percentages."""
        bins = [{"above": one.low, "num_images": one.num_images, "confidence": 100 * one.confidence, "acc1": 100 * one.accuracy} for one in self.bins]
        return {"ece": 100 * self.ece, "mean_confidence": 100 * self.confidence, "bins": bins}


def calibrate(outcomes: Outcomes, num_bins: int = NUM_BINS) -> Calibration:
    """Calibration of at least one outcome; bins without images are left out."""
    confidences, is_right = outcomes.confidences.astype(np.float64), outcomes.is_right
    edges = np.linspace(0, 1, num_bins + 1)
    numbers = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, num_bins - 1)
    counts = np.bincount(numbers, minlength=num_bins)
    sums = (np.bincount(numbers, weights=values, minlength=num_bins) for values in (confidences, is_right))
    confidence, accuracy = (total / np.maximum(counts, 1) for total in sums)
    bins = [Bin(float(edges[i]), float(edges[i + 1]), int(counts[i]), float(confidence[i]), float(accuracy[i])) for i in range(num_bins) if counts[i]]
    ece = float((counts * np.abs(accuracy - confidence)).sum() / len(outcomes))
    return Calibration(ece, float(confidences.mean()), float(is_right.mean()), bins)


class ClassOutcome(NamedTuple):
    """Of a class: its number, images, how many were recognised, their mean confidence in what was said; what else was said most often, and how
    often; how many images of others were taken for it."""

    number: int
    num_images: int
    num_right: int
    confidence: float
    taken_for: int | None
    num_taken: int
    num_false: int


def by_class(outcomes: Outcomes, num_classes: int) -> list[ClassOutcome]:
    """Classes in their order; those without images too."""
    images = np.bincount(outcomes.targets, minlength=num_classes)
    right = np.bincount(outcomes.targets[outcomes.is_right], minlength=num_classes)
    confidence = np.bincount(outcomes.targets, weights=outcomes.confidences, minlength=num_classes) / np.maximum(images, 1)
    said = np.bincount(outcomes.predictions, minlength=num_classes)
    worst = {}
    for target, prediction, count in confused_pairs(outcomes):
        worst.setdefault(target, (prediction, count))
    return [ClassOutcome(i, int(images[i]), int(right[i]), float(confidence[i]), *worst.get(i, (None, 0)), int(said[i] - right[i])) for i in range(num_classes)]


def confused_pairs(outcomes: Outcomes) -> list[tuple[int, int, int]]:
    """(class, what was said instead, how often), the most frequent first; equals in the order of classes."""
    is_wrong = ~outcomes.is_right
    pairs, counts = np.unique(np.stack([outcomes.targets[is_wrong], outcomes.predictions[is_wrong]], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]


def pairs_of_matrix(matrix: np.ndarray) -> list[tuple[int, int, int]]:
    """`confused_pairs` of a confusion matrix (C, C) of whole numbers, whose rows are the classes."""
    places = np.argwhere((matrix > 0) & ~np.eye(len(matrix), dtype=bool))
    counts = matrix[tuple(places.T)]
    order = np.argsort(-counts, kind="stable")
    return [(*places[i].tolist(), int(counts[i])) for i in order]


def confident_mistakes(outcomes: Outcomes, count: int) -> np.ndarray:
    """Indices of up to `count` outcomes that are wrong, the most confident first; equals in the order of places."""
    wrong = np.flatnonzero(~outcomes.is_right)
    return wrong[np.argsort(-outcomes.confidences[wrong], kind="stable")][:count]


def confusion(outcomes: Outcomes, num_classes: int) -> np.ndarray:
    """(C, C) images per class (rows) and what was said (columns)."""
    places = outcomes.targets.astype(np.int64) * num_classes + outcomes.predictions
    return np.bincount(places, minlength=num_classes**2).reshape(num_classes, num_classes)
