"""ReXNet-lite of any width, under the published module name: `rexnetv1_lite.ReXNetV1_lite(multiplier=1.0)`."""

from model.rexnet import ReXNetV1Lite as ReXNetV1_lite

__all__ = ["ReXNetV1_lite"]
