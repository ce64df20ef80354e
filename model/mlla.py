"""MLLA, and MLLA with recursive mixers: gated blocks of linear attention or recursive convolutions, between depthwise convolutions.

Papers: Demystify Mamba in Vision: A Linear Attention Perspective (https://arxiv.org/abs/2405.16605);
RecConv: Efficient Recursive Convolutions for Multi-Frequency Representations (https://arxiv.org/abs/2412.19628)
Source: https://github.com/suous/RecNeXt (Apache-2.0), and https://github.com/LeapLabTHU/MLLA for the baseline; state-dict names are the published
ones, but for the baseline and the transposed convolutions, of which no reference numbers were at hand.
Differences: rotary tables follow the input, so that sizes other than 256 work too; the saved ones are used where they fit.
"""

from collections import OrderedDict

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn
from torch.nn.functional import linear, relu, silu

from model.depthwise import DepthwiseConv2d
from model.layers import ConvNorm, average_pool
from model.mixers import LinearAttention, RecAttn2d, RecConv2d, kernel_feature, run_in_float32
from model.nets import Blocks, PooledNet
from model.recconv import TransposedRecConv2d
from model.registration import pretrained_cfg, register


def rotary_table(height: int, width: int, dim: int) -> Tensor:
    """(height, width, dim / 2, 2): cosine and sine of the angle by which each position turns each pair of channels.

    The first half of the pairs turns with the row, the second with the column, at dim / 4 frequencies from 1 down to 1e-4."""
    num_frequencies = dim // 4
    frequencies = 10000.0 ** (-torch.arange(num_frequencies) / num_frequencies)
    rows = torch.arange(height).view(-1, 1, 1) * frequencies
    columns = torch.arange(width).view(1, -1, 1) * frequencies
    shape = (height, width, num_frequencies)
    angles = torch.cat((rows.expand(shape), columns.expand(shape)), dim=-1)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


class RotaryEmbedding(nn.Module):
    """Turns pairs of neighbouring channels of (B, dim, H, W) by angles that grow with the position."""

    def __init__(self, dim: int, resolution: tuple[int, int]):
        super().__init__()
        self.register_buffer("rotations", rotary_table(resolution[0], resolution[1], dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        table = self.rotations
        if table.shape[0] != height or table.shape[1] != width:
            table = rotary_table(height, width, dim).to(table)
        cos, sin = table.permute(2, 3, 0, 1).to(x.dtype).unbind(1)
        first, second = x.reshape(batch, dim // 2, 2, height, width).unbind(2)
        return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=2).reshape(x.shape)


class RotaryAttention(nn.Module):
    """Linear attention whose scores, but not their normaliser, depend on the distance of positions: (B, dim, H, W) -> (B, dim, H, W).

    `qk` gives the channels of q, then those of k."""

    def __init__(self, qk: nn.Module, dim: int, *, num_heads: int, resolution: tuple[int, int]):
        super().__init__()
        self.num_heads = num_heads
        self.qk = qk
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.rope = RotaryEmbedding(dim, resolution)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All (B, dim, H, W). Values come first: heads are so narrow that scores never cost less."""
        q, k = kernel_feature(q, "elu"), kernel_feature(k, "elu")
        shape = [q.shape[0], self.num_heads, -1, q.shape[2] * q.shape[3]]
        scale = (q.shape[2] * q.shape[3]) ** -0.5
        values = (v.reshape(shape) * scale) @ (self.rope(k).reshape(shape) * scale).transpose(-2, -1)
        total = k.reshape(shape).mean(-1, keepdim=True).transpose(-2, -1) @ q.reshape(shape)
        return (values @ self.rope(q).reshape(shape) / (total + 1e-6)).reshape(v.shape)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, dim=1)
        if torch.jit.is_scripting():
            return self.lepe(x) + self._attend(q, k, x)
        return self.lepe(x) + run_in_float32(self._attend, q, k, x)


MIXERS = ("baseline", "recconv_convtrans", "recconv", "recattn", "recattn_simple")  # in the order of the published table


def build_mixer(kind: str, dim: int, *, num_heads: int, level: int, resolution: tuple[int, int]) -> nn.Module:
    """Token mixer of (B, dim, H, W), other than the baseline's; `resolution` is that of the map it attends on."""
    if kind == "recconv":
        return RecConv2d(dim, level=level, mode="nearest")
    if kind == "recconv_convtrans":
        return TransposedRecConv2d(dim, kernel_size=5, level=level)
    qk = nn.Conv2d(dim, 2 * dim, 1, groups=2)
    if kind == "recattn":
        attention = RotaryAttention(qk, dim, num_heads=num_heads, resolution=resolution)
    else:
        attention = LinearAttention(qk, nn.Conv2d(dim, dim, 3, padding=1, groups=dim), num_heads=num_heads)
    return RecAttn2d(DepthwiseConv2d(dim, 5, stride=2), attention, DepthwiseConv2d(dim, 5))


class Block(nn.Module):
    """Convolution, gated mixer, convolution, MLP, each but a strided first one residual: (B, dim, H, W) -> (B, out, H / stride, W / stride).

    With stride 2 the first convolution doubles the channels. `mixer` mixes half of the gate's `hidden_dim` channels."""

    def __init__(self, dim: int, mixer: nn.Module, *, hidden_dim: int, act: nn.Module, stride: int, drop_path_rate: float):
        super().__init__()
        out_chs = dim * stride
        self.is_strided = stride > 1
        self.cpe1 = DepthwiseConv2d(dim, 5, out_chs=out_chs, stride=stride)
        self.norm1 = nn.LayerNorm(out_chs)
        self.i_proj = nn.Linear(out_chs, hidden_dim)
        self.o_proj = nn.Conv2d(hidden_dim // 2, out_chs, 1)
        self.act = act
        self.agg = mixer
        self.cpe2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, groups=out_chs)
        self.norm2 = nn.LayerNorm(out_chs)
        self.mlp = Mlp(out_chs, 4 * out_chs)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x) if self.is_strided else x + self.cpe1(x)
        gate, content = self.i_proj(self.norm1(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2).chunk(2, dim=1)
        x = x + self.drop_path(self.o_proj(self.act(gate) * self.agg(content)))
        x = x + self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2))


class ChannelLinear(nn.Linear):
    """Linear layer over the channels of a map: (B, in_chs, H, W) -> (B, out_chs, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


class BaselineBlock(nn.Module):
    """MLLA's own block, with attention at the full resolution: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int, *, num_heads: int, resolution: tuple[int, int], drop_path_rate: float):
        super().__init__()
        self.cpe1 = DepthwiseConv2d(dim, 3)
        self.norm1 = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, dim)
        self.act_proj = nn.Linear(dim, dim)
        self.dwc = DepthwiseConv2d(dim, 3)
        self.attn = RotaryAttention(ChannelLinear(dim, 2 * dim), dim, num_heads=num_heads, resolution=resolution)
        self.out_proj = nn.Linear(dim, dim)
        self.cpe2 = DepthwiseConv2d(dim, 3)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cpe1(x)
        normed = self.norm1(x.permute(0, 2, 3, 1))
        content = silu(self.dwc(self.in_proj(normed).permute(0, 3, 1, 2)))
        gated = self.attn(content).permute(0, 2, 3, 1) * silu(self.act_proj(normed))
        x = x + self.drop_path(self.out_proj(gated).permute(0, 3, 1, 2))
        x = x + self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2))


class PatchMerging(nn.Module):
    """The baseline's downsampling, an inverted bottleneck: (B, in_chs, H, W) -> (B, 2 in_chs, H/2, W/2)."""

    def __init__(self, in_chs: int):
        super().__init__()
        hidden_dim = 8 * in_chs
        self.conv = nn.Sequential(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(in_chs, hidden_dim, 1), act=nn.ReLU())),
            nn.Sequential(OrderedDict(conv=DepthwiseConv2d(hidden_dim, 3, stride=2), act=nn.ReLU())),
            ConvNorm(hidden_dim, 2 * in_chs, bias=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Layer(nn.Module):
    """Blocks at one resolution and, but for the last layer, a block that halves it."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module):
        super().__init__()
        self.blocks = Blocks(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class Stem(nn.Module):
    """Strided and residual convolutions: (B, in_chans, H, W) -> (B, dim, H/4, W/4)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim // 2, 3, stride=2)
        self.conv2 = nn.Sequential(ConvNorm(dim // 2, dim // 2, 3), ConvNorm(dim // 2, dim // 2, 3))
        self.conv3 = nn.Sequential(ConvNorm(dim // 2, 4 * dim, 3, stride=2), ConvNorm(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.conv1(x))
        x = x + self.conv2[1](relu(self.conv2[0](x)))
        return self.conv3[1](relu(self.conv3[0](x)))


def map_size(img_size: int | tuple[int, int], reduction: int) -> tuple[int, int]:
    """Height and width of a map whose sides are that much smaller than the image's."""
    height, width = to_2tuple(img_size)
    return -(-height // reduction), -(-width // reduction)


class MLLA(PooledNet):
    """MLLA: (B, in_chans, H, W) -> (B, num_classes), for H and W from 32 up; with recconv_convtrans, multiples of 64.

    `mixer` is one of MIXERS: recattn_simple has no rotary embedding, recconv_convtrans doubles by transposed convolutions; `img_size` is that of
    the rotary tables in the state dict. `drop_path_rate` is reached by the last block, linearly from 0."""

    def __init__(
        self,
        *,
        dim: int,
        depths: tuple[int, ...],
        mixer: str,
        img_size: int | tuple[int, int] = 256,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        if mixer not in MIXERS:
            raise ValueError(f"mixer is '{mixer}': it can be {', '.join(MIXERS)}")
        dims = [dim * 2**i for i in range(len(depths))]
        features = [(chs, 4 * 2**i, f"layers.{i}.blocks", 2 * i + 2) for i, chs in enumerate(dims)]
        super().__init__(in_chans=in_chans, features=features, num_features=dims[-1], distillation=False)
        self.norms_map = mixer == "baseline"  # MLLA itself pools last
        self.patch_embed = Stem(in_chans, dim)

        def build_block(i: int, rate: float) -> nn.Module:
            if mixer != "baseline":
                return build_mixing_block(i, rate, stride=1)
            return BaselineBlock(dims[i], num_heads=2 ** (i + 1), resolution=map_size(img_size, 4 * 2**i), drop_path_rate=rate)

        def build_mixing_block(i: int, rate: float, *, stride: int) -> Block:
            is_recconv = mixer.startswith("recconv")
            out_chs = dims[i] * stride
            hidden_dim = out_chs * 5 // 2 if is_recconv else 2 * out_chs
            resolution = map_size(img_size, 4 * 2**i * stride * 2)
            agg = build_mixer(mixer, hidden_dim // 2, num_heads=2 ** (i + 1), level=5 - i - stride, resolution=resolution)
            act = nn.GELU() if is_recconv else nn.SiLU()
            return Block(dims[i], agg, hidden_dim=hidden_dim, act=act, stride=stride, drop_path_rate=rate)

        def build_downsample(i: int, rate: float) -> nn.Module:
            if i == len(depths) - 1:
                return nn.Identity()
            return PatchMerging(dims[i]) if mixer == "baseline" else build_mixing_block(i, rate, stride=2)

        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.layers = nn.ModuleList(
            Layer([build_block(i, rate) for rate in stage_rates], build_downsample(i, stage_rates[-1])) for i, stage_rates in enumerate(rates)
        )
        self.norm = nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def trunk(self) -> list[nn.Module]:
        return [self.patch_embed] + [part for layer in self.layers for part in (layer.blocks, layer.downsample)]

    def cut_trunk(self, length: int) -> None:
        self.layers = self.layers[: length // 2]
        self.layers[-1].downsample = nn.Identity()
        self.norm = nn.Identity()

    def _build_heads(self, num_classes: int) -> tuple[nn.Module, ...]:
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        return (self.head,)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        # What downsamples comes last in its layer: it is a block of its own, or as much.
        by_block = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", (MATCH_PREV_GROUP[0] - 1,))]
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None)] if coarse else by_block, "norm": [(r"^norm", MATCH_PREV_GROUP)]}

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, num_features, h, w): the last block's feature map."""
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of a feature map or, with `pre_logits`, its pooled and normalised features (B, num_features)."""
        if self.global_pool == "":
            return x
        x = average_pool(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) if self.norms_map else self.norm(average_pool(x))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


SIZES = {  #     width of the first stage, blocks per stage
    "nano": {"dim": 32, "depths": (2, 2, 4, 2)},
    "mini": {"dim": 48, "depths": (2, 4, 8, 4), "drop_path_rate": 0.2},
}
VARIANTS = {f"mlla_{size}_{mixer}": {**settings, "mixer": mixer} for size, settings in SIZES.items() for mixer in MIXERS}
PRETRAINED = {name: pretrained_cfg("patch_embed.conv1.conv", "head", input_size=(3, 256, 256), pool_size=(8, 8)) for name in VARIANTS}
register(VARIANTS, MLLA, PRETRAINED, has_distillation=False)
