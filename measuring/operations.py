"""Parameters and multiply-accumulates of networks, as trained and fused, beside the published figures."""

import difflib
from collections.abc import Callable

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model
import utils
from run.errors import InputError

PUBLISHED = {  # fused parameters in millions, MACs at 224 pixels in billions, as printed
    "recnext_m0": ("2.5", "0.4"),
    "recnext_m1": ("5.2", "0.9"),
    "recnext_m2": ("6.8", "1.2"),
    "recnext_m3": ("8.2", "1.4"),
    "recnext_m4": ("14.1", "2.4"),
    "recnext_m5": ("22.9", "4.7"),
    "recnext_a0": ("2.8", "0.4"),
    "recnext_a1": ("5.9", "0.9"),
    "recnext_a2": ("7.9", "1.2"),
    "recnext_a3": ("9.0", "1.4"),
    "recnext_a4": ("15.8", "2.4"),
    "recnext_a5": ("25.7", "4.7"),
    "recnext_t": ("12.1", "0.3"),
    "recnext_s": ("15.8", "0.7"),
    "recnext_b": ("19.3", "1.1"),
    "recnext_t_share_channel": ("12.1", "0.3"),
    "recnext_s_share_channel": ("15.8", "0.7"),
    "recnext_b_share_channel": ("19.2", "1.1"),
    "repnext_m0": ("2.3", "0.4"),
    "repnext_m1": ("4.8", "0.8"),
    "repnext_m2": ("6.5", "1.1"),
    "repnext_m3": ("7.8", "1.3"),
    "repnext_m4": ("13.3", "2.3"),
    "repnext_m5": ("21.7", "4.5"),
    "lsnet_t": ("11.4", "0.3"),
    "lsnet_s": ("16.1", "0.5"),
    "lsnet_b": ("23.2", "1.3"),
    "rexnetv1_1_0": ("4.8", "0.40"),
    "rexnetv1_1_3": ("7.6", "0.66"),
    "rexnetv1_1_5": ("9.7", "0.88"),
    "rexnetv1_2_0": ("16", "1.5"),
    "rexnetv1_3_0": ("34", "3.4"),
    "rexnetv1_lite_1_0": ("4.7", "0.41"),
    "rexnetv1_lite_1_3": ("6.8", "0.65"),
    "rexnetv1_lite_1_5": ("8.3", "0.84"),
    "rexnetv1_lite_2_0": ("13", "1.5"),
}


def count_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def count_macs(net: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of a network on the meta device, for one image; attention counts, elementwise operators do not."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, *image_shape, device="meta"))
    return counter.get_total_flops() // 2


def count(net: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Parameters of a network as trained, parameters fused, MACs fused for one image; `net` is used up."""
    num_trained = count_parameters(net)
    net = utils.replace_batchnorm(net.eval()).to("meta")
    return num_trained, count_parameters(net), count_macs(net, image_shape)


def measure(name: str, input_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    """`count` of the classifier of that name, for an image of that side, or height and width (default: the network's own size)."""
    net = model.create_model(name)
    chans, *sides = net.pretrained_cfg["input_size"]
    if input_size is not None:
        sides = (input_size, input_size) if isinstance(input_size, int) else input_size
    return count(net, (chans, *sides))


def agrees(value: float, published: str, *, tolerance: float = 0.0) -> bool:
    """Whether a value is within one unit of the last printed digit of `published`, or within `tolerance`."""
    decimals = len(published.partition(".")[2])
    return abs(value - float(published)) <= max(10.0**-decimals, tolerance)


def format_row(name: str, input_size: int | tuple[int, int] | None, *, measure: Callable = measure) -> str:
    """One line of the table; `measure` counts the network of a name."""
    num_trained, num_fused, macs = measure(name, input_size)
    line = f"{name:<26}{num_trained:>12,}{num_fused:>12,}{macs / 1e9:>10.3f}"
    if name not in PUBLISHED or input_size not in (None, 224):
        return line
    params, gmacs = PUBLISHED[name]
    params_mark = " " if agrees(num_fused / 1e6, params) else "!"
    macs_mark = " " if agrees(macs / 1e9, gmacs, tolerance=max(0.1, 0.05 * float(gmacs))) else "!"
    return f"{line}{params:>11}M{params_mark}{gmacs:>8}G{macs_mark}".rstrip()


def choose_models(name: str) -> list[str]:
    """The networks `name` stands for; InputError where timm knows none of that name."""
    if name == "all":
        return model.list_models()
    if timm.is_model(name):
        return [name]
    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    raise InputError(f"-m {name} is no model that timm or this project knows" + (f"; did you mean {' or '.join(close)}?" if close else ""))
