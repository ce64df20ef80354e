"""Train or evaluate a detector; `python -m detection --help` lists the settings.

A table of contents, as main.py: what needs torch is imported once the settings are read."""

import contextlib
import sys

from detection import config
from run.command import STOPPED, run_process


def train(cfg: config.Config, rank, held: contextlib.ExitStack) -> int:
    """Train: from scratch, from given weights, or on from a checkpoint. The exit code; `held` is to be closed when the run ends."""
    import engine
    import utils
    from detection import networks, training
    from run import checkpoint, clipping, hardware, optim, records, signals, watch
    from run.folder import claim_folder, find_checkpoint

    amp_dtype = hardware.pick_amp(cfg.amp, rank.device)
    stop = signals.StopRequest()
    train_data, val_data = training.open_data(cfg)
    folder = claim_folder(cfg, rank, held)
    loader, val_loader = training.open_train_loader(cfg, train_data, rank, folder), training.open_val_loader(cfg, val_data, rank, folder)
    source = find_checkpoint(cfg, folder, rank)
    with utils.main_first(rank):
        net = training.build_net(cfg, len(train_data.class_names), is_new=source is None)
    net.to(rank.device)
    spared = networks.no_weight_decay(net)
    optimizer = optim.build_dense_optimizer(cfg, net, lr=cfg.lr, weight_decay=cfg.weight_decay, spared=spared)
    parts = training.Parts(
        data=val_data,
        metrics=cfg.scored,
        clip=clipping.build_clipping(cfg),
        amp_dtype=amp_dtype,
        accum_steps=cfg.grad_accum_steps,
        seed=cfg.seed,
        log_steps=cfg.log_steps,
        rank=rank,
    )
    if rank.world_size > 1:
        net = networks.synchronised(net, rank.device)
    state = checkpoint.TrainState(
        ema=None,
        net=utils.wrap_distributed(net, rank, accum_steps=cfg.grad_accum_steps),
        optimizer=optimizer,
        scheduler=training.build_scheduler(cfg, optimizer, loader.num_steps),
        scaler=hardware.build_scaler(cfg.amp, rank.device),
        best=dict.fromkeys(parts.bests, -1.0),
    )
    run = {"global_batch": loader.global_batch, "num_images": len(train_data), "class_names": train_data.class_names}
    if source:
        checkpoint.resume(cfg, state, source, run=run, rank=rank)
    training.announce(cfg, loader, rank)
    run_records = records.open_records(cfg, folder, state.epoch, rank, state.step)
    facts = training.facts(cfg, val_data)
    saver = engine.Saver(cfg, parts, state, folder=folder, source=source, facts=facts, run=run, stop=stop, watch=watch.Watch(cfg, amp_dtype))
    with saver.saving_if_damaged():
        is_done = engine.fit(cfg, parts, state, loader, val_loader, run_records=run_records, saver=saver)
    return 0 if is_done else STOPPED


def evaluate(cfg: config.Config, rank) -> int:
    """Evaluate the weights of --resume, ours or published ones, and print one line of average precision. The exit code."""
    import engine
    from detection import names, training
    from run import checkpoint, hardware
    from run.folder import choose_folder, find_checkpoint

    _, data = training.open_data(cfg)
    source = find_checkpoint(cfg, choose_folder(cfg), rank)
    saved = checkpoint.read(source)
    checkpoint.warn_of_other(saved, source, training.facts(cfg, data))
    net = training.build_net(cfg, len(data.class_names), is_new=False)
    names.load(net, saved, where=source)
    net.to(rank.device)
    parts = engine.EvalParts(amp_dtype=hardware.pick_amp(cfg.amp, rank.device), rank=rank)
    training.report(net, training.open_val_loader(cfg, data, rank), parts, data=data, metrics=cfg.scored, report=cfg.report)
    return 0


def main(argv: list[str]) -> int:
    cfg, notes = config.parse(argv)
    import utils
    from run import process

    rank = process.start_process(cfg.device, cfg.seed)
    for note in notes:
        utils.log.info(note)
    with contextlib.ExitStack() as held:
        exit_code = evaluate(cfg, rank) if cfg.eval else train(cfg, rank, held)
    process.stop_process()
    return exit_code


if __name__ == "__main__":
    run_process(main, sys.argv[1:])
