"""Labels at the picture's own size, confusion matrices of whole numbers, and what is computed from them.

Each process counts its share of the pictures; the matrices of all are added (`utils.all_sum`)."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from segmentation.batches import Batch
from segmentation.config import METRICS
from segmentation.networks import IGNORED, enlarged

_NUM_SCORES = 2**26  # logits that are enlarged at once: 256 MiB


def predicted(logits: Tensor, size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
    """(H, W) int64, the most probable class of each pixel of a picture of `original_size`, of its logits (1, C, h, w) on an image of `size`.

    The logits are enlarged twice, as published: to the image that the network saw, then to the picture. A few classes at a time, for all of
    a large picture's would not fit into memory."""
    best = labels = None
    step = max(1, _NUM_SCORES // max(size[0] * size[1], original_size[0] * original_size[1]))
    for first in range(0, logits.shape[1], step):
        part = enlarged(enlarged(logits[:, first : first + step].float(), size), original_size)[0]
        scores, own = part.max(0)
        if best is None:
            best, labels = scores, own
            continue
        is_better = scores > best  # of equal ones the first, as in a maximum over all
        best, labels = torch.where(is_better, scores, best), torch.where(is_better, own + first, labels)
    return labels


def confusion(labels: Tensor, found: Tensor, num_classes: int) -> Tensor:
    """(num_classes, num_classes) int64: pixels by their label (row) and what was found (column), both of one shape; `IGNORED` left out."""
    is_counted = labels != IGNORED
    places = labels[is_counted].long() * num_classes + found[is_counted]
    return torch.bincount(places, minlength=num_classes**2).view(num_classes, num_classes)


@torch.no_grad()
def count(net: nn.Module, batches: Iterable[Batch], num_classes: int, device: torch.device, *, after_image: Callable[[], None] = lambda: None) -> Tensor:
    """The confusion matrix of the pictures in `batches`, on `device`; `net` is left in evaluation mode."""
    net.eval()
    total = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for batch in batches:
        (size,), (labels,) = batch.sizes, batch.labels
        total += confusion(labels, predicted(net(batch.images), size, tuple(labels.shape)), num_classes)
        after_image()
    return total


def summary(matrix: Tensor, class_names: list[str]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Mean intersection over union, mean accuracy of the classes and accuracy of all pixels, by published name, and the first two per class.

    Fractions of 1. Classes that occur neither in labels nor among what was found have no overlap, those without labels no accuracy: they
    are left out of the means, which are 0 where nothing is left."""
    counts = matrix.cpu().numpy().astype(np.float64)
    right, labelled, found = counts.diagonal(), counts.sum(1), counts.sum(0)
    union = labelled + found - right
    overlap = {name: float(right[i] / union[i]) for i, name in enumerate(class_names) if union[i]}
    accuracy = {name: float(right[i] / labelled[i]) for i, name in enumerate(class_names) if labelled[i]}
    means = [float(np.mean(list(values.values()))) if values else 0.0 for values in (overlap, accuracy)]
    total = float(right.sum() / counts.sum()) if counts.sum() else 0.0
    return dict(zip(METRICS, (round(value, 6) for value in (*means, total)), strict=True)), {"IoU": overlap, "Acc": accuracy}
