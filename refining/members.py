"""The checkpoints to average: found in folders of runs or named one by one, chosen by epoch or accuracy, required to be alike."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from refining.recipe import settings_of
from run import checkpoint
from run.config import Config
from run.errors import Faults, InputError
from run.watch import require_finite_weights
from utils import log


@dataclass(frozen=True)
class Member:
    """A checkpoint without its weights, which `state` reads.

    `epoch`: the one that it ends; `acc1`: percent of the validation images, as its run measured them; None where it does not say. `saved`: what
    else is in it. `shapes`: of its tensors, by name."""

    source: str
    use_ema: bool
    epoch: int | None
    acc1: float | None
    saved: dict
    shapes: dict[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.source.rpartition("/")[2] + ("" if self.epoch is None else f" (epoch {self.epoch})")

    def state(self) -> dict[str, Tensor]:
        """Its weights."""
        return checkpoint.weights(checkpoint.read(self.source), use_ema=self.use_ema, where=self.source)


HEAVY = {"model", "model_ema", "state_dict", "state_dict_ema", "optimizer", "lr_scheduler", "scaler", "rank_buffers"}


def open_member(source: str, *, use_ema: bool) -> Member:
    """InputError where the checkpoint is damaged or has no such weights, or they are not finite."""
    saved = checkpoint.read(source)
    state = checkpoint.weights(saved, use_ema=use_ema, where=source)
    require_finite_weights(state, where=source)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    light = {name: value for name, value in saved.items() if name not in HEAVY and not isinstance(value, Tensor)}
    metrics = saved.get("metrics") if isinstance(saved.get("metrics"), dict) else {}
    return Member(source, use_ema, saved.get("epoch"), metrics.get("test_ema_acc1" if use_ema else "test_acc1"), light, shapes)


def _open_run(folder: Path, *, use_ema: bool) -> Iterator[Member]:
    """Every epoch that there is a sound checkpoint of, once, in their order."""
    paths = [path for _, path in checkpoint.numbered(folder)]
    paths += [folder / name for name in (checkpoint.BEST, checkpoint.BEST_EMA, checkpoint.LAST) if (folder / name).is_file()]
    found, files = {}, {path.stat().st_ino: path for path in reversed(paths) if path.is_file()}  # the best ones may be links to numbered ones
    for path in reversed(files.values()):
        try:
            member = open_member(str(path), use_ema=use_ema)
        except InputError as error:
            log.warning("passed over: %s", error.fact)
            continue
        if member.saved.get("step"):
            log.info("passed over: %s was saved inside an epoch", path)
        elif member.epoch is not None and member.epoch >= 0:
            found.setdefault(member.epoch, member)
    if not found:
        raise InputError(f"--input {folder} holds no sound checkpoint of an epoch", "name a run's folder, or checkpoints")
    yield from (found[epoch] for epoch in sorted(found))


def find(sources: Sequence[str], *, use_ema: bool, last: int | None = None, best: int | None = None) -> list[Member]:
    """The checkpoints in `sources`: files as named, of folders every epoch that is there; of them the `last` or the `best`, by their own run's
    figures. InputError where there are not so many, or fewer than two."""
    members = []
    for source in sources:
        folder = Path(source).expanduser()
        members += _open_run(folder, use_ema=use_ema) if folder.is_dir() else [open_member(source, use_ema=use_ema)]
    twice = [source for source, count in Counter(member.source for member in members).items() if count > 1]
    if twice:
        raise InputError(f"--input names {twice[0]} twice, and a mean in which it counts double is rarely meant", "name it once")
    if last is not None or best is not None:
        members = _chosen(members, last=last, best=best)
    if len(members) < 2:
        raise InputError(f"--input names {len(members)} checkpoint, and an average is of two or more", "name more, or a run's folder")
    return members


def _chosen(members: list[Member], *, last: int | None, best: int | None) -> list[Member]:
    flag, key, count = ("--last", "epoch", last) if last is not None else ("--best", "acc1", best)
    silent = [member.source for member in members if getattr(member, key) is None]
    if silent:
        raise InputError(f"{flag}: {silent[0]} does not tell its {'epoch' if key == 'epoch' else 'accuracy'}", f"drop {flag}, or leave it out")
    if len(members) < count:
        kept = "runs keep as many numbered checkpoints as --checkpoint-hist says"
        raise InputError(f"{flag} {count}: there are {len(members)} checkpoints ({kept})", "ask for fewer")
    return sorted(members, key=lambda member: getattr(member, key))[-count:]


def require_alike(members: Sequence[Member], *, allows_other_recipes: bool) -> None:
    """InputError, which names every one, where members differ from the first in architecture, classes, images or, unless that is allowed, recipe."""
    first, faults = members[0], Faults()
    cfg = Config(**settings_of(first.saved, first.source))
    for member in members[1:]:
        differences = _differences(first, member)
        faults.add(*(f"{member.source} and {first.source} cannot be averaged: {text}" for text in differences))
        changes = checkpoint.recipe_changes(member.saved, cfg, first.saved.get("run", {})) if isinstance(member.saved.get("args"), dict) else []
        if changes and not allows_other_recipes and not differences:
            advice = "average checkpoints of one recipe, or accept with --allow-config-change where all were fine-tuned from the same weights"
            faults.add(f"{member.source} is of another recipe than {first.source}: {'; '.join(changes)}. {advice[0].upper()}{advice[1:]}")
    faults.refuse()


def _differences(first: Member, member: Member) -> list[str]:
    """Why weights of the two have no mean, a line each; a further line only where those before leave it open."""
    names = [one.saved.get("args", {}).get("model") if isinstance(one.saved.get("args"), dict) else None for one in (member, first)]
    if None not in names and names[0] != names[1]:
        return [f"the architecture is {names[0]} there, {names[1]} here"]
    counts = [len(one.saved["class_names"]) if one.saved.get("class_names") else None for one in (member, first)]
    if None not in counts and counts[0] != counts[1]:
        return [f"there are {counts[0]} classes there, {counts[1]} here"]
    facts = [name for name in checkpoint.COMPARED_FACTS if member.saved.get(name) != first.saved.get(name)]
    lines = [f"{name} is {checkpoint.brief(member.saved.get(name))} there, {checkpoint.brief(first.saved.get(name))} here" for name in facts]
    only = sorted(set(first.shapes) ^ set(member.shapes))
    lines += [f"{len(only)} tensors are in one alone, such as {only[0]}"] if only else []
    other = [name for name in first.shapes if name in member.shapes and first.shapes[name] != member.shapes[name]]
    return lines + [f"{name} is {list(member.shapes[name])} there, {list(first.shapes[name])} here" for name in other[:1]]
