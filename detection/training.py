"""A detector's part of a run: its data, its network, its schedule, what it puts into the training loop, and its evaluation."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from timm.scheduler import MultiStepLRScheduler
from torch import Tensor, nn

from detection import coco, names, networks, painting
from detection.batches import Batch, build_plan, build_train_loader, build_val_loader
from detection.coco import CocoData
from detection.config import Config
from detection.evaluation import OVERLAPS, detect, evaluate
from engine import EvalParts, TrainParts
from features import class_report
from features.class_report import ClassReport
from loading import augment, pixels
from loading.loaders import loader_settings
from loading.steps import ImageLoader, StepLoader
from run import checkpoint
from run.checkpoint import TrainState
from run.errors import InputError
from sources.progress import Progress
from utils import Rank, gather_objects, log, unwrap

NAMES = {"bbox": "box", "segm": "mask"}  # on a page, as the next ones
HEADINGS = {"mAP": "AP", "mAP_50": "AP50", "mAP_75": "AP75", "mAP_s": "AP, small", "mAP_m": "AP, medium", "mAP_l": "AP, large"}
PLACES = {"": "", "_50": "50: ", "_75": "75: "}  # of the figures that the console shows


# ---- data


def open_data(cfg: Config, rank: Rank) -> tuple[CocoData | None, CocoData]:
    """Training and validation data; for an evaluation None in place of the former. InputError where files are missing or wrong."""
    coco.mask_api()
    pixels.require()
    pixels.prepare_process()
    root = Path(cfg.data_path).expanduser()
    if not root.is_dir():
        raise InputError(f"--data-path {root}: there is no such folder", "name the one that holds annotations/, train2017/ and val2017/")
    train = None if cfg.eval else coco.read(root / cfg.train_annotations, root / cfg.train_images, has_masks=cfg.has_masks)
    val = coco.read(root / cfg.val_annotations, root / cfg.val_images, has_masks="segm" in cfg.scored)
    if train is not None and (train.category_ids, train.class_names) != (val.category_ids, val.class_names):
        raise InputError(f"{val.path} has other categories than {train.path}: {_named(val)}, and {_named(train)}; give both files the same list 'categories'")
    return train, val


def _named(data: CocoData) -> str:
    """The categories, a few of them."""
    pairs = [f"{key} {name}" for key, name in zip(data.category_ids, data.class_names, strict=True)]
    return ", ".join(pairs[:5]) + (f" and {len(pairs) - 5} more" if len(pairs) > 5 else "")


def open_train_loader(cfg: Config, train: CocoData, rank: Rank, folder: Path) -> StepLoader:
    """The training data in keyed order. `folder` gets the list of damaged images, where there are many."""
    plan = build_plan(train, batch_size=cfg.batch_size * rank.world_size * cfg.grad_accum_steps, max_size=tuple(cfg.max_size), data_seed=cfg.data_seed)
    settings = loader_settings(cfg, rank, len(train))
    parts = {"has_masks": cfg.has_masks, "accum_steps": cfg.grad_accum_steps, "max_bad_images": cfg.max_bad_images}
    return build_train_loader(plan, rank, settings=settings, list_path=folder / "bad_images_train.txt", **parts)


def open_val_loader(cfg: Config, val: CocoData, rank: Rank, folder: Path | None = None) -> ImageLoader:
    """Each validation image once, over all processes. `folder` gets the list of damaged images, where there are many."""
    list_path = folder / "bad_images_val.txt" if folder else None
    settings = loader_settings(cfg, rank, len(val))
    return build_val_loader(val, rank, settings=settings, max_size=tuple(cfg.max_size), skips_damaged=cfg.skip_bad_images, list_path=list_path)


def facts(cfg: Config, data: CocoData) -> dict:
    """What a checkpoint's user must know of the images."""
    size = {"max_size": list(cfg.max_size), "mean": augment.MEAN, "std": augment.STD}
    return {"class_names": data.class_names, "category_ids": data.category_ids, **size}


# ---- network and schedule


def build_net(cfg: Config, num_classes: int, *, pretrained: bool) -> nn.Module:
    """The recipe's detector for `num_classes` classes."""
    return networks.build(cfg.detector, cfg.model, num_classes, pretrained=pretrained, channels=cfg.channels, rois_per_image=cfg.rois_per_image)


load, load_finetune = names.load, names.load_finetune


def build_scheduler(cfg: Config, optimizer: torch.optim.Optimizer, num_steps: int) -> MultiStepLRScheduler:
    """The published schedule by steps, of which an epoch has `num_steps`: a linear warm-up, and drops after epochs."""
    return MultiStepLRScheduler(
        optimizer,
        decay_t=[epoch * num_steps + 1 for epoch in cfg.decay_after or ()],  # timm's drops come one step before their number
        decay_rate=cfg.decay_rate,
        warmup_t=cfg.warmup_steps,
        warmup_lr_init=cfg.warmup_ratio * cfg.lr,
        warmup_prefix=False,
        t_in_epochs=False,
    )


# ---- what the loop asks for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts(TrainParts):
    """Detection's: `data` and `metrics` are evaluated, the first of which decides what is best."""

    data: CocoData
    metrics: tuple[str, ...]

    first_keys = ("epoch", "train_lr", "train_loss", "n_parameters")

    @property
    def bests(self) -> dict[str, tuple[str, str]]:
        return {f"best_{self.metrics[0]}_mAP": (f"{self.metrics[0]}_mAP", checkpoint.BEST)}

    def outputs(self, net: nn.Module, inputs: Batch) -> dict[str, Tensor]:
        with self.autocast(self.rank.device):
            return net(inputs.images, inputs.sizes, inputs.targets, inputs.words)

    def losses(self, net: nn.Module, batch: Batch, epoch: int) -> dict[str, Tensor]:
        losses = self.outputs(net, batch)
        return {**losses, "loss": networks.total(losses)}

    def evaluate(self, state: TrainState, loader: ImageLoader) -> dict:
        figures, _ = score(unwrap(state.net), loader, self, data=self.data, metrics=self.metrics)
        return {**figures, "test_bad_images": loader.damage.num_skipped}

    def told(self, record: dict) -> str:
        return "  ".join([told_figures(record, self.metrics), self.told_best(record)])

    def told_best(self, best: dict[str, float]) -> str:
        name = next(iter(self.bests))
        return f"{name.replace('_', ' ')} {max(best[name], 0.0):.4f}"


def build_parts(cfg: Config, val: CocoData, *, num_steps: int, **settings) -> Parts:
    """What the training loop uses; `settings` are those that every task has."""
    return Parts(data=val, metrics=cfg.scored, **settings)


def told_figures(figures: dict[str, float], metrics: Iterable[str]) -> str:
    """`bbox mAP 0.4170 (50: 0.6340  75: 0.4540)`, for each metric."""
    parts = {metric: [f"{text}{figures[f'{metric}_mAP{place}']:.4f}" for place, text in PLACES.items()] for metric in metrics}
    return "  ".join(f"{metric} mAP {first} ({'  '.join(others)})" for metric, (first, *others) in parts.items())


def score(net: nn.Module, loader: ImageLoader, parts: EvalParts, *, data: CocoData, metrics: tuple[str, ...]) -> tuple[dict[str, float], dict]:
    """Average precision by published name, and per class by metric: the same for any number of processes, and known to all of them."""
    progress = Progress(len(loader), log.info, what="images evaluated")
    with parts.autocast(parts.rank.device):
        entries = detect(net, loader, data, after_image=progress.add)
    everyone = gather_objects(entries, parts.rank)
    found = evaluate(data, list(itertools.chain(*everyone)), metrics, left_out=loader.damage.reasons) if parts.rank.is_main else None
    return gather_objects(found, parts.rank)[0]


def report(net: nn.Module, loader: ImageLoader, parts: EvalParts, *, cfg: Config, data: CocoData) -> None:
    """Evaluate and print the line that ends `--eval`; write the average precision of each class to the file of --report."""
    figures, per_class = score(net, loader, parts, data=data, metrics=cfg.scored)
    if cfg.report and parts.rank.is_main:
        described = report_of(figures, per_class, data, loader, metrics=cfg.scored)
        shown = seen(net, data, tuple(cfg.max_size), parts.rank.device) if class_report.is_page(cfg) else ()
        class_report.write(cfg, dataclasses.replace(described, views=shown))
    num_skipped = loader.damage.num_skipped
    skipped = f"  damaged images left out: {num_skipped}" if num_skipped else ""
    log.info("Average precision on the %d test images: %s%s", len(data) - num_skipped, told_figures(figures, cfg.scored), skipped)


def seen(net: nn.Module, data: CocoData, max_size: tuple[int, int], device: torch.device) -> Iterator[class_report.View]:
    """A few pictures with their objects, and with those that the network finds."""

    def look(place: int, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        truth, found = data.target(place, has_masks=False), painting.found_in(net, picture, max_size, device)
        return painting.overlay(picture, truth, data.class_names), painting.overlay(picture, found, data.class_names)

    return class_report.views([data.file(i) for i in range(len(data))], look)


def report_of(figures: dict[str, float], per_class: dict, data: CocoData, loader: ImageLoader, *, metrics: tuple[str, ...]) -> ClassReport:
    """What was found, for the file of --report; the objects of a class are those that are no crowd."""
    left_out = set(loader.damage.reasons)
    counts = sum((data.num_objects(i) for i in range(len(data)) if data.file(i) not in left_out), start=np.zeros(len(data.class_names), np.int64))
    headings = {f"{metric}_{name}": f"{NAMES[metric]} {heading}" for metric in metrics for name, heading in HEADINGS.items()}
    return ClassReport(
        figures=figures,
        per_class={f"{metric}_mAP{place}": per_class[metric + place] for metric in metrics for place in OVERLAPS},
        class_names=data.class_names,
        judged=f"{len(data) - len(left_out)} images with {counts.sum()} objects." + (f" {len(left_out)} damaged images were left out." if left_out else ""),
        counted="objects",
        counts=counts.tolist(),
        headings=headings,
    )


def announce(cfg: Config, loader: StepLoader, rank: Rank) -> None:
    """Say what is about to run, and warn of what is rarely meant."""
    parts = (cfg.detector, cfg.model, cfg.batch_size, rank.world_size, cfg.grad_accum_steps, loader.global_batch, cfg.lr, rank.device)
    log.info("%s of %s  batch %d x %d processes x %d accumulation = global batch %d  learning rate %g  on %s", *parts)
    if loader.global_batch != cfg.recipe_batch:
        log.warning("the recipe was made for a global batch of %d, this run's is %d: precision may differ", cfg.recipe_batch, loader.global_batch)
    if cfg.warmup_steps >= loader.num_steps * cfg.epochs > 0:
        log.warning("--warmup-steps %d never ends: this run has %d steps", cfg.warmup_steps, loader.num_steps * cfg.epochs)
