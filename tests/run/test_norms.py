"""BatchNorm over all processes, in a process that is alone: torch's own. That several share it is in tests/test_processes.py."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from run.errors import InputError
from run.norms import synchronised

NORMS = {
    "images": (nn.BatchNorm2d(3), (4, 3, 5, 6)),
    "vectors": (nn.BatchNorm1d(3), (4, 3)),
    "an activation": (BatchNormAct2d(3), (4, 3, 5, 6)),
    "a mean of all batches": (nn.BatchNorm2d(3, momentum=None), (4, 3, 5, 6)),
    "no weights": (nn.BatchNorm2d(3, affine=False), (4, 3, 5, 6)),
    "no statistics": (nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 5, 6)),
}


@pytest.mark.parametrize("name", NORMS)
def test_outputs_gradients_and_statistics_are_torchs(name):
    torch.manual_seed(0)
    norm, shape = NORMS[name]
    own = copy.deepcopy(norm).double()
    shared = synchronised(nn.Sequential(copy.deepcopy(own)), torch.device("cpu"))
    assert type(shared[0]) is not type(norm)
    found = []
    for net in (own, shared):
        images = torch.linspace(-2, 3, torch.Size(shape).numel(), dtype=torch.float64).view(shape).square().requires_grad_()
        for _ in range(2):
            outputs = net(images)
        outputs.pow(3).sum().backward()
        gradients = [images.grad, *(parameter.grad for parameter in net.parameters())]
        found.append([outputs, *gradients, *net.buffers(), net.eval()(images)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_another_batchnorm_is_refused_where_there_is_no_gpu():
    with pytest.raises(InputError, match=r"0 \(BatchNorm3d\) cannot .* on a CPU.*drop --sync-bn"):
        synchronised(nn.Sequential(nn.BatchNorm3d(3)), torch.device("cpu"))
