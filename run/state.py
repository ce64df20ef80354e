"""What a run carries from step to step, as its recipe sets it."""

from collections.abc import Iterable

from torch import nn

import utils
from run import hardware, network, optim
from run.checkpoint import TrainState
from run.compiling import Compiler, NoCompiler
from run.config import Config


def build_state(
    cfg: Config, net: nn.Module, rank: utils.Rank, compiler: Compiler | NoCompiler, *, global_batch: int, num_steps: int, bests: Iterable[str] = ()
) -> TrainState:
    """The state before the first step of training `net`, which is on the run's device, in epochs of `num_steps` steps.

    `bests` names the figures of which the best is kept."""
    net = network.prepare(cfg, net, rank)
    optimizer = optim.build_optimizer(cfg, net, global_batch)
    return TrainState(
        ema=optim.build_ema(cfg, net),
        net=utils.wrap_distributed(compiler(net), rank, accum_steps=cfg.grad_accum_steps),
        optimizer=optimizer,
        scheduler=optim.build_scheduler(cfg, optimizer, num_steps),
        scaler=hardware.build_scaler(cfg.amp, rank.device),
        epoch=cfg.start_epoch,
        best=dict.fromkeys(bests, -1.0),
    )
