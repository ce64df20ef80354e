"""Weights of a network on a classifier's features: what decays, and what is loaded from a classifier's checkpoint."""

from pathlib import Path

import timm
from torch import nn

from run import checkpoint
from run.errors import InputError
from utils import log


def no_weight_decay(net: nn.Module) -> set[str]:
    """Names of the parameters that weight decay spares: LSNet's attention biases. All others decay, biases and norms among them."""
    return {name for name, _ in net.named_parameters() if name.endswith("attention_biases")}


def load_backbone(net: nn.Module, name: str, source: str) -> list[str]:
    """Load the backbone `name` of the detector from a classification checkpoint of ours or the published ones (`<name>_distill_300e.pth`).

    Returns, and logs, the names in the file that were left out: those of its heads. InputError where anything else is missing or left over."""
    where = f"--backbone-weights {source}"
    is_local = "://" not in source and not source.startswith("hf-hub:")
    if is_local and not Path(source).expanduser().is_file():
        cure = f"put {name}'s ImageNet weights there, published or of main.py, name others, or start from random ones with --backbone-weights none"
        raise InputError(f"{where}: there is no such file", cure)
    state = checkpoint.weights(checkpoint.read(source), where=where)
    own = getattr(net.backbone.body, "model", net.backbone.body)
    heads = _heads(name)
    dropped = [key for key in state if key.partition(".")[0] in heads and key not in own.state_dict()]
    checkpoint.load_weights(own, {key: value for key, value in state.items() if key not in dropped}, where=where)
    log.info("backbone weights of %s: all loaded but %d of its heads: %s", source, len(dropped), ", ".join(dropped) or "it has none")
    return dropped


def _heads(name: str) -> set[str]:
    """First parts of the names of a classifier's heads."""
    classifier = timm.get_pretrained_cfg_value(name.partition(".")[0], "classifier") or ()
    return {part.partition(".")[0] for part in ((classifier,) if isinstance(classifier, str) else classifier)} | {"head", "head_dist"}
