"""Forms of recursive convolution besides `RecConv2d`, and plain depthwise ones: the token mixers of RecNeXt-M's ablation, by name.

Paper: RecConv: Efficient Recursive Convolutions for Multi-Frequency Representations (https://arxiv.org/abs/2412.19628)
Source: https://github.com/suous/RecNeXt (Apache-2.0); state-dict names are the published ones, where a form's code is published.

All map (B, dim, H, W) to (B, dim, H, W) over `level` halvings. A map's sides are those of the image divided by 2^(6 - level), so that
what a form asks of them holds for the whole network or for none of it.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from model.depthwise import DepthwiseConv2d
from model.layers import keep_layout
from model.mixers import RecConv2d, RecursiveConv


def depthwise_up(dim: int, kernel_size: int) -> nn.ConvTranspose2d:
    """Transposed depthwise convolution, the counterpart of a strided one of that odd size: (B, dim, H, W) -> (B, dim, 2 H, 2 W)."""
    return nn.ConvTranspose2d(dim, dim, kernel_size + 1, 2, kernel_size // 2, groups=dim, bias=False)


def require_multiples(x: Tensor, level: int) -> None:
    """ValueError where the map x cannot be halved `level` times without a remainder: doubling would not lead back to its size."""
    height, width, unit = x.shape[2], x.shape[3], 1 << level
    if height % unit != 0 or width % unit != 0:
        raise ValueError(
            f"transposed convolutions double what {level} halvings leave, which does not give back a map of {height}x{width}: "
            f"its sides have to be multiples of {unit}, those of images multiples of 64 (such as 256 or 384)"
        )


def require_divisible(dim: int, level: int) -> None:
    """ValueError where `dim` channels cannot be halved `level` times."""
    if dim % (1 << level) != 0:
        raise ValueError(f"this mixer halves its channels at each of {level} levels, and {dim} are not divisible by {1 << level}: choose other dims")


def unpool(x: Tensor, places: Tensor, finer: Tensor) -> Tensor:
    """Map of the size of `finer` with the values of x at `places`, which max pooling gave, and 0 elsewhere.

    `max_unpool2d`'s result. As a scatter to places that all differ it can be traced, and its order is of no account on any device."""
    return x.new_zeros(finer.shape).flatten(2).scatter(2, places.flatten(2), keep_layout(x).flatten(2)).reshape(finer.shape)


class UnpoolRecConv2d(RecursiveConv):
    """Max pooling halves, and unpooling puts each maximum back in its place: no weights but those of a convolution per level."""

    def __init__(self, dim: int, *, kernel_size: int, level: int):
        super().__init__()
        self.level = level
        self.convs = nn.ModuleList([DepthwiseConv2d(dim, kernel_size, bias=False) for _ in range(level + 1)])

    def _mix(self, x: Tensor) -> Tensor:
        height, width, smallest = x.shape[2], x.shape[3], 1 << self.level
        if height < smallest or width < smallest:
            raise ValueError(
                f"a map of {height}x{width} cannot be pooled {self.level} times: its sides have to be {smallest} or more, those of images 64 or more"
            )
        pyramid = [x]
        places = []
        for _ in range(self.level):
            pooled, place = max_pool2d(pyramid[-1], 2, return_indices=True)
            pyramid.append(pooled)
            places.append(place)
        x = pyramid.pop()
        for i, conv in enumerate(self.convs):
            if i > 0:
                finer = pyramid.pop()
                x = finer + unpool(x, places.pop(), finer)
            x = conv(x)
        return x


class TransposedRecConv2d(RecursiveConv):
    """`RecConv2d` with a transposed convolution, shared by all levels as the strided one is, in place of interpolation ("basic")."""

    def __init__(self, dim: int, *, kernel_size: int, level: int):
        super().__init__()
        self.level = level
        self.down = DepthwiseConv2d(dim, kernel_size, stride=2, bias=False)
        self.convs = nn.ModuleList([DepthwiseConv2d(dim, kernel_size, bias=False) for _ in range(level + 1)])
        self.up = depthwise_up(dim, kernel_size)

    def _mix(self, x: Tensor) -> Tensor:
        require_multiples(x, self.level)
        pyramid = [x]
        for _ in range(self.level):
            pyramid.append(self.down(pyramid[-1]))
        x = pyramid.pop()
        for i, conv in enumerate(self.convs):
            if i > 0:
                x = pyramid.pop() + self.up(x)
            x = conv(x)
        return x


class GroupRecConv2d(RecursiveConv):
    """Grouped strided convolutions halve channels too, two into one, and transposed ones double them again ("group")."""

    def __init__(self, dim: int, *, kernel_size: int, level: int):
        super().__init__()
        require_divisible(dim, level)
        self.level = level
        chs = [dim >> i for i in range(level + 1)]
        pad = kernel_size // 2
        pairs = list(zip(chs[:-1], chs[1:], strict=True))
        self.downs = nn.ModuleList([nn.Conv2d(fine, coarse, kernel_size, 2, pad, groups=coarse, bias=False) for fine, coarse in pairs])
        self.convs = nn.ModuleList([DepthwiseConv2d(dim, kernel_size, bias=False) for dim in reversed(chs)])
        self.ups = nn.ModuleList([nn.ConvTranspose2d(coarse, fine, kernel_size + 1, 2, pad, groups=coarse, bias=False) for fine, coarse in reversed(pairs)])

    def _mix(self, x: Tensor) -> Tensor:
        require_multiples(x, self.level)
        pyramid = [x]
        for down in self.downs:
            pyramid.append(down(pyramid[-1]))
        x = pyramid.pop()
        for conv, up in zip(self.convs, self.ups, strict=False):  # the last, finest one has nothing to double
            x = pyramid.pop() + up(conv(x))
        return self.convs[-1](x)


class SplitRecConv2d(RecursiveConv):
    """Each level passes the second half of its channels down and puts what comes back beside the first ("split")."""

    def __init__(self, dim: int, *, kernel_size: int, level: int):
        super().__init__()
        require_divisible(dim, level)
        self.level = level
        chs = [dim >> i for i in range(level + 1)]
        self.downs = nn.ModuleList([DepthwiseConv2d(dim, kernel_size, stride=2, bias=False) for dim in chs[1:]])
        self.convs = nn.ModuleList([DepthwiseConv2d(dim, kernel_size, bias=False) for dim in reversed(chs)])
        self.ups = nn.ModuleList([depthwise_up(dim, kernel_size) for dim in reversed(chs[1:])])

    def _mix(self, x: Tensor) -> Tensor:
        require_multiples(x, self.level)
        kept = []
        for down in self.downs:
            stay, go = x.chunk(2, dim=1)
            kept.append(stay)
            x = down(go)
        for conv, up in zip(self.convs, self.ups, strict=False):  # the last, finest one has nothing to double
            x = torch.cat((kept.pop(), up(conv(x))), dim=1)
        return self.convs[-1](x)


class RecurrentRecConv2d(RecursiveConv):
    """One recurrence over the pyramid, from its deepest map up: the state is `a` of the state plus `b` of the map, resized to the next one's size.

    The output is `c` of the state plus `d` of the input; `n` halves. The five are shared by all levels, and one level needs no `a`."""

    def __init__(self, dim: int, *, kernel_size: int, level: int, mode: str = "nearest"):
        super().__init__()
        self.level = level
        self.mode = mode
        conv = partial(DepthwiseConv2d, dim, kernel_size, bias=False)
        self.n = conv(stride=2)
        self.a = conv() if level > 1 else nn.Identity()
        self.b, self.c, self.d = conv(), conv(), conv()

    def _mix(self, x: Tensor) -> Tensor:
        pyramid = [x]
        for _ in range(self.level):
            pyramid.append(self.n(pyramid[-1]))
        state = self.b(pyramid.pop())
        for _ in range(self.level - 1):
            finer = pyramid.pop()
            state = self.a(interpolate(state, size=finer.shape[2:], mode=self.mode)) + self.b(finer)
        return self.c(interpolate(state, size=x.shape[2:], mode=self.mode)) + self.d(x)

    def scale_output(self, scale: Tensor) -> None:
        for conv in (self.c, self.d):
            conv.weight *= scale.view(-1, 1, 1, 1)


PLAIN = {f"{size}x{size}": size for size in (3, 7, 11)}  # one depthwise convolution, with a bias; 11x11 is the published "bxb"
RECURSIVE = {
    "rec_{0}x{0}": RecConv2d,
    "rec_{0}x{0}_nearest": partial(RecConv2d, mode="nearest"),
    "rec_{0}x{0}_unpool": UnpoolRecConv2d,
    "rec_{0}x{0}_recurrent": RecurrentRecConv2d,
    "rec_convtrans_{0}x{0}_basic": TransposedRecConv2d,
    "rec_convtrans_{0}x{0}_group": GroupRecConv2d,
    "rec_convtrans_{0}x{0}_split": SplitRecConv2d,
}
FORMS = {pattern.format(size): partial(form, kernel_size=size) for pattern, form in RECURSIVE.items() for size in (3, 5, 7)}
MIXERS = (*PLAIN, *FORMS)


def build_mixer(name: str, dim: int, *, level: int) -> nn.Module:
    """Token mixer `name` of MIXERS, recursive over `level` halvings or a plain convolution; ValueError for another name."""
    if name in PLAIN:
        return DepthwiseConv2d(dim, PLAIN[name])
    if name not in FORMS:
        raise ValueError(f"mixer is '{name}': it can be {', '.join(MIXERS)}")
    return FORMS[name](dim, level=level)
