"""What a run leaves in its folder besides checkpoints: args.yaml, log.txt (one JSON object per epoch), TensorBoard events; and, where the
task has one, train_log.txt (one per so many steps, and one per evaluation)."""

import io
import json
import math
import os
import platform
import socket
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision

from run import checkpoint, disk, settings, trackers
from run.config import RunConfig
from run.folder import LOG_NAME, STEPS_NAME
from utils import Rank, checkout, log

CURE = "make room, then --resume auto"


def _environment(cfg: RunConfig) -> str:
    """Comment lines for args.yaml: commit, versions, machine."""
    commit = checkout() or "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = f"python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    return f"# {cfg.command} --config <this file> runs this again.\n# commit {commit}\n# {versions}\n# {device}, {os.cpu_count()} cores\n"


class Records:
    """The run's folder on the first process.

    `start_epoch` is the epoch to train next, `start_step` the steps done in it: lines and numbered checkpoints from there on belong to work
    that is about to be repeated. InputError where the folder cannot be written, `DiskFull` where it has no room; it may then be opened again."""

    def __init__(self, cfg: RunConfig, folder: Path, start_epoch: int, start_step: int = 0):
        self.folder = folder
        self.log_path, self.steps_path = folder / LOG_NAME, folder / STEPS_NAME
        with disk.writing(str(folder), CURE):
            if cfg.overwrite:
                self._delete_run()
            self.rewind(start_epoch, start_step)
            if not (folder / "args.yaml").exists():
                disk.write_whole(folder / "args.yaml", _environment(cfg) + settings.dump(cfg))
            self.boards = [_TensorBoard(folder, start_epoch), *([trackers.Tracker(name, cfg, folder)] if (name := trackers.wanted(cfg)) else [])]

    def _delete_run(self) -> None:
        for path in [
            self.log_path,
            self.steps_path,
            self.folder / "args.yaml",
            self.folder / trackers.IDS_NAME,
            *self.folder.glob("checkpoint_*.pth"),
            *self.folder.glob("events.out.tfevents.*"),
        ]:
            if not path.is_dir():
                path.unlink(missing_ok=True)

    def rewind(self, start_epoch: int, start_step: int = 0) -> None:
        """Set aside what belongs to steps from there on, which training repeats: numbered checkpoints, and lines of the logs."""
        with disk.writing(str(self.folder), CURE):
            checkpoint.set_aside(self.folder, start_epoch)
            self._drop_lines(self.log_path, lambda line: int(line["epoch"]) < start_epoch, start_epoch)
            self._drop_lines(self.steps_path, lambda line: _place_of(line) <= (start_epoch, start_step), start_epoch)

    def _drop_lines(self, path: Path, is_kept: Callable[[dict], bool], start_epoch: int) -> None:
        """Keep the lines of a log that are to be kept; move the others, and torn ones, to <log>_dropped.txt."""
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8", errors="replace")  # a torn block may hold anything
        kept, dropped = [], []
        for line in text.splitlines():
            (kept if _holds(is_kept, line) else dropped).append(line + "\n")
        if dropped:
            set_aside = path.with_stem(f"{path.stem}_dropped")
            disk.append_whole(set_aside, "".join(dropped).encode())
            log.info("%d lines of %s from epoch %d on moved to %s: these epochs are trained again", len(dropped), path.name, start_epoch, set_aside.name)
        if "".join(kept) != text:
            disk.write_whole(path, "".join(kept))

    def write(self, record: dict) -> None:
        """Append one epoch's numbers, whole or not at all, as strict JSON: what is not a finite number becomes null."""
        record = self._append(self.log_path, record)
        for board in self.boards:
            board.write(record)

    def write_line(self, line: dict) -> None:
        """Append a line to train_log.txt, as `write` does to log.txt."""
        self._append(self.steps_path, line)

    @staticmethod
    def _append(path: Path, record: dict) -> dict:
        record = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        with disk.writing(str(path), CURE):
            disk.append_whole(path, (json.dumps(record, allow_nan=False) + "\n").encode())
        return record

    def close(self) -> None:
        for board in self.boards:
            board.close()


class NoRecords:
    """What the other processes have in place of `Records`."""

    def rewind(self, start_epoch: int, start_step: int = 0) -> None:
        pass

    def write(self, record: dict) -> None:
        pass

    def write_line(self, line: dict) -> None:
        pass

    def close(self) -> None:
        pass


def open_records(cfg: RunConfig, folder: Path, start_epoch: int, rank: Rank, start_step: int = 0) -> Records | NoRecords:
    """Where the run writes its numbers: the folder for the first process, nowhere for the others."""
    return disk.FullDisk(cfg, rank).write(lambda: Records(cfg, folder, start_epoch, start_step) if rank.is_main else NoRecords())


def _holds(is_kept: Callable[[dict], bool], line: str) -> bool:
    """Whether a line is one to keep; not where a killed job left half of it."""
    try:
        return is_kept(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return False


def _place_of(line: dict) -> tuple[int, int]:
    """The epoch and the steps done in it after which a line of train_log.txt was written; the published logs count epochs from 1 on."""
    return (int(line["epoch"]) - 1, int(line["iter"])) if line["mode"] == "train" else (int(line["epoch"]), 0)


class _TensorBoard:
    """A file of events that TensorBoard reads, written an epoch at a time; torch's writer does so from a thread, which dies where the
    disk is full."""

    def __init__(self, folder: Path, start_epoch: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.path = folder / f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        opening = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        repeated = [Event(wall_time=time.time(), step=start_epoch, session_log=SessionLog(status=SessionLog.START))]  # what follows replaces what was there
        self._append(opening + repeated * (start_epoch > 0))

    def _append(self, events: list) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        writer = RecordWriter(buffer)
        for event in events:
            writer.write(event.SerializeToString())
        disk.append_whole(self.path, buffer.getvalue())

    def write(self, record: dict) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in record.items() if key != "epoch" and value is not None]
        try:
            self._append([Event(wall_time=time.time(), step=record["epoch"], summary=Summary(value=values))])
        except OSError as error:
            log.warning("TensorBoard goes without epoch %d (%s); log.txt has its numbers", record["epoch"], error.strerror)

    def close(self) -> None:
        """Nothing is open between two epochs."""
