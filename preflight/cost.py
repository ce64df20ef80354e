"""Memory and time of a training step, and the hours of a run.

On a GPU the step of the recipe is run. On a CPU, where that may take minutes, two small ones are, and a straight line through them says what a
step of the recipe's size takes."""

import dataclasses
import time

import torch

from distillation.teacher import NoTeacher, Teacher
from engine import clock
from loading.batches import Batch
from loading.keys import build_plan
from loading.loaders import TrainLoader, count_cores, count_workers
from measuring import steps
from measuring.throughput import free_memory
from measuring.timing import synchroniser
from preflight.room import bytes_of
from run.checkpoint import TrainState
from run.compiling import no_compiler
from run.config import Config
from run.errors import Faults
from utils import Rank, log, unwrap

SMALL = (2, 6)  # images of the steps on a CPU
ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of an optimiser step of one process, bytes that it takes on the device, seconds of evaluating one image."""

    step_s: float
    num_bytes: int
    eval_s: float


class _Saved:
    """Bytes of what autograd keeps for the backward pass inside the block, but for parameters."""

    def __init__(self, net: torch.nn.Module):
        self._own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
        self.sizes: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


class _Labels(NoTeacher):
    """Stands for stored labels, which cost nothing: always the first class."""

    def __init__(self, cfg: Config, num_classes: int):
        self.kind, self.num_classes = cfg.distillation, num_classes

    def __call__(self, images: torch.Tensor, batch: Batch, epoch: int) -> torch.Tensor | None:
        if self.kind == "none":
            return None
        shape, dtype = ((len(images),), torch.int64) if self.kind == "hard" else ((len(images), self.num_classes), torch.float32)
        return torch.zeros(shape, dtype=dtype, device=images.device)


def _side(cfg: Config, state: TrainState, rank: Rank, teacher: Teacher | NoTeacher, *, num_images: int, num_classes: int, size: int) -> tuple:
    """A side of `measuring.steps` for that many images of that size, and its batch on the device."""
    plan = build_plan(num_images, repeated_aug=False, group_size=num_images // 2 * 2, lanes=1, data_seed=0)
    answers = Teacher(teacher.net, answer=teacher.answer, plan=plan) if isinstance(teacher, Teacher) else _Labels(cfg, num_classes)
    side = steps.side_of(cfg, plan, rank, state, compiler=no_compiler, answers=answers, num_classes=num_classes, size=size)
    batch = steps.build_batch(plan, size, num_classes, max(1, cfg.aug_splits))
    return side, batch._replace(images=batch.images.to(rank.device))


def forward_s(net: torch.nn.Module, images: torch.Tensor) -> float:
    """Seconds per image of the network's forward pass."""
    wait, times = synchroniser(images.device), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        net(images)
        wait()
        times.append(time.perf_counter() - start)
    return min(times) / len(images)


@torch.no_grad()
def _eval_s(cfg: Config, side: steps.Side, images: torch.Tensor) -> float:
    """Seconds in which the trained network evaluates an image of --input-size, from as many as there are `images`."""
    images = images if images.shape[-1] == cfg.input_size else images.new_zeros(len(images), 3, cfg.input_size, cfg.input_size)
    net = unwrap(side.state.net).eval()
    with side.parts.autocast(images.device):
        found = forward_s(net, images.contiguous(memory_format=side.parts.memory_format))
    net.train()
    return found


def _on_cpu(cfg: Config, state: TrainState, rank: Rank, teacher: Teacher | NoTeacher, num_classes: int, batch_size: int, size: int) -> Cost:
    times, kept = [], []
    for num_images in SMALL:
        side, batch = _side(cfg, state, rank, teacher, num_images=num_images, num_classes=num_classes, size=size)
        saved = _Saved(unwrap(state.net))
        with saved.hooks:
            steps.visit_s(side, batch, 1)
        kept.append(sum(saved.sizes.values()))
        times.append(min(steps.visit_s(side, batch, 1) for _ in range(ROUNDS)))
    span = SMALL[1] - SMALL[0]
    per_image_s, per_image = max(times[1] - times[0], times[1] / 2) / span, (kept[1] - kept[0]) / span
    once_s = max(0.0, times[0] - SMALL[0] * per_image_s)
    net = unwrap(state.net)
    learnt = sum(bytes_of(parameter.detach()) for parameter in net.parameters())
    fixed = bytes_of(net.state_dict()) + learnt + bytes_of(state.optimizer.state_dict()["state"])
    fixed += bytes_of(state.ema.module.state_dict()) if state.ema is not None else 0
    fixed += bytes_of(teacher.net.state_dict()) if teacher.net is not None else 0
    return Cost(once_s + batch_size * cfg.grad_accum_steps * per_image_s, int(fixed + batch_size * per_image), _eval_s(cfg, side, batch.images))


def _on_gpu(cfg: Config, state: TrainState, rank: Rank, teacher: Teacher | NoTeacher, num_classes: int, batch_size: int, size: int) -> Cost:
    side, batch = _side(cfg, state, rank, teacher, num_images=batch_size, num_classes=num_classes, size=size)
    torch.cuda.reset_peak_memory_stats(rank.device)
    steps.visit_s(side, batch, 2)
    step_s = min(steps.visit_s(side, batch, 2) for _ in range(ROUNDS))
    return Cost(step_s * cfg.grad_accum_steps, torch.cuda.max_memory_allocated(rank.device), _eval_s(cfg, side, batch.images))


def measure(
    cfg: Config, state: TrainState, rank: Rank, teacher: Teacher | NoTeacher, faults: Faults, *, num_classes: int, batch_size: int, size: int
) -> Cost | None:
    """What a step with that micro-batch of images of that size costs; None, and a fault, where it does not fit into the GPU's memory."""
    name = "with the teacher" if isinstance(teacher, Teacher) else "without the teacher" if cfg.distillation != "none" else "of training"
    name += f" at {size} pixels" if cfg.image_size_schedule is not None else ""
    if rank.device.type == "cpu":
        cost, free = _on_cpu(cfg, state, rank, teacher, num_classes, batch_size, size), free_memory()
        log.info("a step %s: %.3g s and about %.3g GiB on this CPU (from steps of %d and %d images)", name, cost.step_s, cost.num_bytes / 2**30, *SMALL)
        if free is not None and cost.num_bytes > free:
            log.warning("%.3g GiB are free here: on this CPU take a smaller --batch-size and more --grad-accum-steps", free / 2**30)
        return cost
    try:
        cost = _on_gpu(cfg, state, rank, teacher, num_classes, batch_size, size)
    except torch.OutOfMemoryError:
        total = torch.cuda.mem_get_info(rank.device)[1] / 2**30
        faults.add(f"a step of --batch-size {batch_size} does not fit into the {total:.3g} GiB of {rank.device}: halve it, and double --grad-accum-steps")
        return None
    log.info("a step %s: %.3g s and %.3g GiB on %s", name, cost.step_s, cost.num_bytes / 2**30, rank.device)
    return cost


def epochs_by_size(cfg: Config, start: int) -> dict[int, int]:
    """How many of the run's epochs from `start` on have training images of which size; where there are none, none of the last size."""
    starts = sorted(cfg.size_starts.items())
    ends = [epoch for epoch, _ in starts[1:]] + [cfg.num_epochs]
    counts = {}
    for (first, size), end in zip(starts, ends, strict=True):
        counts[size] = counts.get(size, 0) + max(0, min(end, cfg.num_epochs) - max(first, start))
    return {size: count for size, count in counts.items() if count} or {starts[-1][1]: 0}


def say_hours(cfg: Config, loader: TrainLoader, rank: Rank, costs: list[tuple[float, Cost]], *, view_s: float, num_val: int, has_ema: bool) -> None:
    """Say how long the run will take: of the number of epochs and the cost of a step in each kind of epoch, as seen by one of its processes.

    Loader processes work beside a GPU, and in turn with a CPU, whose cores they share."""
    views = loader.sampler.batch_size * cfg.grad_accum_steps
    workers = min(max(1, count_workers(cfg, rank)), max(1, count_cores() // rank.local_world_size))
    loading_s = views * view_s / workers
    num_epochs, total_s, is_limited = 0, 0.0, False
    for epochs, cost in costs:
        step_s = cost.step_s + loading_s if rank.device.type == "cpu" else max(cost.step_s, loading_s)
        is_limited |= loading_s > cost.step_s
        total_s += epochs * (loader.num_steps * step_s + (2 if has_ema else 1) * num_val / rank.world_size * cost.eval_s)
        num_epochs += epochs
    num_epochs = round(num_epochs)
    num_views = num_epochs * loader.num_steps * loader.global_batch
    log.info("loading: a view takes %.2f ms of a core, so %d loader processes make %.0f views/s", 1e3 * view_s, workers, workers / view_s)
    place = f"{rank.world_size} of {rank.device}" if rank.world_size > 1 else str(rank.device)
    limit = ", limited by the loader" if is_limited else ""
    took, at_1000 = clock(total_s), clock(num_views / 1000)
    log.info("about %s (h:mm:ss) on %s for %d epochs, %d views%s; %s at 1000 views/s", took, place, num_epochs, num_views, limit, at_1000)
