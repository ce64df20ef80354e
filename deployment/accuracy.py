"""Accuracy of a fused file, as `main.py --eval` measures a checkpoint's."""

import argparse
from pathlib import Path

import torch
from torch import nn

import datasets
import engine
import utils
from deployment import weights
from deployment.weights import Trained
from run import checkpoint, config, hardware, process
from run.config import Config
from run.errors import InputError, first_line


def load(cfg: Config) -> tuple[nn.Module, dict]:
    """The fused network in --resume, on the CPU, and what its file says of classes and images."""
    path = checkpoint.fetch(cfg.resume)
    if isinstance(path, Path) and checkpoint.is_torchscript(path):
        return weights.load_torchscript(path)
    trained = weights.load_trained(cfg.model, cfg.resume, use_ema=cfg.use_ema, img_size=cfg.input_size)
    return weights.fused(trained), weights.facts(trained)


def _require_fit(net: nn.Module, cfg: Config, num_classes: int) -> None:
    """InputError where the network does not take the images or has another number of classes."""
    try:
        with torch.no_grad():
            logits = net(torch.zeros(1, 3, cfg.input_size, cfg.input_size))
    except RuntimeError as error:
        raise InputError(f"{cfg.resume} does not take images of --input-size {cfg.input_size} ({first_line(error)}): use the size it was made for") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else f"{len(logits)} outputs"
        raise InputError(f"{cfg.resume} gives {found} for an image, the data has {num_classes} classes: check --resume and --data-path")


def prepare(cfg: Config, rank: utils.Rank) -> dict:
    """What `engine.evaluate` takes, by name, for the file in --resume."""
    _, images = datasets.open_images(cfg)
    net, there = load(cfg)
    checkpoint.warn_of_other(there, cfg.resume, datasets.facts(cfg, images.classes))
    _require_fit(net.eval(), cfg, len(images.classes))
    amp_dtype = hardware.pick_amp(cfg.amp, rank.device)
    memory_format = hardware.pick_memory_format(cfg.memory_format, rank.device, amp_dtype)
    parts = engine.EvalParts(amp_dtype=amp_dtype, memory_format=memory_format, rank=rank)
    net.to(rank.device, memory_format=memory_format)
    return {"net": net, "loader": datasets.build_val_loader(cfg, images, rank), "parts": parts}


def measure(args: argparse.Namespace, trained: Trained, source: str, *, use_ema: bool = False) -> dict:
    """Accuracy in full precision of the file `source` on the validation images, and what it was measured on."""
    data = [f"--data-set={args.data_set}", *([f"--data-path={args.data_path}"] if args.data_path else []), *(["--use-ema"] if use_ema else [])]
    size = [f"--input-size={trained.input_size}", f"--crop-pct={trained.crop_pct}", f"--batch-size={args.batch_size}"]
    size += [f"--crop-mode={trained.crop_mode}", f"--interpolation={trained.interpolation}", f"--loader={trained.loader}"]
    size += ["--exif-transpose"] if trained.args.get("exif_transpose") else []  # as the run evaluated it
    size += ["--mean", *map(str, trained.mean), "--std", *map(str, trained.std)]
    cfg, _ = config.parse(["--eval", f"--model={trained.name}", f"--resume={source}", f"--device={args.device}", "--amp=none", *size, *data])
    parts = prepare(cfg, process.start_process(cfg.device, cfg.seed))
    return {**engine.evaluate(parts["net"], parts["loader"], parts["parts"]), "data_set": args.data_set, "data_path": args.data_path}
