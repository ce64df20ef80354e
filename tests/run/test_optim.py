import copy
import json

import pytest
import torch
from timm.utils import ModelEmaV3

from run import config, optim
from tests.conftest import ROOT

PUBLISHED = json.loads((ROOT / "tests" / "golden" / "published_lr.json").read_text())


def schedule(*flags: str, global_batch: int = 512):
    cfg, _ = config.parse(["--data-set", "DIGITS", *flags])
    optimizer = optim.build_optimizer(cfg, torch.nn.Linear(3, 3), global_batch)
    return optim.build_scheduler(cfg, optimizer), optimizer


def rates(num_epochs: int, *flags: str, metrics=None, global_batch: int = 512) -> list[float]:
    """Learning rate of each epoch, the scheduler stepped with e after epoch e."""
    scheduler, optimizer = schedule(*flags, global_batch=global_batch)
    found = []
    for epoch in range(num_epochs):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch, metrics[epoch] if metrics else 0.0)
    return found


@pytest.mark.parametrize(("name", "global_batch"), [("recnext_m1_without_distill_300e", 1024), ("recnext_m0_without_distill_300e", 2048)])
def test_default_schedule_is_the_published_column(name, global_batch):
    assert rates(300, global_batch=global_batch) == pytest.approx(PUBLISHED[name], rel=1e-12)


def test_plateau_drops_when_accuracy_stalls_and_not_when_it_rises():
    flags = ("--sched=plateau", "--warmup-epochs=0", "--patience-epochs=2", "--decay-rate=0.5", "--cooldown-epochs=0")
    assert rates(6, *flags, metrics=[1, 2, 3, 4, 5, 6]) == [1e-3] * 6
    assert rates(6, *flags, metrics=[5, 4, 3, 2, 2, 2]) == [1e-3] * 4 + [5e-4] * 2


def test_plateau_goes_on_after_a_checkpoint_where_it_was():
    flags = ("--sched=plateau", "--warmup-epochs=0", "--patience-epochs=2", "--decay-rate=0.5")
    first, optimizer = schedule(*flags)
    for epoch in range(2):
        first.step(epoch, 1.0)
    second, other = schedule(*flags)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for epoch in (2, 3):
        first.step(epoch, 1.0), second.step(epoch, 1.0)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 5e-4


@pytest.mark.parametrize(("sched", "first_drop"), [("step", 4), ("multistep", 3)])
def test_steps_fall_every_decay_epochs(sched, first_drop):
    """timm's multistep looks one epoch ahead."""
    found = rates(9, f"--sched={sched}", "--epochs=9", "--warmup-epochs=2", "--decay-epochs=3")
    assert found[:3] == pytest.approx([1e-6, 1e-6, (1e-6 + 1e-3) / 2])
    assert found[3:] == pytest.approx([1e-3 * 0.1 ** ((epoch - first_drop) // 3 + 1) for epoch in range(3, 9)])


def test_noise_stays_inside_its_span_and_repeats():
    flags = ("--epochs=20", "--warmup-epochs=0", "--lr-noise", "0.5", "0.75", "--lr-noise-std", "0.1")
    quiet, noisy = rates(20, *flags[:2]), rates(20, *flags)
    differing = [epoch for epoch in range(20) if quiet[epoch] != noisy[epoch]]
    assert differing == list(range(11, 16)) and noisy == rates(20, *flags)


def test_decay_spares_biases_norms_and_what_the_net_names():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)
            self.table = torch.nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay(self):
            return {"table"}

    cfg, _ = config.parse(["--data-set", "DIGITS"])
    groups = optim.build_optimizer(cfg, Net(), 512).param_groups
    assert {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in groups} == {0.0: 2 + 4 + 4, 0.025: 4}


GO, LEAVE_OUT = torch.zeros(()), torch.ones(())


def test_ema_averages_floats_and_copies_counters():
    cfg, _ = config.parse(["--data-set", "DIGITS", "--model-ema-decay", "0.75"])
    net = torch.nn.BatchNorm1d(2)
    ema = optim.build_ema(cfg, net)
    with torch.no_grad():
        net.weight += 4
        net.running_mean += 8
        net.num_batches_tracked += 3
    ema.update(net, LEAVE_OUT)
    assert ema.module.weight.tolist() == [1.0, 1.0] and ema.module.num_batches_tracked == 0
    ema.update(net, GO)
    state = ema.module.state_dict()
    assert state["weight"].tolist() == [2.0, 2.0] and state["running_mean"].tolist() == [2.0, 2.0] and state["num_batches_tracked"] == 3
    assert not ema.module.training


def test_ema_is_timms_after_weights_were_loaded_too():
    torch.manual_seed(0)
    cfg, _ = config.parse(["--data-set", "DIGITS", "--model-ema-decay", "0.9"])
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    ours, theirs = optim.build_ema(cfg, net), ModelEmaV3(net, decay=0.9)
    for _ in range(3):
        net(torch.randn(2, 3, 5, 5))
        net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
        ours.update(net, GO)
        theirs.update(net)
    for own, other in zip(ours.module.state_dict().values(), theirs.module.state_dict().values(), strict=True):
        assert torch.equal(own, other)


def stepped(opt: str, layouts, *, is_fused: bool, reload: bool) -> torch.Tensor:
    """A convolution's weight after a step in each of the layouts, through a checkpoint each time if `reload`."""
    cfg, _ = config.parse(["--data-set", "DIGITS", "--opt", opt, "--lr", "0.1"])
    conv, state = torch.nn.Conv2d(3, 2, 3, bias=False).double(), None
    torch.nn.init.ones_(conv.weight)
    for i, layout in enumerate(layouts):
        conv = conv.to(memory_format=layout)
        if reload or i == 0:
            optimizer = optim.build_optimizer(cfg, conv, 512)
            assert optimizer.defaults["fused"]
            for group in optimizer.param_groups:
                group["fused"] = is_fused
            if state is not None:
                optim.load_optimizer(optimizer, state)
        conv(torch.linspace(-1, 1, 75, dtype=torch.float64).view(1, 3, 5, 5) ** (i + 1)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            group["fused"] = None  # as unfused runs left it
    return conv.weight.detach()


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_fused_optimisers_go_on_from_checkpoints_of_unfused_ones_and_of_another_memory_format(opt):
    layouts = (torch.channels_last, torch.contiguous_format, torch.channels_last)
    reference = stepped(opt, layouts[:1] * 3, is_fused=False, reload=False)
    torch.testing.assert_close(stepped(opt, layouts, is_fused=True, reload=True), reference, rtol=1e-12, atol=1e-12)


def test_a_resumed_optimiser_is_fused_whatever_the_checkpoint_says():
    cfg, _ = config.parse(["--data-set", "DIGITS"])
    optimizer = optim.build_optimizer(cfg, torch.nn.Linear(2, 2), 512)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["fused"] = None
    optim.load_optimizer(optimizer, state)
    assert all(group["fused"] for group in optimizer.param_groups)


def test_an_optimiser_is_not_fused_where_torch_has_no_kernel_for_the_parameters():
    cfg, _ = config.parse(["--data-set", "DIGITS"])
    assert not optim.build_optimizer(cfg, torch.nn.Linear(2, 2, device="meta"), 512).defaults.get("fused")
    cfg, _ = config.parse(["--data-set", "DIGITS", "--opt", "nadamw"])
    assert not optim.build_optimizer(cfg, torch.nn.Linear(2, 2), 512).defaults.get("fused")
