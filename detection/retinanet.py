"""RetinaNet on torchvision's classes: what the published detectors do otherwise.

Paper: Focal Loss for Dense Object Detection (https://arxiv.org/abs/1708.02002)."""

from torch import Tensor
from torch.nn.functional import l1_loss
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import sigmoid_focal_loss

from detection.matching import MAX_OBJECTS, MIN_SCORE, RATIOS, Anchors, shared_count
from features.pyramid import Backbone

ANCHOR_SIZES = tuple(4 * 2 ** (i / 3) for i in range(3))  # strides


class Head(RetinaNetHead):
    """torchvision's, whose losses are divided by the number of positive anchors in the whole batch, not in each image."""

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        """Focal loss (gamma 2, alpha 0.25) over the anchors that are positive or negative, L1 over the positive ones."""
        between, coder = self.classification_head.BETWEEN_THRESHOLDS, self.regression_head.box_coder
        loss_cls = loss_bbox = 0.0
        for target, logits, deltas, boxes, matched in zip(
            targets, head_outputs["cls_logits"], head_outputs["bbox_regression"], anchors, matched_idxs, strict=True
        ):
            is_used, is_positive = matched != between, matched >= 0
            objects = matched[is_positive]
            wanted = logits.new_zeros(logits.shape)
            wanted[is_positive, target["labels"][objects]] = 1.0
            loss_cls = loss_cls + sigmoid_focal_loss(logits[is_used], wanted[is_used], reduction="sum")
            loss_bbox = loss_bbox + l1_loss(deltas[is_positive], coder.encode_single(target["boxes"][objects], boxes[is_positive]), reduction="sum")
        count = shared_count(sum((matched >= 0).sum() for matched in matched_idxs), anchors[0].device)
        return {"loss_cls": loss_cls / count, "loss_bbox": loss_bbox / count}

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {name: one.float() for name, one in super().forward(x).items()}  # in full precision under autocast too


class RetinaNet(TorchvisionRetinaNet):
    """torchvision's, for images that are resized, normalised and padded already; see `detection.networks.build` for the call."""

    def __init__(self, backbone: Backbone, num_classes: int):
        anchors = Anchors([tuple(size * stride for size in ANCHOR_SIZES) for stride in backbone.strides], backbone.strides)
        head = Head(backbone.out_channels, len(RATIOS) * len(ANCHOR_SIZES), num_classes)
        super().__init__(backbone, num_classes, anchor_generator=anchors, head=head, score_thresh=MIN_SCORE, detections_per_img=MAX_OBJECTS)
        del self.transform  # the loader's
        self.num_classes = num_classes

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None = None, words: list[tuple[int, ...]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        features = list(self.backbone(images).values())
        outputs = self.head(features)
        anchors = self.anchor_generator(ImageList(images, sizes), features)
        if self.training:
            return self.compute_loss(targets, outputs, anchors)  # nothing is sampled, so no random words are needed
        lengths = [one.shape[2] * one.shape[3] * len(RATIOS) * len(ANCHOR_SIZES) for one in features]
        by_map = {name: list(one.split(lengths, dim=1)) for name, one in outputs.items()}
        return self.postprocess_detections(by_map, [list(one.split(lengths)) for one in anchors], sizes)
