import copy
import json
import math

import pytest
import timm
import torch
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

import model
from run import config, optim
from run.errors import InputError
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


@pytest.mark.parametrize(
    ("flags", "theirs"),
    [
        (["--sched-on-updates"], {"step_on_epochs": False}),
        (["--sched-on-updates", "--sched=tanh", "--lr-noise", "0.5"], {"step_on_epochs": False, "sched": "tanh", "noise": [0.5]}),
        (["--sched-on-updates", "--sched=step", "--decay-epochs=2"], {"step_on_epochs": False, "sched": "step", "decay_epochs": 2}),
        (["--lr-cycle-limit=3"], {"cycle_limit": 3, "cycle_decay": 0.5}),
        (["--lr-cycle-limit=3", "--lr-cycle-decay=0.8", "--sched=poly"], {"cycle_limit": 3, "cycle_decay": 0.8, "sched": "poly"}),
        (
            ["--lr-cycle-limit=3", "--lr-cycle-mul=1.5", "--lr-cycle-decay=1", "--sched-on-updates"],
            {"cycle_limit": 3, "cycle_mul": 1.5, "cycle_decay": 1.0, "step_on_epochs": False},
        ),
    ],
)
def test_schedules_by_steps_and_in_cycles_are_timms(flags, theirs):
    """Its scripts step a schedule after each update, or after each epoch with the number of the next."""
    num_steps = 5
    cfg, _ = config.parse(["--data-set", "DIGITS", "--epochs=6", "--warmup-epochs=2", *flags])
    own, other = (optim.build_optimizer(cfg, torch.nn.Linear(3, 3), 512) for _ in range(2))
    ours = optim.build_scheduler(cfg, own, num_steps)
    settings = {"warmup_lr": 1e-6, "min_lr": 1e-5, "warmup_epochs": 2, "decay_rate": 0.1, "updates_per_epoch": num_steps, **theirs}
    reference, num_epochs = create_scheduler_v2(other, num_epochs=6, **settings)
    assert cfg.num_epochs == num_epochs
    found, expected = [], []
    for epoch in range(num_epochs):
        for step in range(num_steps):
            ours.step_update(epoch * num_steps + step)
            reference.step_update(epoch * num_steps + step)
            found.append(optim.current_lr(own)), expected.append(other.param_groups[0]["lr"])
        ours.step(epoch + 1), reference.step(epoch + 1)
    assert found == expected and len(set(found)) > num_epochs / 2


def test_a_warm_up_of_steps():
    scheduler, optimizer = schedule("--sched-on-updates", "--warmup-steps=4", "--epochs=6")
    found = [(scheduler.step_update(step), optim.current_lr(optimizer))[1] for step in range(4)]
    assert found == pytest.approx([1e-6 + step * (1e-3 - 1e-6) / 4 for step in range(4)], rel=1e-12)


@pytest.mark.parametrize(
    ("flags", "peak", "told"),
    [
        ([], 2e-3, "0.001 x 1024 / 512 = 0.002"),
        (["--lr-base=0.1"], 0.1 * math.sqrt(4), "0.1 x sqrt(1024 / 256) = 0.2"),  # of AdamW
        (["--lr-base=0.1", "--opt=sgd"], 0.4, "0.1 x 1024 / 256 = 0.4"),
        (["--lr-base=0.1", "--lr-base-size=1024"], 0.1, "0.1 x sqrt(1024 / 1024) = 0.1"),
        (["--lr-base=0.1", "--lr-base-size=128", "--lr-base-scale=linear"], 0.8, "0.1 x 1024 / 128 = 0.8"),
    ],
)
def test_peak_rates(flags, peak, told):
    cfg, _ = config.parse(["--data-set", "DIGITS", *flags])
    optimizer = optim.build_optimizer(cfg, torch.nn.Linear(3, 3), 1024)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([peak] * 2, rel=1e-12)
    assert optim.told_lr(cfg, 1024) == told


def scales(net, *flags: str) -> tuple[dict[str, float], torch.optim.Optimizer]:
    """By parameter, its rate at the end of a warm-up relative to the peak."""
    cfg, _ = config.parse(["--data-set", "DIGITS", "--warmup-epochs=2", *flags])
    optimizer = optim.build_optimizer(cfg, net, 512)
    optim.build_scheduler(cfg, optimizer).step(2)
    names = {parameter: name for name, parameter in net.named_parameters()}
    return {names[parameter]: group["lr"] / group["initial_lr"] for group in optimizer.param_groups for parameter in group["params"]}, optimizer


def test_layer_decay_lowers_rates_from_layer_to_layer():
    """ResNet-18: the stem, eight blocks, the classifier."""
    blocks = [f"layer{stage}.{block}." for stage in (1, 2, 3, 4) for block in (0, 1)]
    found, optimizer = scales(timm.create_model("resnet18", num_classes=4), "--layer-decay=0.5", "--sched=plateau")
    for name, scale in found.items():
        depth = next((i for i, prefix in enumerate(["fc.", *blocks[::-1]]) if name.startswith(prefix)), 9)
        assert scale == pytest.approx(0.5**depth, rel=1e-9), name
    assert optim.current_lr(optimizer) == pytest.approx(1e-3)
    assert {(group["weight_decay"], parameter.ndim > 1) for group in optimizer.param_groups for parameter in group["params"]} == {(0.0, False), (0.025, True)}


def test_layer_decay_takes_our_networks_layers_and_keeps_both_heads_high():
    """RecNeXt-M0: the stem, the blocks of all stages, both heads."""
    with torch.device("meta"):
        net = model.create_model("recnext_m0", num_classes=4, distillation=True)
    found, _ = scales(net, "--layer-decay=0.9", "--sched=plateau")
    num_blocks = sum(len(stage.blocks) for stage in net.stages)
    assert {scale for name, scale in found.items() if name.startswith("head")} == {1.0}
    assert {round(scale / 0.9 ** (num_blocks + 1), 9) for name, scale in found.items() if name.startswith("stem")} == {1.0}
    assert len({round(scale, 9) for scale in found.values()}) == num_blocks + 2


def test_layer_decay_of_a_network_without_layers_is_refused():
    with pytest.raises(InputError, match="has no effect on recnext_m1"):
        scales(torch.nn.Linear(3, 3), "--layer-decay=0.5")


def test_plateaus_lowest_rate_is_scaled_with_the_layers():
    net = timm.create_model("resnet18", num_classes=4)
    flags = ("--layer-decay=0.5", "--sched=plateau", "--min-lr=5e-4", "--decay-rate=0.1", "--patience-epochs=0", "--cooldown-epochs=0")
    cfg, _ = config.parse(["--data-set", "DIGITS", "--warmup-epochs=0", *flags])
    optimizer = optim.build_optimizer(cfg, net, 512)
    scheduler = optim.build_scheduler(cfg, optimizer)
    for epoch in range(4):
        scheduler.step(epoch, 1.0)
    assert [group["lr"] / group["lr_scale"] for group in optimizer.param_groups] == pytest.approx([5e-4] * len(optimizer.param_groups))


def test_arguments_of_the_optimiser():
    net = torch.nn.Linear(2, 2)
    cfg, _ = config.parse(["--data-set", "DIGITS", "--lr=0.5", "--opt=sgd", "--opt-kwargs", "maximize=true", "dampening=0.5", "nesterov=false"])
    optimizer = optim.build_optimizer(cfg, net, 512)
    assert optimizer.defaults["fused"] and optimizer.defaults["dampening"] == 0.5 and not optimizer.defaults["nesterov"]
    before = net.bias.tolist()
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert net.bias.tolist() == pytest.approx([value + 0.5 * 0.5 for value in before])  # up the slope
    cfg, _ = config.parse(["--data-set", "DIGITS", "--opt-kwargs", "foreach=true", "amsgrad=true"])
    optimizer = optim.build_optimizer(cfg, net, 512)
    assert optimizer.defaults["foreach"] and optimizer.defaults["amsgrad"] and not optimizer.defaults["fused"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["amsgrd=true"], "amsgrd"),
        (["amsgrad=1"], "amsgrad=int"),  # which is first met by the kernel
        (["differentiable=true"], "a leaf Variable that requires grad"),
        (["max_grad_norm=x", "--opt=lamb"], "'Tensor' and 'str'"),
    ],
)
def test_an_argument_that_the_optimiser_does_not_know_or_cannot_use_is_refused(flags, words):
    cfg, _ = config.parse(["--data-set", "DIGITS", "--opt-kwargs", *flags])
    with pytest.raises(InputError, match=f"{words}.*check --opt-kwargs"):
        optim.build_optimizer(cfg, torch.nn.Linear(2, 2), 512)


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


def test_ema_that_warms_up_is_timms():
    cfg, _ = config.parse(["--data-set", "DIGITS", "--model-ema-decay", "0.6", "--model-ema-warmup"])
    net = torch.nn.Linear(2, 2)
    ours, theirs, decays = optim.build_ema(cfg, net), ModelEmaV3(net, decay=0.6, use_warmup=True), []
    for step in range(1, 7):
        with torch.no_grad():
            net.weight += step
        ours.num_updates = step
        decays.append(ours.current_decay)
        ours.update(net, GO)
        theirs.update(net, step=step)
        assert torch.equal(ours.module.weight, theirs.module.weight)
    assert decays == pytest.approx([0, 1 - 2 ** (-2 / 3), 1 - 3 ** (-2 / 3), 0.6, 0.6, 0.6])


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
