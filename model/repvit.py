"""RepViT-M0.6, the size below timm's RepViTs: a mobile convnet with the block structure of a vision transformer.

Paper: RepViT: Revisiting Mobile CNN From ViT Perspective (https://arxiv.org/abs/2307.09283)
Source: https://github.com/THU-MIG/RepViT (Apache-2.0); state-dict names are the published ones, which timm's RepViT has renamed.
"""

import torch
from timm.layers import SqueezeExcite, calculate_drop_path_rates
from torch import Tensor, nn

from model.layers import (
    LEVIT_CONV_NAMES,
    LEVIT_HEAD_NAMES,
    ChannelScale,
    ConvNorm,
    NormLinear,
    Residual,
    add_identity_and_1x1,
    average_heads,
    average_pool,
    fold_norm_after,
)
from model.nets import PooledNet, stage_patterns
from model.registration import pretrained_cfg, register


def _conv_norm(in_chs: int, out_chs: int, kernel_size: int = 1, **settings) -> ConvNorm:
    return ConvNorm(in_chs, out_chs, kernel_size, names=LEVIT_CONV_NAMES, **settings)


class RepVGGDW(nn.Module):
    """BatchNorm of the sum of depthwise 3x3 and 1x1 convolutions and the input: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = _conv_norm(dim, dim, 3, groups=dim)
        self.conv1 = ChannelScale(dim)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + self.conv1(x) + x)

    def fuse(self) -> nn.Conv2d:
        return fold_norm_after(add_identity_and_1x1(self.conv.fuse(), self.conv1), self.bn)


class Block(nn.Module):
    """Token mixer with optional squeeze-excite, then a residual MLP: (B, in_chs, H, W) -> (B, out_chs, H / stride, W / stride)."""

    def __init__(self, in_chs: int, out_chs: int, *, use_se: bool, stride: int, drop_path_rate: float):
        super().__init__()
        se = SqueezeExcite(in_chs, rd_ratio=0.25) if use_se else nn.Identity()
        if stride == 2:
            self.token_mixer = nn.Sequential(_conv_norm(in_chs, in_chs, 3, stride=2, groups=in_chs), se, _conv_norm(in_chs, out_chs))
        else:
            self.token_mixer = nn.Sequential(RepVGGDW(in_chs), se)
        mlp = nn.Sequential(_conv_norm(out_chs, 2 * out_chs), nn.GELU(), _conv_norm(2 * out_chs, out_chs, norm_init=0.0))
        self.channel_mixer = Residual(mlp, drop_path_rate=drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(self.token_mixer(x))


class Classifier(nn.Module):
    """Class head and, with `distillation`, distillation head: (B, dim) -> (B, num_classes), the mean of both.

    While training with `distillation` it returns the pair (class logits, distillation logits); scripted, the mean there too, as timm's do."""

    def __init__(self, dim: int, num_classes: int, *, distillation: bool):
        super().__init__()
        self.num_classes = num_classes
        self.distillation = distillation
        self.classifier = NormLinear(dim, num_classes, names=LEVIT_HEAD_NAMES) if num_classes > 0 else nn.Identity()
        # None, and not absent, for TorchScript looks at all that may run.
        self.classifier_dist = NormLinear(dim, num_classes, names=LEVIT_HEAD_NAMES) if distillation and num_classes > 0 else None

    def forward(self, x: Tensor):
        logits = self.classifier(x)
        if self.classifier_dist is not None:
            logits_dist = self.classifier_dist(x)
            if self.training and self.distillation and not torch.jit.is_scripting():
                return logits, logits_dist
            logits = (logits + logits_dist) / 2
        return logits

    def fuse(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        head = self.classifier.fuse()
        return average_heads(head, self.classifier_dist.fuse()) if self.classifier_dist is not None else head


class RepViT(PooledNet):
    """RepViT: (B, in_chans, H, W) -> (B, num_classes), for H and W from 32 up.

    `blocks` lists each block's (channels, squeeze-excite, stride); `drop_path_rate` is reached by the last one, linearly from 0."""

    block_type = Block

    def __init__(
        self,
        *,
        blocks: tuple[tuple[int, int, int], ...],
        in_chans: int = 3,
        num_classes: int = 1000,
        distillation: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        stage_ends = [i for i in range(1, len(blocks)) if blocks[i][2] == 2] + [len(blocks)]
        features = [(blocks[end - 1][0], 4 * 2**i, f"features.{end}", end + 1) for i, end in enumerate(stage_ends)]
        super().__init__(in_chans=in_chans, features=features, num_features=blocks[-1][0], distillation=distillation)
        dim = blocks[0][0]
        layers = [nn.Sequential(_conv_norm(in_chans, dim // 2, 3, stride=2), nn.GELU(), _conv_norm(dim // 2, dim, 3, stride=2))]
        rates = calculate_drop_path_rates(drop_path_rate, len(blocks))
        for (out_chs, use_se, stride), rate in zip(blocks, rates, strict=True):
            layers.append(Block(dim, out_chs, use_se=bool(use_se), stride=stride, drop_path_rate=rate))
            dim = out_chs
        self.features = nn.Sequential(*layers)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def trunk(self) -> list[nn.Module]:
        return list(self.features)

    def cut_trunk(self, length: int) -> None:
        self.features = self.features[:length]

    def _build_heads(self, num_classes: int) -> tuple[nn.Module, ...]:
        self.classifier = Classifier(self.num_features, num_classes, distillation=self.distillation)
        return (self.classifier,)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        return {"stem": r"^features\.0\.", "blocks": stage_patterns("features", self.feature_depths) if coarse else r"^features\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, num_features, h, w): the last block's feature map."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self._run_trunk(x)
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False):
        """Logits of a feature map or, with `pre_logits`, its pooled features (B, num_features)."""
        if self.global_pool == "avg":
            x = average_pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.classifier(x)


# fmt: off
VARIANTS = {  #               channels, squeeze-excite, stride
    "repvit_m0_6": {"blocks": (
        (40, 1, 1), (40, 0, 1),
        (80, 0, 2), (80, 1, 1), (80, 0, 1),
        (160, 0, 2), *((160, 1, 1), (160, 0, 1)) * 4, (160, 0, 1),
        (320, 0, 2), (320, 1, 1),
    )},
}
# fmt: on
TAGS = {"in1k": "classifier.classifier.l", "dist_in1k": ("classifier.classifier.l", "classifier.classifier_dist.l")}
PRETRAINED = {f"{name}.{tag}": pretrained_cfg("features.0.0.c", classifier) for name in VARIANTS for tag, classifier in TAGS.items()}
register(VARIANTS, RepViT, PRETRAINED, distillation_tags=tuple(TAGS))
