"""Mask R-CNN, and Faster R-CNN without its masks, on torchvision's classes: what the published detectors do otherwise.

Papers: Faster R-CNN (https://arxiv.org/abs/1506.01497), Mask R-CNN (https://arxiv.org/abs/1703.06870)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, l1_loss
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops._utils import convert_boxes_to_roi_format
from torchvision.ops.poolers import LevelMapper

from detection.matching import MAX_OBJECTS, MIN_SCORE, RATIOS, Anchors, KeyedSampler, Matcher, shared_count
from features.pyramid import Backbone

ANCHOR_SIZE = 8  # strides
NUM_ROI_MAPS = 4  # the finest, that boxes and masks are cut out of
MASK_SIZE = 28

Targets = list[dict[str, Tensor]]


class ProposalHead(RPNHead):
    """torchvision's, with results in full precision under autocast too: in bfloat16 boxes would be off by pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(x)
        return [one.float() for one in scores], [one.float() for one in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's, with the published anchors, matching, sampling, number of proposals and losses."""

    def __init__(self, backbone: Backbone):
        super().__init__(
            Anchors([(ANCHOR_SIZE * stride,) for stride in backbone.strides], backbone.strides),
            ProposalHead(backbone.out_channels, len(RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        self.proposal_matcher = Matcher(0.7, 0.3, min_quality=0.3)
        self.fg_bg_sampler = KeyedSampler(256, 0.5)
        self.min_size = torch.finfo(torch.float32).tiny  # any size, but boxes that clipping left nothing of are none

    def compute_loss(self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Cross-entropy over the sampled anchors, L1 over the positive ones; both divided by the number sampled."""
        positives, negatives = (torch.cat(masks) for masks in self.fg_bg_sampler(labels))
        sampled = positives | negatives
        count = shared_count(sampled.sum(), objectness.device)
        wanted = torch.cat(labels)[sampled]
        score_loss = binary_cross_entropy_with_logits(objectness.flatten()[sampled], wanted, reduction="sum")
        box_loss = l1_loss(pred_bbox_deltas[positives], torch.cat(regression_targets)[positives], reduction="sum")
        return score_loss / count, box_loss / count


class AlignedRoIAlign(MultiScaleRoIAlign):
    """torchvision's, with pixel centres half a pixel in (`aligned`), as many samples as pixels, and known strides: (R, C, size, size)."""

    def __init__(self, output_size: int, strides: list[int]):
        super().__init__([str(i) for i in range(len(strides))], output_size, sampling_ratio=0)
        self.scales = [1 / stride for stride in strides]
        self.map_levels = LevelMapper(2, 2 + len(strides) - 1)  # 2**2 is the finest stride

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        rois, levels = convert_boxes_to_roi_format(boxes), self.map_levels(boxes)
        places = [torch.where(levels == level)[0] for level in range(len(self.scales))]
        parts = [
            roi_align(x[name].float(), rois[own], self.output_size, scale, self.sampling_ratio, aligned=True)
            for name, scale, own in zip(self.featmap_names, self.scales, places, strict=True)
        ]
        return torch.cat(parts)[torch.cat(places).argsort()]


class BoxPredictor(FastRCNNPredictor):
    """torchvision's, with the published first weights: (R, in_channels) -> (R, 1 + classes) scores, (R, 4 (1 + classes)) deltas, in full precision.

    Row 0 is the background's; its deltas mean nothing, are zero and stay so."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__(in_channels, num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.bbox_pred.weight[:4])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


def box_losses(class_logits: Tensor, box_regression: Tensor, labels: list[Tensor], regression_targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the sampled boxes, L1 of the true class's deltas of the positive ones; both divided by the number sampled."""
    labels, wanted = torch.cat(labels), torch.cat(regression_targets)
    count = shared_count(len(labels), class_logits.device)
    positives = torch.where(labels > 0)[0]
    deltas = box_regression.unflatten(1, (-1, 4))[positives, labels[positives]]
    return cross_entropy(class_logits, labels, reduction="sum") / count, l1_loss(deltas, wanted[positives], reduction="sum") / count


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor) -> Tensor:
    """(P, 28, 28), 0 or 1: of the objects' `masks` (N, H, W), those that `matched` (P,) numbers, cut out at `boxes` (P, 4)."""
    rois = torch.cat([matched[:, None].to(boxes), boxes], dim=1)
    return (roi_align(masks[:, None].to(boxes), rois, (MASK_SIZE, MASK_SIZE), 1.0, 0, aligned=True)[:, 0] >= 0.5).to(boxes)


def mask_loss(mask_logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of the true classes' masks (P, 28, 28); mean over all positive boxes and their pixels, 0 where there are none."""
    count = shared_count(wanted.numel(), mask_logits.device)
    chosen = mask_logits[torch.arange(len(labels), device=labels.device), labels]
    return binary_cross_entropy_with_logits(chosen, wanted, reduction="sum") / count


class Heads(RoIHeads):
    """torchvision's, with the published pooling, sampling and losses; with masks or without."""

    def __init__(self, backbone: Backbone, num_classes: int, *, rois_per_image: int, has_masks: bool):
        chs, strides = backbone.out_channels, backbone.strides[:NUM_ROI_MAPS]
        box_head = TwoMLPHead(chs * 7**2, 4 * chs)
        for layer in (box_head.fc6, box_head.fc7):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        super().__init__(
            AlignedRoIAlign(7, strides),
            box_head,
            BoxPredictor(4 * chs, 1 + num_classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=rois_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=MIN_SCORE,
            nms_thresh=0.5,
            detections_per_img=MAX_OBJECTS,
        )
        self.fg_bg_sampler = KeyedSampler(rois_per_image, 0.25)
        if has_masks:
            self.mask_roi_pool = AlignedRoIAlign(MASK_SIZE // 2, strides)
            self.mask_head = MaskRCNNHeads(chs, (chs,) * 4, 1)
            self.mask_predictor = MaskRCNNPredictor(chs, chs, 1 + num_classes)
            for parameter in self.mask_predictor.mask_fcn_logits.parameters():
                nn.init.zeros_(parameter[:1])  # the background's, as in `BoxPredictor`

    def _masks(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, sizes))).float()

    def _predict(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, sizes)))

    def losses(self, features: dict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]], targets: Targets) -> dict[str, Tensor]:
        """The heads' losses, and the part of the sampled boxes in percent that are classified rightly."""
        boxes, matched, labels, regression_targets = self.select_training_samples(proposals, targets)
        logits, deltas = self._predict(features, boxes, sizes)
        loss_cls, loss_bbox = box_losses(logits, deltas, labels, regression_targets)
        losses = {"loss_cls": loss_cls, "acc": 100 * (logits.argmax(1) == torch.cat(labels)).float().mean(), "loss_bbox": loss_bbox}
        if self.has_mask():
            positives = [torch.where(one > 0)[0] for one in labels]
            boxes, matched, labels = ([one[places] for one, places in zip(parts, positives, strict=True)] for parts in (boxes, matched, labels))
            wanted = [mask_targets(target["masks"], *parts) for target, *parts in zip(targets, boxes, matched, strict=True)]
            losses["loss_mask"] = mask_loss(self._masks(features, boxes, sizes), torch.cat(labels), torch.cat(wanted))
        return losses

    def detections(self, features: dict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """For each image the boxes kept: boxes (n, 4), labels (n,), scores (n,) and, with masks, masks (n, 1, 28, 28) of probabilities."""
        found = self.postprocess_detections(*self._predict(features, proposals, sizes), proposals, sizes)
        results = [dict(zip(("boxes", "scores", "labels"), parts, strict=True)) for parts in zip(*found, strict=True)]
        if self.has_mask():
            labels = [result["labels"] for result in results]
            masks = maskrcnn_inference(self._masks(features, [result["boxes"] for result in results], sizes), labels)
            results = [result | {"masks": one} for result, one in zip(results, masks, strict=True)]
        return results


class RCNN(GeneralizedRCNN):
    """torchvision's two stages, for images that are resized, normalised and padded already; see `detection.networks.build` for the call."""

    def __init__(self, backbone: Backbone, num_classes: int, *, rois_per_image: int, has_masks: bool):
        # The images' transform is the loader's.
        heads = Heads(backbone, num_classes, rois_per_image=rois_per_image, has_masks=has_masks)
        super().__init__(backbone, ProposalNetwork(backbone), heads, nn.Identity())
        self.num_classes = num_classes

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: Targets | None = None, words: list[tuple[int, ...]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if targets is not None:
            targets = [target | {"labels": target["labels"] + 1} for target in targets]  # torchvision's background is class 0
            self.rpn.fg_bg_sampler.seeds, self.roi_heads.fg_bg_sampler.seeds = [one[0] for one in words], [one[1] for one in words]
        features = self.backbone(images)
        proposals, losses = self.rpn(ImageList(images, sizes), features, targets)
        if not self.training:
            found = self.roi_heads.detections(features, proposals, sizes)
            return [result | {"labels": result["labels"] - 1} for result in found]
        head_losses = self.roi_heads.losses(features, proposals, sizes, targets)
        return {"loss_rpn_cls": losses["loss_objectness"], "loss_rpn_bbox": losses["loss_rpn_box_reg"], **head_losses}
