"""Our architectures. Importing this package registers them with timm, whose `create_model` then builds them by name."""

import difflib

import timm
import torch
from torch import nn

from model import convnext, lsnet, mlla, recnext_a, recnext_m, recnext_t, repnext, repvit, rexnet  # noqa: F401  (they register)
from model.layers import REGISTERED
from run.config import Config
from run.errors import InputError, first_line


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


def build(cfg: Config, num_classes: int, *, distillation: bool) -> nn.Module:
    """The network a recipe names, for `num_classes` classes. InputError where it is unknown or refuses an option or the image size."""
    if not timm.is_model(cfg.model):
        close = difflib.get_close_matches(cfg.model, timm.list_models(), n=3)
        raise InputError(f"--model {cfg.model} is no model that timm or this project knows" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    options = {"num_classes": num_classes, "drop_rate": cfg.drop, "drop_path_rate": cfg.drop_path, **(cfg.model_kwargs or {})}
    try:
        net = create_model(cfg.model, distillation=distillation, pretrained=cfg.pretrained, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"--model {cfg.model} does not take an option given to it ({first_line(error)}): check --model-kwargs, --drop, --drop-path") from error
    except (OSError, RuntimeError) as error:
        if not cfg.pretrained:
            raise InputError(f"--model {cfg.model} cannot be built ({first_line(error)})") from error
        raise InputError(
            f"--pretrained: the weights of {cfg.model} could not be fetched ({first_line(error)}): download them where there is a network, "
            "then use --resume FILE with --eval, or --finetune FILE to train"
        ) from error
    _try_size(cfg, net)
    return net


@torch.no_grad()
def _try_size(cfg: Config, net: nn.Module) -> None:
    """InputError where the network does not take images of the recipe's size."""
    try:
        net.eval()(torch.zeros(1, 3, cfg.input_size, cfg.input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"--model {cfg.model} does not take images of --input-size {cfg.input_size} ({first_line(error)}): choose another size, "
            "or where the model has that option --model-kwargs img_size=N"
        ) from error
    net.train()
