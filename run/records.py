"""What a run leaves in its folder besides checkpoints: args.yaml, log.txt (one JSON object per epoch), TensorBoard events."""

import json
import math
import os
import platform
import time
from pathlib import Path

import timm
import torch
import torchvision

from run import checkpoint, settings
from run.config import Config
from run.errors import InputError
from utils import Rank, checkout, log

LOG_NAME = "log.txt"


def choose_folder(cfg: Config) -> Path:
    """The run's folder: as given, else that of the run which --resume continues, else checkpoints/<model>/<time>."""
    if cfg.output_dir:
        return Path(cfg.output_dir)
    if cfg.resume and (Path(cfg.resume).parent / LOG_NAME).is_file():
        return Path(cfg.resume).parent
    return Path("checkpoints") / cfg.model / time.strftime("%Y%m%d-%H%M%S")


def claim_folder(cfg: Config, rank: Rank) -> Path:
    """The run's folder, made if need be. InputError where it cannot be written or holds another run; nothing in it changes yet."""
    folder = choose_folder(cfg)
    if rank.is_main:
        if (folder / LOG_NAME).exists() and not (cfg.resume or cfg.overwrite):
            raise InputError(f"{folder} already holds a run: continue it with --resume auto, delete it with --overwrite, or choose another --output_dir")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
        except OSError as error:
            raise InputError(f"--output_dir {folder} cannot be written ({error.strerror}): choose another folder") from error
    return folder


def find_checkpoint(cfg: Config, folder: Path) -> str | None:
    """What to continue from: the --resume file, for `auto` the folder's last checkpoint, or None."""
    if cfg.resume != "auto":
        return cfg.resume
    path = folder / checkpoint.LAST
    if cfg.eval and not path.is_file():
        raise InputError(f"--resume auto: {folder} holds no {checkpoint.LAST} to evaluate")
    return str(path) if path.is_file() else None


def _environment() -> str:
    """Comment lines for args.yaml: commit, versions, machine."""
    commit = checkout() or "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = f"python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    return f"# python main.py --config <this file> runs this again.\n# commit {commit}\n# {versions}\n# {device}, {os.cpu_count()} cores\n"


class Records:
    """The run's folder on the first process.

    `start_epoch` is the epoch to train next: lines of log.txt from it on belong to work that is about to be repeated."""

    def __init__(self, cfg: Config, folder: Path, start_epoch: int):
        self.folder = folder
        self.log_path = folder / LOG_NAME
        if cfg.overwrite:
            for path in [self.log_path, folder / "args.yaml", *folder.glob("checkpoint_*.pth"), *folder.glob("events.out.tfevents.*")]:
                path.unlink(missing_ok=True)
        self.rewind(start_epoch)
        if not (folder / "args.yaml").exists():
            (folder / "args.yaml").write_text(_environment() + settings.dump(cfg), encoding="utf-8")
        self.boards = [_TensorBoard(folder, start_epoch), *([_WeightsAndBiases(cfg, folder)] if cfg.project else [])]

    def rewind(self, start_epoch: int) -> None:
        """Keep the lines of log.txt before `start_epoch`; move the others, which training repeats, to log_dropped.txt."""
        if not self.log_path.exists():
            return
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)  # a torn block may hold anything
        kept, dropped = [], []
        for line in lines:
            epoch = _epoch_of(line)
            (kept if epoch is not None and epoch < start_epoch else dropped).append(line)
        if dropped:
            with (self.folder / "log_dropped.txt").open("a", encoding="utf-8") as file:
                file.writelines(line.rstrip("\n") + "\n" for line in dropped)
            log.info("%d lines of log.txt from epoch %d on moved to log_dropped.txt: these epochs are trained again", len(dropped), start_epoch)
            temporary = self.log_path.with_suffix(".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, self.log_path)

    def write(self, record: dict) -> None:
        """Append one epoch's numbers, as strict JSON: what is not a finite number becomes null."""
        record = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        try:
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self.log_path} cannot be written ({error.strerror}): make room, then --resume auto") from error
        for board in self.boards:
            board.write(record)

    def close(self) -> None:
        for board in self.boards:
            board.close()


class NoRecords:
    """What the other processes have in place of `Records`."""

    def rewind(self, start_epoch: int) -> None:
        pass

    def write(self, record: dict) -> None:
        pass

    def close(self) -> None:
        pass


def open_records(cfg: Config, folder: Path, start_epoch: int, rank: Rank) -> Records | NoRecords:
    """Where the run writes its numbers: the folder for the first process, nowhere for the others."""
    return Records(cfg, folder, start_epoch) if rank.is_main else NoRecords()


def _epoch_of(line: str) -> int | None:
    """Epoch of a line of log.txt; None where a killed job left half a line."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return None


class _TensorBoard:
    def __init__(self, folder: Path, start_epoch: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start_epoch or None)

    def write(self, record: dict) -> None:
        for key, value in record.items():
            if key != "epoch" and value is not None:
                self.writer.add_scalar(key, value, record["epoch"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    def __init__(self, cfg: Config, folder: Path):
        try:
            import wandb
        except ImportError as error:
            raise InputError("--project needs wandb: pip install wandb, or drop the flag") from error
        self.run = wandb.init(project=cfg.project, dir=str(folder), name=folder.name, config=vars(cfg), resume="allow")

    def write(self, record: dict) -> None:
        self.run.log(record, step=record["epoch"])

    def close(self) -> None:
        self.run.finish()
