"""Anchors, which object each is for, and the keyed choice of those that a step learns from: where torchvision's differ from the published ones."""

import torch
from torch import Tensor
from torch import distributed as dist
from torchvision.models.detection import _utils as det_utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from utils import all_sum

RATIOS = (0.5, 1.0, 2.0)  # height by width
MIN_SCORE, MAX_OBJECTS = 0.05, 100  # of what is found in an image


class Anchors(AnchorGenerator):
    """torchvision's, but not rounded, and centred on multiples of each map's own stride.

    torchvision divides the image's size by the map's, which gives another stride where a map's size was rounded up.
    `sizes` holds for each map the square roots of its anchors' areas."""

    def __init__(self, sizes: list[tuple[float, ...]], strides: list[int]):
        super().__init__(tuple(sizes), (RATIOS,) * len(sizes))
        self.strides = strides

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=torch.device("cpu")) -> Tensor:  # noqa: B008  (torchvision's signature)
        scales = torch.as_tensor(scales, dtype=dtype, device=device)
        heights_per_size = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = (scales / heights_per_size[:, None]).flatten(), (scales * heights_per_size[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """(A, 4) corners x1, y1, x2, y2 of all anchors, map after map, for each image; float32 under autocast too."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        anchors = torch.cat(self.grid_anchors([one.shape[-2:] for one in feature_maps], [[stride, stride] for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class Matcher(det_utils.Matcher):
    """torchvision's, whose best anchors of an object, with all ties, count only from an overlap of `min_quality` on."""

    def __init__(self, high_threshold: float, low_threshold: float, *, min_quality: float):
        super().__init__(high_threshold, low_threshold, allow_low_quality_matches=True)
        self.min_quality = min_quality

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        is_best = ((match_quality_matrix == best) & (best >= self.min_quality)).any(dim=0)
        matches[is_best] = all_matches[is_best]


class KeyedSampler(det_utils.BalancedPositiveNegativeSampler):
    """torchvision's, drawing for each image from a generator of its own: `seeds`, one per image, are set before each step."""

    def __init__(self, batch_size_per_image: int, positive_fraction: float):
        super().__init__(batch_size_per_image, positive_fraction)
        self.seeds: list[int] = []

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each image two masks, of its positives and its negatives drawn, of its labels: positive from 1 on, negative at 0."""
        pairs = [self._draw(labels, torch.Generator().manual_seed(seed)) for labels, seed in zip(matched_idxs, self.seeds, strict=True)]
        return [positive for positive, _ in pairs], [negative for _, negative in pairs]

    def _draw(self, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        positive = _some_of(labels >= 1, int(self.batch_size_per_image * self.positive_fraction), generator)
        return positive, _some_of(labels == 0, self.batch_size_per_image - int(positive.sum()), generator)


def _some_of(mask: Tensor, num_wanted: int, generator: torch.Generator) -> Tensor:
    """`mask` with at most `num_wanted` of its true places left."""
    places = torch.where(mask)[0]
    order = torch.randperm(len(places), generator=generator)[:num_wanted]
    return torch.zeros_like(mask).index_fill_(0, places[order.to(places.device)], True)


def shared_count(count: Tensor | int, device: torch.device) -> Tensor:
    """What a loss's sum over this process's images is divided by, so that the mean over processes is the sum by the whole step's count.

    With one process: the count, at least 1."""
    total = all_sum(torch.as_tensor(count, dtype=torch.float32, device=device).clone()).clamp_(min=1)
    return total / dist.get_world_size() if dist.is_initialized() else total
