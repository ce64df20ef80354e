"""Checkpoints of segmenters with the published names: `{"state_dict": ...}`, in both directions and without changing a bit."""

import functools

from torch import Tensor, nn

from features import names
from run import checkpoint

_RENAMED = (*names.BACKBONE, (r"head\.", "decode_head."))
_SCORES = ("head.conv_seg.bias", "decode_head.conv_seg.bias")


def to_published(net: nn.Module) -> dict[str, Tensor]:
    """The segmenter's state dict in the published names."""
    return {names.renamed(name, _RENAMED): value for name, value in net.state_dict().items()}


def from_published(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict in our names, as far as it has the segmenter's tensors; others keep their names."""
    ours = {names.renamed(name, _RENAMED): name for name in net.state_dict()}
    return {ours.get(name, name): value for name, value in state.items()}


load = functools.partial(names.load, from_published=from_published)
load_finetune = functools.partial(names.load_finetune, from_published=from_published)


def num_classes(saved: dict, *, where: str) -> int | None:
    """Number of classes of the segmenter in a checkpoint, ours or published; None where it holds no head that tells."""
    state = checkpoint.weights(saved, where=where)
    return next((len(state[name]) for name in _SCORES if name in state), None)
