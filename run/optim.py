"""Optimiser, learning-rate schedule and EMA, as a recipe sets them; in timm's terms."""

import copy
import difflib
import math
import warnings

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import (
    CosineLRScheduler,
    MultiStepLRScheduler,
    PlateauLRScheduler,
    PolyLRScheduler,
    StepLRScheduler,
    TanhLRScheduler,
)
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from run.config import Config, RunConfig
from run.errors import InputError, first_line

# What torch has as one kernel, which can leave a step out without the host. On a GPU others take lists of tensors, by torch's and timm's defaults.
FUSED, FUSED_ON = ("adam", "adamw", "momentum", "nesterov", "sgd"), ("cpu", "cuda")


def scaled_lr(lr: float, global_batch: int) -> float:
    """Linear scaling (Goyal et al., arXiv:1706.02677) from DeiT's reference batch of 512 images."""
    return lr * global_batch / 512


def base_scale(cfg: Config) -> str:
    """How --lr-base grows with the global batch: as asked for, or as timm chooses by the optimiser's name."""
    return cfg.lr_base_scale or ("sqrt" if any(part in cfg.opt.lower() for part in ("ada", "lamb")) else "linear")


def peak_lr(cfg: Config, global_batch: int) -> float:
    """The learning rate from which the schedule comes down."""
    if cfg.lr_base is None:
        return scaled_lr(cfg.lr, global_batch)
    ratio = global_batch / cfg.lr_base_size
    return cfg.lr_base * (math.sqrt(ratio) if base_scale(cfg) == "sqrt" else ratio)


def told_lr(cfg: Config, global_batch: int) -> str:
    """How that learning rate comes about: `0.001 x 1024 / 512 = 0.002`."""
    base, size = (cfg.lr, 512) if cfg.lr_base is None else (cfg.lr_base, cfg.lr_base_size)
    ratio = f"{global_batch} / {size}"
    return f"{base:g} x {ratio if cfg.lr_base is None or base_scale(cfg) == 'linear' else f'sqrt({ratio})'} = {peak_lr(cfg, global_batch):g}"


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """The schedule's present rate: the highest of the groups', which with layer decay is the classifier's."""
    return max(group["lr"] for group in optimizer.param_groups)


def build_optimizer(cfg: Config, net: nn.Module, global_batch: int) -> torch.optim.Optimizer:
    """Optimiser of what learns in `net`, in two groups: weights, and what weight decay spares (biases, one-dimensional and the net's
    `no_weight_decay`). With layer decay these two for each of timm's layers, whose `lr_scale` its schedules obey."""
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    lr = peak_lr(cfg, global_batch)
    optimizer = create_optimizer(cfg, net, learning, lr=lr, weight_decay=cfg.weight_decay, layer_decay=cfg.layer_decay)
    if cfg.layer_decay is not None and all(group["lr_scale"] == 1 for group in optimizer.param_groups) and cfg.layer_decay < 1:
        raise InputError(f"--layer-decay {cfg.layer_decay} has no effect on {cfg.model}: what learns in it is all of one layer; drop the flag")
    return optimizer


def build_dense_optimizer(cfg: RunConfig, net: nn.Module, *, lr: float, weight_decay: float, spared: set[str]) -> torch.optim.Optimizer:
    """Optimiser that decays every parameter, biases and norms too, but those that are `spared` by name: detection's and segmentation's."""
    named = [(name, one) for name, one in net.named_parameters() if one.requires_grad]
    groups = [([one for name, one in named if (name in spared) == is_spared], 0.0 if is_spared else weight_decay) for is_spared in (False, True)]
    groups = [{"params": params, "weight_decay": decay} for params, decay in groups if params]
    return create_optimizer(cfg, groups, [one for _, one in named], lr=lr, weight_decay=weight_decay)


def create_optimizer(
    cfg: RunConfig, net_or_groups, parameters: list[nn.Parameter], *, lr: float, weight_decay: float, layer_decay: float | None = None
) -> torch.optim.Optimizer:
    """timm's optimiser of that name, fused where that is possible. InputError where there is none, or it cannot be used."""
    if cfg.opt not in list_optimizers():
        close = difflib.get_close_matches(cfg.opt, list_optimizers(), n=3)
        raise InputError(f"--opt {cfg.opt} is no optimiser timm knows" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    betas = {"betas": cfg.opt_betas} if cfg.opt_betas is not None else {}
    eps = {"eps": cfg.opt_eps} if cfg.opt_eps is not None else {}
    own = cfg.opt_kwargs or {}
    settings = {"lr": lr, "weight_decay": weight_decay, "momentum": cfg.momentum, "layer_decay": layer_decay, **eps, **betas}
    has_kernel = cfg.opt in FUSED and all(one.is_floating_point() and one.device.type in FUSED_ON for one in parameters)
    if has_kernel and own.keys().isdisjoint(("foreach", "differentiable")):
        settings["fused"] = True
    try:
        optimizer = create_optimizer_v2(net_or_groups, opt=cfg.opt, **{**settings, **own})
        if own:
            _try_step(cfg, {**settings, **own}, parameters[0].device)
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        flags = "--opt-eps and --opt-betas" if not own else "--opt-kwargs, --opt-eps and --opt-betas"
        raise InputError(f"--opt {cfg.opt} cannot be used here ({first_line(error)}): choose another, or check {flags}") from error
    if getattr(optimizer, "is_second_order", False) or cfg.opt == "adahessian":
        raise InputError(f"--opt {cfg.opt} needs second derivatives, which this training loop does not compute: choose another")
    if optimizer.defaults.get("fused"):
        start_momentum(optimizer)
    return optimizer


def _try_step(cfg: RunConfig, settings: dict, device: torch.device) -> None:
    """A step of that optimiser on four numbers, which raises where an argument is of a kind that it does not take: it looks at most only then."""
    numbers = nn.Parameter(torch.ones(2, 2, device=device))
    numbers.grad = torch.ones_like(numbers)
    create_optimizer_v2([numbers], opt=cfg.opt, **{**settings, "layer_decay": None}).step()


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD the momentum of no steps yet, which is 0; a fused one that leaves out its first step would go on from whatever memory held."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Continue from the optimiser state of a checkpoint, with the kernels chosen for this device rather than for the checkpoint's.

    ValueError or KeyError where it belongs to another optimiser."""
    pairs = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    groups = [group | {"fused": own["fused"]} if "fused" in own else group for group, own in pairs]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    # Fused kernels go through parameter and moments by their order in memory: a run in another memory format left the moments in another.
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class PlateauSchedule(PlateauLRScheduler):
    """timm's drop-on-plateau schedule, whose whole state survives a checkpoint (timm's own forgets its counters)."""

    def __init__(self, *args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # timm deprecates it for the lost counters
            super().__init__(*args, **kwargs)
        # the lowest rate is the classifier's, as in the other schedules
        scales = [group.get("lr_scale", 1.0) for group in self.optimizer.param_groups]
        self.lr_scheduler.min_lrs = [low * scale for low, scale in zip(self.lr_scheduler.min_lrs, scales, strict=True)]

    def step(self, epoch: int, metric: float | None = None) -> None:
        """timm's, which without a warm-up would leave the rate at the warm-up's start."""
        super().step(epoch if self.warmup_t else epoch + 1, metric)

    def state_dict(self) -> dict:
        return {"restore_lr": self.restore_lr, "plateau": self.lr_scheduler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.restore_lr = state_dict["restore_lr"]
        self.lr_scheduler.load_state_dict(state_dict["plateau"])


def build_scheduler(cfg: Config, optimizer: torch.optim.Optimizer, num_steps: int = 1) -> Scheduler:
    """Schedule that is stepped with e after epoch e, as in the published runs: epochs 0 and 1 share the first rate.

    With --sched-on-updates, that goes by optimiser steps, of which an epoch has `num_steps`: step n of the run has the rate at n."""
    unit = num_steps if cfg.sched_on_updates else 1
    common = {"warmup_lr_init": cfg.warmup_lr, "warmup_t": cfg.warmup_epochs * unit if cfg.warmup_steps is None else cfg.warmup_steps}
    common |= {"noise_pct": cfg.lr_noise_pct, "noise_std": cfg.lr_noise_std, "noise_seed": 42}
    if cfg.lr_noise is not None:
        edges = [fraction * cfg.num_epochs * unit for fraction in cfg.lr_noise]
        common["noise_range_t"] = edges[0] if len(edges) == 1 else edges
    clock = {"t_in_epochs": not cfg.sched_on_updates}
    cycles = {"cycle_limit": cfg.lr_cycle_limit, "cycle_mul": cfg.lr_cycle_mul, "cycle_decay": cfg.lr_cycle_decay}
    span = {"t_initial": max(cfg.epochs * unit, 1), "lr_min": cfg.min_lr, **cycles, **clock}
    drops = {"decay_rate": cfg.decay_rate, "warmup_prefix": False, **clock}
    scheduler = {
        "cosine": lambda: CosineLRScheduler(optimizer, **span, **common),
        "tanh": lambda: TanhLRScheduler(optimizer, **span, **common),
        "poly": lambda: PolyLRScheduler(optimizer, **span, power=cfg.decay_rate, **common),
        "step": lambda: StepLRScheduler(optimizer, decay_t=cfg.decay_epochs * unit, **drops, **common),
        "multistep": lambda: MultiStepLRScheduler(
            optimizer, decay_t=[epoch * unit for epoch in range(cfg.decay_epochs, cfg.epochs, cfg.decay_epochs)], **drops, **common
        ),
        "plateau": lambda: PlateauSchedule(
            optimizer,
            decay_rate=cfg.decay_rate,
            patience_t=cfg.patience_epochs,
            cooldown_t=cfg.cooldown_epochs,
            lr_min=cfg.min_lr,
            mode="max",
            **common,
        ),
    }[cfg.sched]()
    if cfg.start_epoch > 0:
        scheduler.step(cfg.start_epoch - 1)
    return scheduler


class Ema:
    """Moving average of every floating-point entry of a network's state dict, in `module`; other entries are copied.

    As timm's ModelEmaV3, but that the entries are looked up once, and a step can be left out without waiting for a GPU.
    `num_updates`: the number in the run, from 1, of the step that is averaged in next, of which a warm-up makes the decay."""

    def __init__(self, net: nn.Module, *, decay: float, device: torch.device | None = None, warms_up: bool = False):
        self.module = copy.deepcopy(net).eval().to(device)
        self.decay = decay
        self.warms_up = warms_up
        self.num_updates = 1
        self.net = None

    @property
    def current_decay(self) -> float:
        """The decay of the next step; in a warm-up 0 at first, so that nothing is left of the initial weights."""
        return min(self.decay, 1 - self.num_updates ** (-2 / 3)) if self.warms_up else self.decay

    def _look_up(self, net: nn.Module) -> None:
        self.net = net
        pairs = zip(self.module.state_dict(keep_vars=True).values(), net.state_dict(keep_vars=True).values(), strict=True)
        by_kind = {True: ([], []), False: ([], [])}
        for average, value in pairs:
            averages, values = by_kind[average.is_floating_point()]
            averages.append(average)
            values.append(value)
        self.floats, self.others = by_kind[True], by_kind[False]

    @torch.no_grad()
    def update(self, net: nn.Module, found_inf: Tensor) -> None:
        """Average `net` in; where `found_inf` (scalar on the net's device) is 1, change nothing."""
        if net is not self.net:
            self._look_up(net)
        averages, values = self.floats
        device = averages[0].device
        if device.type == "cpu" and found_inf.item():
            return
        if values[0].device != device:
            values = [value.to(device) for value in values]
        if device.type == "cpu":
            torch._foreach_lerp_(averages, values, weight=1 - self.current_decay)
        else:
            lerp_unless(found_inf, averages, values, weight=1 - self.current_decay)
        if self.others[0]:
            torch._foreach_copy_(*self.others)


def lerp_unless(found_inf: Tensor, averages: list[Tensor], values: list[Tensor], *, weight: float) -> None:
    """Move the averages by `weight` of the way to the values; where `found_inf` is 1, not at all. Nothing is read from the device.

    Lerp's own weight must be a number of the host's, so it is taken apart."""
    differences = torch._foreach_sub(values, averages)
    torch._foreach_mul_(differences, weight * (1 - found_inf))
    torch._foreach_add_(averages, differences)


def build_ema(cfg: Config, net: nn.Module) -> Ema | None:
    """The recipe's moving average of `net`; None where it keeps none."""
    if not cfg.model_ema:
        return None
    return Ema(net, decay=cfg.model_ema_decay, device=torch.device("cpu") if cfg.model_ema_force_cpu else None, warms_up=cfg.model_ema_warmup)
