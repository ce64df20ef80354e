"""RecNeXt-M: recursive depthwise convolutions as token mixer.

Paper: RecConv: Efficient Recursive Convolutions for Multi-Frequency Representations (https://arxiv.org/abs/2412.19628)
Source: https://github.com/suous/RecNeXt (Apache-2.0); state-dict names are the published ones.
"""

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import interpolate

from model.layers import ConvNorm, Stage, StagedNet, fold_norm_after, fold_norm_before, mlp, pretrained_cfg, register


class RecConv2d(nn.Module):
    """Depthwise convolutions over a pyramid of `level` halvings of the input: (B, dim, H, W) -> (B, dim, H, W).

    One strided convolution is shared by all halvings; coming up, each level's convolution sees its input plus the level below."""

    def __init__(self, dim: int, *, kernel_size: int = 5, level: int):
        super().__init__()
        self.level = level
        settings = {"kernel_size": kernel_size, "padding": kernel_size // 2, "groups": dim, "bias": False}
        self.down = nn.Conv2d(dim, dim, stride=2, **settings)
        self.convs = nn.ModuleList([nn.Conv2d(dim, dim, **settings) for _ in range(level + 1)])

    def _mix(self, x: Tensor) -> Tensor:
        pyramid = [x]
        for _ in range(self.level):
            pyramid.append(self.down(pyramid[-1]))
        x = pyramid.pop()
        for i, conv in enumerate(self.convs):
            if i > 0:
                finer = pyramid.pop()
                x = finer + interpolate(x, size=finer.shape[2:], mode="bilinear")
            x = conv(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting() or not _is_half_autocast(x):
            return self._mix(x)
        # Nothing normalises between the levels, and their running sum can pass float16's 65504.
        with torch.autocast(x.device.type, enabled=False):
            return self._mix(x.float())


@torch.jit.ignore
def _is_half_autocast(x: Tensor) -> bool:
    device_type = x.device.type
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16


class Block(nn.Module):
    """Residual block of a recursive convolution, BatchNorm and an MLP: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int, mlp_ratio: float, *, level: int, drop_path_rate: float):
        super().__init__()
        self.token_mixer = RecConv2d(dim, level=level)
        self.norm = nn.BatchNorm2d(dim)
        self.channel_mixer = mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.channel_mixer(self.norm(self.token_mixer(x))))

    def fuse(self) -> "Block":
        if isinstance(self.norm, nn.BatchNorm2d):
            self.channel_mixer[0] = fold_norm_before(self.norm, self.channel_mixer[0].fuse())
            self.norm = nn.Identity()
        return self


class Downsample(nn.Module):
    """Halves the resolution and doubles the channels: (B, in_chs, H, W) -> (B, 2 in_chs, H/2, W/2)."""

    def __init__(self, in_chs: int, mlp_ratio: float):
        super().__init__()
        self.token_mixer = nn.Conv2d(in_chs, 2 * in_chs, 7, stride=2, padding=3, groups=in_chs)
        self.norm = nn.BatchNorm2d(2 * in_chs)
        self.channel_mixer = mlp(2 * in_chs, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.token_mixer(x))
        return x + self.channel_mixer(x)

    def fuse(self) -> "Downsample":
        if isinstance(self.norm, nn.BatchNorm2d):
            self.token_mixer = fold_norm_after(self.token_mixer, self.norm)
            self.norm = nn.Identity()
        return self


class Stem(nn.Module):
    """Two strided convolutions: (B, in_chans, H, W) -> (B, dim, H/4, W/4)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(in_chans, dim // 2, 3, stride=2), nn.GELU(), ConvNorm(dim // 2, dim, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


class RecNeXtM(StagedNet):
    """RecNeXt-M: (B, in_chans, H, W) -> (B, num_classes), for H and W from 32 up.

    `dims` and `depths` give each stage's channels and blocks; `drop_path_rate` is the same in every block."""

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        mlp_ratio: float = 2,
        in_chans: int = 3,
        num_classes: int = 1000,
        distillation: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            downsample = Downsample(dims[i - 1], mlp_ratio) if i > 0 else nn.Identity()
            blocks = [Block(dim, mlp_ratio, level=4 - i, drop_path_rate=drop_path_rate) for _ in range(depth)]
            stages.append(Stage(downsample, nn.Sequential(*blocks)))
        super().__init__(
            stem=Stem(in_chans, dims[0]),
            stages=stages,
            dims=dims,
            reductions=(4, 8, 16, 32),
            in_chans=in_chans,
            num_classes=num_classes,
            distillation=distillation,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


VARIANTS = {  #     channels per stage                  blocks per stage
    "recnext_m0": {"dims": (40, 80, 160, 320), "depths": (2, 2, 9, 1)},
    "recnext_m1": {"dims": (48, 96, 192, 384), "depths": (3, 3, 15, 2)},
    "recnext_m2": {"dims": (56, 112, 224, 448), "depths": (3, 3, 15, 2)},
    "recnext_m3": {"dims": (64, 128, 256, 512), "depths": (3, 3, 13, 2)},
    "recnext_m4": {"dims": (64, 128, 256, 512), "depths": (5, 5, 25, 4), "drop_path_rate": 0.2},
    "recnext_m5": {"dims": (80, 160, 320, 640), "depths": (7, 7, 35, 2), "drop_path_rate": 0.3},
}
PRETRAINED = {
    f"{name}.{tag}": pretrained_cfg("stem.stem.0.conv", ("head.head.linear", "head.head_dist.linear"), hf_hub_id=f"suous/{name}.{tag}")
    for name in VARIANTS
    for tag in ("base_300e_in1k", "dist_300e_in1k")
}
register(VARIANTS, RecNeXtM, PRETRAINED, distillation_tags=("base_300e_in1k", "dist_300e_in1k"))
