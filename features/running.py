"""A run of a network on a classifier's features, whatever it learns: a table of contents, as main.py.

What needs torch is imported once the settings are read, so that `--help` and misspelt flags answer at once."""

import contextlib
from collections.abc import Callable
from typing import Protocol

from features.config import BackboneConfig
from run.command import STOPPED


class Task(Protocol):
    """What a task brings, as functions of a module."""

    def open_data(self, cfg, rank):
        """Training and validation data, each with `class_names`; for an evaluation None in place of the former."""

    def open_train_loader(self, cfg, train, rank, folder):
        """The training data in keyed order (`loading.steps.StepLoader`); `folder` gets a long list of damaged images."""

    def open_val_loader(self, cfg, val, rank, folder=None):
        """Each validation image once (`loading.steps.ImageLoader`)."""

    def build_net(self, cfg, num_classes: int, *, pretrained: bool):
        """The network, with a `backbone`; `pretrained`: with timm's weights of that."""

    def load(self, net, saved: dict, *, where: str) -> None:
        """Load a checkpoint, ours or a published one."""

    def load_finetune(self, net, source: str) -> None:
        """Load what fits of one, for a run to start from."""

    def build_scheduler(self, cfg, optimizer, num_steps: int):
        """The schedule, of epochs of `num_steps` steps."""

    def build_parts(self, cfg, val, *, num_steps: int, **settings):
        """What the training loop uses (`engine.TrainParts`); `settings` are those that every task has."""

    def facts(self, cfg, data) -> dict:
        """What a checkpoint's user must know."""

    def announce(self, cfg, loader, rank) -> None:
        """Say what is about to run."""

    def report(self, net, loader, parts, *, cfg, data) -> None:
        """Evaluate, and print and write what was found."""


def build_net(cfg: BackboneConfig, task: Task, num_classes: int, *, is_new: bool):
    """The recipe's network for `num_classes` classes; `is_new`, with the weights that a run starts from. InputError where these do not fit."""
    from features import weights

    net = task.build_net(cfg, num_classes, pretrained=cfg.pretrained and is_new)
    if cfg.backbone_weights and is_new:
        weights.load_backbone(net, cfg.model, cfg.backbone_weights)
    if cfg.finetune and is_new:
        task.load_finetune(net, cfg.finetune)
    return net


def train(cfg: BackboneConfig, task: Task, rank, held: contextlib.ExitStack) -> int:
    """Train: from scratch, from given weights, or on from a checkpoint. The exit code; `held` is to be closed when the run ends."""
    import engine
    import utils
    from features import weights
    from run import checkpoint, clipping, hardware, norms, optim, records, signals, trackers, watch
    from run.folder import claim_folder, find_checkpoint

    amp_dtype = hardware.pick_amp(cfg.amp, rank.device)
    stop = signals.StopRequest()
    trackers.require_package(cfg)
    train_data, val_data = task.open_data(cfg, rank)
    folder = claim_folder(cfg, rank, held)
    loader, val_loader = task.open_train_loader(cfg, train_data, rank, folder), task.open_val_loader(cfg, val_data, rank, folder)
    source = find_checkpoint(cfg, folder, rank)
    with utils.main_first(rank):
        net = build_net(cfg, task, len(train_data.class_names), is_new=source is None)
    net.to(rank.device)
    optimizer = optim.build_dense_optimizer(cfg, net, lr=cfg.lr, weight_decay=cfg.weight_decay, spared=weights.no_weight_decay(net))
    settings = {"clip": clipping.build_clipping(cfg), "amp_dtype": amp_dtype, "accum_steps": cfg.grad_accum_steps, "seed": cfg.seed}
    parts = task.build_parts(cfg, val_data, num_steps=loader.num_steps, log_steps=cfg.log_steps, rank=rank, **settings)
    if rank.world_size > 1 and not net.backbone.keeps_statistics:
        net = norms.synchronised(net, rank.device)
    state = checkpoint.TrainState(
        ema=None,
        net=utils.wrap_distributed(net, rank, accum_steps=cfg.grad_accum_steps),
        optimizer=optimizer,
        scheduler=task.build_scheduler(cfg, optimizer, loader.num_steps),
        scaler=hardware.build_scaler(cfg.amp, rank.device),
        best=dict.fromkeys(parts.bests, -1.0),
    )
    run = {"global_batch": loader.global_batch, "num_images": len(train_data), "class_names": train_data.class_names}
    if source:
        checkpoint.resume(cfg, state, source, run=run, rank=rank)
    task.announce(cfg, loader, rank)
    run_records = records.open_records(cfg, folder, state.epoch, rank, parts.iteration(state.epoch, state.step))
    facts = task.facts(cfg, val_data)
    saver = engine.Saver(cfg, parts, state, folder=folder, source=source, facts=facts, run=run, stop=stop, watch=watch.Watch(cfg, amp_dtype))
    with saver.saving_if_damaged():
        is_done = engine.fit(cfg, parts, state, loader, val_loader, run_records=run_records, saver=saver)
    return 0 if is_done else STOPPED


def evaluate(cfg: BackboneConfig, task: Task, rank) -> int:
    """Evaluate the weights of --resume, ours or published ones, and print one line of figures. The exit code."""
    import engine
    from features import class_report
    from run import checkpoint, hardware
    from run.folder import choose_folder, find_checkpoint

    if rank.is_main:
        class_report.check_writable(cfg)
    _, data = task.open_data(cfg, rank)
    source = find_checkpoint(cfg, choose_folder(cfg), rank)
    saved = checkpoint.read(source)
    checkpoint.warn_of_other(saved, source, task.facts(cfg, data))
    net = build_net(cfg, task, len(data.class_names), is_new=False)
    task.load(net, saved, where=source)
    net.to(rank.device)
    parts = engine.EvalParts(amp_dtype=hardware.pick_amp(cfg.amp, rank.device), rank=rank)
    task.report(net, task.open_val_loader(cfg, data, rank), parts, cfg=cfg, data=data)
    return 0


def main(argv: list[str], *, parse: Callable[[list[str]], tuple[BackboneConfig, list[str]]], open_task: Callable[[], Task]) -> int:
    """Run the command line `argv` of a task, whose settings `parse` reads and whose module `open_task` imports. The exit code."""
    cfg, notes = parse(argv)
    import utils
    from run import process

    task, rank = open_task(), process.start_process(cfg.device, cfg.seed)
    for note in notes:
        utils.log.info(note)
    with contextlib.ExitStack() as held:
        exit_code = evaluate(cfg, task, rank) if cfg.eval else train(cfg, task, rank, held)
    process.stop_process()
    return exit_code
