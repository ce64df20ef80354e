"""A network asked twice: of each image and of its mirror image."""

import math

from torch import Tensor, nn


class FlipAveraged(nn.Module):
    """(B, C, H, W) -> (B, num_classes), the logarithm of the mean of the class probabilities of an image and of its mirror image, in float32.

    Probabilities are what a mean is taken of, not logits: the two answers count the same, however large the logits of one of them, and what
    comes out is a distribution again, of which loss, calibration and ranks are those of the mean."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        one, other = (self.net(view).float().log_softmax(dim=1) for view in (images, images.flip(-1)))
        return one.logaddexp(other) - math.log(2)


def asked_twice(net: nn.Module, tta: str) -> nn.Module:
    """The network as --tta has it evaluated."""
    return FlipAveraged(net) if tta == "hflip" else net
