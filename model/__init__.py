"""Our architectures. Importing this package registers them with timm, whose `create_model` then builds them by name."""

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
