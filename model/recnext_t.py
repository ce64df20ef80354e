"""RecNeXt-T, -S and -B: attention on a quarter of the channels, behind a reparametrised depthwise convolution.

In the `share_channel` variants, every fifth block of the last stage mixes tokens with what the four before it attended to.

Paper: RecConv: Efficient Recursive Convolutions for Multi-Frequency Representations (https://arxiv.org/abs/2412.19628)
Source: https://github.com/suous/RecNeXt (Apache-2.0); state-dict names are the published ones.
"""

import math

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from model.layers import ConvNorm, add_identity_and_1x1, dense, keep_layout
from model.mixers import build_attention, build_rec_attention
from model.nets import Blocks, Stage, StagedNet, mlp
from model.recompute import recomputed
from model.registration import DISTILLATION_TAGS, register, staged_pretrained_cfgs

SHARE_EVERY = 5  # blocks of the last stage, of which the last one shares


class RepMixer(nn.Module):
    """Depthwise 3x3 and 1x1 convolutions and the input, summed: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.lk = ConvNorm(dim, dim, 3, groups=dim, bias=True)
        self.sk = ConvNorm(dim, dim, 1, groups=dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lk(x) + self.sk(x) + x

    def fuse(self) -> nn.Conv2d:
        return add_identity_and_1x1(self.lk.fuse(), self.sk.fuse())


class PartialAttention(nn.Module):
    """Attention on the first quarter of the channels: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int, *, is_recursive: bool, kernel: str):
        super().__init__()
        self.split_dims = [dim // 4, dim - dim // 4]
        attn_dim = dim // 4
        if is_recursive:
            self.attn = build_rec_attention(attn_dim, kernel=kernel, bias=True)
        else:
            self.attn = build_attention(attn_dim, qk_dim=attn_dim // 2, qk_groups=1, kernel=kernel, bias=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, dim, H, W) -> the mixed map, and its part from the attention (B, dim / 4, H, W)."""
        attended, passed = x.split(self.split_dims, dim=1)
        attended = keep_layout(self.attn(dense(attended)))
        return torch.cat((attended, passed), dim=1), attended


class Block(nn.Module):
    """Depthwise convolution, then a residual block of partial attention and an MLP: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int, mlp_ratio: float, *, is_recursive: bool, kernel: str, drop_path_rate: float):
        super().__init__()
        self.rep_mixer = RepMixer(dim)
        self.token_mixer = PartialAttention(dim, is_recursive=is_recursive, kernel=kernel)
        self.channel_mixer = mlp(dim, mlp_ratio, bias=True)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rep_mixer(x)
        return x + self.drop_path(self.channel_mixer(self.token_mixer(x)[0]))


class LendingBlock(Block):
    """`Block` that appends what it attended to (B, dim / 4, H, W) to `lent`, for the next `BorrowingBlock`."""

    def forward(self, x: Tensor, lent: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x = self.rep_mixer(x)
        mixed, attended = self.token_mixer(x)
        return x + self.drop_path(self.channel_mixer(mixed)), lent + [attended]


class BorrowingBlock(nn.Module):
    """Block whose token mixer is the sum of its input and the four maps of `lent`, which it uses up."""

    def __init__(self, dim: int, mlp_ratio: float, *, drop_path_rate: float):
        super().__init__()
        self.rep_mixer = RepMixer(dim)
        self.channel_mixer = mlp(dim, mlp_ratio, bias=True)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, lent: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x = self.rep_mixer(x)
        mixed = x + torch.cat(lent, dim=1)
        return x + self.drop_path(self.channel_mixer(mixed)), lent[:0]


class SharingStage(Stage):
    """Stage of blocks that lend and borrow attended channels: (B, in_chs, H, W) -> (B, dim, H/2, W/2).

    `grad_checkpointing` is that of `Blocks`."""

    def __init__(self, downsample: nn.Module, blocks: nn.Module):
        super().__init__(downsample, blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        lent: list[Tensor] = []
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x, lent = recomputed(block, x, lent)
        else:
            for block in self.blocks:
                x, lent = block(x, lent)
        return x


class Downsample(nn.Module):
    """Strided convolution and a residual MLP: (B, in_chs, H, W) -> (B, out_chs, H/2, W/2)."""

    def __init__(self, in_chs: int, out_chs: int, mlp_ratio: float, *, drop_path_rate: float):
        super().__init__()
        self.token_mixer = ConvNorm(in_chs, out_chs, 5, stride=2, groups=math.gcd(in_chs, out_chs), bias=True)
        self.channel_mixer = mlp(out_chs, mlp_ratio, bias=True)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.drop_path(self.channel_mixer(x))


class Stem(nn.Module):
    """Three strided convolutions: (B, in_chans, H, W) -> (B, dim, H/8, W/8)."""

    def __init__(self, in_chans: int, dim: int, *, has_last_act: bool):
        super().__init__()
        self.stem = nn.Sequential(
            ConvNorm(in_chans, dim // 4, 3, stride=2, bias=True),
            nn.GELU(),
            ConvNorm(dim // 4, dim // 2, 3, stride=2, bias=True),
            nn.GELU(),
            ConvNorm(dim // 2, dim, 3, stride=2, bias=True),
            nn.GELU() if has_last_act else nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


class RecNeXtT(StagedNet):
    """RecNeXt-T, -S and -B: (B, in_chans, H, W) -> (B, num_classes), for H and W from 32 up.

    `dims`, `depths` and `mlp_ratios` hold one value per stage; `drop_path_rate` is reached by the last block, linearly from 0.
    `attn_kernel` is one of layers.ATTN_KERNELS; the published weights are of `elu`."""

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        mlp_ratios: tuple[float, ...] = (2, 2, 2, 1.5),
        share_channel: bool = False,
        attn_kernel: str = "elu",
        in_chans: int = 3,
        num_classes: int = 1000,
        distillation: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        num_recursive = 2 if share_channel else 3
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, mlp_ratio) in enumerate(zip(dims, mlp_ratios, strict=True)):
            downsample = Downsample(dims[i - 1], dim, mlp_ratio, drop_path_rate=rates[i][0]) if i > 0 else nn.Identity()
            settings = {"is_recursive": i < num_recursive, "kernel": attn_kernel}
            if share_channel and i == len(dims) - 1:
                blocks = [
                    LendingBlock(dim, mlp_ratio, drop_path_rate=rate, **settings)
                    if (j + 1) % SHARE_EVERY
                    else BorrowingBlock(dim, mlp_ratio, drop_path_rate=rate)
                    for j, rate in enumerate(rates[i])
                ]
                stages.append(SharingStage(downsample, nn.ModuleList(blocks)))
            else:
                blocks = [Block(dim, mlp_ratio, drop_path_rate=rate, **settings) for rate in rates[i]]
                stages.append(Stage(downsample, Blocks(*blocks)))
        super().__init__(
            stem=Stem(in_chans, dims[0], has_last_act=depths[0] == 0),
            stages=stages,
            dims=dims,
            reductions=(8, 16, 32, 64),
            in_chans=in_chans,
            num_classes=num_classes,
            distillation=distillation,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


PLAIN_VARIANTS = {  # channels per stage             blocks per stage
    "recnext_t": {"dims": (64, 128, 256, 512), "depths": (0, 2, 8, 10)},
    "recnext_s": {"dims": (128, 256, 384, 512), "depths": (0, 2, 8, 10), "drop_path_rate": 0.1},
    "recnext_b": {"dims": (128, 256, 384, 512), "depths": (2, 8, 8, 12), "drop_path_rate": 0.2},
}
VARIANTS = PLAIN_VARIANTS | {f"{name}_share_channel": {**settings, "share_channel": True} for name, settings in PLAIN_VARIANTS.items()}
register(VARIANTS, RecNeXtT, staged_pretrained_cfgs(VARIANTS, pool_size=(4, 4)), distillation_tags=DISTILLATION_TAGS)
