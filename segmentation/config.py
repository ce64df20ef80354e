"""Settings of a segmenter's run, with the machinery of classification's. Imports no torch, so that `--help` answers at once."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from features.config import BACKBONE_GROUPS, BackboneConfig, backbone_rules, published
from run.settings import Settings, refuse, setting

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "segmentation"
METRICS = ("mIoU", "mAcc", "aAcc")  # published names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BackboneConfig):
    """Settings of one run, as given. `GROUPS` orders them for `--help`.

    What lies between two evaluations is an epoch to all that segmentation shares with other tasks."""

    command: ClassVar[str] = "python -m segmentation"

    # schedule
    batch_size: int = setting(4, "images per process and micro-batch", at_least=1)
    recipe_batch: int = setting(32, "global batch the recipe was made for; another is warned of", at_least=1)
    iterations: int = setting(80000, "optimiser steps to train", at_least=0)
    eval_interval: int = setting(8000, "optimiser steps between evaluations, each with a checkpoint", at_least=1)
    lr: float = setting(1e-4, "learning rate at the start, as it is", at_least=0)
    min_lr: float = setting(1e-6, "learning rate that it goes down to", at_least=0)
    poly_power: float = setting(0.9, "power of what is left of the run, by which it does", above=0)
    # data
    data_set: str = setting("ade20k", "ade20k: its 150 classes, and 0 in its label images is ignored; own: any classes", choices=("ade20k", "own"))
    data_path: str = setting("data/ade/ADEChallengeData2016", "folder that holds the folders of pictures and label images")
    train_images: str = setting("images/training", "folder of pictures to train on, seen from --data-path")
    train_labels: str = setting("annotations/training", "folder of their label images, which have their names but for the ending")
    val_images: str = setting("images/validation", "folder of pictures to evaluate on, seen from --data-path")
    val_labels: str = setting("annotations/validation", "folder of their label images")
    classes: str | None = setting(None, "file of class names by number, a line each, with #rrggbb after a name that has a colour; for --data-set own")
    num_classes: int | None = setting(None, "number of classes of --data-set own (default: that of --classes, else found from the label images)", at_least=1)
    reduce_zero_label: bool | None = setting(None, "0 in label images is ignored, and class k has the value k + 1 (default: in ade20k alone)")
    max_size: tuple[int, ...] = setting((2048, 512), "pictures are resized to fit into this: long and short side, pixels", nargs="+", at_least=32)
    scales: tuple[float, ...] = setting((0.5, 2.0), "training pictures are made larger or smaller by a factor between these two", nargs="+", above=0)
    crop_size: int = setting(512, "side of the square that training sees of a picture, pixels", at_least=32)
    # evaluation
    metrics: tuple[str, ...] | None = setting(None, "published: mIoU; all three figures are told in any case", nargs="+")

    @property
    def epochs(self) -> int:
        """Stretches between evaluations."""
        return self.iterations // self.eval_interval

    @property
    def skips_zero(self) -> bool:
        """Whether 0 in label images is ignored."""
        return self.data_set == "ade20k" if self.reduce_zero_label is None else self.reduce_zero_label


GROUPS = BACKBONE_GROUPS | {"schedule": "batch_size", "data": "data_set", "evaluation": "metrics"}
SETTINGS = Settings(
    Config, prog="python -m segmentation", description="Train or evaluate a segmenter. Settings: defaults < --config < flags.", groups=GROUPS, without_effect={}
)


def parse(argv: list[str]) -> tuple[Config, list[str]]:
    """Settings from a command line (without the program's name), and notes to show the user: see `run.config.parse`."""
    settings, notes = SETTINGS.parse(published(argv, RECIPES, ending=r"_ade20k_\d+k"))
    cfg = Config(**settings)
    validate(cfg)
    return cfg, notes


def validate(cfg: Config) -> None:
    """InputError where settings contradict each other."""
    others = [name for name in cfg.metrics or () if name not in METRICS]
    refuse(
        [
            *backbone_rules(cfg),
            (not cfg.data_path, "--data-path is missing: name the folder that holds images/ and annotations/"),
            (bool(others), f"--metrics {' '.join(others)}: choose from {', '.join(METRICS)}"),
            (
                cfg.iterations % cfg.eval_interval != 0,
                f"--eval-interval {cfg.eval_interval} does not divide the {cfg.iterations} iterations: the last evaluation would not be of the last one",
            ),
            (cfg.min_lr > cfg.lr, f"--min-lr {cfg.min_lr} is above --lr {cfg.lr}: the learning rate goes down"),
            (len(cfg.scales) != 2 or cfg.scales[0] > cfg.scales[1], "--scales takes two numbers, the smaller one first"),
            (cfg.crop_size % 32 != 0, f"--crop-size {cfg.crop_size} is no multiple of 32: use {max(1, cfg.crop_size // 32) * 32}"),
            (
                cfg.data_set == "ade20k" and (cfg.num_classes is not None or bool(cfg.classes)),
                "--classes and --num-classes are for --data-set own: ADE20K has classes of its own",
            ),
        ]
    )
