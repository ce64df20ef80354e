"""Gradient checkpointing: backward gets a block's input alone, and computes the rest again."""

from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


class KeptStatistics:
    """Context in which the BatchNorms of `module` update copies of their running statistics, which are then forgotten."""

    def __init__(self, module: nn.Module):
        self.norms = [part for part in module.modules() if isinstance(part, BATCH_NORMS)]
        self.kept = []

    def __enter__(self) -> None:
        self.kept = [(norm, name, buffer) for norm in self.norms if norm.training for name, buffer in norm.named_buffers(recurse=False)]
        for norm, name, buffer in self.kept:
            setattr(norm, name, buffer.clone())

    def __exit__(self, *exception) -> None:
        for norm, name, buffer in self.kept:
            setattr(norm, name, buffer)


def recomputed(block: nn.Module, *inputs):
    """`block(*inputs)`, of which `inputs` alone are kept for backward: same values, gradients, random draws and running statistics.

    timm's `checkpoint_seq` has the statistics of a batch counted twice, since BatchNorm meets it a second time in backward. A compiled
    network does not: what its forward pass writes is no part of what is computed again."""
    if torch.compiler.is_compiling():
        return checkpoint(block, *inputs, use_reentrant=False)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=partial(_contexts, block))


def _contexts(block: nn.Module):
    return nullcontext(), KeptStatistics(block)
