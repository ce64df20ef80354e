"""Settings that every network on a classifier's features has, detector or segmenter. Imports no torch, so that `--help` answers at once."""

import dataclasses
import re
from pathlib import Path

from run.config import RUN_GROUPS, RunConfig, run_rules
from run.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig(RunConfig):
    """What is trained from a backbone, and how. Each task's own settings extend it, among others with `epochs`, `batch_size` and `lr`."""

    # network
    model: str = setting("recnext_m3", "its backbone: a name in timm's registry, which includes ours")
    channels: int = setting(256, "channels of its pyramid, and of a detector's heads", at_least=1)
    backbone_weights: str | None = setting(None, "classification checkpoint that the backbone starts from: file, URL or hf-hub:name")
    pretrained: bool = setting(False, "start the backbone from timm's weights of it")
    finetune: str | None = setting(None, "checkpoint of such a network to start from, ours or a published one; heads of other classes are dropped")
    amp: str = setting("none", "mixed precision; auto: bf16 on a GPU that has it, else none", choices=("auto", "bf16", "fp16", "none"), nargs="?", const="auto")
    # rates
    weight_decay: float = setting(0.05, "decay of all parameters but LSNet's attention biases", at_least=0)
    clip_grad: float | None = setting(None, "gradient clipping bound, over all parameters; none: off", above=0)
    # logs
    report: str | None = setting(None, "with --eval: figures of each class, as a page (.html), as numbers (.json), or as CSV")
    log_steps: int = setting(50, "optimiser steps between lines of train_log.txt", at_least=1)


BACKBONE_GROUPS = RUN_GROUPS | {"network": "model", "rates": "weight_decay", "logs": "report"}


def backbone_rules(cfg: BackboneConfig) -> list[tuple[bool, str]]:
    """What is wrong with settings that every such network has, as `run.settings.refuse` takes it; `max_size` is each task's own."""
    return [
        *run_rules(cfg),
        (cfg.eval and not cfg.resume, "--eval needs weights: add --resume FILE"),
        (len(cfg.max_size) != 2, "--max-size takes two numbers, the long side and the short side"),
        (len(cfg.max_size) == 2 and cfg.max_size[0] < cfg.max_size[1], "--max-size takes the long side first"),
        (bool(cfg.finetune) and (bool(cfg.backbone_weights) or cfg.pretrained), "--finetune holds the backbone's weights too: drop the others"),
        (bool(cfg.backbone_weights) and cfg.pretrained, "--backbone-weights and --pretrained both say what to start from: drop one of them"),
    ]


def published(argv: list[str], recipes: Path, *, ending: str) -> list[str]:
    """A command line of the published scripts as ours: a configuration's name that ends in .py means the one of `recipes` that has its name,
    but for what the pattern `ending` matches, and words after `--eval` name the metrics."""
    result = []
    for before, word in zip(["", *argv], argv, strict=False):
        flag, _, value = word.rpartition("=")
        if value.endswith(".py") and "--config" in (before, flag):
            word = word.removesuffix(value) + str(recipes / (re.sub(f"{ending}$", "", Path(value).stem) + ".yaml"))
        if before == "--eval" and not word.startswith("--"):
            result.append("--metrics")
        result.append(word)
    return result
