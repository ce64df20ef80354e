"""The training loop: fit, one epoch, one step, whatever is learnt; and what classification puts into it. Receives every part, builds none.

An epoch is what lies between two evaluations."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar, NoReturn

import torch
from torch import Tensor, nn

from loading.keys import draw_words
from loading.loaders import ValLoader
from loading.transfer import at_once, beside
from losses import count_correct
from run import checkpoint, disk
from run.checkpoint import TrainState
from run.compiling import Compiler, NoCompiler, no_compiler
from run.config import Config, RunConfig
from run.console import NO_BAR, Bar, NoBar, progress_bar
from run.errors import DamagedImages, InputError
from run.folder import find_checkpoint
from run.freezing import set_train_mode
from run.optim import current_lr, told_lr
from run.signals import StopRequest
from run.skipping import step_unless
from run.watch import NotFinite, Watch, first_nonfinite, first_nonfinite_in, require_finite, tensors_of
from utils import Agreement, Rank, all_sum, any_process, gather_objects, log, mean_over_processes, unwrap

REPORT_EVERY_S = 10.0  # between progress lines
BAR_EVERY_S = 2.0  # between moments at which a bar's loss is fetched from the device, which a step may have to wait for


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalParts:
    """How a network is run; `amp_dtype` None is full precision."""

    rank: Rank
    compiler: Compiler | NoCompiler = no_compiler
    amp_dtype: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.amp_dtype, enabled=self.amp_dtype is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainParts(EvalParts):
    """What every training step uses, whatever is learnt. `clip` may be neutral. `keeps_statistics`: see `set_train_mode`; `recomputes`: whether
    the backward pass runs parts of the network again. Each task extends it with what it alone knows: how micro-batches
    come and make losses, how the network is evaluated, and what the logs say of it.

    `bests`: for each best figure in checkpoints, its key in log.txt and the file that holds its weights; the first decides.
    `first_keys` of log.txt's lines. `log_steps`: steps between lines of train_log.txt; 0: there is none."""

    clip: Callable
    accum_steps: int = 1
    keeps_statistics: tuple[str, ...] = ()
    recomputes: bool = False
    seed: int = 0
    log_steps: int = 0

    bests: ClassVar[dict[str, tuple[str, str]]]
    first_keys: ClassVar[tuple[str, ...]]

    def batches(self, loader, epoch: int, step: int) -> Iterable:
        """The micro-batches of `epoch` from `step` on."""
        return loader.batches(epoch, step)

    def inputs(self, batch, epoch: int):
        """What `outputs` and the loss take of a micro-batch, on the device: tensors in tuples, lists and dicts."""
        return batch

    def outputs(self, net: nn.Module, inputs):
        """What the network, training, makes of the `inputs`."""
        raise NotImplementedError

    def losses(self, net: nn.Module, batch, epoch: int) -> dict[str, Tensor]:
        """Of a micro-batch the mean `loss` and, for lines of train_log.txt, what it consists of: scalars on the device."""
        raise NotImplementedError

    def end_epoch(self, epoch: int) -> None:
        """Told when an epoch is over or left."""

    def iteration(self, epoch: int, step: int) -> int:
        """The `iter` that train_log.txt gives after `step` steps of `epoch`: counted from the epoch's beginning, or from the run's."""
        return step

    def evaluate(self, state: TrainState, loader) -> dict:
        """Figures of the present weights under the keys of log.txt; every process takes part, and gets them."""
        raise NotImplementedError

    def told(self, record: dict) -> str:
        """What the console says of an epoch's figures."""
        raise NotImplementedError

    def told_best(self, best: dict[str, float]) -> str:
        """What the console says of the run's best figures when it ends."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts(TrainParts):
    """Classification's. `mix` and `teacher` may be neutral.

    `teacher(images, batch, epoch)` answers for mixed images, and is told by `teacher.end_epoch(epoch)` when an epoch is over or left. On a GPU
    it answers beside the student's forward pass."""

    criterion: Callable
    teacher: Callable
    mix: Callable

    bests: ClassVar[dict[str, tuple[str, str]]] = {
        "best_acc1": ("test_acc1", checkpoint.BEST),
        "best_ema_acc1": ("test_ema_acc1", checkpoint.BEST_EMA),
    }
    first_keys: ClassVar[tuple[str, ...]] = ("train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters")  # the published ones

    def batches(self, loader, epoch: int, step: int) -> Iterable:
        return loader.batches(epoch, step, prepare=functools.partial(mix_ahead, self, epoch))

    def inputs(self, batch, epoch: int) -> tuple[Tensor, Tensor]:
        return mixed(self, batch, epoch)

    def outputs(self, net: nn.Module, inputs: tuple[Tensor, Tensor]):
        with self.autocast(self.rank.device):
            return net(inputs[0])

    def losses(self, net: nn.Module, batch, epoch: int) -> dict[str, Tensor]:
        images, targets = inputs = self.inputs(batch, epoch)
        ask = functools.partial(self.teacher, images, batch, epoch)
        answer = at_once(ask) if self.compiler.shares_memory else beside(self.rank.device, ask)
        outputs = self.outputs(net, inputs)
        with self.autocast(self.rank.device):
            return {"loss": self.criterion(outputs, targets, answer())}

    def end_epoch(self, epoch: int) -> None:
        self.teacher.end_epoch(epoch)

    def evaluate(self, state: TrainState, loader: ValLoader) -> dict:
        return _evaluate_both(state, loader, self)

    def told(self, record: dict) -> str:
        ema = f"  EMA acc1 {record['test_ema_acc1']:.2f}" if "test_ema_acc1" in record else ""
        loss, *accuracies = (record[key] for key in ("test_loss", "test_acc1", "test_acc5"))
        return "test loss {:.4f}  acc1 {:.2f}  acc5 {:.2f}{}  best acc1 {:.2f}".format(loss, *accuracies, ema, record["best_acc1"])

    def told_best(self, best: dict[str, float]) -> str:
        return f"best acc1 {max(best['best_acc1'], 0.0):.2f}"


def start_forward(parts: TrainParts, epoch: int, step: int) -> None:
    """Make dropout and stochastic depth functions of (seed, epoch, step, rank), so that a resumed run repeats them."""
    seed = draw_words("step", parts.seed, epoch, step, parts.rank.index)[0] % 2**63
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` formats the call stack at each call until there is a GPU in use
    if parts.rank.device.type == "cuda":
        torch.cuda.manual_seed(seed)


def mixed(parts: Parts, batch, epoch: int) -> tuple[Tensor, Tensor]:
    """Images and targets of a micro-batch (`loading.batches.Batch`) on the device, mixed: here, unless they were on their way there."""
    if batch.mixed is not None:
        return batch.mixed
    images = batch.images.to(parts.rank.device, memory_format=parts.memory_format, non_blocking=True)
    return parts.mix(images, batch.targets.to(parts.rank.device, non_blocking=True), epoch, batch.positions)


def mix_ahead(parts: Parts, epoch: int, batch):
    """The micro-batch with its images and targets mixed, on a GPU; on a CPU, where nothing is done ahead, as it is."""
    if parts.rank.device.type == "cpu":
        return batch
    return batch._replace(mixed=mixed(parts, batch, epoch), images=torch.empty(0))


def train_step(parts: TrainParts, state: TrainState, micro_batches: Iterable, *, epoch: int, step: int) -> Tensor:
    """One optimiser step over `parts.accum_steps` micro-batches of the task's; the mean loss, on the device.

    A step that is not finite in some process changes nothing in any but `state.skipped_steps`, and its loss counts as 0."""
    start_forward(parts, epoch, step)
    state.guard.start_step()
    total = torch.zeros((), device=parts.rank.device, dtype=torch.float64)
    tally = {}
    for i, batch in enumerate(micro_batches):
        is_last = i == parts.accum_steps - 1
        with contextlib.nullcontext() if is_last or not hasattr(state.net, "no_sync") else state.net.no_sync():
            losses = parts.losses(state.net, batch, epoch)
            loss = losses["loss"] / parts.accum_steps
            with state.guard.keeping_statistics() if parts.recomputes else contextlib.nullcontext():
                state.scaler.scale(state.guard.spread(loss)).backward()
        total += loss.detach()
        if parts.log_steps:
            tally = {name: tally.get(name, 0.0) + value.detach().double() / parts.accum_steps for name, value in losses.items()}
    state.scaler.unscale_(state.optimizer)
    found_inf = state.guard.found_inf(parts.clip(state.guard.parameters))
    step_unless(found_inf, state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.guard.end_step(found_inf, step=step, is_explained=total.isfinite() & state.scaler.is_enabled())
    if state.ema is not None:
        state.ema.update(unwrap(state.net), found_inf)
    state.skipped_steps = state.skipped_steps + found_inf.long()
    if parts.log_steps:
        counted = {**tally, "steps": torch.ones_like(total)}
        state.tally = {name: state.tally.get(name, 0.0) + value.masked_fill(found_inf.bool(), 0) for name, value in counted.items()}
    return total.masked_fill(found_inf.bool(), 0)


def blank(parts: EvalParts, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Images of that shape, laid out as a run's are."""
    return torch.zeros(shape, device=device).contiguous(memory_format=parts.memory_format)


def prepare(parts: Parts, state: TrainState, *, shapes: Iterable[tuple[int, ...]], val_shape: tuple[int, ...]) -> None:
    """Compile what steps on images of each of the `shapes` and evaluations on those of `val_shape` run. See `Compiler.prepare`."""
    for shape in shapes:
        prepare_step(parts, state, shape=shape)
        parts.teacher.prepare(parts.compiler, shape)
    prepare_evaluation(parts, unwrap(state.net), shape=val_shape)
    if state.ema is not None:
        prepare_evaluation(parts, state.ema.module, shape=val_shape, what="the EMA's evaluation")


def prepare_step(parts: Parts, state: TrainState, *, shape: tuple[int, ...]) -> None:
    """Compile what steps on images of that shape run; the state stays as it is."""
    net = parts.compiler(unwrap(state.net))
    before = [buffer.clone() for buffer in net.buffers()]
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def run() -> None:
        with parts.autocast(parts.rank.device):
            outputs = net(blank(parts, shape, parts.rank.device))
        loss = sum(one.float().mean() for one in (outputs if isinstance(outputs, tuple) else (outputs,)))
        torch.autograd.grad(loss, learning, allow_unused=True)  # and not `backward`, which would have gradients averaged over the processes

    set_train_mode(net, keeps_statistics=parts.keeps_statistics)
    parts.compiler.prepare("the training step", unwrap(net), shape, run)
    with torch.no_grad():
        for buffer, value in zip(net.buffers(), before, strict=True):
            buffer.copy_(value)


def prepare_evaluation(parts: EvalParts, net: nn.Module, *, shape: tuple[int, ...], what: str = "the evaluation") -> None:
    """Compile what evaluating `net` on images of that shape runs."""
    compiled = parts.compiler(net).eval()
    device = next(net.parameters()).device

    def run() -> None:
        with torch.no_grad(), parts.autocast(device):
            compiled(blank(parts, shape, device))

    parts.compiler.prepare(what, net, shape, run)


class Meter:
    """Sums over an epoch, and the console's progress: a bar on a terminal, else lines.

    `pause_s`: what lies between the training of two epochs."""

    def __init__(
        self,
        num_steps: int,
        images_per_step: int,
        epoch: int,
        num_epochs: int,
        first_step: int,
        *,
        bar: Bar | NoBar,
        device: torch.device,
        pause_s: float = 0.0,
    ):
        self.num_steps, self.images_per_step = num_steps, images_per_step
        self.epoch, self.num_epochs = epoch, num_epochs
        self.first_step = self.step = first_step
        self.epoch_start = self.last_report = time.perf_counter()
        self.data_wait_s = 0.0
        self.bar, self.device, self.pause_s = bar, device, pause_s
        self.loss = math.nan

    def is_due(self) -> bool:
        """Whether it is time for another progress line, or to tell the bar of the loss."""
        return time.perf_counter() - self.last_report > (BAR_EVERY_S if self.bar.is_live else REPORT_EVERY_S)

    def rates(self) -> dict:
        """Training images per second of all processes, and seconds waited for data."""
        epoch_s = time.perf_counter() - self.epoch_start
        num_images = (self.step - self.first_step) * self.images_per_step
        return {"images_per_s": num_images / max(epoch_s, 1e-9), "data_wait_s": self.data_wait_s, "epoch_s": epoch_s}

    def left_s(self) -> tuple[float, float]:
        """Seconds until the epoch's training ends, and until the run does."""
        step_s = (time.perf_counter() - self.epoch_start) / (self.step - self.first_step)
        epoch_left_s = step_s * (self.num_steps - self.step)
        return epoch_left_s, epoch_left_s + self.pause_s + (self.num_epochs - self.epoch - 1) * (step_s * self.num_steps + self.pause_s)

    def advance(self, step: int) -> None:
        """Note that `step` steps of the epoch are done."""
        self.step = step
        if self.bar.is_live:
            self.bar.show(step, self.status())

    def status(self) -> str:
        """What the bar says: loss, rate, the part of the time that went into waiting for data, when epoch and run end, and the most memory of a GPU
        that was taken; of a narrow terminal's line the end is cut off."""
        rates, (epoch_left_s, run_left_s) = self.rates(), self.left_s()
        loss = "" if math.isnan(self.loss) else f"loss {self.loss:.4f}  "  # there is none before it is first asked for
        memory = f"  {torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB" if self.device.type == "cuda" else ""
        return (
            f"{loss}{rates['images_per_s']:.0f} images/s  data {100 * rates['data_wait_s'] / rates['epoch_s']:.0f} %  "
            f"ends in {clock(epoch_left_s)}, run in {clock(run_left_s)}{memory}"
        )

    def report(self, loss: float, lr: float) -> None:
        """Tell where the epoch stands, when it will end, and whether the data keep up: in a line, but where there is a bar only once the epoch ends."""
        self.loss, self.last_report = loss, time.perf_counter()
        if self.bar.is_live and self.step < self.num_steps:
            self.bar.show(self.step, self.status())
            return
        rates = self.rates()
        log.info(
            "epoch %d/%d  step %d/%d  loss %.4f  lr %.2e  %.0f images/s  waited for data %.0f %%  epoch ends in %s",
            self.epoch,
            self.num_epochs,
            self.step,
            self.num_steps,
            loss,
            lr,
            rates["images_per_s"],
            100 * rates["data_wait_s"] / rates["epoch_s"],
            clock(self.left_s()[0]),
        )


def clock(seconds: float) -> str:
    """12345 -> `3:25:45`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def train_one_epoch(
    parts: TrainParts,
    state: TrainState,
    batches: Iterable,
    *,
    num_steps: int,
    epoch: int,
    num_epochs: int,
    images_per_step: int,
    after_step: Callable[[], bool] = lambda: False,
    look: Callable[..., None] = lambda skips, **facts: None,
    note: Callable[[], None] = lambda: None,
    bar: Bar | NoBar = NO_BAR,
    pause_s: float = 0.0,
) -> dict | None:
    """Train from `state.step` to the epoch's last step; its learning rate, mean loss, counts and rates, or None if stopped before.

    `batches` is an iterable over the micro-batches that are left. `after_step` may save, and stops the epoch by returning True; `look` is
    told of skipped steps (`Watch.look`) at each progress line, `note` called every `parts.log_steps` steps. `bar`, `pause_s`: see `Meter`."""
    set_train_mode(state.net, keeps_statistics=parts.keeps_statistics)
    state.optimizer.zero_grad(set_to_none=True)
    meter = Meter(num_steps, images_per_step, epoch, num_epochs, state.step, bar=bar, device=parts.rank.device, pause_s=pause_s)
    lr = current_lr(state.optimizer)
    loss_sum = torch.zeros((), device=parts.rank.device, dtype=torch.float64) + state.loss_sum
    batches = iter(batches)
    for step in range(state.step, num_steps):
        wait_start = time.perf_counter()
        micro_batches = [next(batches) for _ in range(parts.accum_steps)]
        meter.data_wait_s += time.perf_counter() - wait_start
        state.scheduler.step_update(epoch * num_steps + step)  # schedules by epochs keep their rate
        lr = current_lr(state.optimizer)
        if state.ema is not None:
            state.ema.num_updates = epoch * num_steps + step + 1
        loss_sum += train_step(parts, state, micro_batches, epoch=epoch, step=step)
        state.bad_images += sum(len(batch.replaced) for batch in micro_batches)
        state.step = step + 1
        meter.advance(state.step)
        if step + 1 == num_steps or meter.is_due():
            num_skipped = int(state.skipped_steps)
            meter.report(_mean(loss_sum.item(), meter.step - num_skipped), lr)
            look(state.guard.read(), num_skipped=num_skipped, epoch=epoch, lr=lr)
        state.loss_sum = loss_sum
        if parts.log_steps and (step + 1) % parts.log_steps == 0:
            note()
        if step + 1 < num_steps and after_step():
            return None
    num_skipped = int(state.skipped_steps)
    # of a copy, for a run that ends before the epoch is evaluated saves each process's own sum
    train_loss = _mean(all_sum(loss_sum.clone()).item(), (num_steps - num_skipped) * parts.rank.world_size)
    bad_images = all_sum(torch.tensor(state.bad_images, device=parts.rank.device)).item()
    return {"train_lr": lr, "train_loss": train_loss, "skipped_steps": num_skipped, "bad_images": bad_images, **meter.rates()}


def _mean(total: float, count: int) -> float:
    """NaN of nothing."""
    return total / count if count else math.nan


@torch.no_grad()
def where_it_begins(parts: TrainParts, state: TrainState, loader, *, epoch: int, step: int) -> str:
    """In words, what is first not to be finite in that step, whose forward pass all processes run again with the present weights.

    For a run that stops or goes back: this leaves the loader's epoch, and BatchNorm's statistics as the pass makes them."""
    net = unwrap(state.net)
    inputs = [parts.inputs(batch, epoch) for _, batch in zip(range(parts.accum_steps), loader.batches(epoch, step), strict=False)]

    def forward() -> None:
        set_train_mode(net, keeps_statistics=parts.keeps_statistics)
        start_forward(parts, epoch, step)
        for one in inputs:
            parts.outputs(net, one)

    found = "its images are not finite" if first_nonfinite(tensors_of(inputs)) is not None else first_nonfinite_in(net, forward)
    found = [f"in process {i}, {text}" if parts.rank.world_size > 1 else text for i, text in enumerate(gather_objects(found, parts.rank)) if text]
    return found[0] if found else "run again, every module's output is finite: the loss, the gradients or weights that have changed since"


@torch.no_grad()
def average_buffers(net: nn.Module, rank: Rank) -> None:
    """Make BatchNorm's running statistics their mean over all processes, in one message."""
    buffers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    if rank.world_size == 1 or not buffers:
        return
    means = mean_over_processes(torch.cat([buffer.flatten() for buffer in buffers]), rank).split([buffer.numel() for buffer in buffers])
    torch._foreach_copy_(buffers, [mean.view_as(buffer) for mean, buffer in zip(means, buffers, strict=True)])


@torch.no_grad()
def evaluate(net: nn.Module, loader: Iterable, parts: EvalParts, note: Callable[[Tensor, Tensor], None] | None = None) -> dict:
    """Loss, top-1 and top-5 accuracy in percent and the number of images, exact for any number of processes.

    Every process counts its own images; the sums are added. `note` is told of each batch's logits (B, C) and class indices (B,)."""
    net = parts.compiler(net).eval()
    device = next(net.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, targets in loader:
        images = images.to(device, memory_format=parts.memory_format, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        with parts.autocast(device):
            logits = net(images)
        losses = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        sums += torch.stack([losses.double(), count_correct(logits, targets, 1), count_correct(logits, targets, 5), targets.new_full((), len(targets))])
        if note is not None:
            note(logits, targets)
    loss, correct1, correct5, num_images = all_sum(sums.to(parts.rank.device)).tolist()
    return {"loss": loss / num_images, "acc1": 100 * correct1 / num_images, "acc5": 100 * correct5 / num_images, "num_images": int(num_images)}


def check_teacher(net: nn.Module, loader: Iterable, parts: EvalParts, *, num_classes: int, min_acc1: float | None) -> None:
    """Log the top-1 accuracy of the teacher `net`, which runs as `parts` say, on `loader`; InputError where it is below `min_acc1`.

    None means chance plus three standard errors: what a network that learnt nothing passes once in 700 times."""
    result = evaluate(net, loader, parts)
    chance, num_images = 1 / num_classes, result["num_images"]
    if min_acc1 is None:
        min_acc1 = 100 * (chance + 3 * (chance * (1 - chance) / num_images) ** 0.5)
    log.info("teacher: top-1 %.2f %% on %d validation images (at least %.2f %% asked for)", result["acc1"], num_images, min_acc1)
    if result["acc1"] < min_acc1:
        raise InputError(
            f"the teacher's top-1 accuracy on {num_images} validation images is {result['acc1']:.2f} %, below {min_acc1:.2f} %: wrong weights, "
            "class order or normalisation? Check --teacher-model and --teacher-path, or lower --teacher-min-acc1 (0 = off)"
        )


def _evaluate_both(state: TrainState, loader: ValLoader, parts: Parts) -> dict:
    """Raw and EMA accuracy under the keys of log.txt."""
    average_buffers(unwrap(state.net), parts.rank)
    raw = evaluate(unwrap(state.net), loader, parts)
    result = {"test_loss": raw["loss"], "test_acc1": raw["acc1"], "test_acc5": raw["acc5"]}
    if state.ema is not None:
        average_buffers(state.ema.module, parts.rank)
        ema = evaluate(state.ema.module, loader, parts)
        result |= {"test_ema_acc1": ema["acc1"], "test_ema_acc5": ema["acc5"], "test_ema_loss": ema["loss"]}
    return result | {"test_bad_images": loader.damage.num_skipped}


class Saver:
    """Writes a run's checkpoints: before the first step, after every epoch, and inside epochs as often as asked for or when the run is
    told to stop. The best weights are replaced by better ones alone, also where a run goes on from before they were found.

    `source`: the checkpoint that the run continues."""

    def __init__(
        self, cfg: RunConfig, parts: TrainParts, state: TrainState, *, folder: Path, source: str | None, facts: dict, run: dict, stop: StopRequest, watch: Watch
    ):
        self.cfg, self.parts, self.state, self.source = cfg, parts, state, source
        self.folder, self.facts, self.run, self.stop, self.watch = folder, facts, run, stop, watch
        self.full_disk = disk.FullDisk(cfg, parts.rank)
        self.metrics = {}
        bests = {name: key for key, name in parts.bests.values()} if parts.rank.is_main else {}
        self.held = {name: (key, checkpoint.held_accuracy(folder / name, key)) for name, key in bests.items()}
        self.last_save = time.perf_counter()
        self.pause_s = 0.0  # what lay between the training of the last two epochs
        self.last_line = state.step, self.last_save  # of train_log.txt: after which step, and when
        self.agreement = Agreement(parts.rank)

    def before_training(self) -> None:
        """Save unless the last checkpoint is the one that the run continues: so that a log is never without one, a full disk is found out at
        once, and what else lies there in its place, of work that is done again, or damaged, is not what a next --resume auto meets."""
        if self.source is None or Path(self.source) != self.folder / checkpoint.LAST:
            try:
                self._write([checkpoint.LAST])
            except NotFinite as trouble:
                raise InputError(f"what the run starts from is damaged ({trouble})", "start from other weights") from trouble

    def _write(self, names: list[str]) -> None:
        collected = checkpoint.collect(self.cfg, self.state, facts=self.facts, run=self.run, metrics=self.metrics, rank=self.parts.rank)
        require_finite(collected, self.parts.rank, epoch=self.state.epoch, step=self.state.step)
        self.full_disk.write(lambda: checkpoint.save(collected, self.folder, names) if self.parts.rank.is_main else None)
        self.last_save = time.perf_counter()

    @contextlib.contextmanager
    def saving_if_damaged(self):
        """Save what was done of an epoch when damaged images end the run inside the block."""
        try:
            yield
        except DamagedImages:
            self.parts.end_epoch(self.state.epoch)
            with contextlib.suppress(NotFinite):  # then the checkpoint before is the one to go on from
                self._write([checkpoint.LAST])
            raise

    def after_step(self) -> bool:
        """Save if it is time to, or if any process was asked to stop; whether to stop. NotFinite where any may not go on."""
        minutes = self.cfg.checkpoint_minutes
        is_late = minutes is not None and time.perf_counter() - self.last_save > 60 * minutes
        must_stop, is_due, is_tripped = self.agreement.any_process([self.stop.is_made, is_late, self.watch.is_tripped])
        if is_tripped:
            raise self.watch.trouble(self.state.guard.read(), self.state.epoch)
        is_due = is_due or (self.cfg.checkpoint_steps is not None and self.state.step % self.cfg.checkpoint_steps == 0)
        # Not among skipped steps, for going back from there should undo them.
        if must_stop or (is_due and self.state.guard.read().in_a_row == 0):
            self._write([checkpoint.LAST])
        return must_stop

    def write_record(self, run_records, record: dict) -> None:
        """Append an epoch's numbers to the run's log."""
        self.full_disk.write(lambda: run_records.write(record))

    def write_steps(self, run_records) -> None:
        """Append a line of training to train_log.txt: means over all processes and the steps since the last line, and seconds per step."""
        state, now = self.state, time.perf_counter()
        sums = dict(zip(state.tally, all_sum(torch.stack(list(state.tally.values()))).tolist(), strict=True))
        num_steps = sums.pop("steps")
        means = {name: _mean(value, num_steps) for name, value in sums.items()}
        place = {"mode": "train", "epoch": state.epoch + 1, "iter": self.parts.iteration(state.epoch, state.step), "lr": current_lr(state.optimizer)}
        step_s = (now - self.last_line[1]) / max(1, state.step - self.last_line[0])
        state.tally, self.last_line = {}, (state.step, now)
        self.write_line(run_records, {**place, **means, "time": step_s})

    def write_line(self, run_records, line: dict) -> None:
        """Append a line to train_log.txt."""
        self.full_disk.write(lambda: run_records.write_line(line))

    def after_epoch(self, record: dict) -> bool:
        """Save; whether any process was asked to stop."""
        self.metrics = record
        better = {name: (key, record[key]) for name, (key, accuracy) in self.held.items() if record.get(key, -1.0) > accuracy}
        numbered = [f"checkpoint_{record['epoch']}.pth"] if (record["epoch"] + 1) % self.cfg.save_freq == 0 else []
        self._write([*numbered, *better, checkpoint.LAST])
        self.held |= better
        if self.parts.rank.is_main:
            checkpoint.prune(self.folder, record["epoch"], self.cfg.checkpoint_hist)
        return any_process([self.stop.is_made], self.parts.rank)[0]

    def go_back(self) -> str | None:
        """Continue from the newest sound checkpoint in the run's folder, and return its path; None where there is none."""
        source = find_checkpoint(dataclasses.replace(self.cfg, resume="auto", eval=False), self.folder, self.parts.rank)
        if source is not None:
            self.state.forget_step()
            checkpoint.resume(self.cfg, self.state, source, run=self.run, rank=self.parts.rank)
            self.state.guard.forget()
            self.watch.start()
            self.watch.has_gone_back = True
        return source


def fit(cfg: RunConfig, parts: TrainParts, state: TrainState, loader, val_loader, *, run_records, saver: Saver) -> bool:
    """Train from `state` to the recipe's last epoch; after each one evaluate, write a record, save. False if told to stop before.

    InputError where too much is not finite to go on, see --on-nonfinite."""
    saver.before_training()
    while state.epoch < cfg.num_epochs:
        epoch = state.epoch
        try:
            must_stop = _fit_epoch(cfg, parts, state, loader, val_loader, run_records=run_records, saver=saver)
        except NotFinite as trouble:
            parts.end_epoch(epoch)
            _go_back(trouble, parts, state, loader, saver=saver)
            saver.full_disk.write(lambda: run_records.rewind(state.epoch, parts.iteration(state.epoch, state.step)))
            continue
        if must_stop and state.epoch < cfg.num_epochs:
            log.warning("told to stop: saved after %sepoch %d; continue with --resume auto", f"step {state.step} of " if state.step else "", epoch)
            run_records.close()
            return False
    run_records.close()
    log.info("done: %s, %s", saver.folder, parts.told_best(state.best))
    return True


def _fit_epoch(cfg: RunConfig, parts: TrainParts, state: TrainState, loader, val_loader, *, run_records, saver: Saver) -> bool:
    """Train what is left of an epoch, evaluate, write its record, save; whether the run was told to stop, and where `state` has it then."""
    epoch = state.epoch
    saver.last_line = state.step, time.perf_counter()
    with progress_bar(f"epoch {epoch}/{cfg.num_epochs}", total=loader.num_steps, num_done=state.step, is_main=parts.rank.is_main) as bar:
        trained = train_one_epoch(
            parts,
            state,
            parts.batches(loader, epoch, state.step),
            epoch=epoch,
            num_epochs=cfg.num_epochs,
            num_steps=loader.num_steps,
            images_per_step=loader.global_batch,
            after_step=saver.after_step,
            look=saver.watch.look,
            note=lambda: saver.write_steps(run_records),
            bar=bar,
            pause_s=saver.pause_s,
        )
    parts.end_epoch(epoch)
    if trained is None:
        return True
    eval_start = time.perf_counter()
    tested = parts.evaluate(state, val_loader)
    saver.watch.end_epoch(parts.rank, epoch=epoch, num_steps=loader.num_steps, test_loss=tested.get("test_loss", 0.0))
    state.end_epoch()
    state.scheduler.step(epoch, tested[next(iter(parts.bests.values()))[0]])
    _keep_best(parts, state, tested)
    record = _record(parts, state, epoch, trained, tested, eval_s=time.perf_counter() - eval_start)
    saver.write_record(run_records, record)
    if parts.log_steps:
        saver.write_line(run_records, {"mode": "val", "epoch": epoch + 1, "lr": trained["train_lr"], **tested})
    must_stop = saver.after_epoch(record)
    saver.pause_s = time.perf_counter() - eval_start
    log.info("epoch %d  %s", epoch, parts.told(record))
    return must_stop


def _go_back(trouble: NotFinite, parts: TrainParts, state: TrainState, loader, *, saver: Saver) -> None:
    """Continue from the newest sound checkpoint; InputError, which tells all, where the run may not, or there is none."""
    begin = where_it_begins(parts, state, loader, epoch=trouble.epoch, step=trouble.step)
    lr = current_lr(state.optimizer)
    message = f"{trouble} (learning rate {lr:.2e}, precision {saver.watch.precision}): {begin}"
    source = saver.go_back() if saver.watch.may_go_back() else None
    if source is None:
        raise InputError(f"{message}. {saver.watch.advice()}") from trouble
    log.warning("%s. Going back to %s, epoch %d, step %d", message, source, state.epoch, state.step)


def _record(parts: TrainParts, state: TrainState, epoch: int, trained: dict, tested: dict, *, eval_s: float) -> dict:
    """One epoch's line of log.txt: the task's first keys first."""
    n_parameters = sum(p.numel() for p in state.net.parameters() if p.requires_grad)
    best = {name: state.best[name] for name, (key, _) in parts.bests.items() if key in tested}
    found = {**trained, **tested, **best, "epoch": epoch, "n_parameters": n_parameters, "eval_s": eval_s}
    return {key: found[key] for key in (*parts.first_keys, *tested, *best, *trained, "eval_s")}


def _keep_best(parts: TrainParts, state: TrainState, tested: dict) -> None:
    """Remember this epoch's figures where they are the best so far."""
    state.best |= {name: max(state.best.get(name, -1.0), tested.get(key, -1.0)) for name, (key, _) in parts.bests.items()}


def announce(cfg: Config, state: TrainState, loader, rank: Rank) -> None:
    """Say what is about to run, and warn of what is rarely meant."""
    sampler = loader.sampler
    log.info(
        "%s  batch %d x %d processes x %d accumulation = global batch %d  learning rate %s  on %s",
        cfg.model,
        sampler.batch_size,
        rank.world_size,
        cfg.grad_accum_steps,
        loader.global_batch,
        told_lr(cfg, loader.global_batch),
        rank.device,
    )
    if loader.global_batch != cfg.recipe_batch:
        log.warning("the recipe was made for a global batch of %d, this run's is %d: accuracies may differ", cfg.recipe_batch, loader.global_batch)
    parameters, num_steps = list(unwrap(state.net).parameters()), loader.num_steps * cfg.num_epochs
    if not all(parameter.requires_grad for parameter in parameters):
        log.info(
            "%d of %d parameters learn, the others are frozen", sum(one.numel() for one in parameters if one.requires_grad), sum(map(torch.numel, parameters))
        )
    if cfg.sched_on_updates:
        log.info("the learning rate moves at each of %d steps", num_steps)
    num_warmup = cfg.warmup_epochs * loader.num_steps if cfg.warmup_steps is None else cfg.warmup_steps
    if num_warmup >= num_steps > 0:
        log.warning("the warm-up of %d steps never ends: this run has %d", num_warmup, num_steps)
    if unused := cfg.unused_sizes:
        log.warning("--image-size-schedule %s: no epoch of this run is at %s pixels", cfg.image_size_schedule, " or ".join(map(str, unused)))
    if cfg.distillation != "none" and not hasattr(unwrap(state.net), "set_distilled_training"):
        log.info("%s has one output: it learns both terms of the %s distillation loss on it", cfg.model, cfg.distillation)
    if state.ema is not None and not state.ema.warms_up and num_steps < 3 / max(1 - cfg.model_ema_decay, 1e-12):
        log.warning(
            "--model-ema-decay %g averages over %.0f steps, more than a third of this run's %d: its EMA will lag; lower the decay",
            cfg.model_ema_decay,
            1 / max(1 - cfg.model_ema_decay, 1e-12),
            num_steps,
        )


def refuse_nonfinite(where: str) -> NoReturn:
    """InputError for an evaluation of what is not finite."""
    raise InputError(
        f"what the network says of some of {where} is not finite, so that there is no accuracy",
        "with --amp fp16 try bf16 or none; else the weights are damaged, or take another normalisation: use others",
    )


def report(net: nn.Module, loader: ValLoader, parts: EvalParts, note: Callable[[Tensor, Tensor], None] | None = None) -> dict:
    """Evaluate and print the line that ends `--eval`. What `evaluate` takes and returns; `loader` has the `damage` that it met.

    InputError where what the network says is not finite: of that there is nothing to report."""
    result = evaluate(net, loader, parts, note)
    num_skipped = loader.damage.num_skipped
    log.info(
        "Accuracy of the network on the %d test images: acc1 %.3f acc5 %.3f loss %.4f%s",
        *(result[key] for key in ("num_images", "acc1", "acc5", "loss")),
        f"  damaged images left out: {num_skipped}" if num_skipped else "",
    )
    if not math.isfinite(result["loss"]):
        refuse_nonfinite("the validation images")
    return result
