"""Time of a training step (forward and backward) of our networks, relative to the same networks with their operators written plainly.

    python benchmarks/models.py                                                  one network per family, minutes
    python benchmarks/models.py -m repnext_m1 --batch-size 8 --rounds 20

Plain is what the papers' formulas say: every branch of a sum is a convolution of its own, linear attention has one order of evaluation, LSNet's
aggregation unfolds its input. Both run in turns on one thread; below 1 ours is faster. A ratio's spread is that of its rounds.
"""

import argparse
import copy
import statistics
import sys
import time
import types
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

import model
from model.layers import ChannelScale
from model.lsnet import LSConv
from model.mixers import LinearAttention, attend_values_first, kernel_feature
from model.repnext import RepDWConvM, RepDWConvS

FAMILIES = ("recnext_m1", "recnext_a1", "recnext_t", "recnext_t_share_channel", "repnext_m1", "lsnet_t", "repvit_m0_6", "rexnetv1_1_0", "rexnetv1_lite_1_0")


def _plain_attention(self: LinearAttention, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    q, k = kernel_feature(self.qk(x), self.kernel).reshape(batch, 2 * self.num_heads, -1, height * width).chunk(2, dim=1)
    return attend_values_first(q, k, x.reshape(batch, self.num_heads, -1, height * width)).reshape(x.shape) + self.pe(x)


def _plain_lsconv(self: LSConv, x: Tensor) -> Tensor:
    w = self.lkp(x)
    batch, chs, height, width = x.shape
    patches = unfold(x, 3, padding=1).view(batch, chs, 9, height, width)
    return self.bn((patches * w.repeat(1, chs // w.shape[1], 1, 1, 1)).sum(2)) + x


def _plain_small(self: RepDWConvS, x: Tensor) -> Tensor:
    if self.stride == 1:
        return self.conv_3_3(x) + self.conv_3_w(x) + self.conv_3_h(x) + self.conv_2_2(x)
    return self.conv_3_3(x) + self.conv_3_h(self.conv_3_w(x)) + self.conv_2_2(x)


def _plain_middle(self: RepDWConvM, x: Tensor) -> Tensor:
    pairs = self.conv_7_h(self.conv_7_w(x)) + self.conv_5_h(self.conv_5_w(x))
    return self.conv_7_7(x) + self.conv_5_3(x) + self.conv_3_5(x) + pairs


PLAIN_METHODS = {
    ChannelScale: ("forward", nn.Conv2d.forward),
    LinearAttention: ("forward", _plain_attention),
    LSConv: ("forward", _plain_lsconv),
    RepDWConvS: ("forward", _plain_small),
    RepDWConvM: ("forward", _plain_middle),
}


def to_plain(net: nn.Module) -> nn.Module:
    """A copy of `net` with the same weights, in which each operator is written plainly."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if type(module) in PLAIN_METHODS:
            name, method = PLAIN_METHODS[type(module)]
            setattr(module, name, types.MethodType(method, module))
        if isinstance(module, RepDWConvS | RepDWConvM) and module.stride == 2:
            for conv_name, conv in module.named_children():
                # While merged, the strides of the branches are of no account; a pair in a row halves one side each.
                conv.stride = {"w": (1, 2), "h": (2, 1)}.get(conv_name[-1], (2, 2))
    return net


def step_s(net: nn.Module, images: Tensor) -> float:
    """Duration of one forward and backward."""
    net.zero_grad()
    start = time.perf_counter()
    net(images).logsumexp(1).mean().backward()
    return time.perf_counter() - start


def compare(name: str, *, batch_size: int, input_size: int, num_rounds: int, memory_format: torch.memory_format) -> str:
    """One line of the table. AssertionError where both forms disagree."""
    torch.manual_seed(0)
    net = model.create_model(name, drop_path_rate=0.0, drop_rate=0.0).to(memory_format=memory_format).train()
    plain = to_plain(net)
    images = torch.randn(batch_size, 3, input_size, input_size).contiguous(memory_format=memory_format)
    torch.testing.assert_close(net(images), plain(images), rtol=1e-3, atol=1e-4)
    for one in (net, plain):
        step_s(one, images)
    times = [(step_s(net, images), step_s(plain, images)) for _ in range(num_rounds)]
    ratios = sorted(ours / theirs for ours, theirs in times)
    ours_ms, plain_ms = (1e3 * min(column) for column in zip(*times, strict=True))
    return f"{name:<26}{ours_ms:>9.0f} ms{plain_ms:>9.0f} ms{statistics.median(ratios):>8.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("-m", "--models", nargs="+", default=FAMILIES, choices=model.list_models(), metavar="NAME", help="our networks")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=8, help="images [8]")
    parser.add_argument("--input-size", "--input_size", type=int, default=224, help="side of the images, pixels [224]")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each form that are timed [10]")
    parser.add_argument("--channels-last", "--channels_last", action="store_true", help="memory format, as main.py trains")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{'model':<26}{'ours':>12}{'plain':>12}{'ratio':>8}  (spread)")
    settings = {"batch_size": args.batch_size, "input_size": args.input_size, "num_rounds": args.rounds}
    for name in args.models:
        print(compare(name, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format, **settings), flush=True)


if __name__ == "__main__":
    main()
