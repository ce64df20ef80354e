"""Corruption errors of ImageNet-C (Hendrycks and Dietterich, arXiv:1903.12261): relative to AlexNet's, or to a network's own clean error."""

from collections.abc import Mapping, Sequence

SEVERITIES = (1, 2, 3, 4, 5)
ALEXNET_ERRORS = {  # mean top-1 error over the five severities, in percent
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
CORRUPTIONS = tuple(ALEXNET_ERRORS)
ALEXNET, CLEAN = "AlexNet's error", "the clean error"  # what corruption errors may be relative to


def mean_acc1(acc1s: Sequence[float | None]) -> float | None:
    """The mean accuracy over the severities, in percent; None where one is missing."""
    return None if None in acc1s else sum(acc1s) / len(acc1s)


def corruption_error(acc1s: Sequence[float | None], reference_error: float | None) -> float | None:
    """The mean error over the severities as a percentage of `reference_error`, which is one too. None where a severity is missing, or there is
    no such reference: it is None, or 0."""
    mean = mean_acc1(acc1s)
    return None if mean is None or not reference_error else 100 * (100 - mean) / reference_error


def reference_errors(relative_to: str, clean_acc1: float | None) -> dict[str, float | None]:
    """What each corruption's error is relative to, in percent: `ALEXNET` or `CLEAN`."""
    clean_error = None if clean_acc1 is None else 100 - clean_acc1
    return ALEXNET_ERRORS if relative_to == ALEXNET else dict.fromkeys(CORRUPTIONS, clean_error)


def mean_corruption_error(errors: Mapping[str, float | None]) -> float | None:
    """mCE, in percent; None unless there is an error for each of the fifteen corruptions."""
    found = [errors.get(name) for name in CORRUPTIONS]
    return None if None in found else sum(found) / len(found)
