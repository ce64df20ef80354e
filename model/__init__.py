"""Our architectures: a name in, a network out. Importing this package registers them with timm, whose `create_model` then builds them.

layers.py        layers that architectures share, and their folding
depthwise.py     depthwise convolution, quick in channels-last on CPUs
mixers.py        token mixers that architectures share
recconv.py       forms of recursive convolution, by name
recompute.py     gradient checkpointing
nets.py          skeletons from stem to heads
registration.py  how architectures enter timm's registry
recnext_m.py     RecNeXt-M
recnext_a.py     RecNeXt-A
recnext_t.py     RecNeXt-T, -S, -B
repnext.py       RepNeXt
repvit.py        RepViT-M0.6
convnext.py      ConvNeXt-femto with RepNeXt's downsampling
mlla.py          MLLA
rexnet.py        ReXNet, ReXNet-lite
lsnet.py         LSNet
ska.py           small-kernel aggregation, LSNet's operator
ska_triton.py    its kernels for GPUs
profile.py       how linear attention computes fastest
"""

import timm
from torch import nn

from model import convnext, lsnet, mlla, recnext_a, recnext_m, recnext_t, repnext, repvit, rexnet  # noqa: F401  (they register)
from model.registration import REGISTERED


def list_models() -> list[str]:
    """Names of our models, family by family."""
    return list(REGISTERED)


def create_model(name: str, *, distillation: bool = False, **kwargs) -> nn.Module:
    """Model `name` of timm's registry, ours or timm's own, prepared to be trained with or without distillation.

    Arguments that are None are left to the model. Models with a distillation head return a pair of logits while they train
    with distillation; others have one output for both terms of the loss."""
    if name.partition(".")[0] in REGISTERED:
        return timm.create_model(name, distillation=distillation, **kwargs)
    net = timm.create_model(name, **kwargs)
    if hasattr(net, "set_distilled_training"):
        net.set_distilled_training(distillation)
    return net
