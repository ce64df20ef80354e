"""BatchNorm whose statistics are those of all processes' images, on any device."""

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from utils import all_sum


class _SumOverProcesses(torch.autograd.Function):
    """The sum of every process's values, on each; every process's loss depends on it, so that its gradients are summed too."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return all_sum(values.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_sum(grad.clone())


class _SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics in training are those of all processes' batches; torch's own synchronised one needs a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        full = x.float()
        *sums, count = _SumOverProcesses.apply(torch.cat([full.sum((0, 2, 3)), full.new_tensor([x.numel() / x.shape[1]])])).unbind()
        mean = torch.stack(sums) / count
        centred = full - mean.view(-1, 1, 1)
        var = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


def synchronised(net: nn.Module, device: torch.device) -> nn.Module:
    """`net`, changed in place so that BatchNorm takes its statistics over all processes; a backbone that keeps its statistics stays as it is."""
    if net.backbone.keeps_statistics:
        return net
    if device.type == "cuda":
        return convert_sync_batchnorm(net)
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SharedBatchNorm2d
    return net
