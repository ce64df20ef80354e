"""The published names of backbones and pyramids, and how a tensor's name here is translated into the published one."""

import re
from collections.abc import Callable

from torch import Tensor, nn

from run import checkpoint

State = dict[str, Tensor]
FromPublished = Callable[[nn.Module, State], State]  # a task's translation of a published state dict

# Modules here, and there; what follows the first match of a pattern is the same.
BACKBONE = (
    (r"backbone\.fpn\.inner_blocks\.(\d+)\.0\.", r"neck.lateral_convs.{}.conv."),
    (r"backbone\.fpn\.layer_blocks\.(\d+)\.0\.", r"neck.fpn_convs.{}.conv."),
    (r"backbone\.body\.(?:model\.)?", "backbone."),
)


def renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """The published name of our tensor `name`, by the first pattern of `table` that it begins with. KeyError where none does."""
    for pattern, there in table:
        match = re.match(pattern, name)
        if match:
            return there.format(*match.groups()) + name[match.end() :]
    raise KeyError(name)


def is_published(state: State) -> bool:
    """Whether a state dict has the published names."""
    return any(name.startswith("neck.") for name in state)


def num_channels(saved: dict, *, where: str) -> int:
    """Channels of the pyramid of the network in a checkpoint, ours or published."""
    state = checkpoint.weights(saved, where=where)
    return next(len(state[name]) for name in ("backbone.fpn.layer_blocks.0.0.bias", "neck.fpn_convs.0.conv.bias") if name in state)


def load(net: nn.Module, saved: dict, *, where: str, from_published: FromPublished) -> None:
    """Load a task's checkpoint, ours or a published one, as `run.checkpoint.read` gives it. InputError names what does not fit."""
    state = checkpoint.weights(saved, where=where)
    checkpoint.load_weights(net, from_published(net, state) if is_published(state) else state, where=where)


def load_finetune(net: nn.Module, source: str, *, from_published: FromPublished) -> None:
    """Load what fits of a task's checkpoint, ours or a published one; heads of other classes are dropped, which the log says."""
    checkpoint.load_finetune(net, source, convert=lambda state: from_published(net, state) if is_published(state) else state)
