"""LSNet: large kernels see, small ones aggregate; a network for small budgets.

Paper: LSNet: See Large, Focus Small (https://arxiv.org/abs/2503.23135)
Source: https://github.com/jameslahm/lsnet (Apache-2.0); state-dict names are the published ones.
Differences: `img_size` builds the tables of attention biases for other sizes than 224, for training; feature maps are to be had at any
size, logits at the built one alone; a `_distill` network built without distillation keeps both heads and trains their mean.
"""

import torch
from timm.layers import SqueezeExcite, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn
from torch.nn.functional import interpolate

from model.layers import (
    LEVIT_CONV_NAMES,
    LEVIT_HEAD_NAMES,
    ConvNorm,
    NormLinear,
    Residual,
    ScaleShift,
    add_identity_and_1x1,
    average_heads,
    average_pool,
    dense,
    keep_layout,
)
from model.mixers import matmul_laid_out_like
from model.nets import Blocks, PooledNet
from model.registration import pretrained_cfg, register
from model.ska import ska

GROUP_REPEATS = 8  # channels that share one of LSConv's small kernels
NUM_TAPS = 9  # of a small kernel, 3x3


def _conv_norm(in_chs: int, out_chs: int, kernel_size: int = 1, **settings) -> ConvNorm:
    return ConvNorm(in_chs, out_chs, kernel_size, names=LEVIT_CONV_NAMES, **settings)


class LargeKernelPerception(nn.Module):
    """Small kernels from what a large one sees: (B, dim, H, W) -> (B, dim / 8, 9, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.num_groups = dim // GROUP_REPEATS
        self.cv1 = _conv_norm(dim, dim // 2)
        self.act = nn.ReLU()
        self.cv2 = _conv_norm(dim // 2, dim // 2, 7, groups=dim // 2)
        self.cv3 = _conv_norm(dim // 2, dim // 2)
        self.cv4 = nn.Conv2d(dim // 2, NUM_TAPS * self.num_groups, 1)
        self.norm = nn.GroupNorm(self.num_groups, NUM_TAPS * self.num_groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.cv3(self.cv2(self.act(self.cv1(x)))))
        return self.norm(self.cv4(x)).unflatten(1, [self.num_groups, -1])


class LSConv(nn.Module):
    """Convolution with small kernels that a large one chose, and the input: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.lkp = LargeKernelPerception(dim)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(ska(x, self.lkp(x))) + x

    def fuse(self) -> "LSConv":
        """The kernels depend on the data and eight channels share one, so that no weight can take the BatchNorm up."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.bn = ScaleShift(self.bn)
        return self


class RepVGGDW(nn.Module):
    """Depthwise 3x3 and 1x1 convolutions and the input, summed: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = _conv_norm(dim, dim, 3, groups=dim)
        self.conv1 = _conv_norm(dim, dim, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv1(x) + x

    def fuse(self) -> nn.Conv2d:
        return add_identity_and_1x1(self.conv.fuse(), self.conv1.fuse())


def attention_bias_index(resolution: tuple[int, int]) -> tuple[Tensor, int]:
    """(N, N) index of each pair of the N positions' offset (|dy|, |dx|) among the distinct ones, and their number.

    Offsets are numbered by first appearance, pairs being in row-major order."""
    height, width = resolution
    positions = [(y, x) for y in range(height) for x in range(width)]
    numbers: dict[tuple[int, int], int] = {}
    index = [numbers.setdefault((abs(y1 - y2), abs(x1 - x2)), len(numbers)) for y1, x1 in positions for y2, x2 in positions]
    return torch.tensor(index).view(len(positions), len(positions)), len(numbers)


class Attention(nn.Module):
    """Softmax attention with a bias per head and offset: (B, dim, H, W) -> (B, dim, H, W).

    The biases are for maps of `resolution`; on another their table is resized as a picture, bicubically, as the published detectors do."""

    def __init__(self, dim: int, *, num_heads: int, key_dim: int, resolution: tuple[int, int]):
        super().__init__()
        self.num_heads = num_heads
        self.scale = key_dim**-0.5
        self.resolution = resolution
        self.split_dims = [key_dim * num_heads, key_dim * num_heads, dim]
        self.qkv = _conv_norm(dim, sum(self.split_dims))
        self.proj = nn.Sequential(nn.ReLU(), _conv_norm(dim, dim, norm_init=0.0))
        self.dw = _conv_norm(key_dim * num_heads, key_dim * num_heads, 3, groups=key_dim * num_heads)
        index, num_offsets = attention_bias_index(resolution)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, num_offsets))
        self.register_buffer("attention_bias_idxs", index)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        if torch.jit.is_tracing():  # a trace is of one size, which it gives as tensors
            height, width = int(height), int(width)
        q, k, v = keep_layout(self.qkv(x)).split(self.split_dims, dim=1)
        shape = [batch, self.num_heads, -1, height * width]
        q, k, v = keep_layout(self.dw(dense(q))).reshape(shape), k.reshape(shape), v.reshape(shape)
        biases = self.attention_biases[:, self.attention_bias_idxs]
        if (height, width) != self.resolution:
            biases = interpolate(biases.unsqueeze(0), [height * width, height * width], mode="bicubic", align_corners=False).squeeze(0)
        scores = (q * self.scale).transpose(-2, -1) @ k + biases
        out = matmul_laid_out_like(v, v, scores.softmax(-1).transpose(-2, -1))
        return self.proj(out.reshape(batch, dim, height, width))


class FFN(nn.Module):
    """Two 1x1 convolutions: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.pw1 = _conv_norm(dim, 2 * dim)
        self.act = nn.ReLU()
        self.pw2 = _conv_norm(2 * dim, dim, norm_init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class Block(nn.Module):
    """Token mixer, squeeze-excite (an Identity for every other mixer), FFN: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, mixer: nn.Module, dim: int, *, use_se: bool, drop_path_rate: float):
        super().__init__()
        self.mixer = mixer
        self.se = SqueezeExcite(dim, rd_ratio=0.25) if use_se else nn.Identity()
        self.ffn = Residual(FFN(dim), drop_path_rate=drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.se(self.mixer(x)))


def _halve(size: tuple[int, int], times: int) -> tuple[int, int]:
    """Height and width after so many strided convolutions."""
    return -(-size[0] >> times), -(-size[1] >> times)  # rounded up, in a form that TorchScript takes for whole numbers


class LSNet(PooledNet):
    """LSNet: (B, in_chans, H, W) -> (B, num_classes), for H and W that shrink to the same last map as `img_size` (193 to 256 for 224).

    Feature maps (`features_only`, `forward_intermediates`) are to be had at any size, with the attention's biases resized.

    `dims` and `depths` give each stage's channels and blocks. `head_dist` exists with `distillation` or `has_head_dist`; training returns the
    pair of logits with `distillation`, else, and scripted, their mean. `drop_path_rate` is reached by the last block, linearly from 0."""

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        num_heads: int = 4,
        key_dim: int = 16,
        img_size: int | tuple[int, int] = 224,
        has_head_dist: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        distillation: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        features = [(dim, 8 * 2**i, f"blocks{i + 1}", i + 2) for i, dim in enumerate(dims)]
        super().__init__(in_chans=in_chans, features=features, num_features=dims[-1], distillation=distillation)
        self.has_head_dist = has_head_dist or distillation
        dim = dims[0]
        self.patch_embed = nn.Sequential(
            _conv_norm(in_chans, dim // 4, 3, stride=2),
            nn.ReLU(),
            _conv_norm(dim // 4, dim // 2, 3, stride=2),
            nn.ReLU(),
            _conv_norm(dim // 2, dim, 3, stride=2),
        )
        self.resolution = resolution = _halve(to_2tuple(img_size), 6)  # of the last map
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, dim in enumerate(dims):
            layers = [_conv_norm(dims[i - 1], dims[i - 1], 3, stride=2, groups=dims[i - 1]), _conv_norm(dims[i - 1], dim)] if i > 0 else []
            for depth, rate in enumerate(rates[i]):
                use_se = depth % 2 == 0
                if use_se:
                    mixer = RepVGGDW(dim)
                elif i == len(dims) - 1:
                    mixer = Residual(Attention(dim, num_heads=num_heads, key_dim=key_dim, resolution=resolution), drop_path_rate=rate)
                else:
                    mixer = LSConv(dim)
                layers.append(Block(mixer, dim, use_se=use_se, drop_path_rate=rate))
            self.add_module(f"blocks{i + 1}", Blocks(*layers))
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay spares."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    def trunk(self) -> list[nn.Module]:
        return [self.patch_embed, self.blocks1, self.blocks2, self.blocks3, self.blocks4]

    def cut_trunk(self, length: int) -> None:
        for i in range(length, 5):
            setattr(self, f"blocks{i}", nn.Identity())

    def _build_heads(self, num_classes: int) -> tuple[nn.Module, ...]:
        heads = tuple(
            NormLinear(self.num_features, num_classes, names=LEVIT_HEAD_NAMES) if num_classes > 0 else nn.Identity() for _ in range(1 + self.has_head_dist)
        )
        self.head, self.head_dist = heads[0], heads[1] if self.has_head_dist else None
        return heads

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        # The two convolutions that downsample go with the block behind them.
        by_block = [(r"^blocks([2-4])\.[01]\.", (2,)), (r"^blocks(\d)\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": r"^blocks(\d)" if coarse else by_block}

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether training returns the pair of logits; ValueError where there is no head for it."""
        if enable and self.head_dist is None:
            raise ValueError("this LSNet has no distillation head: build it with distillation=True")
        self.distillation = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, num_features, h, w): the last stage's feature map. ValueError where the images are of another size than the biases are for."""
        height, width = _halve((x.shape[2], x.shape[3]), 6)
        if (height, width) != self.resolution:
            raise ValueError(
                f"the biases of this network's attention are for maps of {self.resolution[0]}x{self.resolution[1]}, not {height}x{width}: "
                "resize the images to the network's img_size (224), or train one with img_size=(height, width)"
            )
        x = self.patch_embed(x)
        return self.blocks4(self.blocks3(self.blocks2(self.blocks1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False):
        """Logits of a feature map or, with `pre_logits`, its pooled features (B, num_features)."""
        if self.global_pool == "avg":
            x = average_pool(x)
        x = self.head_drop(x)
        if pre_logits:
            return x
        logits = self.head(x)
        if self.head_dist is None:
            return logits
        logits_dist = self.head_dist(x)
        if self.training and self.distillation and self.num_classes > 0 and not torch.jit.is_scripting():
            return logits, logits_dist
        return (logits + logits_dist) / 2

    def fuse(self) -> "LSNet":
        if self.head_dist is not None and isinstance(self.head, NormLinear):
            self.head = average_heads(self.head.fuse(), self.head_dist.fuse())
        self.head_dist = None
        return self


BASE_VARIANTS = {  #  channels per stage             blocks per stage
    "lsnet_t": {"dims": (64, 128, 256, 384), "depths": (0, 2, 8, 10)},
    "lsnet_s": {"dims": (96, 192, 320, 448), "depths": (1, 2, 8, 10)},
    "lsnet_b": {"dims": (128, 256, 384, 512), "depths": (4, 6, 8, 10)},
}
DISTILL_VARIANTS = {f"{name}_distill": {**settings, "has_head_dist": True} for name, settings in BASE_VARIANTS.items()}
SETTINGS = {"first_conv": "patch_embed.0.c", "pool_size": (4, 4), "fixed_input_size": True}
PRETRAINED = {f"{name}.in1k": pretrained_cfg(classifier="head.l", hf_hub_id=f"jameslahm/{name}", **SETTINGS) for name in BASE_VARIANTS}
PRETRAINED |= {
    key: pretrained_cfg(classifier=("head.l", "head_dist.l"), hf_hub_id=f"jameslahm/{name}_distill", **SETTINGS)
    for name in BASE_VARIANTS
    for key in (f"{name}.dist_in1k", f"{name}_distill.dist_in1k")
}
register(BASE_VARIANTS, LSNet, PRETRAINED, distillation_tags=("in1k", "dist_in1k"))
register(DISTILL_VARIANTS, LSNet, {}, distillation_tags=("dist_in1k", "dist_in1k"))
