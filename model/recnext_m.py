"""RecNeXt-M: recursive depthwise convolutions as token mixer, or what they were compared with.

Paper: RecConv: Efficient Recursive Convolutions for Multi-Frequency Representations (https://arxiv.org/abs/2412.19628)
Source: https://github.com/suous/RecNeXt (Apache-2.0); state-dict names are the published ones.
"""

from torch import nn

from model.nets import Blocks, Downsample, MixerBlock, Stage, StagedNet, Stem, strided_conv
from model.recconv import build_mixer
from model.registration import DISTILLATION_TAGS, register, staged_pretrained_cfgs


class RecNeXtM(StagedNet):
    """RecNeXt-M: (B, in_chans, H, W) -> (B, num_classes), for H and W from 32 up.

    `dims` and `depths` give each stage's channels and blocks; `mixer` is one of `model.recconv.MIXERS`, some of which ask more of H and W;
    `drop_path_rate` is the same in every block."""

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        mlp_ratio: float = 2,
        mixer: str = "rec_5x5",
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
            blocks = [MixerBlock(build_mixer(mixer, dim, level=4 - i), dim, mlp_ratio, drop_path_rate=drop_path_rate) for _ in range(depth)]
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
    "recnext_m0": {"dims": (40, 80, 160, 320), "depths": (2, 2, 9, 1)},
    "recnext_m1": {"dims": (48, 96, 192, 384), "depths": (3, 3, 15, 2)},
    "recnext_m2": {"dims": (56, 112, 224, 448), "depths": (3, 3, 15, 2)},
    "recnext_m3": {"dims": (64, 128, 256, 512), "depths": (3, 3, 13, 2)},
    "recnext_m4": {"dims": (64, 128, 256, 512), "depths": (5, 5, 25, 4), "drop_path_rate": 0.2},
    "recnext_m5": {"dims": (80, 160, 320, 640), "depths": (7, 7, 35, 2), "drop_path_rate": 0.3},
}
register(VARIANTS, RecNeXtM, staged_pretrained_cfgs(VARIANTS), distillation_tags=DISTILLATION_TAGS)
