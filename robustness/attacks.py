"""Images changed against a network, within a distance that an eye does not see: FGSM (arXiv:1412.6572) and PGD (arXiv:1706.06083).

Distances are in pixels of the range from 0 to 1, in which the changed images stay. A network takes and both attacks return images
as the loaders give them, normalised (B, 3, H, W)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loading import augment
from loading.augment import IMAGENET, Statistics
from loading.keys import draw_words

EPSILON = 1 / 255
STEP, NUM_STEPS = 0.5 / 255, 5  # PGD's


def _gradient_sign(net: nn.Module, pixels: Tensor, targets: Tensor, values: Statistics) -> Tensor:
    """The direction in which each pixel raises the loss of its image: -1, 0 or 1."""
    mean, std = augment.tensors_of(values, pixels.device)
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad():
        loss = nn.functional.cross_entropy(net((pixels - mean) / std).float(), targets, reduction="sum")  # of each image, whatever the batch
    return torch.autograd.grad(loss, pixels)[0].sign()


def fgsm(net: nn.Module, images: Tensor, targets: Tensor, *, epsilon: float = EPSILON, values: Statistics = IMAGENET) -> Tensor:
    """The images, normalised by `values`, after one step of `epsilon` that raises their loss."""
    mean, std = augment.tensors_of(values, images.device)
    pixels = images * std + mean
    changed = (pixels + epsilon * _gradient_sign(net, pixels, targets, values)).clamp(0, 1)
    return (changed - mean) / std


def random_start(shape: Sequence[int], places: Tensor, seed: int) -> Tensor:
    """Uniform noise from -1 to 1 for images (B, 3, H, W), on the CPU: a function of the seed and each image's place in its set alone."""
    noise = torch.empty(*shape)
    for i, place in enumerate(places.tolist()):
        generator = torch.Generator().manual_seed(draw_words("pgd", seed, place)[0] % 2**63)
        noise[i].uniform_(-1, 1, generator=generator)
    return noise


def pgd(
    net: nn.Module,
    images: Tensor,
    targets: Tensor,
    places: Tensor,
    *,
    seed: int,
    epsilon: float = EPSILON,
    step: float = STEP,
    num_steps: int = NUM_STEPS,
    values: Statistics = IMAGENET,
) -> Tensor:
    """The images after steps that raise their loss, each brought back to within `epsilon` of where the image was; from a random start there."""
    mean, std = augment.tensors_of(values, images.device)
    pixels = images * std + mean
    changed = (pixels + epsilon * random_start(images.shape, places, seed).to(pixels)).clamp(0, 1)
    for _ in range(num_steps):
        moved = changed + step * _gradient_sign(net, changed, targets, values)
        changed = (pixels + (moved - pixels).clamp(-epsilon, epsilon)).clamp(0, 1)
    return (changed - mean) / std
