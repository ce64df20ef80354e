"""Training steps on made-up images: the training loop's own, with mixing, clipping, optimiser and EMA, on a batch that is ready."""

import dataclasses
import time

import torch

import engine
import losses
import model
import utils
from distillation import teacher
from loading import augment
from loading.batches import Batch
from loading.keys import Plan
from run import clipping, compiling, config, hardware, network
from run.checkpoint import TrainState
from run.compiling import Compiler, NoCompiler
from run.freezing import set_train_mode
from run.state import build_state

NUM_CLASSES = 1000


@dataclasses.dataclass
class Side:
    """One way to train: what a step needs, and the seconds per step of each round."""

    parts: engine.Parts
    state: TrainState
    rounds_s: list[float] = dataclasses.field(default_factory=list)


def build_batch(plan: Plan, input_size: int, num_classes: int = NUM_CLASSES, num_splits: int = 1) -> Batch:
    """Random images at the plan's positions, so many views of each; in channels-last, as loaders give them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_splits * plan.num_positions, 3, input_size, input_size, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(num_classes, (plan.num_positions,), generator=generator)
    hashes = torch.randint(-(2**62), 2**62, (plan.num_positions,), generator=generator)
    return Batch(images, targets.repeat(num_splits), torch.from_numpy(plan.positions(0, plan.num_positions)), hashes)


def build_online(cfg: config.Config, plan: Plan, rank: utils.Rank) -> teacher.Teacher:
    """The recipe's teacher with random weights."""
    torch.manual_seed(0)
    net = teacher.folded(cfg, model.create_model(cfg.teacher_model, num_classes=NUM_CLASSES).eval())
    return teacher.Teacher(net.to(rank.device, memory_format=torch.channels_last), answer=teacher.pick_answer(cfg, NUM_CLASSES), plan=plan)


def side_of(
    cfg: config.Config, plan: Plan, rank: utils.Rank, state: TrainState, *, compiler: Compiler | NoCompiler, answers, num_classes: int, size: int | None = None
) -> Side:
    """The side that trains `state` on the plan's positions, with `answers` for the teacher, on images of --input-size or another."""
    size = size or cfg.input_size
    amp_dtype = hardware.pick_amp(cfg.amp, rank.device)
    parts = engine.Parts(
        criterion=losses.build_criterion(cfg),
        teacher=answers,
        mix=augment.build_mixing(cfg, plan, num_classes),
        clip=clipping.build_clipping(cfg),
        amp_dtype=amp_dtype,
        memory_format=hardware.pick_memory_format(cfg.memory_format, rank.device, amp_dtype),
        rank=rank,
        compiler=compiler,
        keeps_statistics=cfg.keeps_statistics,
        recomputes=cfg.grad_checkpointing,
    )
    engine.prepare_step(parts, state, shape=(max(1, cfg.aug_splits) * plan.num_positions, 3, size, size))
    set_train_mode(state.net, keeps_statistics=cfg.keeps_statistics)
    return Side(parts, state)


def build_side(cfg: config.Config, plan: Plan, rank: utils.Rank, *, answers) -> Side:
    """Student, optimiser and the rest, as main.py would build them."""
    memory_format = hardware.pick_memory_format(cfg.memory_format, rank.device, hardware.pick_amp(cfg.amp, rank.device))
    torch.manual_seed(0)
    net = network.build(cfg, NUM_CLASSES, distillation=cfg.distillation != "none").to(rank.device, memory_format=memory_format)
    compiler = compiling.build_compiler(cfg, rank)
    state = build_state(cfg, net, rank, compiler, global_batch=cfg.batch_size, num_steps=1)
    return side_of(cfg, plan, rank, state, compiler=compiler, answers=answers, num_classes=NUM_CLASSES)


def visit_s(side: Side, batch: Batch, num_steps: int) -> float:
    """Seconds per step of a few steps in a row, each of which mixes the batch's images further, in place."""
    start = time.perf_counter()
    for step in range(num_steps):
        loss = engine.train_step(side.parts, side.state, [batch], epoch=0, step=step)
    loss.item()  # what was handed to a GPU is done
    return (time.perf_counter() - start) / num_steps
