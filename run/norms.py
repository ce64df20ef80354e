"""BatchNorm whose statistics are those of all processes' images, on any device."""

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from run.errors import InputError
from utils import all_sum


class _SumOverProcesses(torch.autograd.Function):
    """The sum of every process's values, on each; every process's loss depends on it, so that its gradients are summed too."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return all_sum(values.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_sum(grad.clone())


def _normalised(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """What `norm` makes of (B, C, ...) in training, by the mean and variance of all processes' batches, which its running statistics follow."""
    full = x.to(torch.promote_types(x.dtype, torch.float32))
    others = [0, *range(2, x.ndim)]
    shape = (-1, *[1] * (x.ndim - 2))
    *sums, count = _SumOverProcesses.apply(torch.cat([full.sum(others), full.new_tensor([x.numel() / x.shape[1]])])).unbind()
    mean = torch.stack(sums) / count
    centred = full - mean.view(shape)
    var = _SumOverProcesses.apply(centred.square().sum(others)) / count
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            weight = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.to(norm.running_mean), weight)
            norm.running_var.lerp_((var * count / (count - 1)).to(norm.running_var), weight)
    scale = (var + norm.eps).rsqrt()
    if norm.affine:
        return (centred * (norm.weight * scale).view(shape) + norm.bias.view(shape)).to(x.dtype)
    return (centred * scale.view(shape)).to(x.dtype)


class _SharedBatchNorm1d(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return _normalised(self, x) if self.training else super().forward(x)


class _SharedBatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return _normalised(self, x) if self.training else super().forward(x)


class _SharedBatchNormAct2d(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(_normalised(self, x))) if self.training else super().forward(x)


# Torch's own synchronised BatchNorm needs a GPU; elsewhere one of these takes the place of a module's class.
_SHARED = {nn.BatchNorm1d: _SharedBatchNorm1d, nn.BatchNorm2d: _SharedBatchNorm2d, BatchNormAct2d: _SharedBatchNormAct2d}


def synchronised(net: nn.Module, device: torch.device) -> nn.Module:
    """`net`, changed in place so that BatchNorm takes its statistics over all processes. InputError where it has a BatchNorm that cannot."""
    if device.type == "cuda":
        return convert_sync_batchnorm(net)
    for name, module in net.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if type(module) not in _SHARED:
            raise InputError(f"{name} ({type(module).__name__}) cannot take its statistics over all processes on a CPU", "use a GPU, or drop --sync-bn")
        module.__class__ = _SHARED[type(module)]
    return net
