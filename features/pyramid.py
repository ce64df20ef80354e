"""A classifier's feature maps, and the feature pyramid on top of them.

Paper: Feature Pyramid Networks for Object Detection (https://arxiv.org/abs/1612.03144); torchvision's, and LSNet's published forms of it."""

from collections import OrderedDict

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

import model
from model.lsnet import LSNet
from model.registration import REGISTERED
from run.errors import InputError, first_line

# timm's families take these options or refuse them: the network itself, whose checkpoints load by name, not a list of its layers
# renamed; images of any size, where attention windows are said to be for one alone.
_TIMM_OPTIONS = ({"feature_cls": "getter", "strict_img_size": False}, {"feature_cls": "getter"}, {})


def _create(name: str, options: dict) -> nn.Module:
    """The features of `name`, with the first of timm's options that its family does not refuse."""
    for extra in _TIMM_OPTIONS:
        try:
            return model.create_model(name, **options, **extra)
        except TypeError as error:
            refused = error
    raise refused


def build_body(name: str, *, pretrained: bool = False) -> nn.Module:
    """The network `name` without heads and drop path: (B, 3, H, W) -> its last four feature maps, of doubling strides from 4 or 8 on.

    InputError where no such network is known, or it has no such maps at any image size."""
    options = {"features_only": True, "out_indices": (-4, -3, -2, -1), "pretrained": pretrained}
    is_ours = name.partition(".")[0] in REGISTERED
    if not is_ours and not timm.is_model(name):
        raise InputError(f"--model {name} is no model that timm or this project knows")
    try:
        body = model.create_model(name, drop_path_rate=0.0, **options) if is_ours else _create(name, options)
        with torch.no_grad():
            body.eval()(torch.zeros(1, 3, 64, 96))
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError, OSError) as error:
        raise InputError(f"--model {name} cannot be a backbone ({first_line(error)}): choose one that gives feature maps of any image") from error
    strides = body.feature_info.reduction()
    if strides not in ([4, 8, 16, 32], [8, 16, 32, 64]):
        raise InputError(f"--model {name} cannot be a backbone: its last feature maps have strides {strides}, a pyramid needs 4, 8, 16, 32 or 8, 16, 32, 64")
    return body.train()


class FinePyramid(FeaturePyramidNetwork):
    """torchvision's pyramid with one map more, of half the finest stride: LSNet's for Mask R-CNN.

    That map is the finest lateral after the top-down pass, enlarged by a transposed convolution and then convolved."""

    def __init__(self, in_channels_list: list[int], out_channels: int):
        super().__init__(in_channels_list, out_channels)
        self.enlarge = nn.ConvTranspose2d(out_channels, out_channels, 2, stride=2)
        self.fine_block = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        for module in (self.enlarge, self.fine_block):
            nn.init.kaiming_uniform_(module.weight, a=1)
            nn.init.zeros_(module.bias)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        laterals = [block(one) for block, one in zip(self.inner_blocks, x.values(), strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + interpolate(laterals[i], size=laterals[i - 1].shape[-2:], mode="nearest")
        maps = [block(one) for block, one in zip(self.layer_blocks, laterals, strict=True)]
        maps.insert(0, self.fine_block(self.enlarge(laterals[0])))
        return OrderedDict((str(i), one) for i, one in enumerate(maps))


class CoarseMaps(ExtraFPNBlock):
    """Coarser maps of the backbone's last one, each by a strided convolution of the one before: RetinaNet's."""

    def __init__(self, in_chs: int, out_chs: int, num_maps: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(in_chs if i == 0 else out_chs, out_chs, 3, stride=2, padding=1) for i in range(num_maps))
        for conv in self.convs:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        coarse = x[-1]
        for conv in self.convs:
            coarse = conv(coarse)
            results, names = [*results, coarse], [*names, str(len(names))]
        return results, names


class Backbone(nn.Module):
    """Body and pyramid: (B, 3, H, W) -> four or five maps (B, channels, h, w) by name, finest first; `strides` tells of what part of the image each is.

    `keeps_statistics`: BatchNorm's running statistics are used and not updated, in training too; its weights learn."""

    def __init__(self, body: nn.Module, pyramid: FeaturePyramidNetwork, *, strides: list[int], keeps_statistics: bool):
        super().__init__()
        self.body = body
        self.fpn = pyramid
        self.strides = strides
        self.keeps_statistics = keeps_statistics
        self.out_channels = pyramid.inner_blocks[0][0].out_channels

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for module in self.body.modules() if self.keeps_statistics else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        laterals = maps[-len(self.fpn.inner_blocks) :]
        return self.fpn(OrderedDict((str(i), one) for i, one in enumerate(laterals)))


def build_backbone(name: str, channels: int, *, kind: str, pretrained: bool = False) -> Backbone:
    """The backbone `name` with the pyramid of `channels` that its strides and the `kind` of network ask for.

    "semantic": the four maps of the backbone's own strides; "rcnn": five of strides 4 to 64 and "retinanet": five of strides 8 to 128,
    whatever the body's. InputError as `build_body`."""
    body = build_body(name, pretrained=pretrained)
    in_chs, strides = body.feature_info.channels(), body.feature_info.reduction()
    is_fine, num_maps = strides[0] == 4, 5
    if kind == "semantic":
        pyramid, first, num_maps = FeaturePyramidNetwork(in_chs, channels), strides[0], 4
    elif kind == "retinanet":
        in_chs = in_chs[1:] if is_fine else in_chs
        pyramid, first = FeaturePyramidNetwork(in_chs, channels, CoarseMaps(in_chs[-1], channels, 5 - len(in_chs))), 8
    else:
        pyramid, first = FeaturePyramidNetwork(in_chs, channels, LastLevelMaxPool()) if is_fine else FinePyramid(in_chs, channels), 4
    keeps_statistics = isinstance(getattr(body, "model", None), LSNet)
    return Backbone(body, pyramid, strides=[first * 2**i for i in range(num_maps)], keeps_statistics=keeps_statistics)
