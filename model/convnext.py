"""ConvNeXt-femto with RepNeXt's downsampling layers in place of its own: the ablation of the RepNeXt paper.

Papers: A ConvNet for the 2020s (https://arxiv.org/abs/2201.03545);
RepNeXt: A Fast Multi-Scale CNN using Structural Reparameterization (https://arxiv.org/abs/2406.16004)
Source: timm's `convnext_femto` (Apache-2.0), whose blocks and state-dict names these are, and https://github.com/suous/RepNeXt (Apache-2.0).
"""

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from model.depthwise import DepthwiseConv2d
from model.layers import average_pool
from model.nets import Blocks, PooledNet, Stage, staged_group_matcher
from model.registration import pretrained_cfg, register


class Downsample(nn.Module):
    """Strided depthwise convolution, then a residual MLP: (B, in_chs, H, W) -> (B, 2 in_chs, H/2, W/2).

    With `norm_in_branch` the shortcut bypasses norm and MLP ("ModifiedA"), else the MLP alone ("ModifiedB")."""

    def __init__(self, in_chs: int, *, norm_in_branch: bool):
        super().__init__()
        dim = 2 * in_chs
        self.norm_in_branch = norm_in_branch
        self.dwconv = DepthwiseConv2d(in_chs, 7, out_chs=dim, stride=2)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x).permute(0, 2, 3, 1)
        normed = self.norm(x)
        shortcut = x if self.norm_in_branch else normed
        return (shortcut + self.pwconv2(self.act(self.pwconv1(normed)))).permute(0, 3, 1, 2)


class Head(nn.Module):
    """Norm, dropout and a linear layer: (B, dim) -> (B, num_classes)."""

    def __init__(self, dim: int, num_classes: int, drop_rate: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()
        _init_weights(self.fc)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.norm(x))
        return x if pre_logits else self.fc(x)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class ConvNeXt(PooledNet):
    """ConvNeXt: (B, in_chans, H, W) -> (B, num_classes), for H and W from 32 up.

    `dims` and `depths` give each stage's channels and blocks; `drop_path_rate` is reached by the last block, linearly from 0."""

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        norm_in_branch: bool,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        features = [(dim, 4 * 2**i, f"stages.{i}", i + 2) for i, dim in enumerate(dims)]
        super().__init__(in_chans=in_chans, features=features, num_features=dims[-1], distillation=False)
        self.drop_rate = drop_rate
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4), LayerNorm2d(dims[0]))
        stages = []
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)):
            downsample = Downsample(dims[i - 1], norm_in_branch=norm_in_branch) if i > 0 else nn.Identity()
            stages.append(Stage(downsample, Blocks(*[ConvNeXtBlock(dims[i], conv_mlp=True, drop_path=rate) for rate in rates])))
        self.stages = nn.Sequential(*stages)
        self.apply(_init_weights)
        self.reset_classifier(num_classes, global_pool)

    def trunk(self) -> list[nn.Module]:
        return [self.stem, *self.stages]

    def cut_trunk(self, length: int) -> None:
        self.stages = self.stages[: length - 1]

    def _build_heads(self, num_classes: int) -> tuple[nn.Module, ...]:
        self.head = Head(self.num_features, num_classes, self.drop_rate)
        return (self.head,)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        return staged_group_matcher(coarse)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, num_features, h, w): the last stage's feature map."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of a feature map or, with `pre_logits`, its pooled and normalised features (B, num_features)."""
        if self.global_pool == "":
            return x
        return self.head(average_pool(x), pre_logits)


FEMTO = {"dims": (48, 96, 192, 384), "depths": (2, 2, 6, 2)}
VARIANTS = {
    "convnext_femto_downsample_a": {**FEMTO, "norm_in_branch": True},
    "convnext_femto_downsample_b": {**FEMTO, "norm_in_branch": False},
}
register(VARIANTS, ConvNeXt, {name: pretrained_cfg("stem.0", "head.fc") for name in VARIANTS}, has_distillation=False)
