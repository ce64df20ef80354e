"""Train or evaluate an image classifier; `python main.py --help` lists the settings.

A table of contents: each line builds one part and hands it on. What needs torch is imported once the settings are read, so that
`--help` and misspelt flags answer at once."""

import contextlib
import sys

from run import config
from run.command import STOPPED, run_process


def train(cfg: config.Config, rank, held: contextlib.ExitStack) -> int:
    """Train: from scratch, from given weights, or on from a checkpoint. The exit code; `held` is to be closed when the run ends."""
    import datasets
    import engine
    import losses
    import utils
    from distillation import labelling
    from loading import augment
    from run import checkpoint, clipping, compiling, hardware, network, records, signals, trackers, watch
    from run.folder import claim_folder, find_checkpoint
    from run.state import build_state

    amp_dtype = hardware.pick_amp(cfg.amp, rank.device)
    memory_format = hardware.pick_memory_format(cfg.memory_format, rank.device, amp_dtype)
    stop = signals.StopRequest()
    trackers.require_package(cfg)
    train_images, val_images = datasets.open_images(cfg)
    folder = claim_folder(cfg, rank, held)
    loader, val_loader = datasets.build_train_loader(cfg, train_images, rank, folder), datasets.build_val_loader(cfg, val_images, rank, folder)
    val_loader.start()
    num_classes = len(train_images.classes)
    with utils.main_first(rank):
        net = network.build(cfg, num_classes, distillation=cfg.distillation != "none")
        if cfg.finetune:
            checkpoint.load_finetune(net, cfg.finetune)
    net.to(rank.device, memory_format=memory_format)
    compiler = compiling.build_compiler(cfg, rank)
    state = build_state(cfg, net, rank, compiler, global_batch=loader.global_batch, num_steps=loader.num_steps, bests=engine.Parts.bests)
    run = {"global_batch": loader.global_batch, "num_images": len(train_images), "class_names": train_images.classes}
    if source := find_checkpoint(cfg, folder, rank):
        checkpoint.resume(cfg, state, source, run=run, rank=rank)
    parts = engine.Parts(
        criterion=losses.build_criterion(cfg),
        teacher=labelling.build_teacher(cfg, loader, rank, num_classes=num_classes, epochs=range(state.epoch, cfg.num_epochs)),
        mix=augment.build_mixing(cfg, loader.plan, num_classes),
        clip=clipping.build_clipping(cfg),
        amp_dtype=amp_dtype,
        memory_format=memory_format,
        accum_steps=cfg.grad_accum_steps,
        keeps_statistics=cfg.keeps_statistics,
        recomputes=cfg.grad_checkpointing,
        seed=cfg.seed,
        rank=rank,
        compiler=compiler,
    )
    engine.announce(cfg, state, loader, rank)
    engine.prepare(parts, state, shapes=map(loader.shape, cfg.train_sizes), val_shape=val_loader.shape(cfg.input_size))
    if parts.teacher.net is not None and cfg.teacher_min_acc1 != 0:
        labelling.check_teacher(cfg, parts.teacher.net, val_images, rank)
    run_records = records.open_records(cfg, folder, state.epoch, rank)
    facts = datasets.facts(cfg, val_images.classes)
    saver = engine.Saver(cfg, parts, state, folder=folder, source=source, facts=facts, run=run, stop=stop, watch=watch.Watch(cfg, amp_dtype))
    with saver.saving_if_damaged():
        is_done = engine.fit(cfg, parts, state, loader, val_loader, run_records=run_records, saver=saver)
    return 0 if is_done else STOPPED


def evaluate(cfgs: list[config.Config], rank) -> int:
    """Evaluate given weights, fused, and print a line of accuracies for each set of images; where there are several sizes of these, a Config for
    each, a table too. The exit code."""
    import datasets
    import utils
    from engine import EvalParts
    from robustness import evaluation, sets
    from run import checkpoint, compiling, flips, hardware, network
    from run.folder import choose_folder, find_checkpoint

    cfg, accuracies = cfgs[0], []
    amp_dtype = hardware.pick_amp(evaluation.precision(cfg), rank.device)
    memory_format = hardware.pick_memory_format(cfg.memory_format, rank.device, amp_dtype)
    suite = sets.open_suite(cfg)
    folder = choose_folder(cfg)
    source = find_checkpoint(cfg, folder, rank)
    facts = datasets.facts(cfg, suite.classes)
    if len(cfgs) > 1:
        del facts["input_size"]
    saved = checkpoint.read_for_evaluation(cfg, source, facts) if source else None
    has_dist_head = any("dist" in name for name in saved) if saved else cfg.distillation != "none"
    for cfg in cfgs:
        net = network.build(cfg, len(suite.classes), distillation=has_dist_head)
        if saved:
            checkpoint.load_weights(net, saved, where=source)
        net = flips.asked_twice(utils.replace_batchnorm(net.eval()), cfg.tta).to(rank.device, memory_format=memory_format)
        parts = EvalParts(amp_dtype=amp_dtype, memory_format=memory_format, rank=rank, compiler=compiling.build_compiler(cfg, rank))
        accuracies.append(evaluation.evaluate_suite(cfg, suite, net, parts, folder=folder if folder.is_dir() else None, weights=source))
    if len(cfgs) > 1:
        evaluation.say_sizes(cfgs, accuracies)
    return 0


def main(argv: list[str]) -> int:
    cfgs, notes = config.parse_sizes(argv)
    import utils
    from run import process

    cfg = cfgs[0]
    rank = process.start_process("auto" if cfg.dry_run else cfg.device, cfg.seed, is_alone=cfg.dry_run)
    for note in notes:
        utils.log.info(note)
    if cfg.dry_run:
        from preflight.rehearsal import rehearse

        return max(rehearse(one, rank) for one in cfgs)
    with contextlib.ExitStack() as held:
        exit_code = evaluate(cfgs, rank) if cfg.eval else train(cfg, rank, held)
    process.stop_process()
    return exit_code


if __name__ == "__main__":
    run_process(main, sys.argv[1:])
