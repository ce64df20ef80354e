"""Detectors by name: a backbone of ours or timm's under Mask R-CNN, Faster R-CNN or RetinaNet; what their training and use must know."""

from collections.abc import Iterator

import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes

from detection.config import DETECTORS
from detection.pyramid import build_backbone
from detection.rcnn import RCNN
from detection.retinanet import RetinaNet
from run import checkpoint
from run.errors import InputError
from utils import all_sum, log


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
    body = build_backbone(backbone, channels, for_retinanet=detector == "retinanet", pretrained=pretrained)
    if detector == "retinanet":
        return RetinaNet(body, num_classes)
    return RCNN(body, num_classes, rois_per_image=rois_per_image, has_masks=detector == "mask_rcnn")


def total(losses: dict[str, Tensor]) -> Tensor:
    """The loss to be minimised: the sum of a detector's losses, without what only tells of its progress."""
    return sum(value for name, value in losses.items() if name.startswith("loss"))


def no_weight_decay(net: nn.Module) -> set[str]:
    """Names of the parameters that weight decay spares: LSNet's attention biases. All others decay, biases and norms among them."""
    return {name for name, _ in net.named_parameters() if name.endswith("attention_biases")}


def load_backbone(net: nn.Module, name: str, source: str) -> list[str]:
    """Load the backbone `name` of the detector from a classification checkpoint of ours or the published ones (`<name>_distill_300e.pth`).

    Returns, and logs, the names in the file that were left out: those of its heads. InputError where anything else is missing or left over."""
    where = f"--backbone-weights {source}"
    state = checkpoint.weights(checkpoint.read(source), where=where)
    own = getattr(net.backbone.body, "model", net.backbone.body)
    heads = _heads(name)
    dropped = [key for key in state if key.partition(".")[0] in heads and key not in own.state_dict()]
    checkpoint.load_weights(own, {key: value for key, value in state.items() if key not in dropped}, where=where)
    log.info("backbone weights of %s: all loaded but %d of its heads: %s", source, len(dropped), ", ".join(dropped) or "it has none")
    return dropped


def _heads(name: str) -> set[str]:
    """First parts of the names of a classifier's heads."""
    classifier = timm.get_pretrained_cfg_value(name.partition(".")[0], "classifier") or ()
    return {part.partition(".")[0] for part in ((classifier,) if isinstance(classifier, str) else classifier)} | {"head", "head_dist"}


def restored(detection: dict[str, Tensor], size: tuple[int, int], original_size: tuple[int, int]) -> dict[str, Tensor]:
    """A detection of an image of `size` (height, width), with its boxes in the coordinates of the image before it was resized."""
    return detection | {"boxes": resize_boxes(detection["boxes"], size, original_size)}


def pasted(detection: dict[str, Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
    """The masks (height, width), bool, of a `restored` detection in the image of `size`, one by one, for all at once may not fit into memory."""
    for mask, box in zip(detection["masks"], detection["boxes"], strict=True):
        yield paste_masks_in_image(mask[None], box[None], size)[0, 0] >= 0.5


class _SumOverProcesses(torch.autograd.Function):
    """The sum of every process's values, on each; every process's loss depends on it, so that its gradients are summed too."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return all_sum(values.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_sum(grad.clone())


class _SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics in training are those of all processes' batches; torch's own synchronised one needs a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        full = x.float()
        *sums, count = _SumOverProcesses.apply(torch.cat([full.sum((0, 2, 3)), full.new_tensor([x.numel() / x.shape[1]])])).unbind()
        mean = torch.stack(sums) / count
        centred = full - mean.view(-1, 1, 1)
        var = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


def synchronised(net: nn.Module, device: torch.device) -> nn.Module:
    """`net`, changed in place so that BatchNorm takes its statistics over all processes; a backbone that keeps its statistics stays as it is."""
    if net.backbone.keeps_statistics:
        return net
    if device.type == "cuda":
        return convert_sync_batchnorm(net)
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SharedBatchNorm2d
    return net
