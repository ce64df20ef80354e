"""Detectors by name: a backbone of ours or timm's under Mask R-CNN, Faster R-CNN or RetinaNet; what their training and use must know."""

from collections.abc import Iterator

from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes

from detection.config import DETECTORS
from detection.rcnn import RCNN
from detection.retinanet import RetinaNet
from features.pyramid import build_backbone
from run.errors import InputError


def build(detector: str, backbone: str, num_classes: int, *, channels: int = 256, rois_per_image: int = 512, pretrained: bool = False) -> nn.Module:
    """The detector of that name on the backbone `backbone`, a model of ours or timm's, for `num_classes` classes; nothing in it is frozen.

    Called with images (B, 3, H, W), normalised and padded with zeros, and `sizes`, the (height, width) of each without padding.
    Training, it takes `targets`, for each image boxes (N, 4) as x1, y1, x2, y2 in pixels, labels (N,) from 0 on and for Mask R-CNN masks
    (N, h, w) of 0 and 1, and `words`, for each image the random words that choose among its anchors and proposals; it returns the published
    losses by name: their sum is `total`. Evaluating, it returns for each image boxes, scores and labels, at most 100, best first, and for
    Mask R-CNN masks (n, 1, 28, 28) of probabilities inside the boxes: `restored` and `pasted` take them to the image as it was.
    `channels` of the pyramid and the heads, of which the published networks have 256; `rois_per_image` that the R-CNN's heads learn from;
    `pretrained`: with timm's weights of the backbone. InputError where the backbone is unknown or has no feature maps for a pyramid."""
    if detector not in DETECTORS:
        raise InputError(f"--detector {detector}: choose from {', '.join(DETECTORS)}")
    body = build_backbone(backbone, channels, kind="retinanet" if detector == "retinanet" else "rcnn", pretrained=pretrained)
    if detector == "retinanet":
        return RetinaNet(body, num_classes)
    return RCNN(body, num_classes, rois_per_image=rois_per_image, has_masks=detector == "mask_rcnn")


def total(losses: dict[str, Tensor]) -> Tensor:
    """The loss to be minimised: the sum of a detector's losses, without what only tells of its progress."""
    return sum(value for name, value in losses.items() if name.startswith("loss"))


def restored(detection: dict[str, Tensor], size: tuple[int, int], original_size: tuple[int, int]) -> dict[str, Tensor]:
    """A detection of an image of `size` (height, width), with its boxes in the coordinates of the image before it was resized."""
    return detection | {"boxes": resize_boxes(detection["boxes"], size, original_size)}


def pasted(detection: dict[str, Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
    """The masks (height, width), bool, of a `restored` detection in the image of `size`, one by one, for all at once may not fit into memory."""
    for mask, box in zip(detection["masks"], detection["boxes"], strict=True):
        yield paste_masks_in_image(mask[None], box[None], size)[0, 0] >= 0.5
