"""A segmenter's part of a run: its data, its network, its schedule, what it puts into the training loop, and its evaluation."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from timm.scheduler import PolyLRScheduler
from torch import Tensor, nn

from engine import EvalParts, TrainParts
from features import class_report
from features.class_report import ClassReport
from loading import augment, pixels
from loading.loaders import loader_settings
from loading.steps import ImageLoader, StepLoader
from reporting.evaluation_page import confusions
from reporting.outcomes import pairs_of_matrix
from run import checkpoint
from run.checkpoint import TrainState
from run.errors import InputError
from segmentation import data as pairs
from segmentation import names, networks, painting
from segmentation.batches import Batch, build_plan, build_train_loader, build_val_loader
from segmentation.classes import ADE20K, Classes, numbered, read_classes
from segmentation.config import METRICS, Config
from segmentation.data import SegData
from segmentation.evaluation import count, summary
from segmentation.saved import classes_of
from sources.progress import Progress
from utils import Rank, all_sum, log, unwrap

# ---- data


def open_data(cfg: Config, rank: Rank) -> tuple[SegData | None, SegData]:
    """Training and validation data; for an evaluation None in place of the former. InputError where files are missing or wrong."""
    pixels.require()
    pixels.prepare_process()
    root = Path(cfg.data_path).expanduser()
    train, val = (root / cfg.train_images, root / cfg.train_labels), (root / cfg.val_images, root / cfg.val_labels)
    classes = open_classes(cfg, [val] if cfg.eval else [train, val], rank)
    splits = [pairs.read(*folders, classes, skips_zero=cfg.skips_zero) for folders in ((val,) if cfg.eval else (train, val))]
    return (None if cfg.eval else splits[0]), splits[-1]


def open_classes(cfg: Config, splits: list[tuple[Path, Path]], rank: Rank) -> Classes:
    """The classes of the recipe's data, whose folders are `splits`: known, given, of the checkpoint to be evaluated, or found from the label images."""
    if cfg.data_set == "ade20k":
        return read_classes(ADE20K)
    if cfg.classes:
        classes = read_classes(cfg.classes)
        if cfg.num_classes not in (None, len(classes)):
            raise InputError(f"--num-classes {cfg.num_classes} and the {len(classes)} names in --classes {cfg.classes} differ: drop one of them")
        return classes
    if cfg.num_classes is None and cfg.eval:
        return classes_of(checkpoint.read(cfg.resume), where=cfg.resume)
    return numbered(cfg.num_classes or pairs.find_num_classes(splits, rank, skips_zero=cfg.skips_zero))


def open_train_loader(cfg: Config, train: SegData, rank: Rank, folder: Path) -> StepLoader:
    """The training data in keyed order. `folder` gets the list of damaged files, where there are many."""
    plan = build_plan(
        train,
        batch_size=cfg.batch_size * rank.world_size * cfg.grad_accum_steps,
        num_steps=cfg.eval_interval,
        crop_size=cfg.crop_size,
        max_size=tuple(cfg.max_size),
        scales=tuple(cfg.scales),
        data_seed=cfg.data_seed,
    )
    parts = {"accum_steps": cfg.grad_accum_steps, "max_bad_images": cfg.max_bad_images}
    return build_train_loader(plan, rank, settings=loader_settings(cfg, rank, len(train)), list_path=folder / "bad_images_train.txt", **parts)


def open_val_loader(cfg: Config, val: SegData, rank: Rank, folder: Path | None = None) -> ImageLoader:
    """Each validation picture once, over all processes. `folder` gets the list of damaged files, where there are many."""
    list_path = folder / "bad_images_val.txt" if folder else None
    settings = loader_settings(cfg, rank, len(val))
    return build_val_loader(val, rank, settings=settings, max_size=tuple(cfg.max_size), skips_damaged=cfg.skip_bad_images, list_path=list_path)


def facts(cfg: Config, data: SegData) -> dict:
    """What a checkpoint's user must know of the pictures and classes."""
    size = {"max_size": list(cfg.max_size), "mean": augment.MEAN, "std": augment.STD}
    return {"class_names": data.class_names, "palette": data.classes.palette.tolist(), "reduce_zero_label": data.skips_zero, **size}


# ---- network and schedule


def build_net(cfg: Config, num_classes: int, *, pretrained: bool) -> nn.Module:
    """The recipe's segmenter for `num_classes` classes."""
    return networks.build(cfg.model, num_classes, channels=cfg.channels, pretrained=pretrained)


load, load_finetune = names.load, names.load_finetune


def build_scheduler(cfg: Config, optimizer: torch.optim.Optimizer, num_steps: int) -> PolyLRScheduler:
    """The published schedule by iterations: down to `min_lr`, in proportion to a power of what is left of the run."""
    total = max(1, cfg.epochs * num_steps)
    return PolyLRScheduler(optimizer, t_initial=total, power=cfg.poly_power, lr_min=cfg.min_lr, t_in_epochs=False)


# ---- what the loop asks for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts(TrainParts):
    """Segmentation's: `class_names` are those of the data."""

    class_names: list[str]

    num_steps: int  # per epoch

    bests = {"best_mIoU": ("mIoU", checkpoint.BEST)}
    first_keys = ("epoch", "iter", "train_lr", "train_loss", "n_parameters")

    def outputs(self, net: nn.Module, inputs: Batch) -> Tensor:
        with self.autocast(self.rank.device):
            return net(inputs.images, inputs.words)

    def losses(self, net: nn.Module, batch: Batch, epoch: int) -> dict[str, Tensor]:
        losses = networks.losses(self.outputs(net, batch), batch.labels)
        return {**losses, "loss": losses["decode.loss_ce"]}

    def iteration(self, epoch: int, step: int) -> int:
        return epoch * self.num_steps + step

    def evaluate(self, state: TrainState, loader: ImageLoader) -> dict:
        figures, _ = score(unwrap(state.net), loader, self, class_names=self.class_names)
        return {"iter": self.iteration(state.epoch, state.step), **figures, "test_bad_images": loader.damage.num_skipped}

    def told(self, record: dict) -> str:
        return f"{told_figures(record)}  {self.told_best(record)}"

    def told_best(self, best: dict[str, float]) -> str:
        return f"best mIoU {max(best['best_mIoU'], 0.0):.4f}"


def build_parts(cfg: Config, val: SegData, *, num_steps: int, **settings) -> Parts:
    """What the training loop uses; `settings` are those that every task has."""
    return Parts(class_names=val.class_names, num_steps=num_steps, **settings)


def told_figures(figures: dict[str, float]) -> str:
    """`mIoU 0.4100  mAcc 0.5200  aAcc 0.8000`."""
    return "  ".join(f"{name} {figures[name]:.4f}" for name in METRICS)


def score(net: nn.Module, loader: ImageLoader, parts: EvalParts, *, class_names: list[str]) -> tuple[dict[str, float], dict]:
    """Figures by published name, and per class: the same for any number of processes, and known to all of them."""
    return summary(counted(net, loader, parts, num_classes=len(class_names)), class_names)


def counted(net: nn.Module, loader: ImageLoader, parts: EvalParts, *, num_classes: int) -> Tensor:
    """The confusion matrix of the pictures of all processes, as `segmentation.evaluation.confusion` has it."""
    progress = Progress(len(loader), log.info, what="pictures evaluated")
    with parts.autocast(parts.rank.device):
        matrix = count(net, loader, num_classes, parts.rank.device, after_image=progress.add)
    return all_sum(matrix)


def report(net: nn.Module, loader: ImageLoader, parts: EvalParts, *, cfg: Config, data: SegData) -> None:
    """Evaluate and print the line that ends `--eval`; write the figures of each class to the file of --report."""
    matrix = counted(net, loader, parts, num_classes=len(data.class_names))
    figures, per_class = summary(matrix, data.class_names)
    if cfg.report and parts.rank.is_main:
        described = report_of(figures, per_class, matrix, data, loader)
        shown = seen(net, data, tuple(cfg.max_size), parts.rank.device) if class_report.is_page(cfg) else ()
        class_report.write(cfg, dataclasses.replace(described, views=shown))
    num_skipped = loader.damage.num_skipped
    skipped = f"  damaged ones left out: {num_skipped}" if num_skipped else ""
    log.info("Segmentation of the %d test pictures: %s%s", len(data) - num_skipped, told_figures(figures), skipped)


def seen(net: nn.Module, data: SegData, max_size: tuple[int, int], device: torch.device) -> Iterator[class_report.View]:
    """A few pictures under their labels, and under those that the network gives them."""
    palette = data.classes.palette

    def look(place: int, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = painting.labelled(net, picture, max_size, device, where=data.image_file(place))
        return painting.overlay(picture, data.labels(place), palette), painting.overlay(picture, found, palette)

    return class_report.views([data.image_file(i) for i in range(len(data))], look)


def report_of(figures: dict[str, float], per_class: dict, matrix: Tensor, data: SegData, loader: ImageLoader) -> ClassReport:
    """What was found, for the file of --report, with what each class is taken for."""
    counts = matrix.cpu().numpy()
    num_skipped = loader.damage.num_skipped
    return ClassReport(
        figures=figures,
        per_class=per_class,
        class_names=data.class_names,
        judged=f"{len(data) - num_skipped} pictures with {counts.sum()} labelled pixels."
        + (f" {num_skipped} damaged ones were left out." if num_skipped else ""),
        counted="pixels",
        counts=counts.sum(1).tolist(),
        headings={"mIoU": "mean IoU", "mAcc": "mean accuracy of the classes", "aAcc": "accuracy of the pixels", "IoU": "IoU", "Acc": "accuracy"},
        sections=tuple(confusions(pairs_of_matrix(counts), counts.sum(1).tolist(), data.class_names, matrix=counts, what="pixels")),
    )


def announce(cfg: Config, loader: StepLoader, rank: Rank) -> None:
    """Say what is about to run, and warn of what is rarely meant."""
    parts = (cfg.model, cfg.batch_size, rank.world_size, cfg.grad_accum_steps, loader.global_batch, cfg.iterations, cfg.lr, rank.device)
    log.info("semantic FPN of %s  batch %d x %d processes x %d accumulation = global batch %d  %d iterations  learning rate %g  on %s", *parts)
    if loader.global_batch != cfg.recipe_batch:
        log.warning("the recipe was made for a global batch of %d, this run's is %d: figures may differ", cfg.recipe_batch, loader.global_batch)
