"""Train or evaluate an image classifier; `python main.py --help` lists the settings.

A table of contents: each line builds one part and hands it on. What needs torch is imported once the settings are read, so that
`--help` and misspelt flags answer at once."""

import os
import sys
import time
import traceback

import config
from errors import InputError


def train(cfg: config.Config, rank) -> None:
    """Train: from scratch, from given weights, or on from a checkpoint."""
    import augment
    import checkpoint
    import datasets
    import engine
    import losses
    import model
    import optim
    import records
    import teacher
    import utils

    amp_dtype = utils.pick_amp(cfg.amp, rank.device)
    memory_format = utils.pick_memory_format(cfg.memory_format, rank.device, amp_dtype)
    folder = records.claim_folder(cfg, rank)
    train_images, val_images = datasets.open_images(cfg)
    loader, val_loader = datasets.build_train_loader(cfg, train_images, rank), datasets.build_val_loader(cfg, val_images, rank)
    num_classes = len(train_images.classes)
    net = model.build(cfg, num_classes, distillation=cfg.distillation != "none")
    if cfg.finetune:
        checkpoint.load_finetune(net, cfg.finetune)
    net.to(rank.device, memory_format=memory_format)
    optimizer = optim.build_optimizer(cfg, net, loader.global_batch)
    state = checkpoint.TrainState(
        ema=optim.build_ema(cfg, net),
        net=utils.wrap_distributed(net, rank),
        optimizer=optimizer,
        scheduler=optim.build_scheduler(cfg, optimizer),
        scaler=utils.build_scaler(cfg.amp, rank.device),
        epoch=cfg.start_epoch,
    )
    if source := records.find_checkpoint(cfg, folder):
        checkpoint.resume(state, source)
    parts = engine.Parts(
        criterion=losses.build_criterion(cfg),
        teacher=teacher.build_teacher(cfg, num_classes, rank),
        mix=augment.build_mixing(cfg, loader.plan, num_classes),
        clip=optim.build_clipping(cfg),
        amp_dtype=amp_dtype,
        memory_format=memory_format,
        accum_steps=cfg.grad_accum_steps,
        freezes_batchnorm=cfg.set_bn_eval,
        seed=cfg.seed,
        rank=rank,
    )
    engine.announce(cfg, state, loader, rank)
    if cfg.distillation != "none" and cfg.teacher_min_acc1 != 0:
        engine.check_teacher(parts, datasets.build_teacher_loader(cfg, val_images, rank), num_classes=num_classes, min_acc1=cfg.teacher_min_acc1)
    run_records = records.open_records(cfg, folder, state.epoch, rank)
    engine.fit(cfg, parts, state, loader, val_loader, folder=folder, run_records=run_records, facts=datasets.facts(cfg, val_images.classes))


def evaluate(cfg: config.Config, rank) -> None:
    """Evaluate given weights, fused, and print one line of accuracies."""
    import checkpoint
    import datasets
    import engine
    import model
    import records
    import utils

    amp_dtype = utils.pick_amp(cfg.amp, rank.device)
    memory_format = utils.pick_memory_format(cfg.memory_format, rank.device, amp_dtype)
    _, images = datasets.open_images(cfg)
    source = records.find_checkpoint(cfg, records.choose_folder(cfg))
    saved = checkpoint.read_for_evaluation(cfg, source, datasets.facts(cfg, images.classes)) if source else None
    has_dist_head = any("dist" in name for name in saved) if saved else cfg.distillation != "none"
    net = model.build(cfg, len(images.classes), distillation=has_dist_head)
    if saved:
        checkpoint.load_weights(net, saved, where=source)
    utils.replace_batchnorm(net.eval()).to(rank.device, memory_format=memory_format)
    parts = engine.EvalParts(amp_dtype=amp_dtype, memory_format=memory_format, rank=rank)
    engine.report(net, datasets.build_val_loader(cfg, images, rank), parts, classes=images.classes, report=cfg.report)


def main(argv: list[str]) -> None:
    cfg, notes = config.parse(argv)
    import utils

    rank = utils.start_process(cfg.device, cfg.seed)
    for note in notes:
        utils.log.info(note)
    evaluate(cfg, rank) if cfg.eval else train(cfg, rank)
    utils.stop_process()


def explain(error: BaseException) -> int:
    """Name the cause of a failed run, once for all its processes; the exit code.

    Under a launcher each process but the first to fail is about to be ended by it, so all wait before they speak, and only the
    one that failed first gets to. What the user can put right is known to all at once: the first process tells."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    index = int(os.environ.get("RANK", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not (index == 0 and isinstance(error, InputError)):
        time.sleep(3)
    if not isinstance(error, InputError):
        traceback.print_exception(error)
        return 1
    text = str(error).rpartition("errors.InputError: ")[2].strip()  # a loader's worker wraps it in its own traceback
    sys.stderr.write(f"error: {text}\n" if index == 0 else f"[rank {index}] error: {text}\n")
    return 1


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as failure:
        sys.exit(explain(failure))
