"""The network that a recipe names, built for its data, tried on an image of its size, and made ready to be trained."""

import difflib

import timm
import torch
from torch import nn

import model
from run import norms
from run.config import Config
from run.errors import InputError, first_line
from run.freezing import freeze
from utils import Rank


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


def prepare(cfg: Config, net: nn.Module, rank: Rank) -> nn.Module:
    """`net`, which is on its device, as the recipe trains it: what is frozen, what is computed again, what is shared by the processes.

    InputError where the network cannot do that."""
    if cfg.freeze:
        freeze(net, cfg.freeze)
    if cfg.grad_checkpointing:
        try:
            net.set_grad_checkpointing(True)
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise InputError(f"--grad-checkpointing: {cfg.model} cannot compute its activations again: drop the flag, or choose another model") from error
    return norms.synchronised(net, rank.device) if cfg.sync_bn and rank.world_size > 1 else net
