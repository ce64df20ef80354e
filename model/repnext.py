"""RepNeXt: multi-branch depthwise convolutions that merge into few, and its single-branch twins.

Paper: RepNeXt: A Fast Multi-Scale CNN using Structural Reparameterization (https://arxiv.org/abs/2406.16004)
Source: https://github.com/suous/RepNeXt (Apache-2.0); state-dict names are the published ones.
Differences: nothing stands between the branches of a token mixer, so their kernels are summed before they are applied, while training
too: one convolution instead of four or seven, with the same result and gradients.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from model.depthwise import DepthwiseConv2d, depthwise_conv2d
from model.layers import Classifier, NormLinear, dense, keep_layout, norm_scale_shift
from model.nets import Blocks, Downsample, MixerBlock, Stage, StagedNet, Stem, strided_conv
from model.registration import DISTILLATION_TAGS, register, staged_pretrained_cfgs


def _pad_kernel(kernel: Tensor, size: int) -> Tensor:
    """(dim, 1, h, w) kernel with odd sides, centred in zeros: (dim, 1, size, size)."""
    rows, columns = (size - kernel.shape[2]) // 2, (size - kernel.shape[3]) // 2
    return pad(kernel, [columns, columns, rows, rows])


def _sum_biases(biases: list[Tensor | None]) -> Tensor:
    """(dim,) sum of those that there are, the first among them; TorchScript takes any convolution's bias for one that may be missing."""
    total = biases[0]
    if total is None:
        raise ValueError("the first convolution of a sum has a bias")
    for bias in biases[1:]:
        if bias is not None:
            total = total + bias
    return total


class MergedDepthwise(nn.Module):
    """Parallel depthwise convolutions, applied as their sum: (B, dim, H, W) -> (B, dim, H / stride, W / stride).

    A subclass holds the branches and merges them; a 1xk and a kx1 convolution in a row are one with the outer product as kernel."""

    def __init__(self, kernel_size: int, stride: int):
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride

    def merge(self) -> tuple[Tensor, Tensor]:
        """(dim, 1, k, k) kernel and (dim,) bias of the sum of all branches."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.merge()
        if torch.jit.is_scripting():
            return conv2d(x, weight, bias, self.stride, self.kernel_size // 2, groups=weight.shape[0])
        return depthwise_conv2d(x, weight, bias, (self.stride,) * 2, (self.kernel_size // 2,) * 2)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        weight, bias = self.merge()
        dim = weight.shape[0]
        conv = DepthwiseConv2d(dim, self.kernel_size, stride=self.stride)
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        return conv.train(self.training)


class RepDWConvS(MergedDepthwise):
    """Small kernels, merged into 3x3: 3x3, 1x3, 3x1 and the four corners. With stride 2, 1x3 and 3x1 stand in a row, unbiased."""

    def __init__(self, dim: int, *, stride: int = 1):
        super().__init__(3, stride)
        self.conv_3_3 = DepthwiseConv2d(dim, 3)
        self.conv_3_w = DepthwiseConv2d(dim, (1, 3), bias=stride == 1)
        self.conv_3_h = DepthwiseConv2d(dim, (3, 1), bias=stride == 1)
        self.conv_2_2 = nn.Conv2d(dim, dim, 2, padding=1, dilation=2, groups=dim)

    def merge(self) -> tuple[Tensor, Tensor]:
        kernel_w, kernel_h = self.conv_3_w.weight, self.conv_3_h.weight
        weight = self.conv_3_3.weight.clone()
        weight[:, :, ::2, ::2] += self.conv_2_2.weight
        bias = _sum_biases([self.conv_3_3.bias, self.conv_2_2.bias, self.conv_3_w.bias, self.conv_3_h.bias])
        if self.stride == 1:
            return weight + _pad_kernel(kernel_w, 3) + _pad_kernel(kernel_h, 3), bias
        return weight + kernel_h * kernel_w, bias


class RepDWConvM(MergedDepthwise):
    """Middle-sized kernels, merged into 7x7: 7x7, 5x3, 3x5, and the pairs 1x7, 7x1 and 1x5, 5x1 in a row."""

    def __init__(self, dim: int, *, stride: int = 1):
        super().__init__(7, stride)
        self.conv_7_7 = DepthwiseConv2d(dim, 7)
        self.conv_5_3 = DepthwiseConv2d(dim, (5, 3))
        self.conv_3_5 = DepthwiseConv2d(dim, (3, 5))
        self.conv_7_w = DepthwiseConv2d(dim, (1, 7), bias=False)
        self.conv_7_h = DepthwiseConv2d(dim, (7, 1), bias=False)
        self.conv_5_w = DepthwiseConv2d(dim, (1, 5), bias=False)
        self.conv_5_h = DepthwiseConv2d(dim, (5, 1), bias=False)

    def merge(self) -> tuple[Tensor, Tensor]:
        weight = self.conv_7_7.weight + self.conv_7_h.weight * self.conv_7_w.weight
        for kernel in (self.conv_5_3.weight, self.conv_3_5.weight, self.conv_5_h.weight * self.conv_5_w.weight):
            weight = weight + _pad_kernel(kernel, 7)
        return weight, _sum_biases([self.conv_7_7.bias, self.conv_5_3.bias, self.conv_3_5.bias])


class ChunkConv(nn.Module):
    """A quarter of the channels each: unchanged, small, middle-sized and large kernels; (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv_s = RepDWConvS(dim // 4)
        self.conv_m = RepDWConvM(dim // 4)
        self.conv_l = nn.Sequential(DepthwiseConv2d(dim // 4, (1, 11)), DepthwiseConv2d(dim // 4, (11, 1)))

    def forward(self, x: Tensor) -> Tensor:
        same, small, middle, large = x.chunk(4, dim=1)
        small, middle, large = self.conv_s(dense(small)), self.conv_m(dense(middle)), self.conv_l(dense(large))
        return torch.cat((same, keep_layout(small), keep_layout(middle), keep_layout(large)), dim=1)

    @torch.no_grad()
    def to_single_conv(self) -> nn.Conv2d:
        """One depthwise 11x11 convolution for all four chunks: approximate, unless the bias of `conv_l.0` is 0.

        `conv_l.1` pads with zeros after that bias, one convolution before it: 5 rows at the top and at the bottom differ."""
        (weight_s, bias_s), (weight_m, bias_m) = (
            (conv.weight, conv.bias) if isinstance(conv, nn.Conv2d) else conv.merge() for conv in (self.conv_s, self.conv_m)
        )
        conv_w, conv_h = self.conv_l
        weights = torch.ones_like(weight_s[:, :, :1, :1]), weight_s, weight_m, conv_h.weight * conv_w.weight
        bias_l = conv_h.bias + conv_w.bias * conv_h.weight.sum((1, 2, 3))
        dim = 4 * bias_l.shape[0]
        conv = DepthwiseConv2d(dim, 11)
        conv.weight = nn.Parameter(torch.cat([_pad_kernel(weight, 11) for weight in weights]))
        conv.bias = nn.Parameter(torch.cat((torch.zeros_like(bias_s), bias_s, bias_m, bias_l)))
        return conv.train(self.training)


class CopyConv(nn.Module):
    """Small and middle-sized kernels on the same input: (B, in_chs, H, W) -> (B, 2 in_chs, H/2, W/2)."""

    def __init__(self, in_chs: int):
        super().__init__()
        self.conv_s = RepDWConvS(in_chs, stride=2)
        self.conv_m = RepDWConvM(in_chs, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.conv_s(x), self.conv_m(x)), dim=1)

    @torch.no_grad()
    def fold_norm(self, norm: nn.BatchNorm2d) -> "CopyConv":
        """This mixer, changed in place to what `norm` of it is in evaluation: half of the channels in each branch."""
        self.conv_s, self.conv_m = self.conv_s.fuse(), self.conv_m.fuse()
        scales, shifts = (values.chunk(2) for values in norm_scale_shift(norm))
        for conv, scale, shift in zip((self.conv_s, self.conv_m), scales, shifts, strict=True):
            conv.weight *= scale.view(-1, 1, 1, 1)
            conv.bias.mul_(scale).add_(shift)
        return self


class RepNeXt(StagedNet):
    """RepNeXt: (B, in_chans, H, W) -> (B, num_classes), for H and W from 32 up.

    `dims` and `depths` give each stage's channels and blocks; `drop_path_rate` is the same in every block. With `is_single_branch`, a
    token mixer is one convolution."""

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        is_single_branch: bool = False,
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
            downsample = nn.Identity()
            if i > 0:
                downsample = Downsample(strided_conv(dims[i - 1]) if is_single_branch else CopyConv(dims[i - 1]), dims[i - 1], mlp_ratio)
            mixers = [DepthwiseConv2d(dim, 11) if is_single_branch else ChunkConv(dim) for _ in range(depth)]
            blocks = [MixerBlock(mixer, dim, mlp_ratio, drop_path_rate=drop_path_rate) for mixer in mixers]
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


def merge_chunks(net: nn.Module) -> nn.Module:
    """Replace every `ChunkConv` of `net` by one 11x11 convolution, in place; returns it.

    Approximate (7e-3 of the largest logit on random weights), see `ChunkConv.to_single_conv`; so no other fusing does it."""
    for block in [module for module in net.modules() if isinstance(module, MixerBlock)]:
        if isinstance(block.token_mixer, ChunkConv):
            block.token_mixer = block.token_mixer.to_single_conv()
    return net


def _permute(module: nn.Module, order: Tensor) -> None:
    """Reorder the output channels of a convolution or the channels of a BatchNorm, in place."""
    for tensor in (*module.parameters(), *(buffer for buffer in module.buffers() if buffer.ndim > 0)):
        tensor.copy_(tensor[order])


def _permute_mlp(layers: nn.Sequential, order: Tensor) -> None:
    """Reorder the input and output channels of an `mlp`, in place."""
    first, last = layers[0][0], layers[2]
    first.weight.copy_(first.weight[:, order])
    _permute(last[0], order)
    _permute(last[1], order)


def _permute_heads(classifier: Classifier, order: Tensor) -> None:
    for head in (classifier.head, classifier.head_dist):
        if isinstance(head, NormLinear):
            norm, linear = head
            _permute(norm, order)
            linear.weight.copy_(linear.weight[:, order])


def _copy_mlp_and_norm(source: nn.Module, target: nn.Module) -> None:
    target.norm.load_state_dict(source.norm.state_dict())
    target.channel_mixer.load_state_dict(source.channel_mixer.state_dict())


def _merge_copies(mixer: CopyConv, target: nn.Conv2d, order: Tensor) -> None:
    """Write both branches of `mixer` into the grouped 7x7 convolution `target`, whose channels are in the order `order`."""
    (weight_s, bias_s), (weight_m, bias_m) = mixer.conv_s.merge(), mixer.conv_m.merge()
    target.weight.copy_(torch.cat((_pad_kernel(weight_s, 7), weight_m))[order])
    target.bias.copy_(torch.cat((bias_s, bias_m))[order])


@torch.no_grad()
def to_single_branch(net: RepNeXt) -> RepNeXt:
    """The single-branch twin of a trainable multi-branch RepNeXt, as a new network: for equal inputs, equal outputs.

    Approximate where biases of `conv_l.0` are not 0, see `ChunkConv.to_single_conv`. A downsampling convolution of the twin has
    the small and the middle-sized kernel of channel i as its outputs 2i and 2i + 1, where `CopyConv` concatenates, so that behind the first
    one all channels of the twin are permuted."""
    depths = tuple(len(stage.blocks) for stage in net.stages)
    dims = tuple(info["num_chs"] for info in net.feature_info)
    mlp_ratio = net.stages[0].blocks[0].channel_mixer[0][0].out_channels / dims[0]
    twin = RepNeXt(
        dims=dims, depths=depths, is_single_branch=True, mlp_ratio=mlp_ratio, in_chans=net.in_chans, num_classes=net.num_classes,
        distillation=net.distillation, drop_rate=net.head_drop.p, drop_path_rate=net.stages[0].blocks[0].drop_path.drop_prob,
        global_pool=net.global_pool,
    )  # fmt: skip
    twin.to(next(net.parameters())).train(net.training)
    twin.stem.load_state_dict(net.stem.state_dict())
    twin.head.load_state_dict(net.head.state_dict())
    order = torch.arange(dims[0], device=next(net.parameters()).device)
    for source_stage, stage in zip(net.stages, twin.stages, strict=True):
        if isinstance(stage.downsample, Downsample):
            order = torch.stack((order, order + len(order)), dim=1).flatten()
            _copy_mlp_and_norm(source_stage.downsample, stage.downsample)
            _merge_copies(source_stage.downsample.token_mixer, stage.downsample.token_mixer, order)
            _permute(stage.downsample.norm, order)
            _permute_mlp(stage.downsample.channel_mixer, order)
        for source, block in zip(source_stage.blocks, stage.blocks, strict=True):
            _copy_mlp_and_norm(source, block)
            block.token_mixer = source.token_mixer.to_single_conv()
            _permute(block.token_mixer, order)
            _permute(block.norm, order)
            _permute_mlp(block.channel_mixer, order)
    _permute_heads(twin.head, order)
    return twin


VARIANTS = {  #     channels per stage                  blocks per stage
    "repnext_m0": {"dims": (40, 80, 160, 320), "depths": (2, 2, 9, 1)},
    "repnext_m1": {"dims": (48, 96, 192, 384), "depths": (3, 3, 15, 2)},
    "repnext_m2": {"dims": (56, 112, 224, 448), "depths": (3, 3, 15, 2)},
    "repnext_m3": {"dims": (64, 128, 256, 512), "depths": (3, 3, 13, 2)},
    "repnext_m4": {"dims": (64, 128, 256, 512), "depths": (5, 5, 25, 4)},
    "repnext_m5": {"dims": (80, 160, 320, 640), "depths": (7, 7, 35, 2)},
}
SINGLE_BRANCH_VARIANTS = {f"{name}e": {**VARIANTS[name], "is_single_branch": True} for name in ("repnext_m0", "repnext_m1", "repnext_m2")}
register(VARIANTS | SINGLE_BRANCH_VARIANTS, RepNeXt, staged_pretrained_cfgs(VARIANTS | SINGLE_BRANCH_VARIANTS), distillation_tags=DISTILLATION_TAGS)
