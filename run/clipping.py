"""Gradient clipping, over lists of tensors at once and without a look at a GPU's numbers. Each form returns the gradients' norm before it."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from run.config import RunConfig

MIN_WEIGHT_NORM, MIN_GRADIENT_NORM = 1e-3, 1e-6  # of adaptive clipping, as in timm


def _unit_norms(vectors: list[Tensor], others: list[Tensor]) -> Tensor:
    """(n,) norms of the units: of each vector, then of each output unit (first dimension) of the others."""
    norms = [norm.view(1) for norm in torch._foreach_norm(vectors)] if vectors else []
    return torch.cat(norms + [torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim))) for tensor in others])


@torch.no_grad()
def clip_adaptively(parameters: Iterable[nn.Parameter], factor: float) -> Tensor:
    """Bound the gradient's norm of each output unit by `factor` times the norm of the unit itself; the norm of all gradients before that.

    A vector (a bias, a norm's weight) counts as one unit. Source: Brock et al. (arXiv:2102.06171), as in timm's `adaptive_clip_grad`."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    vectors, others = ([one for one in with_gradient if (one.ndim <= 1) == is_vector] for is_vector in (True, False))
    gradients = [one.grad for one in (*vectors, *others)]
    norms = _unit_norms(gradients[: len(vectors)], gradients[len(vectors) :])
    bounds = _unit_norms(vectors, others).clamp_(min=MIN_WEIGHT_NORM).mul_(factor)
    scales = torch.where(norms < bounds, 1, bounds / norms.clamp(min=MIN_GRADIENT_NORM))
    sizes = [1] * len(vectors) + [len(one) for one in others]
    # A CPU's numbers are at hand, and most gradients need no clipping: those are not written again.
    chosen = _changed(scales, sizes) if scales.device.type == "cpu" else range(len(gradients))
    views = scales.split(sizes)
    if chosen:
        torch._foreach_mul_([gradients[i] for i in chosen], [views[i].view(_unit_shape(gradients[i])) for i in chosen])
    return torch.linalg.vector_norm(norms)


def _unit_shape(tensor: Tensor) -> tuple[int, ...]:
    """Of one value per unit, to be broadcast over the tensor."""
    return (-1,) * (tensor.ndim > 0) + (1,) * (tensor.ndim - 1)


def _changed(scales: Tensor, sizes: list[int]) -> list[int]:
    """Which of the parts of `scales`, that are of these sizes, do not consist of ones alone."""
    num_changed = np.cumsum((scales != 1).numpy())[np.cumsum(sizes) - 1]
    return np.flatnonzero(np.diff(num_changed, prepend=0)).tolist()


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def clip_values(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Bound each element of the gradients by `limit`; the norm of all gradients before that."""
    parameters = list(parameters)
    norm = get_total_norm(_gradients(parameters))
    clip_grad_value_(parameters, limit)
    return norm


def build_clipping(cfg: RunConfig) -> Callable[[Iterable[nn.Parameter]], Tensor]:
    """Function that clips the gradients of parameters in place, where clipping is on, and returns the norm they had together before.

    That norm is a scalar on their device; where an element is not finite, it is not either."""
    if cfg.clip_grad is None:
        return lambda parameters: get_total_norm(_gradients(parameters))
    clip = {"norm": clip_grad_norm_, "value": clip_values, "agc": clip_adaptively}[cfg.clip_mode]
    return lambda parameters: clip(parameters, cfg.clip_grad)
