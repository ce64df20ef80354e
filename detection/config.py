"""Settings of a detector's run, with the machinery of classification's. Imports no torch, so that `--help` answers at once."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from features.config import BACKBONE_GROUPS, BackboneConfig, backbone_rules, published
from run.settings import Settings, refuse, setting

DETECTORS = ("mask_rcnn", "faster_rcnn", "retinanet")
METRICS = ("bbox", "segm")
RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "detection"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BackboneConfig):
    """Settings of one run, as given. `GROUPS` orders them for `--help`."""

    command: ClassVar[str] = "python -m detection"

    # detector
    detector: str = setting("mask_rcnn", "what is trained: faster_rcnn is mask_rcnn without masks", choices=DETECTORS)
    rois_per_image: int = setting(512, "proposals per image that an R-CNN's heads learn from", at_least=1)
    # schedule
    batch_size: int = setting(2, "images per process and micro-batch", at_least=1)
    recipe_batch: int = setting(16, "global batch the recipe was made for; another is warned of", at_least=1)
    epochs: int = setting(12, "epochs to train", at_least=0)
    lr: float = setting(2e-4, "learning rate, as it is", at_least=0)
    warmup_steps: int = setting(500, "optimiser steps of linear warm-up", at_least=0)
    warmup_ratio: float = setting(1e-6, "part of the learning rate that the warm-up starts from", at_least=0, at_most=1)
    decay_after: tuple[int, ...] | None = setting((8, 11), "epochs after which the learning rate drops", nargs="+", at_least=1)
    decay_rate: float = setting(0.1, "factor of a drop", above=0)
    # data
    data_path: str = setting("data/coco", "folder that holds the annotation files and folders of images")
    train_annotations: str = setting("annotations/instances_train2017.json", "annotation file to train on, in COCO's format, seen from --data-path")
    train_images: str = setting("train2017", "folder of its images, seen from --data-path")
    val_annotations: str = setting("annotations/instances_val2017.json", "annotation file to evaluate on, seen from --data-path")
    val_images: str = setting("val2017", "folder of its images, seen from --data-path")
    max_size: tuple[int, ...] = setting((1333, 800), "images are resized to fit into this: long and short side, pixels", nargs="+", at_least=32)
    # evaluation
    metrics: tuple[str, ...] | None = setting(None, "average precision of boxes (bbox), of masks (segm), or both (default: what the detector finds)", nargs="+")

    @property
    def has_masks(self) -> bool:
        """Whether the detector finds masks."""
        return self.detector == "mask_rcnn"

    @property
    def scored(self) -> tuple[str, ...]:
        """What is evaluated: of `METRICS`."""
        return self.metrics or (METRICS if self.has_masks else ("bbox",))


GROUPS = BACKBONE_GROUPS | {"detector": "detector", "schedule": "batch_size", "data": "data_path", "evaluation": "metrics"}
SETTINGS = Settings(
    Config, prog="python -m detection", description="Train or evaluate a detector. Settings: defaults < --config < flags.", groups=GROUPS, without_effect={}
)


def parse(argv: list[str]) -> tuple[Config, list[str]]:
    """Settings from a command line (without the program's name), and notes to show the user: see `run.config.parse`."""
    settings, notes = SETTINGS.parse(published(argv, RECIPES, ending="_fpn_1x_coco"))
    cfg = Config(**settings)
    validate(cfg)
    return cfg, notes


def validate(cfg: Config) -> None:
    """InputError where settings contradict each other."""
    others = [name for name in cfg.scored if name not in METRICS]
    refuse(
        [
            *backbone_rules(cfg),
            (not cfg.data_path, "--data-path is missing: name the folder that holds annotations/, train2017/ and val2017/"),
            (bool(others), f"--metrics {' '.join(others)}: choose from {', '.join(METRICS)}"),
            ("segm" in cfg.scored and not cfg.has_masks, f"--metrics segm is of masks, and --detector {cfg.detector} finds none"),
        ]
    )
