"""ReXNet V1 and ReXNet-lite: inverted bottlenecks whose channels grow linearly with depth.

Paper: Rethinking Channel Dimensions for Efficient Model Design (https://arxiv.org/abs/2007.00992)
Source: https://github.com/clovaai/rexnet (MIT); state-dict names are the published ones, which timm's ReXNet has renamed.
Differences: the published `features` end with a pooling layer without state; here `forward_head` pools.
"""

import math

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from model.layers import FoldingSequential, keep_layout
from model.nets import PooledNet, stage_patterns
from model.registration import pretrained_cfg, register

GROUP_DEPTHS = (1, 2, 2, 3, 3, 5)  # bottlenecks per group
GROUP_STRIDES = (1, 2, 2, 2, 1, 2)  # of each group's first
FIRST_SE_GROUP = 2
SE_RATIO = 12
FIRST_CHS = 16  # of the first bottleneck at width 1
NUM_STEM_LAYERS = 3  # convolution, BatchNorm, activation


class SqueezeExcite(nn.Module):
    """Channel weights from the pooled map, with a BatchNorm inside: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        hidden_dim = dim // SE_RATIO
        self.fc = FoldingSequential(
            nn.Conv2d(dim, hidden_dim, 1), nn.BatchNorm2d(hidden_dim), nn.ReLU(inplace=True), nn.Conv2d(hidden_dim, dim, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(keep_layout(x).mean((2, 3), keepdim=True))


class Bottleneck(nn.Module):
    """Inverted bottleneck: (B, in_chs, H, W) -> (B, out_chs, H / stride, W / stride).

    With stride 1 and in_chs <= out_chs, the input is added to the first `in_chs` channels of the output."""

    def __init__(self, in_chs: int, out_chs: int, *, expansion: int, stride: int, use_se: bool, act_layer: type[nn.Module], drop_path_rate: float):
        super().__init__()
        self.has_shortcut = stride == 1 and in_chs <= out_chs
        self.in_chs = in_chs
        dim = in_chs * expansion
        expand = [nn.Conv2d(in_chs, dim, 1, bias=False), nn.BatchNorm2d(dim), act_layer(inplace=True)] if expansion != 1 else []
        self.out = FoldingSequential(
            *expand,
            nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False),
            nn.BatchNorm2d(dim),
            *([SqueezeExcite(dim)] if use_se else []),
            nn.ReLU6(inplace=True),
            nn.Conv2d(dim, out_chs, 1, bias=False),
            nn.BatchNorm2d(out_chs),
        )
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        out = self.out(x)
        if self.has_shortcut:
            out = self.drop_path(out)
            out[:, : self.in_chs] += x
        return out


class ReXNet(PooledNet):
    """Skeleton of both ReXNets: (B, in_chans, H, W) -> (B, num_classes), for H and W from 32 up.

    A subclass gives the channels of the stem, of the bottlenecks and before pooling. `head_chs` is the width of a hidden layer of the head, if
    it has one. `drop_path_rate` is reached by the last bottleneck, linearly from 0."""

    block_type = Bottleneck

    def __init__(
        self,
        *,
        stem_chs: int,
        block_chs: list[int],
        last_chs: int,
        depth_mult: float,
        act_layer: type[nn.Module],
        use_se: bool,
        head_chs: int | None,
        in_chans: int,
        num_classes: int,
        drop_rate: float,
        drop_path_rate: float,
        global_pool: str,
    ):
        depths = group_depths(depth_mult)
        groups = [group for group, depth in enumerate(depths) for _ in range(depth)]
        strides = [GROUP_STRIDES[group] if i == 0 or groups[i - 1] != group else 1 for i, group in enumerate(groups)]
        # A map of a resolution is complete before the next strided bottleneck; the first one, at half of the image, is left out.
        ends = [i for i in range(1, len(groups)) if strides[i] == 2][1:] + [len(groups)]
        features = [(block_chs[end - 1], 4 * 2**i, f"features.{end - 1 + NUM_STEM_LAYERS}", end + NUM_STEM_LAYERS) for i, end in enumerate(ends)]
        super().__init__(in_chans=in_chans, features=features, num_features=last_chs, distillation=False)
        self.head_hidden_size = head_chs or last_chs
        self.head_chs = head_chs
        self.drop_rate = drop_rate
        layers = [nn.Conv2d(in_chans, stem_chs, 3, 2, 1, bias=False), nn.BatchNorm2d(stem_chs), act_layer(inplace=True)]
        in_chs = stem_chs
        for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, len(groups))):
            settings = {"expansion": 1 if i == 0 else 6, "stride": strides[i], "use_se": use_se and groups[i] >= FIRST_SE_GROUP}
            layers.append(Bottleneck(in_chs, block_chs[i], act_layer=act_layer, drop_path_rate=rate, **settings))
            in_chs = block_chs[i]
        layers += [nn.Conv2d(in_chs, last_chs, 1, bias=False), nn.BatchNorm2d(last_chs), act_layer(inplace=True)]
        self.features = FoldingSequential(*layers)
        self.reset_classifier(num_classes, global_pool)

    def trunk(self) -> list[nn.Module]:
        return list(self.features)

    def cut_trunk(self, length: int) -> None:
        self.features = self.features[:length]
        self.head_chs = None

    def _build_heads(self, num_classes: int) -> tuple[nn.Module, ...]:
        hidden = []
        dim = self.num_features
        if self.head_chs:
            # Trained layers stay when the classes change: what they make of the pooled map are the network's features.
            is_built = hasattr(self, "output")
            hidden = self.output[:-2] if is_built else [nn.Conv2d(dim, self.head_chs, 1), nn.BatchNorm2d(self.head_chs), nn.ReLU6(inplace=True)]
            dim = self.head_chs
        self.output = FoldingSequential(*hidden, nn.Dropout(self.drop_rate), nn.Conv2d(dim, num_classes, 1) if num_classes > 0 else nn.Identity())
        return (self.output,)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        num_layers = len(self.features)
        last = next(i for i in range(num_layers, 0, -1) if isinstance(self.features[i - 1], Bottleneck))
        if coarse:
            blocks = stage_patterns("features", [*self.feature_depths[:-1], num_layers])
        else:  # the convolution behind the bottlenecks and its BatchNorm make one layer
            blocks = [(r"^features\.(\d+)\.out", None), (r"^features\.\d+", (last,))]
        return {"stem": rf"^features\.[0-{NUM_STEM_LAYERS - 1}]\.", "blocks": blocks}

    def get_classifier(self) -> nn.Module:
        return self.output[-1]

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, num_features, h, w): the feature map before pooling."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self._run_trunk(x)
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of a feature map or, with `pre_logits`, what the last layer sees (B, head_hidden_size)."""
        if self.global_pool == "":
            return x
        x = keep_layout(x).mean((2, 3), keepdim=True)
        for i, layer in enumerate(self.output):
            if not pre_logits or i < len(self.output) - 1:
                x = layer(x)
        return x.flatten(1)


def group_depths(depth_mult: float) -> list[int]:
    """Bottlenecks per group."""
    return [math.ceil(depth * depth_mult) for depth in GROUP_DEPTHS]


def linear_channels(first: float, growth: float, num_blocks: int) -> list[float]:
    """Channels of each bottleneck at width 1, before rounding: the paper's linear rule."""
    return [first + growth * i for i in range(num_blocks)]


class ReXNetV1(ReXNet):
    """ReXNet V1 of any width and depth: (B, in_chans, H, W) -> (B, num_classes)."""

    def __init__(
        self,
        *,
        width_mult: float = 1.0,
        depth_mult: float = 1.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        narrow = min(width_mult, 1.0)  # networks below width 1 keep the stem and the first bottleneck of width 1
        num_blocks = sum(group_depths(depth_mult))
        planes = linear_channels(FIRST_CHS / narrow, 180 / num_blocks, num_blocks)
        super().__init__(
            stem_chs=round(32 / narrow * width_mult),
            block_chs=[round(chs * width_mult) for chs in planes],
            last_chs=int(1280 * width_mult),
            depth_mult=depth_mult,
            act_layer=nn.SiLU,
            use_se=True,
            head_chs=None,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            global_pool=global_pool,
        )


def multiple_of_8(chs: int) -> int:
    """The multiple of 8 nearest to `chs`, or the next one where that would lose more than a tenth; at least 8."""
    rounded = max(8, (chs + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * chs else rounded


class ReXNetV1Lite(ReXNet):
    """ReXNet-lite of any width, without squeeze-excite: (B, in_chans, H, W) -> (B, num_classes)."""

    def __init__(
        self,
        *,
        multiplier: float = 1.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        num_blocks = sum(GROUP_DEPTHS)
        planes = linear_channels(FIRST_CHS, 164 / (num_blocks - 1), num_blocks)
        super().__init__(
            stem_chs=multiple_of_8(round(32 * multiplier)),
            block_chs=[multiple_of_8(round(chs * multiplier)) for chs in planes],
            last_chs=int(1280 * max(multiplier, 1.0)),
            depth_mult=1.0,
            act_layer=nn.ReLU6,
            use_se=False,
            head_chs=1024,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            global_pool=global_pool,
        )


VARIANTS = {"rexnetv1": {}} | {f"rexnetv1_{width}".replace(".", "_"): {"width_mult": width} for width in (0.9, 1.0, 1.3, 1.5, 2.0, 2.2, 3.0)}
LITE_VARIANTS = {"rexnetv1_lite": {}} | {f"rexnetv1_lite_{width}".replace(".", "_"): {"multiplier": width} for width in (1.0, 1.3, 1.5, 2.0)}
register(VARIANTS, ReXNetV1, {name: pretrained_cfg("features.0", "output.1", license="mit") for name in VARIANTS}, has_distillation=False)
register(LITE_VARIANTS, ReXNetV1Lite, {name: pretrained_cfg("features.0", "output.4", license="mit") for name in LITE_VARIANTS}, has_distillation=False)
