"""Settings of a detector's run, with the machinery of classification's. Imports no torch, so that `--help` answers at once."""

import dataclasses
import re
from pathlib import Path
from typing import ClassVar

from run.config import RUN_GROUPS, RunConfig, run_rules
from run.settings import Settings, refuse, setting

DETECTORS = ("mask_rcnn", "faster_rcnn", "retinanet")
METRICS = ("bbox", "segm")
RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "detection"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of one run, as given. `GROUPS` orders them for `--help`."""

    command: ClassVar[str] = "python -m detection"

    # detector
    detector: str = setting("mask_rcnn", "what is trained: faster_rcnn is mask_rcnn without masks", choices=DETECTORS)
    model: str = setting("recnext_m3", "its backbone: a name in timm's registry, which includes ours")
    channels: int = setting(256, "channels of its pyramid and heads", at_least=1)
    rois_per_image: int = setting(512, "proposals per image that an R-CNN's heads learn from", at_least=1)
    backbone_weights: str | None = setting(None, "classification checkpoint that the backbone starts from: file, URL or hf-hub:name")
    pretrained: bool = setting(False, "start the backbone from timm's weights of it")
    finetune: str | None = setting(None, "detector's checkpoint to start from, ours or a published one; heads of other classes are dropped")
    amp: str = setting("none", "mixed precision; auto: bf16 on a GPU that has it, else none", choices=("auto", "bf16", "fp16", "none"), nargs="?", const="auto")
    # schedule
    batch_size: int = setting(2, "images per process and micro-batch", at_least=1)
    recipe_batch: int = setting(16, "global batch the recipe was made for; another is warned of", at_least=1)
    epochs: int = setting(12, "epochs to train", at_least=0)
    lr: float = setting(2e-4, "learning rate, as it is", at_least=0)
    weight_decay: float = setting(0.05, "decay of all parameters but LSNet's attention biases", at_least=0)
    warmup_steps: int = setting(500, "optimiser steps of linear warm-up", at_least=0)
    warmup_ratio: float = setting(1e-6, "part of the learning rate that the warm-up starts from", at_least=0, at_most=1)
    decay_after: tuple[int, ...] | None = setting((8, 11), "epochs after which the learning rate drops", nargs="+", at_least=1)
    decay_rate: float = setting(0.1, "factor of a drop", above=0)
    clip_grad: float | None = setting(None, "gradient clipping bound, over all parameters; none: off", above=0)
    # data
    data_path: str = setting("data/coco", "folder that holds the annotation files and folders of images")
    train_annotations: str = setting("annotations/instances_train2017.json", "annotation file to train on, in COCO's format, seen from --data-path")
    train_images: str = setting("train2017", "folder of its images, seen from --data-path")
    val_annotations: str = setting("annotations/instances_val2017.json", "annotation file to evaluate on, seen from --data-path")
    val_images: str = setting("val2017", "folder of its images, seen from --data-path")
    max_size: tuple[int, ...] = setting((1333, 800), "images are resized to fit into this: long and short side, pixels", nargs="+", at_least=32)
    # evaluation and logs
    metrics: tuple[str, ...] | None = setting(None, "average precision of boxes (bbox), of masks (segm), or both (default: what the detector finds)", nargs="+")
    report: str | None = setting(None, "with --eval: CSV file for the average precision of each class")
    log_steps: int = setting(50, "optimiser steps between lines of train_log.txt", at_least=1)

    @property
    def has_masks(self) -> bool:
        """Whether the detector finds masks."""
        return self.detector == "mask_rcnn"

    @property
    def scored(self) -> tuple[str, ...]:
        """What is evaluated: of `METRICS`."""
        return self.metrics or (METRICS if self.has_masks else ("bbox",))


GROUPS = RUN_GROUPS | {"detector": "detector", "schedule": "batch_size", "data": "data_path", "evaluation and logs": "metrics"}
SETTINGS = Settings(
    Config, prog="python -m detection", description="Train or evaluate a detector. Settings: defaults < --config < flags.", groups=GROUPS, without_effect={}
)


def published(argv: list[str]) -> list[str]:
    """A command line of the published scripts as ours: a configuration's name that ends in .py means the recipe of that name, and
    `--eval bbox segm` names the metrics."""
    result = []
    for before, word in zip(["", *argv], argv, strict=False):
        flag, _, value = word.rpartition("=")
        if value.endswith(".py") and "--config" in (before, flag):
            word = word.removesuffix(value) + str(RECIPES / (re.sub(r"_fpn_1x_coco$", "", Path(value).stem) + ".yaml"))
        if before == "--eval" and not word.startswith("--"):
            result.append("--metrics")
        result.append(word)
    return result


def parse(argv: list[str]) -> tuple[Config, list[str]]:
    """Settings from a command line (without the program's name), and notes to show the user: see `run.config.parse`."""
    settings, notes = SETTINGS.parse(published(argv))
    cfg = Config(**settings)
    validate(cfg)
    return cfg, notes


def validate(cfg: Config) -> None:
    """InputError where settings contradict each other."""
    others = [name for name in cfg.scored if name not in METRICS]
    refuse(
        [
            *run_rules(cfg),
            (cfg.eval and not cfg.resume, "--eval needs weights: add --resume FILE"),
            (bool(others), f"--metrics {' '.join(others)}: choose from {', '.join(METRICS)}"),
            ("segm" in cfg.scored and not cfg.has_masks, f"--metrics segm is of masks, and --detector {cfg.detector} finds none"),
            (len(cfg.max_size) != 2, "--max-size takes two numbers, the long side and the short side"),
            (len(cfg.max_size) == 2 and cfg.max_size[0] < cfg.max_size[1], "--max-size takes the long side first"),
            (bool(cfg.finetune) and (bool(cfg.backbone_weights) or cfg.pretrained), "--finetune holds the backbone's weights too: drop the others"),
            (bool(cfg.backbone_weights) and cfg.pretrained, "--backbone-weights and --pretrained both say what to start from: drop one of them"),
        ]
    )
