"""Two training steps with recorded gradients, by one of several processes (see processes.py).

The file named first receives, from the first process, each step's loss and gradients, and every sample seen with its pixels' and targets' checksums."""

import torch

import datasets
import engine
import losses
import utils
from loading import augment
from run import config, hardware, network, optim, process
from run.checkpoint import TrainState


def main(argv: list[str]) -> int:
    """`argv` is the file to write, the data type, and main.py's flags."""
    out, dtype, *flags = argv
    cfg, _ = config.parse(flags)
    rank = process.start_process(cfg.device, cfg.seed)
    dtype = getattr(torch, dtype)
    images, _ = datasets.open_images(cfg)
    loader = datasets.build_train_loader(cfg, images, rank)
    net = network.build(cfg, len(images.classes), distillation=cfg.distillation != "none").to(dtype)
    optimizer = optim.build_optimizer(cfg, net, loader.global_batch)
    state = TrainState(
        net=utils.wrap_distributed(net, rank, accum_steps=cfg.grad_accum_steps),
        ema=None,
        optimizer=optimizer,
        scheduler=optim.build_scheduler(cfg, optimizer),
        scaler=hardware.build_scaler("none", rank.device),
    )
    torch.manual_seed(7)
    stub = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * cfg.input_size**2, len(images.classes))).to(dtype)
    seen, grads = [], []
    mixing = augment.build_mixing(cfg, loader.plan, len(images.classes))

    def mix(images, targets, epoch, positions):
        mixed, soft = mixing(images.to(dtype, copy=True), targets, epoch, positions)
        labels = stub(mixed).argmax(1)
        sums = zip(positions.tolist(), images, mixed, soft, labels.tolist(), strict=True)
        seen.extend(
            (position, image.double().sum().item(), one.double().abs().sum().item(), target.double().tolist(), label)
            for position, image, one, target, label in sums
        )
        return mixed, soft.to(dtype)

    def record(parameters):
        grads.append([parameter.grad.clone() for parameter in parameters])
        return torch.nn.utils.get_total_norm(grads[-1])

    with torch.no_grad():
        parts = engine.Parts(
            criterion=losses.build_criterion(cfg),
            teacher=lambda images, batch, epoch: stub(images).argmax(1).detach(),
            mix=mix,
            clip=record,
            accum_steps=cfg.grad_accum_steps,
            keeps_statistics=("",),
            rank=rank,
        )
    done = engine.train_one_epoch(parts, state, loader.batches(0), num_steps=2, epoch=0, num_epochs=1, images_per_step=loader.global_batch)
    everyone = [None] * rank.world_size
    if rank.world_size > 1:
        torch.distributed.all_gather_object(everyone, seen)
    else:
        everyone = [seen]
    if rank.is_main:
        torch.save({"loss": done["train_loss"], "grads": grads, "seen": sorted(sum(everyone, []))}, out)
    process.stop_process()
    return 0
