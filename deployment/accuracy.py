"""Accuracy of a fused file, or of one that another runtime runs, as `main.py --eval` measures a checkpoint's."""

import argparse
import functools
from pathlib import Path

import torch
from torch import Tensor, nn

import datasets
import engine
import utils
from deployment import weights
from deployment.verify import Opened
from deployment.weights import Trained
from run import checkpoint, config, flips, hardware, process
from run.config import Config
from run.errors import InputError, first_line
from sources.progress import Progress


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
    net = flips.asked_twice(net, cfg.tta).to(rank.device, memory_format=memory_format)
    return {"net": net, "loader": datasets.build_val_loader(cfg, images, rank), "parts": parts}


def _config(args: argparse.Namespace, trained: Trained, *flags: str) -> Config:
    """Settings of an evaluation in full precision on the data that the options name, of images as the network's checkpoint has them."""
    data = [f"--data-set={args.data_set}", *([f"--data-path={args.data_path}"] if args.data_path else [])]
    size = [f"--input-size={trained.input_size}", f"--crop-pct={trained.crop_pct}", f"--batch-size={args.batch_size}"]
    size += [f"--crop-mode={trained.crop_mode}", f"--interpolation={trained.interpolation}", f"--loader={trained.loader}"]
    size += ["--exif-transpose"] if trained.args.get("exif_transpose") else []  # as the run evaluated it
    size += ["--mean", *map(str, trained.mean), "--std", *map(str, trained.std)]
    return config.parse(["--eval", f"--model={trained.name}", "--amp=none", *size, *data, *flags])[0]


def measure(args: argparse.Namespace, trained: Trained, source: str, *, use_ema: bool = False) -> dict:
    """Accuracy in full precision of the file `source` on the validation images, and what it was measured on."""
    cfg = _config(args, trained, f"--resume={source}", f"--device={args.device}", *(["--use-ema"] if use_ema else []))
    parts = prepare(cfg, process.start_process(cfg.device, cfg.seed))
    return {**engine.evaluate(parts["net"], parts["loader"], parts["parts"]), "data_set": args.data_set, "data_path": args.data_path}


class _Elsewhere(nn.Module):
    """What a runtime makes of images, as a network on the CPU."""

    def __init__(self, opened: Opened):
        super().__init__()
        self.opened = opened
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        parts = [images] if self.opened.takes_batches else images.split(1)
        return torch.cat([self.opened.run(part.contiguous()) for part in parts])


def measure_opened(args: argparse.Namespace, trained: Trained, files: dict[str, Opened]) -> dict:
    """Accuracy of each of the `files`, opened in their runtimes, on the validation images, and what it was measured on. The CPU alone works."""
    cfg = _config(args, trained, f"--resume={trained.source}", "--device=cpu")
    _, images = datasets.open_images(cfg)
    if len(images.classes) != trained.num_classes:
        raise InputError(f"{trained.source} has {trained.num_classes} classes, the data has {len(images.classes)}: check --data-path and --data-set")
    rank = process.start_process(cfg.device, cfg.seed)
    parts = engine.EvalParts(amp_dtype=None, memory_format=torch.contiguous_format, rank=rank)
    loader = datasets.build_val_loader(cfg, images, rank)
    figures = {}
    for name, opened in files.items():
        progress = Progress(len(images), functools.partial(utils.log.info, "%s: %s", name))
        figures[name] = engine.evaluate(_Elsewhere(opened), loader, parts, lambda logits, _, done=progress: done.add(len(logits)))
    return {"data_set": args.data_set, "data_path": args.data_path, **figures}
