"""Blocks and skeletons that architectures hang their mixers in: from stem to heads, with the interface of timm's models."""

import torch
from timm.layers import DropPath
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from model.depthwise import DepthwiseConv2d
from model.layers import Classifier, ConvNorm, average_pool, fold_norm_after, norm_scale_shift
from model.recompute import recomputed

# ---- blocks of the RecNeXt and RepNeXt families


def mlp(dim: int, mlp_ratio: float, *, bias: bool = False) -> nn.Sequential:
    """Channel mixer of two 1x1 convolutions: (B, dim, H, W) -> (B, dim, H, W)."""
    hidden_dim = int(dim * mlp_ratio)
    return nn.Sequential(ConvNorm(dim, hidden_dim, bias=bias), nn.GELU(), ConvNorm(hidden_dim, dim, bias=bias))


class Stem(nn.Module):
    """Two strided convolutions: (B, in_chans, H, W) -> (B, dim, H/4, W/4)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(in_chans, dim // 2, 3, stride=2), nn.GELU(), ConvNorm(dim // 2, dim, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


class MixerBlock(nn.Module):
    """Residual block of a token mixer, BatchNorm and an MLP: (B, dim, H, W) -> (B, dim, H, W).

    Fused, the 1x1 convolution after the norm has taken it up; a larger kernel could not, since the shift would also apply to padding. A mixer
    with a method `scale_output(scale)` takes the scale instead, so that its output has the norm's range in half precision too."""

    def __init__(self, token_mixer: nn.Module, dim: int, mlp_ratio: float, *, drop_path_rate: float):
        super().__init__()
        self.token_mixer = token_mixer
        self.norm = nn.BatchNorm2d(dim)
        self.channel_mixer = mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.channel_mixer(self.norm(self.token_mixer(x))))

    @torch.no_grad()
    def fuse(self) -> "MixerBlock":
        if isinstance(self.norm, nn.BatchNorm2d):
            scale, shift = norm_scale_shift(self.norm)
            conv = self.channel_mixer[0].fuse()
            conv.bias += conv.weight.flatten(1) @ shift
            if hasattr(self.token_mixer, "scale_output"):
                self.token_mixer.scale_output(scale)
            else:
                conv.weight *= scale.view(1, -1, 1, 1)
            self.channel_mixer[0], self.norm = conv, nn.Identity()
        return self


class Blocks(nn.Sequential):
    """Blocks in a row: (B, C, H, W) -> (B, C', H', W'). With `grad_checkpointing`, backward gets their inputs alone."""

    def __init__(self, *blocks: nn.Module):
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self:
                x = recomputed(block, x)
        else:
            for block in self:
                x = block(x)
        return x


class Downsample(nn.Module):
    """A token mixer that halves the resolution and doubles the channels, BatchNorm, a residual MLP.

    (B, in_chs, H, W) -> (B, 2 in_chs, H/2, W/2). The mixer is a convolution, or has a method `fold_norm(norm)` for fusing."""

    def __init__(self, token_mixer: nn.Module, in_chs: int, mlp_ratio: float):
        super().__init__()
        self.token_mixer = token_mixer
        self.norm = nn.BatchNorm2d(2 * in_chs)
        self.channel_mixer = mlp(2 * in_chs, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.token_mixer(x))
        return x + self.channel_mixer(x)

    def fuse(self) -> "Downsample":
        if isinstance(self.norm, nn.BatchNorm2d):
            mixer = self.token_mixer
            self.token_mixer = fold_norm_after(mixer, self.norm) if isinstance(mixer, nn.Conv2d) else mixer.fold_norm(self.norm)
            self.norm = nn.Identity()
        return self


def strided_conv(in_chs: int) -> nn.Conv2d:
    """7x7 convolution with two kernels per channel: (B, in_chs, H, W) -> (B, 2 in_chs, H/2, W/2)."""
    return DepthwiseConv2d(in_chs, 7, out_chs=2 * in_chs, stride=2)


# ---- networks


class PooledNet(nn.Module):
    """A trunk of layers, global average pooling and heads, with the interface of timm's models.

    Maps (B, in_chans, H, W) to (B, num_classes). A family names its modules as its published checkpoints do and defines
    `trunk` and `cut_trunk`, `forward_features`, `forward_head`, `get_classifier` and `_build_heads`.
    `features` describes the maps that `features_only` gives: (channels, reduction of the image's sides, module, trunk layers up to it).
    Blocks in a row are `Blocks`, or of `block_type` where they are layers of the trunk themselves."""

    block_type: type[nn.Module] | tuple = ()

    def __init__(self, *, in_chans: int, features: list[tuple[int, int, str, int]], num_features: int, distillation: bool):
        super().__init__()
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = num_features
        self.distillation = distillation
        self.grad_checkpointing = False
        self.feature_info = [{"num_chs": chs, "reduction": reduction, "module": module} for chs, reduction, module, _ in features]
        self.feature_depths = [depth for *_, depth in features]

    def trunk(self) -> list[nn.Module]:
        """The layers before pooling, in order."""
        raise NotImplementedError

    def cut_trunk(self, length: int) -> None:
        """Keep the trunk's first `length` layers."""
        raise NotImplementedError

    def _build_heads(self, num_classes: int) -> tuple[nn.Module, ...]:
        """Set the modules behind pooling; returns the new ones."""
        raise NotImplementedError

    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        """Names of parameters to groups, from the stem to the last block, or stage with `coarse`; what matches nothing is the heads'.

        timm's form, which its `group_parameters` and layer-wise learning rates read: a pattern, or several with what is appended to the numbers
        that each finds. Names are sorted by these numbers; those with the same make a group."""
        raise NotImplementedError

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether backward computes blocks again instead of getting what they computed: less memory, the same results, more time."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable

    def _run(self, layer: nn.Module, x: Tensor) -> Tensor:
        """`layer` of the trunk, of x."""
        return recomputed(layer, x) if self.grad_checkpointing and isinstance(layer, self.block_type) else layer(x)

    def _run_trunk(self, x: Tensor) -> Tensor:
        for layer in self.trunk():
            x = self._run(layer, x)
        return x

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """New heads for `num_classes` classes (0: none); `global_pool` is `avg`, or empty for feature maps."""
        if global_pool not in ("", "avg"):
            raise ValueError(f"global_pool is '{global_pool}': it can be 'avg' or '' (none)")
        if global_pool == "" and num_classes > 0:
            raise ValueError("global_pool='' leaves feature maps, which the heads cannot take: use num_classes=0 with it")
        self.num_classes = num_classes
        self.global_pool = global_pool
        for head in self._build_heads(num_classes):
            head.train(self.training)

    def forward(self, x: Tensor):
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Feature maps `indices` (all by default), after the trunk's output unless `intermediates_only`.

        timm's signature; `norm` changes nothing, these networks have no final norm before pooling."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is '{output_fmt}': these feature maps are NCHW")
        take_indices, last_index = feature_take_indices(len(self.feature_info), indices)
        take_depths = [self.feature_depths[i] for i in take_indices]
        layers = self.trunk()
        intermediates = []
        for depth, layer in enumerate(layers[: self.feature_depths[last_index]] if stop_early else layers, start=1):
            x = self._run(layer, x)
            if depth in take_depths:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop the layers after the last of `indices`, and the heads with `prune_head`; returns the indices kept."""
        take_indices, last_index = feature_take_indices(len(self.feature_info), indices)
        depth = self.feature_depths[last_index]
        is_cut = depth < len(self.trunk())
        if is_cut:
            self.cut_trunk(depth)
            self.num_features = self.head_hidden_size = self.feature_info[last_index]["num_chs"]
            self.feature_info, self.feature_depths = self.feature_info[: last_index + 1], self.feature_depths[: last_index + 1]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        return take_indices


def stage_patterns(module: str, depths: list[int]) -> list[tuple[str, tuple[int, ...]]]:
    """Patterns of `group_matcher` for layers `module.0`, `module.1`, ... of one row, a group for those up to each of `depths` (counted from 1)."""
    starts = [0, *depths[:-1]]
    return [(rf"^{module}\.(?:{'|'.join(map(str, range(start, end)))})\.", (i,)) for i, (start, end) in enumerate(zip(starts, depths, strict=True))]


def staged_group_matcher(coarse: bool) -> dict[str, str | list]:
    """`group_matcher` of networks whose `Stage`s follow a `stem`; a downsampling layer goes with the block behind it."""
    by_block = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
    return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else by_block}


class Stage(nn.Module):
    """Downsampling layer (an Identity in the first stage), then blocks at one resolution."""

    def __init__(self, downsample: nn.Module, blocks: nn.Module):
        super().__init__()
        self.downsample = downsample
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class StagedNet(PooledNet):
    """Stem, stages and `Classifier`: the skeleton of the RecNeXt and RepNeXt families.

    `reductions` says by how much each stage's output is smaller than the image."""

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: list[Stage],
        dims: tuple[int, ...],
        reductions: tuple[int, ...],
        in_chans: int,
        num_classes: int,
        distillation: bool,
        drop_rate: float,
        global_pool: str,
    ):
        features = [(dim, reduction, f"stages.{i}", i + 2) for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))]
        super().__init__(in_chans=in_chans, features=features, num_features=dims[-1], distillation=distillation)
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def trunk(self) -> list[nn.Module]:
        return [self.stem, *self.stages]

    def cut_trunk(self, length: int) -> None:
        self.stages = self.stages[: length - 1]

    def _build_heads(self, num_classes: int) -> tuple[nn.Module, ...]:
        self.head = Classifier(self.num_features, num_classes, distillation=self.distillation)
        return (self.head,)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        return staged_group_matcher(coarse)

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether training returns the pair of logits; timm's name for it."""
        self.distillation = enable
        if isinstance(self.head, Classifier):
            self.head.distillation = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, num_features, h, w): the last stage's feature map."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False):
        """Logits of a feature map or, with `pre_logits`, its pooled features (B, num_features)."""
        if self.global_pool == "avg":
            x = average_pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)
