"""The only file that knows a checkpoint's keys: read, load, save, resume, fine-tune.

A checkpoint is a dict that `torch.load(weights_only=True)` reads: model, optimizer, lr_scheduler, epoch, model_ema, scaler, args
as in the published scripts, then what else a run carries and what its user needs to know (classes, input size, normalisation)."""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from timm.models._hub import download_cached_file, load_state_dict_from_hf
from torch import Tensor, nn

from run import disk, integrity
from run.config import Config, RunConfig
from run.errors import InputError
from run.optim import load_optimizer
from run.skipping import Guard
from utils import Rank, all_sum, gather, log, mean_over_processes, unwrap

LAST, BEST, BEST_EMA = "checkpoint_last.pth", "checkpoint_best.pth", "checkpoint_best_ema.pth"

_NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # the function that pickles of numpy scalars call; its module was renamed in numpy 2

# Plain data that published checkpoints hold besides tensors: argparse's namespace, paths, numpy scalars.
PLAIN_DATA = [
    argparse.Namespace,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
]


@dataclasses.dataclass
class TrainState:
    """What a run carries from step to step, and a checkpoint from process to process."""

    net: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    scheduler: object
    scaler: torch.amp.GradScaler
    epoch: int = 0  # to train next
    step: int = 0  # optimiser steps done in that epoch, and what they summed up to
    loss_sum: Tensor | float = 0.0
    skipped_steps: Tensor | int = 0
    bad_images: int = 0  # of this process, in whose place it trained on others
    tally: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # sums of this process since the last line of train_log.txt
    best: dict[str, float] = dataclasses.field(default_factory=dict)  # of what is evaluated; at first below any, so that the first epoch is the best so far

    @functools.cached_property
    def guard(self) -> Guard:
        """What keeps steps that are not finite out of the network."""
        return Guard(self.net)

    def end_epoch(self) -> None:
        """Go on to the next epoch. An epoch that is trained is over once it is evaluated: a run that ends between repeats the evaluation alone."""
        self.epoch += 1
        self.forget_step()

    def forget_step(self) -> None:
        """Be at the beginning of the epoch."""
        self.step, self.loss_sum, self.skipped_steps, self.bad_images, self.tally = 0, 0.0, 0, 0, {}


def fetch(source: str) -> Path | dict[str, Tensor]:
    """Local path of a file or URL; the state dict itself for `hf-hub:name`. InputError where it cannot be had."""
    if source.startswith("hf-hub:"):
        get, argument = load_state_dict_from_hf, source.removeprefix("hf-hub:")
    elif re.match(r"https?://", source):
        get, argument = download_cached_file, source
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise InputError(f"{source}: there is no such file" + (", it is a folder" if path.is_dir() else ""))
        return path
    try:
        fetched = get(argument)
    except Exception as error:  # the hub and urllib raise many kinds, all of which mean: not to be had from here
        raise InputError(f"{source} could not be fetched ({error}): download it where there is a network and give its path") from error
    return fetched if isinstance(fetched, dict) else Path(fetched)


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive, a program besides its weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # of many kinds where an archive is damaged; who reads it says so
        return False


def read(source: str) -> dict:
    """Checkpoint in a file, at a URL or on the hub, on the CPU. Never runs code from it; InputError where that would be needed, and
    where the file is damaged, which is certain to be noticed where it carries a checksum."""
    checkpoint, is_sealed = _read(source)
    if not is_sealed and isinstance(checkpoint.get("args"), dict):
        log.info("%s carries no checksum, as those written by this project now do: damage to it may pass unnoticed", source)
    return checkpoint


def _read(source: str) -> tuple[dict, bool]:
    """What `read` returns, and whether its checksum was verified."""
    path = fetch(source)
    if isinstance(path, dict):
        return path, False
    if path.suffix == ".safetensors":
        return _read_safetensors(path), False
    is_sealed = integrity.require_intact(path)
    if is_torchscript(path):
        raise InputError(f"{source} is a TorchScript program: evaluate it with fuse_eval.py, which runs it")
    checkpoint = _unpickle(path, source)
    if not isinstance(checkpoint, dict):
        raise InputError(f"{source} holds a {type(checkpoint).__name__}, not a checkpoint: it must be a dict with the entry 'model'")
    return checkpoint, is_sealed


def _unpickle(path: Path, source: str):
    """What torch reads from the file without running code from it."""
    try:
        with torch.serialization.safe_globals(PLAIN_DATA), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what follows says what is wrong
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|global|class)\W+([A-Za-z_]\w*(?:\.\w+)+)", str(error))
        raise InputError(
            f"{source} is refused: it is damaged, or loading it would run code" + (f", for it asks for {wanted[1]}" if wanted else ""),
            "use another, or have who made it save its tensors alone, with torch.save({'model': state_dict}, path)",
        ) from error
    except Exception as error:  # of many kinds: torch follows whatever a damaged file says
        raise InputError(f"{source} is no complete checkpoint ({integrity.fault(path, error)})", integrity.USE_ANOTHER) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no complete safetensors file ({error}): fetch it again") from error


def weights(checkpoint: dict, *, use_ema: bool = False, where: str) -> dict[str, Tensor]:
    """State dict inside a checkpoint of ours, of the published scripts, of timm, or a bare one; canonical names."""
    ema_names = ("model_ema", "state_dict_ema")
    names = ema_names if use_ema else ("model", "state_dict", *ema_names)  # a file may hold nothing but its EMA
    state = next((checkpoint[name] for name in names if checkpoint.get(name) is not None), None)
    if state is None and use_ema:
        raise InputError(f"{where} holds no EMA weights: drop --use-ema")
    if state is None:
        state = checkpoint
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(
            f"{where} holds no weights: expected the entry 'model' or 'state_dict', or tensors by name; found {', '.join(map(str, list(checkpoint)[:5]))}"
        )
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state.items()}


def model_options(args: dict) -> dict:
    """Further arguments of the network in a checkpoint whose run had the settings `args`."""
    return dict(args.get("model_kwargs") or {})


def _differences(net: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """What keeps `state` from fitting `net`, a line per tensor."""
    own = net.state_dict()
    lines = [
        f"{name} is {list(state[name].shape)} there, {list(own[name].shape)} here" for name in own if name in state and own[name].shape != state[name].shape
    ]
    lines += [f"{name} is missing there" for name in own if name not in state and not name.endswith("num_batches_tracked")]
    return lines + [f"{name} is unknown here" for name in state if name not in own]


def load_weights(net: nn.Module, state: dict[str, Tensor], *, where: str) -> None:
    """Load a complete state dict; where names differ, through the architecture's own filter. InputError names what does not fit."""
    differences = _differences(net, state)
    if differences:
        try:
            converted = _own_filter(net)(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # it knows nothing of such a checkpoint
            converted = state
        remaining = _differences(net, converted)
        if remaining:
            raise InputError(
                f"{where} does not fit {type(net).__name__}: {len(differences)} tensors differ, first: "
                + "; ".join(differences[:3])
                + ". Check the model's name and the number of classes"
            )
        state = converted
    net.load_state_dict(state, strict=False)  # strict but for batch counters, which old checkpoints lack


def _own_filter(net: nn.Module):
    """The function with which timm renames an architecture's old checkpoints; identity where it has none."""
    module = sys.modules[type(net).__module__]
    for name in ("checkpoint_filter_fn", "_checkpoint_filter_fn", "_filter_fn"):
        function = getattr(module, name, None)
        if function is not None:
            takes_net = function.__code__.co_argcount > 1
            return lambda state: function(state, net) if takes_net else function(state)
    return lambda state: state


def load_finetune(net: nn.Module, source: str, *, convert: Callable[[dict], dict] = lambda state: state) -> None:
    """Load what fits; drop head tensors of another class count, and say so. InputError where more than heads differs.

    `convert` gives the file's state dict the network's names."""
    where = f"--finetune {source}"
    state = convert(weights(read(source), where=where))
    own = net.state_dict()
    dropped = [name for name in state if name in own and own[name].shape != state[name].shape and own[name].shape[1:] == state[name].shape[1:]]
    heads = {name.partition(".")[0] for name in dropped} | {"head", "head_dist"}
    kept = {name: value for name, value in state.items() if name not in dropped and (name in own or name.partition(".")[0] not in heads)}
    partial = {**{name: own[name] for name in own if name.partition(".")[0] in heads}, **kept}
    load_weights(net, partial, where=where)
    if dropped:
        log.info("fine-tuning: new heads in place of %s", ", ".join(dropped))


def read_for_evaluation(cfg: Config, source: str, facts: dict) -> dict[str, Tensor]:
    """Weights to evaluate; warns where the checkpoint was made for other classes or images than `facts` tells of."""
    checkpoint = read(source)
    warn_of_other(checkpoint, source, facts)
    return weights(checkpoint, use_ema=cfg.use_ema, where=source)


COMPARED_FACTS = ("class_names", "input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "max_size")


def warn_of_other(checkpoint: dict, source: str, facts: dict) -> None:
    """Warn where the checkpoint was made for other classes or images than `facts` tells of."""
    for name, here in facts.items():
        there = checkpoint.get(name)
        if name in COMPARED_FACTS and there is not None and _plain(there) != _plain(here):
            log.warning("%s was made with other %s than this evaluation: %s, here %s", source, name, brief(there), brief(here))


def brief(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Settings that may differ between a run and its continuation: they say where and how it runs, not what it computes.
# Batch, processes and accumulation are compared by their product, data by number of images and class names.
FREE_SETTINGS = {
    "batch_size", "grad_accum_steps", "recipe_batch", "start_epoch", "device", "output_dir", "overwrite", "resume", "save_freq", "project", "tracker",
    "checkpoint_steps", "checkpoint_minutes", "allow_config_change", "dry_run", "eval", "use_ema", "report", "pretrained", "finetune", "teacher_min_acc1",
    "teacher_path", "teacher_labels", "teacher_labels_mode", "data_path", "num_workers", "pin_mem", "model_ema_force_cpu", "on_full_disk",
    "compile", "compile_mode", "full_disk_minutes", "max_bad_images", "skip_bad_images", "on_nonfinite", "max_skipped_steps",
    "data_format", "data_cache", "data_cache_gb", "class_map", "classes", "inc_path", "ina_path", "inr_path", "insk_path", "inv2_path",
    "real_labels", "fgsm_test", "pgd_test", "num_classes", "backbone_weights", "metrics", "log_steps", "grad_checkpointing",
    "checkpoint_hist", "tta",
}  # fmt: skip


# Of what the optimiser's state consists, as some settings say: its kind, and the groups of parameters. From a setting's name to its value.
STATE_OF = {
    "--opt": lambda value: value("opt"),
    "--opt-kwargs": lambda value: {name: one for name, one in (value("opt_kwargs") or {}).items() if name not in ("foreach", "fused")},
    "--freeze": lambda value: list(value("freeze") or ()),
    "--layer-decay": lambda value: value("layer_decay") is not None,
}


def recipe_changes(checkpoint: dict, cfg: RunConfig, run: dict) -> list[str]:
    """How the recipe of `checkpoint` differs from `cfg` and `run`, a line per setting."""
    # A run from before there was a setting ran as its default now says, but that its only loader was the reference.
    defaults = {field.name: field.default for field in dataclasses.fields(cfg)}
    there = {**defaults, "loader": "reference", **checkpoint["args"], **checkpoint.get("run", {})}
    here = {**dataclasses.asdict(cfg), **run}
    names = [name for name in here if name in there and name not in FREE_SETTINGS]
    return [f"{name} was {brief(there[name])}, is {brief(here[name])}" for name in names if _plain(there[name]) != _plain(here[name])]


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _require_same_recipe(checkpoint: dict, cfg: RunConfig, run: dict, source: str) -> bool:
    """Whether the recipe is the checkpoint's; where it is not, InputError unless --allow-config-change."""
    if not isinstance(checkpoint.get("args"), dict):
        log.warning("%s was not written by this project: its recipe is not compared with this run's", source)
        return True
    changes = recipe_changes(checkpoint, cfg, run)
    if changes and not cfg.allow_config_change:
        raise InputError(
            f"--resume {source}: the recipe changed: "
            + "; ".join(changes)
            + ". Resume with the settings of the args.yaml beside it, or accept with --allow-config-change"
        )
    there = {**{field.name: field.default for field in dataclasses.fields(cfg)}, **checkpoint["args"]}
    other = [flag for flag, state in STATE_OF.items() if state(there.get) != state(lambda name: getattr(cfg, name, None))]
    if other:
        raise InputError(
            f"--resume {source}: {' and '.join(other)} changed, and with it what the optimiser's state in the checkpoint belongs to",
            "start a new run from its weights with --finetune",
        )
    for change in changes:
        log.warning("resuming with another recipe: %s", change)
    return not changes


def resume(cfg: RunConfig, state: TrainState, source: str, *, run: dict, rank: Rank) -> None:
    """Continue the run of the checkpoint `source`: everything in `state` as it was when it was saved.

    `run` holds what of the recipe is not a setting: the global batch and the data's size. Where --allow-config-change lets the
    recipe differ, weights, moments and position are the checkpoint's, rates and decays the new recipe's."""
    checkpoint = read(source)
    _require_run(checkpoint, f"--resume {source}")
    is_same = _require_same_recipe(checkpoint, cfg, run, source)
    load_weights(unwrap(state.net), weights(checkpoint, where=source), where=source)
    if state.ema is not None:
        has_ema = checkpoint.get("model_ema") is not None
        load_weights(state.ema.module, weights(checkpoint, use_ema=has_ema, where=source), where=source)
    state.epoch = checkpoint["epoch"] + 1
    _resume_optimizer(checkpoint, state, source, is_same=is_same)
    state.step = checkpoint.get("step", 0) if is_same else 0
    if state.step:
        _resume_inside_epoch(checkpoint, state, rank)
    state.best |= {name: checkpoint.get(name, -1.0) for name in state.best}
    log.info("continuing %s with epoch %d, step %d", source, state.epoch, state.step)


def _require_run(checkpoint: dict, where: str) -> None:
    if not {"optimizer", "lr_scheduler", "epoch"} <= set(checkpoint):
        raise InputError(f"{where} holds weights alone, no run to continue", "start from it with --finetune, or evaluate it with --eval")


def position(source: str) -> tuple[int, int]:
    """The epoch to train next and the steps done in it, of a checkpoint that is sound and can be continued; InputError where it is not."""
    checkpoint, _ = _read(source)
    _require_run(checkpoint, source)
    return checkpoint["epoch"] + 1, checkpoint.get("step", 0)


def held_accuracy(path: Path, key: str) -> float:
    """Accuracy `key` (of log.txt) of the weights in the checkpoint `path`; below any where it holds none or is damaged."""
    try:
        return _read(str(path))[0]["metrics"][key] if path.exists() else -1.0
    except (InputError, KeyError, TypeError) as error:
        log.warning("%s is replaced after the next epoch: %s", path, error.fact if isinstance(error, InputError) else f"it does not tell its {key}")
        return -1.0


def _resume_optimizer(checkpoint: dict, state: TrainState, source: str, *, is_same: bool) -> None:
    settings = [{key: value for key, value in group.items() if key != "params"} for group in state.optimizer.param_groups]
    try:
        load_optimizer(state.optimizer, checkpoint["optimizer"])
        if is_same:
            state.scheduler.load_state_dict(checkpoint["lr_scheduler"])
        if checkpoint.get("scaler"):
            state.scaler.load_state_dict(checkpoint["scaler"])
    except (ValueError, KeyError) as error:
        raise InputError(f"--resume {source} was made with another optimiser or schedule ({error}): use the settings of the args.yaml beside it") from error
    if not is_same:
        for group, setting in zip(state.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        if state.epoch > 0:
            state.scheduler.step(state.epoch - 1)


def _floating_buffers(state: TrainState) -> list[Tensor]:
    """BatchNorm's running statistics of network and EMA, which differ between processes inside an epoch."""
    nets = [unwrap(state.net)] + ([state.ema.module] if state.ema is not None else [])
    return [buffer for net in nets for buffer in net.buffers() if buffer.is_floating_point()]


def _own(sums: list[float], rank: Rank) -> float:
    """This process's sum; where the number of processes changed, the mean."""
    return sums[rank.index] if len(sums) == rank.world_size else sum(sums) / len(sums)


def _resume_inside_epoch(checkpoint: dict, state: TrainState, rank: Rank) -> None:
    """Each process's own sums and statistics; where the number of processes changed, each gets their mean."""
    loss_sums = checkpoint["loss_sums"]
    state.skipped_steps = checkpoint["skipped_steps"]
    state.bad_images = checkpoint.get("bad_images", 0) if rank.is_main else 0
    state.loss_sum = _own(loss_sums, rank)
    tallies = checkpoint.get("tallies", {})
    state.tally = {name: torch.tensor(_own(sums, rank), dtype=torch.float64, device=rank.device) for name, sums in tallies.items()}
    if rank.world_size > 1 and len(loss_sums) == rank.world_size:
        own = checkpoint["rank_buffers"][rank.index]
        buffers = _floating_buffers(state)
        with torch.no_grad():
            for buffer, value in zip(buffers, own.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(value.view_as(buffer))


def collect(cfg: RunConfig, state: TrainState, *, facts: dict, run: dict, metrics: dict, rank: Rank) -> dict:
    """Checkpoint of a run as it stands; every process takes part, for inside an epoch each has sums and statistics of its own.

    Running statistics are stored as their mean over processes, and inside an epoch each process's besides."""
    model, ema = unwrap(state.net).state_dict(), state.ema.module.state_dict() if state.ema is not None else None
    checkpoint = {
        "model": model,
        "optimizer": state.optimizer.state_dict(),
        "lr_scheduler": state.scheduler.state_dict(),
        "epoch": state.epoch - 1,
        "model_ema": ema,
        "scaler": state.scaler.state_dict(),
        "args": dataclasses.asdict(cfg),
        "run": run,
        **state.best,
        "step": state.step,
        "metrics": metrics,
        **facts,
    }
    if state.step:
        checkpoint["loss_sums"] = gather(torch.as_tensor(state.loss_sum, dtype=torch.float64, device=rank.device), rank).tolist()
        checkpoint["skipped_steps"] = int(state.skipped_steps)
        checkpoint["bad_images"] = all_sum(torch.tensor(state.bad_images, device=rank.device)).item()
        checkpoint["tallies"] = {name: gather(value, rank).tolist() for name, value in state.tally.items()}
    if state.step and rank.world_size > 1:
        own = torch.cat([buffer.flatten().float().to(rank.device) for buffer in _floating_buffers(state)])
        checkpoint["rank_buffers"] = gather(own, rank).cpu()
        for entries in (model, ema or {}):
            entries |= {name: mean_over_processes(value, rank) for name, value in entries.items() if name.endswith(("running_mean", "running_var"))}
    return checkpoint


def save(checkpoint: dict, folder: Path, names: list[str]) -> None:
    """Write a checkpoint with its checksum under each of `names`; a killed job leaves each file old or new, never half.

    The last of them is a file of its own, the others are one: what befalls one of the two leaves the other. InputError where they
    cannot be written, `DiskFull` where there is no room."""
    temporary, copy = folder / "checkpoint.tmp", folder / "checkpoint.tmp2"
    try:
        with temporary.open("w+b") as file:
            torch.save(checkpoint, file)
            integrity.seal(file)
            _sync(file)
        if names[:-1]:
            _copy(temporary, copy)
        for name in names[:-1]:
            _put(copy, folder / name)
        _replace(temporary, folder / names[-1])
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch finishes its archive also after a write that failed
        if not isinstance(cause, OSError):
            raise
        free = shutil.disk_usage(folder).free // 2**20
        fact = f"{folder / names[-1]}: not saved ({cause}; {free} MiB free there). Earlier checkpoints are intact"
        raise disk.refusal(cause, fact, "make room, then --resume auto") from error
    finally:
        for path in (temporary, copy):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written)
        _sync(written)


def _put(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` at once: a second link where the file system has links, else a copy."""
    staged = target.with_suffix(".tmp3")
    staged.unlink(missing_ok=True)
    try:
        try:
            os.link(source, staged)
        except OSError:
            _copy(source, staged)
        _replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)  # half a copy


def _replace(source: Path, target: Path) -> None:
    """Give the file `source` the name `target`; a folder of that name is set aside."""
    if target.is_dir():
        _set_aside(target)
    os.replace(source, target)


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The numbered checkpoints by their epochs, which they end; also what only has such a name."""
    return sorted((int(match[1]), path) for path in folder.glob("checkpoint_*.pth") if (match := re.fullmatch(r"checkpoint_(\d+)", path.stem)))


def prune(folder: Path, epoch: int, num_kept: int) -> None:
    """Remove the numbered checkpoints up to `epoch`, but for the last `num_kept`."""
    for _, path in [item for item in numbered(folder) if item[0] <= epoch and item[1].is_file()][:-num_kept]:
        path.unlink(missing_ok=True)


def set_aside(folder: Path, epoch: int) -> None:
    """Rename the numbered checkpoints from `epoch` on, which is about to be trained: they are of work that is done again, or damaged."""
    for _, path in [item for item in numbered(folder) if item[0] >= epoch]:
        log.info("%s is now %s: its epoch is trained again", path, _set_aside(path).name)


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint, or a folder in its place, to a name that is free; the new path."""
    names = (path.with_suffix(f".dropped{number}.pth") for number in itertools.count(1))
    free = next(name for name in names if not name.exists())
    os.replace(path, free)
    return free
