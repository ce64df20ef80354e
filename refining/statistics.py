"""BatchNorm's running statistics, taken anew from training images, as training sees them."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

import datasets
from loading import augment
from loading.images import Images
from run.config import Config
from run.errors import InputError
from sources.progress import Progress
from utils import Rank, log


def training_batches(cfg: Config, images: Images, rank: Rank, num_images: int) -> Iterator[Tensor]:
    """At least `num_images` training images (B, 3, H, W) on the device, augmented and mixed: those of the epochs after the recipe's last one.

    All batches are of one size. Which images, and how they are cropped, depends on the recipe's --data-seed alone."""
    loader = datasets.build_train_loader(cfg, images, rank)
    mix = augment.build_mixing(cfg, loader.plan, len(images.classes))
    num_batches = -(-num_images // loader.global_batch) * cfg.grad_accum_steps
    said = Progress(num_batches, lambda line: log.info("statistics: %s", line), what="batches")
    batches = ((epoch, batch) for epoch in itertools.count(cfg.num_epochs) for batch in loader.batches(epoch))
    for epoch, batch in itertools.islice(batches, num_batches):
        yield mix(batch.images.to(rank.device), batch.targets.to(rank.device), epoch, batch.positions)[0]
        said.add()


@torch.no_grad()
def recalibrate(net: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set each BatchNorm's running mean and variance to the mean over `batches`, of one size, of each batch's own; the number of images.

    All else is as in evaluation: without dropout and stochastic depth. InputError where the network has no such statistics."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats]
    if not norms:
        raise InputError(
            f"{type(net).__name__} has no BatchNorm whose statistics could be taken anew", "use the checkpoint as it is; a fused one has none left"
        )
    net.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # for torch: every batch counts the same
        norm.train()
    num_images = 0
    for images in batches:
        net(images)
        num_images += len(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()
    return num_images
