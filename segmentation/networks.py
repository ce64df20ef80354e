"""Semantic FPN: a backbone of ours or timm's, its pyramid, and a head that sums what it sees at every scale; the loss.

Papers: Panoptic Feature Pyramid Networks (https://arxiv.org/abs/1901.02446); head and loss as published with RecNeXt, RepNeXt and LSNet."""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from features.pyramid import Backbone, build_backbone
from loading.transfer import sent

IGNORED = -1  # label of pixels that teach nothing and are not counted
DROPOUT = 0.1
HEAD_CHANNELS = 128


def enlarged(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(B, C, h, w) resized to `size` (height, width), bilinear; as they are where they have it."""
    return maps if maps.shape[-2:] == tuple(size) else interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def dropped_channels(words: list[int], num_channels: int) -> Tensor:
    """(B, num_channels, 1, 1) factors of dropout that leaves out whole channels: those of each image depend on its word alone."""
    draws = [torch.rand(num_channels, generator=torch.Generator().manual_seed(word)) for word in words]
    return torch.stack(draws).ge(DROPOUT).float().div_(1 - DROPOUT)[..., None, None]


def _conv_block(in_chs: int) -> nn.Sequential:
    """A convolution with BatchNorm and ReLU, by the published names of their weights."""
    conv = nn.Conv2d(in_chs, HEAD_CHANNELS, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(HEAD_CHANNELS), activate=nn.ReLU(inplace=True)))


class SemanticHead(nn.Module):
    """Maps (B, in_chs, h, w), finest first -> logits (B, num_classes, h, w) at the finest map's size.

    Each map goes through as many convolutions as it has doublings to the finest one, each followed by an enlargement; the finest goes
    through one. What comes out is summed."""

    def __init__(self, in_chs: int, strides: list[int], num_classes: int):
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for stride in strides:
            num_doublings, layers = int(math.log2(stride / strides[0])), []
            for i in range(max(1, num_doublings)):
                layers.append(_conv_block(HEAD_CHANNELS if i else in_chs))
                layers += [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)] if num_doublings else []
            self.scale_heads.append(nn.Sequential(*layers))
        self.conv_seg = nn.Conv2d(HEAD_CHANNELS, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps: list[Tensor], words: list[int] | None) -> Tensor:
        total = self.scale_heads[0](maps[0])
        for head, one in zip(self.scale_heads[1:], maps[1:], strict=True):
            total = total + enlarged(head(one), total.shape[-2:])  # which differ where a map's side is odd
        if self.training:
            total = total * sent(dropped_channels(words, HEAD_CHANNELS), total.device).to(total.dtype)
        return self.conv_seg(total)


class SemanticFPN(nn.Module):
    """Normalised images (B, 3, H, W) -> logits (B, num_classes, h, w) at the stride of the finest map: 4, or 8 on backbones of that stride.

    Training, it takes `words`, for each image the random word of its dropout."""

    def __init__(self, backbone: Backbone, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = SemanticHead(backbone.out_channels, backbone.strides, num_classes)

    @property
    def num_classes(self) -> int:
        return self.head.conv_seg.out_channels

    def forward(self, images: Tensor, words: list[int] | None = None) -> Tensor:
        return self.head(list(self.backbone(images).values()), words)


def build(backbone: str, num_classes: int, *, channels: int = 256, pretrained: bool = False) -> SemanticFPN:
    """Semantic FPN on the backbone `backbone`, a model of ours or timm's; nothing in it is frozen.

    `channels` of the pyramid, of which the published networks have 256; `pretrained`: with timm's weights of the backbone. InputError where
    the backbone is unknown or has no feature maps for a pyramid."""
    return SemanticFPN(build_backbone(backbone, channels, kind="semantic", pretrained=pretrained), num_classes)


def losses(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The published losses by name, of logits (B, C, h, w) and labels (B, H, W): `decode.loss_ce`, and for the eye alone `decode.acc_seg`.

    The cross-entropy at the labels' size; pixels of label `IGNORED` cost nothing but count in the mean. The accuracy is in percent of
    the other pixels."""
    logits, labels = enlarged(logits.float(), labels.shape[-2:]), labels.long()
    loss = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()
    is_counted = labels != IGNORED
    with torch.no_grad():
        right = (logits.argmax(1) == labels).sum()
        accuracy = 100 * right / is_counted.sum().clamp(min=1)
    return {"decode.loss_ce": loss, "decode.acc_seg": accuracy}
