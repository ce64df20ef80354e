"""The network that a recipe names, built for its data and tried on an image of its size."""

import difflib

import timm
import torch
from torch import nn

import model
from run.config import Config
from run.errors import InputError, first_line


def build(cfg: Config, num_classes: int, *, distillation: bool) -> nn.Module:
    """The network a recipe names, for `num_classes` classes. InputError where it is unknown or refuses an option or the image size."""
    if not timm.is_model(cfg.model):
        close = difflib.get_close_matches(cfg.model, timm.list_models(), n=3)
        raise InputError(f"--model {cfg.model} is no model that timm or this project knows" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    options = {"num_classes": num_classes, "drop_rate": cfg.drop, "drop_path_rate": cfg.drop_path, **(cfg.model_kwargs or {})}
    try:
        net = model.create_model(cfg.model, distillation=distillation, pretrained=cfg.pretrained, **options)
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
    """InputError where the network does not take images of the recipe's sizes."""
    for flag, size in cfg.sized_flags:
        try:
            net.eval()(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"--model {cfg.model} does not take images of {flag} ({first_line(error)}): choose another size, "
                "or where the model has that option --model-kwargs img_size=N"
            ) from error
    net.train()
