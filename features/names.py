"""The published names of backbones and pyramids, and how a tensor's name here is translated into the published one."""

import re

from torch import Tensor

from run import checkpoint

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


def is_published(state: dict[str, Tensor]) -> bool:
    """Whether a state dict has the published names."""
    return any(name.startswith("neck.") for name in state)


def num_channels(saved: dict, *, where: str) -> int:
    """Channels of the pyramid of the network in a checkpoint, ours or published."""
    state = checkpoint.weights(saved, where=where)
    return next(len(state[name]) for name in ("backbone.fpn.layer_blocks.0.0.bias", "neck.fpn_convs.0.conv.bias") if name in state)
