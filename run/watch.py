"""What a run does about steps that were left out because they are not finite: tell of them, and say when it may not go on so."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from run.config import RunConfig
from run.errors import InputError
from run.skipping import NO_STEP, Skips
from utils import Rank, any_process, gather_objects, log


class NotFinite(Exception):
    """What is not finite, and in which step and epoch: the run may not go on from there."""

    def __init__(self, what: str, *, epoch: int, step: int):
        super().__init__(what)
        self.epoch, self.step = epoch, step


def precision_name(amp_dtype: torch.dtype | None) -> str:
    return str(amp_dtype or torch.float32).removeprefix("torch.")


class Watch:
    """Looks at the counts of skipped steps whenever there is a progress line, as --on-nonfinite and --max-skipped-steps say."""

    def __init__(self, cfg: RunConfig, amp_dtype: torch.dtype | None):
        self.mode, self.limit, self.precision = cfg.on_nonfinite, cfg.max_skipped_steps, precision_name(amp_dtype)
        self.has_clipping = cfg.clip_grad is not None
        self.has_gone_back = False
        self.start()

    def start(self) -> None:
        """Look afresh."""
        self.skips, self.num_told, self.is_tripped = Skips(0, 0, 0, NO_STEP), 0, False

    def look(self, skips: Skips, *, num_skipped: int, epoch: int, lr: float) -> None:
        """Tell of steps of `epoch` that were left out since the last look, and find out whether they are too many."""
        if num_skipped > self.num_told:
            why = "loss or gradients were not finite" if skips.unexplained else "their gradients were not finite under float16's loss scale, which was lowered"
            steps = "1 step" if num_skipped == 1 else f"{num_skipped} steps"
            log.warning(
                "%s of epoch %d left out so far, the last was step %d (learning rate %.2e, %s): %s", steps, epoch, skips.last_step, lr, self.precision, why
            )
        self.skips, self.num_told = skips, num_skipped
        self.is_tripped = skips.most_in_a_row >= self.limit or (self.mode != "skip" and skips.unexplained > 0)

    def trouble(self, skips: Skips, epoch: int) -> NotFinite:
        """The exception for these counts."""
        several = f"{skips.most_in_a_row} steps in a row, the last was " if skips.most_in_a_row > 1 else ""
        return NotFinite(f"loss or gradients were not finite in {several}step {skips.last_step} of epoch {epoch}", epoch=epoch, step=skips.last_step)

    def end_epoch(self, rank: Rank, *, epoch: int, num_steps: int, test_loss: float) -> None:
        """NotFinite, in all processes, where too many steps were left out, or all that there are up to the epoch's end and the network
        cannot be evaluated either; every process takes part."""
        in_a_row = self.skips.in_a_row
        is_stuck = in_a_row > 0 and (not math.isfinite(test_loss) or (self.skips.unexplained > 0 and in_a_row >= num_steps))
        if any_process([self.is_tripped or is_stuck], rank)[0]:
            raise self.trouble(self.skips, epoch)
        self.num_told = 0
        self.has_gone_back &= self.mode == "skip"  # else this epoch earned another way back

    def may_go_back(self) -> bool:
        """Whether the run may go back to a checkpoint, rather than stop."""
        return self.mode != "stop" and not self.has_gone_back

    def advice(self) -> str:
        """What to try."""
        other = {"float16": ", --amp bf16 or none in place of fp16", "bfloat16": ", --amp none in place of bf16"}.get(self.precision, "")
        clipping = "" if self.has_clipping else ", --clip-grad 1 --clip-mode norm"
        return f"Try a lower --lr{other}{clipping}. What this run has saved is finite: --resume auto --allow-config-change goes on from there"


def tensors_of(entry, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Name and value of every floating-point tensor in nested dicts, lists and tuples."""
    if isinstance(entry, Tensor):
        if entry.is_floating_point():
            yield name, entry
    elif isinstance(entry, dict | list | tuple):
        for key, value in entry.items() if isinstance(entry, dict) else enumerate(entry):
            yield from tensors_of(value, f"{name}.{key}" if name else str(key))


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first of the named tensors that holds NaN or infinity; None if none does."""
    return next((name for name, tensor in tensors if not tensor.isfinite().all()), None)


def require_finite_weights(state: dict[str, Tensor], *, where: str, cure: str = "use another checkpoint") -> None:
    """InputError where a state dict holds what is not finite."""
    if (name := first_nonfinite(state.items())) is not None:
        raise InputError(f"{where}: {name} is not finite", cure)


def first_nonfinite_in(net: nn.Module, forward: Callable[[], None]) -> str | None:
    """In words, the first weight or module's output that is not finite when `forward` runs `net`; None if none is."""
    if (name := first_nonfinite(net.named_parameters())) is not None:
        return f"the weight {name} is not finite"
    found = []

    def look(name: str, module: nn.Module, args: tuple, output) -> None:
        if not found and first_nonfinite(tensors_of(output)) is not None:
            found.append(f"the first module whose output is not finite is {name} ({type(module).__name__})")

    hooks = [module.register_forward_hook(functools.partial(look, name or "the network")) for name, module in net.named_modules()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def require_finite(checkpoint: dict, rank: Rank, *, epoch: int, step: int) -> None:
    """NotFinite, in all processes, where weights, their average or the optimiser's state are not finite in any: not worth saving."""
    own = first_nonfinite(tensors_of({key: checkpoint[key] for key in ("model", "model_ema", "optimizer")}))
    name = next((name for name in gather_objects(own, rank) if name is not None), None)
    if name is not None:
        raise NotFinite(f"{name} is not finite before step {step} of epoch {epoch}, and was not saved", epoch=epoch, step=step)
