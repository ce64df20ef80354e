"""What one process of several loads, without the others, which it would tell of damaged files."""

from loading.steps import ImageLoader, StepLoader


def parts_of(loader: StepLoader, epoch: int, first_step: int = 0) -> list:
    """A process's micro-batches of `epoch` from step `first_step` on."""
    loader.sampler.start(epoch=epoch, step=first_step)
    return list(loader.prepare(iter(loader.loader)))


def share_of(loader: ImageLoader) -> list:
    """A process's share of the images."""
    return list(loader.prepare(iter(loader.loader)))
