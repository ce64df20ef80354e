"""Steps that are not finite leave no trace, whatever spoilt them, and nobody waits for the device to find out."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import utils
from loading.batches import Batch
from run import clipping, hardware, optim
from run.checkpoint import TrainState
from run.skipping import NO_STEP
from tests.test_main import states_equal

CPU = utils.Rank(0, 1, 0, 1, torch.device("cpu"))
BAD_STEP = 2


class Spoiler:
    """Spoils what passes while `is_on`, in one of five ways."""

    def __init__(self, way: str):
        self.way, self.is_on = way, False

    def criterion(self, outputs, targets, teacher_output):
        loss = F.cross_entropy(outputs, targets)
        return loss + {"nan loss": torch.nan, "inf loss": torch.inf}.get(self.way, 0.0) if self.is_on else loss

    def gradient(self, grad):
        return torch.full_like(grad, -torch.inf) if self.is_on and self.way == "gradient" else grad

    def mix(self, images, targets, epoch, positions):
        factor = {"image": torch.nan, "statistics": 1e25}.get(self.way, 1.0) if self.is_on else 1.0
        return images * factor, targets


OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "fused sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "counts itself": lambda params: optim.create_optimizer_v2(params, opt="lamb", lr=0.1),
}


def build(spoiler: Spoiler, optimizer: str = "adamw", *, accum_steps: int = 1, amp: str = "none", has_ema: bool = True) -> tuple[engine.Parts, TrainState]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).train()
    net[5].bias.register_hook(spoiler.gradient)
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    optim.start_momentum(optimizer)
    scaler = hardware.build_scaler(amp, CPU.device)
    state = TrainState(net=net, ema=optim.Ema(net, decay=0.5) if has_ema else None, optimizer=optimizer, scheduler=None, scaler=scaler)
    clip = lambda parameters: clipping.clip_adaptively(parameters, 0.02)  # noqa: E731
    parts = engine.Parts(criterion=spoiler.criterion, teacher=lambda *args: None, mix=spoiler.mix, clip=clip, accum_steps=accum_steps, rank=CPU)
    return parts, state


def batches(step: int, count: int) -> list[Batch]:
    torch.manual_seed(1000 + step)
    return [Batch(torch.randn(6, 3, 8, 8), torch.randint(4, (6,)), torch.arange(6)) for _ in range(count)]


def contents(state: TrainState) -> dict:
    return copy.deepcopy({"net": state.net.state_dict(), "ema": state.ema.module.state_dict(), "optimizer": state.optimizer.state_dict()})


def train(spoiler: Spoiler, steps: list[int], *, bad_step: int | None, **settings) -> tuple[TrainState, list[dict], list[float]]:
    """State after the steps, what it was after each, and their losses; `bad_step` is spoilt."""
    parts, state = build(spoiler, **settings)
    seen, losses = [], []
    for step in steps:
        spoiler.is_on = step == bad_step
        micro_batches = batches(step, parts.accum_steps)
        losses.append(engine.train_step(parts, state, micro_batches, epoch=0, step=step).item())
        seen.append(contents(state))
    return state, seen, losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", ["nan loss", "inf loss", "gradient", "image", "statistics"])
def test_a_spoilt_step_changes_nothing_and_the_next_ones_are_as_if_it_had_not_been(way, optimizer):
    state, seen, losses = train(Spoiler(way), [0, 1, BAD_STEP, 3, 4], bad_step=BAD_STEP, optimizer=optimizer)
    assert states_equal(seen[2], seen[1]) and not states_equal(seen[3], seen[2])
    without, expected, expected_losses = train(Spoiler(way), [0, 1, 3, 4], bad_step=None, optimizer=optimizer)
    assert states_equal(seen[-1], expected[-1])
    assert losses == [*expected_losses[:2], 0.0, *expected_losses[2:]]
    assert (int(state.skipped_steps), tuple(state.guard.read())) == (1, (0, 1, 1, BAD_STEP))
    assert (int(without.skipped_steps), tuple(without.guard.read())) == (0, (0, 0, 0, NO_STEP))


@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw", "fused sgd"])
def test_the_very_first_step_may_be_spoilt(optimizer):
    """Fused SGD would then start from momentum that is whatever memory held."""
    _, seen, _ = train(Spoiler("image"), [BAD_STEP, 3, 4], bad_step=BAD_STEP, optimizer=optimizer)
    _, expected, _ = train(Spoiler("image"), [3, 4], bad_step=None, optimizer=optimizer)
    assert states_equal(seen[-1]["net"], expected[-1]["net"])


def test_one_spoilt_micro_batch_of_several_spoils_the_step():
    spoiler = Spoiler("image")
    parts, state = build(spoiler, accum_steps=2)
    before = contents(state)

    def turning_off(micro_batches):
        for batch in micro_batches:
            yield batch
            spoiler.is_on = False

    spoiler.is_on = True
    assert engine.train_step(parts, state, turning_off(batches(0, 2)), epoch=0, step=0).item() == 0
    assert states_equal(contents(state), before) and state.guard.read().unexplained == 1


def test_what_a_loss_scale_explains_is_told_from_what_it_does_not():
    """65536 times a gradient of 1e35 is not finite, though the loss is."""
    spoiler = Spoiler("none")
    parts, state = build(spoiler, amp="fp16")
    state.net[5].weight.register_hook(lambda grad: grad.sign() * 1e35 * 65536 if spoiler.is_on else grad)
    for step, spoiler.is_on in enumerate([False, True, True, False]):
        engine.train_step(parts, state, batches(step, 1), epoch=0, step=step)
    assert state.guard.read() == (0, 2, 0, 2) and state.scaler.get_scale() == 65536 / 4
    spoiler.way, spoiler.is_on = "nan loss", True
    engine.train_step(parts, state, batches(4, 1), epoch=0, step=4)
    assert state.guard.read() == (1, 2, 1, 4) and int(state.skipped_steps) == 3


class NoHostReads(TorchDispatchMode):
    """Refuses what makes the host wait for a value on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a value"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["fused adamw", "fused sgd"])
def test_the_host_reads_nothing_from_the_device(optimizer):
    spoiler = Spoiler("image")
    parts, state = build(spoiler, optimizer, has_ema=False)
    state.guard.looks = False
    average = copy.deepcopy(state.net)
    for step, spoiler.is_on in enumerate([False, True, False]):
        with NoHostReads():
            engine.train_step(parts, state, batches(step, 1), epoch=0, step=step)
            with torch.no_grad():
                optim.lerp_unless(torch.tensor(0.0), list(average.parameters()), list(state.net.parameters()), weight=0.5)
    with pytest.raises(AssertionError, match="the host reads"), NoHostReads():
        bool(state.skipped_steps > 0)
    assert state.guard.read().most_in_a_row == 1


def test_average_on_a_device_is_timms_and_stands_still_where_a_step_is_left_out():
    torch.manual_seed(0)
    net = nn.Linear(5, 7)
    timms = ModelEmaV3(net, decay=0.9)
    averages = [parameter.detach().clone() for parameter in net.parameters()]
    start = [average.clone() for average in averages]
    values = [parameter.data.add_(3) for parameter in net.parameters()]
    optim.lerp_unless(torch.tensor(1.0), averages, values, weight=0.1)
    assert all(map(torch.equal, averages, start))
    optim.lerp_unless(torch.tensor(0.0), averages, values, weight=0.1)
    timms.update(net)
    for ours, theirs in zip(averages, timms.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_net_without_batchnorm_trains_too():
    net = nn.Linear(4, 2)
    guard = TrainState(net=net, ema=None, optimizer=None, scheduler=None, scaler=None).guard
    guard.start_step()
    guard.spread(net(torch.ones(1, 4)).sum()).backward()
    guard.end_step(guard.found_inf(torch.tensor(1.0)), step=0, is_explained=torch.tensor(False))
    assert guard.read().most_in_a_row == 0


@pytest.mark.parametrize(("saved", "here"), [("adamw", "fused adamw"), ("fused adamw", "adamw")])
def test_a_checkpoint_continues_with_the_kernels_of_the_device_it_is_loaded_on(saved, here):
    _, theirs = build(Spoiler("none"), saved)
    parts, ours = build(Spoiler("none"), here)
    engine.train_step(parts, theirs, batches(0, 1), epoch=0, step=0)
    kept = [group["fused"] for group in ours.optimizer.param_groups]
    optim.load_optimizer(ours.optimizer, theirs.optimizer.state_dict())
    assert [group["fused"] for group in ours.optimizer.param_groups] == kept
    engine.train_step(parts, ours, batches(1, 1), epoch=0, step=1)
    assert [state["step"].item() for state in ours.optimizer.state.values()] == [2] * 6
