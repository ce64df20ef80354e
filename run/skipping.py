"""Training steps that are not finite: noticed and left out on the device, which is never waited for.

Whatever spoils a step (its loss, BatchNorm's statistics, its gradients) is made to show in the gradients, which are averaged over the
processes: so all of them leave out the same steps without a word between them."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

NO_STEP = -1


class Skips(NamedTuple):
    """Steps that were left out: how many in a row up to the last step, and at most; how many for another reason than a loss scale
    that is too high; the last one's number in its epoch, or NO_STEP."""

    in_a_row: int
    most_in_a_row: int
    unexplained: int
    last_step: int


class Guard:
    """Keeps what is not finite out of a network: says on the device whether a step is to be left out, undoes it, and counts.

    It says so as torch's optimisers expect it: `found_inf`, a float32 scalar, is 1 for a step to be left out, else 0."""

    def __init__(self, net: nn.Module):
        self.parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        buffers = [buffer for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) for buffer in module.buffers()]
        by_kind = [[buffer for buffer in buffers if buffer.is_floating_point() == is_floating] for is_floating in (True, False)]
        self.statistics = [group for group in by_kind if group]  # means and variances, and numbers of batches
        self.looks = self.parameters[0].device.type == "cpu"  # there the host need not wait for a number
        self.forget()

    def forget(self) -> None:
        """Count afresh."""
        none = torch.zeros((), dtype=torch.int64, device=self.parameters[0].device)
        self.in_a_row, self.most_in_a_row, self.unexplained, self.last_step = none, none, none, none + NO_STEP

    def start_step(self) -> None:
        """Remember BatchNorm's statistics, which the forward pass changes: averages that a NaN would never leave."""
        self.before = [_flat(group) for group in self.statistics]

    def spread(self, loss: Tensor) -> Tensor:
        """The loss; where it, or a statistic that its forward pass left, is not finite, one whose gradients are all NaN."""
        with torch.no_grad():
            spoilt = 0 * sum((_flat(group).sum() for group in self.statistics), start=loss)  # 0 or NaN
        return loss * (1 + spoilt)

    @contextlib.contextmanager
    def keeping_statistics(self):
        """Leave BatchNorm's statistics as they are, which a forward pass that is run again inside the block would change once more."""
        before = [_flat(group) for group in self.statistics]
        yield
        with torch.no_grad():
            for group, values in zip(self.statistics, before, strict=True):
                _put_back(group, values)

    @staticmethod
    def found_inf(norm: Tensor) -> Tensor:
        """Whether to leave out a step whose gradients, neither scaled nor clipped, have this norm together: where it is not finite."""
        return 1 - norm.isfinite().float()

    @torch.no_grad()
    def end_step(self, found_inf: Tensor, *, step: int, is_explained: Tensor) -> None:
        """Undo and count a step that was left out; `is_explained` is a bool scalar: whether a loss scale that is too high would do that."""
        is_skipped = found_inf.bool()
        if not self.looks or is_skipped:
            for group, before in zip(self.statistics, self.before, strict=True):
                _put_back(group, torch.where(is_skipped, before, _flat(group)))
        self.in_a_row = (self.in_a_row + 1) * is_skipped
        self.most_in_a_row = torch.maximum(self.most_in_a_row, self.in_a_row)
        self.unexplained = self.unexplained + (is_skipped & ~is_explained)
        self.last_step = torch.where(is_skipped, step, self.last_step)

    def read(self) -> Skips:
        """The counts, for which the host waits for the device."""
        return Skips(*torch.stack([self.in_a_row, self.most_in_a_row, self.unexplained, self.last_step]).tolist())


def _flat(tensors: list[Tensor]) -> Tensor:
    """(n,) a copy of the values of vectors, one after the other, or of scalars."""
    return torch.cat(tensors) if tensors[0].ndim else torch.stack(tensors)


def _put_back(tensors: list[Tensor], values: Tensor) -> None:
    """Give the tensors what `_flat` made of them."""
    torch._foreach_copy_(tensors, values.split([len(tensor) for tensor in tensors]) if tensors[0].ndim else values.unbind())


def step_unless(found_inf: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step the optimiser; where `found_inf` is 1, parameters, moments and step counters stay as they are.

    Torch's fused optimisers obey on the device. For others the host looks, which on a GPU means to wait."""
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.grad_scale, optimizer.found_inf = None, found_inf
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not found_inf.item():
        optimizer.step()
