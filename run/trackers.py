"""Trackers that a run's numbers go to besides log.txt and TensorBoard: Weights & Biases or trackio, imported where they are asked for alone."""

import dataclasses
import importlib
import json
import os
import secrets
from pathlib import Path
from types import ModuleType

from run import disk
from run.config import RunConfig
from run.errors import InputError
from utils import log

PROJECT = "understudy"
IDS_NAME = "tracker.json"  # in the run's folder: what each tracker knows the run by


def wanted(cfg: RunConfig) -> str | None:
    """The tracker in force, if there is one: that of --tracker; without it Weights & Biases where there is a --project."""
    return {"none": None, None: "wandb" if cfg.project else None}.get(cfg.tracker, cfg.tracker)


def import_package(name: str) -> ModuleType:
    """The package of a tracker; InputError where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"--tracker {name} needs its package: pip install {name} (see requirements-trackers.txt), or drop the flag") from error


def require_package(cfg: RunConfig) -> None:
    """InputError where the run's tracker has no package: asked before a run leaves anything behind, or checks a teacher for minutes."""
    if name := wanted(cfg):
        import_package(name)


def _open_wandb(wandb: ModuleType, cfg: RunConfig, *, folder: Path, run_id: str):
    """On this machine alone, unless WANDB_MODE says online; `wandb sync` sends it later. Its own copy of the console would come between the bar and
    the terminal."""
    mode = os.environ.get("WANDB_MODE") or "offline"
    how = {"project": cfg.project or PROJECT, "name": folder.name, "config": dataclasses.asdict(cfg), "mode": mode, "settings": {"console": "off"}}
    return wandb.init(dir=str(folder), id=run_id, resume="allow", **how)


def _open_trackio(trackio: ModuleType, cfg: RunConfig, *, folder: Path, run_id: str):
    """On this machine, where `trackio show` finds it; it knows runs by their names."""
    config = json.loads(json.dumps(dataclasses.asdict(cfg)))
    return trackio.init(project=cfg.project or PROJECT, name=f"{folder.name}-{run_id}", config=config, resume="allow")


OPENERS = {"wandb": _open_wandb, "trackio": _open_trackio}


def _run_id(folder: Path, name: str) -> str:
    """What the tracker knows the run in that folder by, from its first start on."""
    path = folder / IDS_NAME
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a first start, or half a file: then it is a new run to the tracker
        ids = {}
    if not (isinstance(ids, dict) and isinstance(ids.get(name), str)):
        ids = {**(ids if isinstance(ids, dict) else {}), name: secrets.token_hex(4)}
        disk.write_whole(path, json.dumps(ids) + "\n")
    return ids[name]


class Tracker:
    """A run at a tracker, the same one again where it is resumed. Whatever goes wrong there is warned of once; then the run goes on without it.

    InputError where its package is missing."""

    def __init__(self, name: str, cfg: RunConfig, folder: Path):
        package, run_id = import_package(name), _run_id(folder, name)
        self.name, self._run = name, None
        self._run = self._try(lambda: OPENERS[name](package, cfg, folder=folder, run_id=run_id))

    def _try(self, act):
        """What `act` returns; None where it fails, with a warning, and the tracker is done with."""
        try:
            return act()
        except Exception as error:  # packages of others, over networks of others
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("--tracker %s has failed (%s): the run goes on without it; log.txt has its numbers", self.name, reason)
            self._run = None

    def write(self, record: dict) -> None:
        """Hand on an epoch's numbers."""
        if self._run is not None:
            values = {key: value for key, value in record.items() if value is not None}
            self._try(lambda: self._run.log(values, step=record["epoch"]))

    def close(self) -> None:
        """Tell the tracker that the run has ended, or was stopped."""
        if self._run is not None:
            self._try(lambda: self._run.finish())
            self._run = None
