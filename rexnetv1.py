"""ReXNet V1 of any width, under the published module name: `rexnetv1.ReXNetV1(width_mult=1.0)`."""

from model.rexnet import ReXNetV1

__all__ = ["ReXNetV1"]
