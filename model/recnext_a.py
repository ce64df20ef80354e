"""RecNeXt-A: linear attention at half the resolution as token mixer.

Paper: RecConv: Efficient Recursive Convolutions for Multi-Frequency Representations (https://arxiv.org/abs/2412.19628)
Source: https://github.com/suous/RecNeXt (Apache-2.0); state-dict names are the published ones.
"""

from timm.layers import DropPath
from torch import Tensor, nn

from model.mixers import build_rec_attention
from model.nets import Blocks, Downsample, Stage, StagedNet, Stem, mlp, strided_conv
from model.registration import DISTILLATION_TAGS, register, staged_pretrained_cfgs


class Block(nn.Module):
    """Residual block of attention and an MLP: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int, mlp_ratio: float, *, num_heads: int, drop_path_rate: float):
        super().__init__()
        self.token_mixer = build_rec_attention(dim, num_heads=num_heads)
        self.channel_mixer = mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.channel_mixer(self.token_mixer(x)))


class RecNeXtA(StagedNet):
    """RecNeXt-A: (B, in_chans, H, W) -> (B, num_classes), for H and W from 32 up.

    `dims` and `depths` give each stage's channels and blocks; `drop_path_rate` is the same in every block."""

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        mlp_ratio: float,
        in_chans: int = 3,
        num_classes: int = 1000,
        distillation: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            downsample = Downsample(strided_conv(dims[i - 1]), dims[i - 1], mlp_ratio) if i > 0 else nn.Identity()
            blocks = [Block(dim, mlp_ratio, num_heads=2 ** (i + 1), drop_path_rate=drop_path_rate) for _ in range(depth)]
            stages.append(Stage(downsample, Blocks(*blocks)))
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
    "recnext_a0": {"dims": (40, 80, 160, 320), "depths": (2, 2, 9, 1), "mlp_ratio": 2},
    "recnext_a1": {"dims": (48, 96, 192, 384), "depths": (3, 3, 15, 2), "mlp_ratio": 2},
    "recnext_a2": {"dims": (56, 112, 224, 448), "depths": (3, 3, 15, 2), "mlp_ratio": 2},
    "recnext_a3": {"dims": (64, 128, 256, 512), "depths": (3, 3, 13, 2), "mlp_ratio": 1.875},
    "recnext_a4": {"dims": (64, 128, 256, 512), "depths": (5, 5, 25, 4), "mlp_ratio": 1.875, "drop_path_rate": 0.2},
    "recnext_a5": {"dims": (80, 160, 320, 640), "depths": (7, 7, 35, 2), "mlp_ratio": 1.875, "drop_path_rate": 0.3},
}
register(VARIANTS, RecNeXtA, staged_pretrained_cfgs(VARIANTS), distillation_tags=DISTILLATION_TAGS)
