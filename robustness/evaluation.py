"""A network tried on every set of a suite: exact counts on any number of processes, a line per result, all of it as JSON."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import datasets
import engine
from engine import EvalParts
from loading import augment
from loading.images import Images
from loading.loaders import ValLoader
from reporting.evaluation_page import evaluation_page, evaluation_sections
from reporting.outcomes import Outcomes, calibrate
from robustness import attacks, scores, sets
from robustness.recording import Recorder, viewer, write_classes
from robustness.scores import CORRUPTIONS, SEVERITIES
from robustness.sets import Corrupted, Suite, TestSet, readable_classes
from run.config import Config
from run.disk import check_writable, write_whole, writing
from sources.progress import Progress
from utils import all_sum, log

Perturb = Callable[[Tensor, Tensor, Tensor], Tensor]  # (images, targets, places in the set) -> images


def precision(cfg: Config) -> str:
    """What takes the place of --amp: none, that is full precision as published, where robustness is measured."""
    if cfg.robustness_flags and cfg.amp not in ("auto", "none"):
        log.warning("--amp %s is left out: robustness is measured in full precision, as published", cfg.amp)
    return "none" if cfg.robustness_flags else cfg.amp


class Counts(NamedTuple):
    """Images whose class was right, or among the first five, of all that were seen."""

    correct1: int
    correct5: int
    num_images: int

    @property
    def acc1(self) -> float:
        """Percent."""
        return 100 * self.correct1 / self.num_images

    def facts(self) -> dict:
        """For the report."""
        return {"acc1": self.acc1, "acc5": 100 * self.correct5 / self.num_images, "correct": self.correct1, "num_images": self.num_images}


@torch.no_grad()
def count(
    net: nn.Module,
    loader: ValLoader,
    truth: np.ndarray,
    parts: EvalParts,
    *,
    kept: list[int] | None = None,
    perturb: Perturb | None = None,
    progress: Callable[[int], None] = lambda num_images: None,
) -> Counts:
    """What a network recognises of images whose targets are their places in `truth` (N, K), the right classes of each (see `TestSet`).

    Every process counts its own images, in whole numbers, and the sums are added. `progress` hears how many each batch had.
    InputError where what the network says is not finite."""
    compiled = parts.compiler(net).eval()
    device = next(net.parameters()).device
    answers = torch.from_numpy(truth if kept is None else _places_among(kept, truth)).to(device)
    sums = torch.zeros(4, dtype=torch.int64, device=device)
    for images, places in loader:
        images = images.to(device, memory_format=parts.memory_format, non_blocking=True)
        right = answers[places.to(device)]
        if perturb is not None:
            images = perturb(images, right[:, 0], places).contiguous(memory_format=parts.memory_format)
        with parts.autocast(device):
            logits = compiled(images)
        logits = logits if kept is None else logits[:, kept]
        num_nonfinite = (~logits.isfinite()).sum()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (best.unsqueeze(2) == right.unsqueeze(1)).any(dim=2)
        sums += torch.stack([hits[:, 0].sum(), hits.sum(dim=1).clamp(max=1).sum(), hits.new_full((), len(places), dtype=torch.int64), num_nonfinite])
        progress(len(places))
    *counts, num_nonfinite = all_sum(sums.to(parts.rank.device)).tolist()
    if num_nonfinite:
        engine.refuse_nonfinite("the images")
    return Counts(*counts)


def _places_among(kept: list[int], truth: np.ndarray) -> np.ndarray:
    """The class numbers in `truth` as places in `kept`, where each is."""
    return np.searchsorted(np.array(kept), truth)


def said_as(progress: Progress, parts: EvalParts, remark: str = "") -> Callable[[int], None]:
    """What hands the images of this process's batches to `progress`, which counts those of all."""
    return lambda num_images: progress.add(num_images * parts.rank.world_size, remark)


class Report:
    """The results so far, in the file that --report names: all of them as JSON or as a page, by its ending, written anew after each, so that a
    stopped evaluation leaves what it has measured; with any other ending the table of the validation images' classes."""

    def __init__(self, cfg: Config, classes: list[str], parts: EvalParts, weights: str | None):
        self.cfg, self.classes, self.rank = cfg, classes, parts.rank
        self.path = Path(cfg.report) if cfg.report else None
        self.ending = self.path.suffix.lower() if self.path else ""
        self.sections, self.num_skipped = None, 0  # of a page: what is to say of the validation images
        self.document = {
            "model": cfg.model,
            "weights": weights or "pretrained",
            "use_ema": cfg.use_ema,
            "tta": cfg.tta,
            "num_classes": len(classes),
            "input_size": cfg.input_size,
            "crop_pct": augment.crop_pct(cfg),
            "crop_mode": cfg.crop_mode,
            "interpolation": cfg.interpolation,
            "accuracies": {},
        }

    def add(self, name: str, facts: dict) -> None:
        """Note a set's accuracy."""
        self.document["accuracies"][name] = facts
        self.write()

    def add_outcomes(self, outcomes: Outcomes, loader: ValLoader) -> None:
        """Note what was said of each of the validation images, which are the loader's; say how well calibrated that is."""
        calibration = calibrate(outcomes)
        self.document["calibration"] = calibration.facts()
        self.num_skipped = loader.damage.num_skipped
        log.info("calibration: ECE %.2f %%  mean confidence %.2f %%", 100 * calibration.ece, 100 * calibration.confidence)
        if not self.rank.is_main:
            return
        if self.ending == ".html":
            self.sections = evaluation_sections(outcomes, readable_classes(self.classes), viewer(loader))
        elif self.ending != ".json":
            write_classes(self.path, outcomes, self.classes)

    def check_writable(self) -> None:
        """InputError where the file cannot be written."""
        if self.rank.is_main and self.path is not None:
            check_writable(self.path, flag="--report")

    def write(self) -> None:
        """Bring the file up to date, where all results are to be in it."""
        if not self.rank.is_main:
            return
        if self.ending == ".json":
            self._write_whole(json.dumps(self.document, indent=2, allow_nan=False) + "\n")
        elif self.ending == ".html" and self.sections is not None:
            self._write_whole(evaluation_page(self.document, self.sections, num_skipped=self.num_skipped))

    def _write_whole(self, text: str) -> None:
        with writing(f"--report {self.path}", "name another file"):
            write_whole(self.path, text)


def evaluate_validation(net: nn.Module, loader: ValLoader, parts: EvalParts, report: Report) -> None:
    """Evaluate on the validation images, print the line of their accuracies, and report what else is asked for."""
    if report.path is None:
        result = engine.report(net, loader, parts)
    else:
        recorder = Recorder(loader)
        result = engine.report(net, recorder, parts, recorder.note)
        report.add_outcomes(recorder.outcomes(parts.rank), loader)
    report.add("clean", {name: round(value, 4) if name == "loss" else value for name, value in result.items()})


def evaluate_suite(cfg: Config, suite: Suite, net: nn.Module, parts: EvalParts, *, folder: Path | None, weights: str | None) -> dict[str, dict]:
    """Try the fused network on all of the suite and print a line per result; write --report. `folder` gets lists of damaged images.

    Accuracies and what belongs to them, of the validation images (`clean`) and each set by its name."""
    report = Report(cfg, suite.classes, parts, weights)
    report.check_writable()  # now, and not after an hour
    if suite.clean is not None:
        loader = datasets.build_val_loader(cfg, suite.clean, parts.rank, folder)
        engine.prepare_evaluation(parts, net, shape=loader.shape(cfg.input_size))
        evaluate_validation(net, loader, parts, report)
    for one in suite.sets:
        counts = _count_set(cfg, one, net, parts, folder)
        _say(one.name, counts)
        report.add(one.name, {**counts.facts(), "path": one.path, "num_classes": one.num_classes})
    for name, perturb in _attacks(cfg, net).items():
        counts = _count_set(cfg, _as_set(name, suite.clean, cfg), net, parts, folder, perturb=perturb)
        _say(name, counts)
        report.add(name, {**counts.facts(), "epsilon": attacks.EPSILON})
    if suite.corrupted is not None:
        _evaluate_corrupted(cfg, suite, net, parts, report, folder)
    return report.document["accuracies"]


def say_sizes(cfgs: list[Config], accuracies: list[dict[str, dict]]) -> None:
    """A table: a row per size, with how images were resized and cropped, and what `evaluate_suite` found at it."""
    names = list(accuracies[0])
    headings = ["size", "resized", "crop-pct", *(heading for name in names for heading in _headings(name))]
    rows = []
    for cfg, found in zip(cfgs, accuracies, strict=True):
        crop = augment.crop_pct(cfg)
        figures = [f"{found[name][key]:.{digits}f}" for name in names for key, digits in _headings(name).values()]
        rows.append([str(cfg.input_size), str(augment.resized_side(cfg.input_size, crop)), f"{crop:g}", *figures])
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    for row in (headings, *rows):
        log.info("%s", "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def _headings(name: str) -> dict[str, tuple[str, int]]:
    """Columns for a set: from the heading to the key of the figure, and its digits."""
    if name == "clean":
        return {"acc1": ("acc1", 3), "acc5": ("acc5", 3), "loss": ("loss", 4)}
    return {f"{name} acc1": ("acc1", 1)}


def _say(name: str, counts: Counts) -> None:
    log.info("Accuracy on the %s: %.1f%%  (%d of %d images)", name, counts.acc1, counts.correct1, counts.num_images)


def _attacks(cfg: Config, net: nn.Module) -> dict[str, Perturb]:
    """The attacks that are asked for, by name. On the network as it is, not as compiled: for that there are no gradients."""
    values = augment.statistics(cfg)
    found = {"FGSM images": lambda images, targets, _: attacks.fgsm(net, images, targets, values=values)} if cfg.fgsm_test else {}
    return found | ({"PGD images": functools.partial(attacks.pgd, net, seed=cfg.seed, values=values)} if cfg.pgd_test else {})


def _as_set(name: str, images: Images, cfg: Config) -> TestSet:
    return TestSet(name, cfg.data_path or cfg.data_set, sets.by_place(images), sets.single_truth(images), None, len(images.classes))


def _count_set(cfg: Config, one: TestSet, net: nn.Module, parts: EvalParts, folder: Path | None, *, perturb: Perturb | None = None) -> Counts:
    loader = datasets.build_val_loader(cfg, one.images, parts.rank, folder)
    progress = Progress(len(one.images), lambda line: log.info("%s: %s", one.name, line))
    return count(net, loader, one.truth, parts, kept=one.kept, perturb=perturb, progress=said_as(progress, parts))


# ---- corruptions


def _evaluate_corrupted(cfg: Config, suite: Suite, net: nn.Module, parts: EvalParts, report: Report, folder: Path | None) -> None:
    corrupted = suite.corrupted
    clean = report.document["accuracies"].get("clean", {}).get("acc1")
    if corrupted.relative_to == scores.CLEAN and not (clean is not None and clean < 100):
        log.warning("%s: there are no corruption errors, for the clean error is %s", corrupted.name, "not measured" if clean is None else "0")
    found = {"path": corrupted.path, "relative_to": corrupted.relative_to, "missing": corrupted.missing, "corruptions": {}, "mce": None}
    report.document[corrupted.name] = found
    counts = {}
    for name, severity, one in _count_folders(cfg, suite, net, parts, folder):
        counts.setdefault(name, {})[severity] = one
        if len(counts[name]) == len(corrupted.folders[name]):
            found["corruptions"][name] = _of_corruption(counts[name], scores.reference_errors(corrupted.relative_to, clean)[name])
            _say_corruption(corrupted, name, found["corruptions"][name])
            report.write()
    _say_unequal(corrupted, counts)
    found["mce"] = scores.mean_corruption_error({name: facts["ce"] for name, facts in found["corruptions"].items()})
    report.write()
    if found["mce"] is not None:
        log.info("mCE on the %s: %.1f%%%s", corrupted.name, found["mce"], _basis(corrupted))
    elif corrupted.missing:
        log.warning("no mCE on the %s, which lack %s", corrupted.name, sets.describe_missing(corrupted.missing))


def _count_folders(cfg: Config, suite: Suite, net: nn.Module, parts: EvalParts, folder: Path | None):
    """(corruption, severity, counts) of each folder in turn; says how far that is, as if all that are left were as large as the present one."""
    corrupted = suite.corrupted
    places = [(name, severity) for name in CORRUPTIONS for severity in corrupted.folders.get(name, {})]
    progress = Progress(1, lambda line: log.info("%s: %s", corrupted.name, line))
    num_seen = 0
    for i, (name, severity) in enumerate(places):
        images = sets.open_severity(corrupted, name, severity, suite.classes)
        images = images.turned() if cfg.exif_transpose else images
        if i == 0:
            _say_enlarged(corrupted, images, cfg.input_size)
        progress.num_done, progress.total = num_seen, num_seen + len(images) * (len(places) - i)
        crop = augment.crop_transform(cfg.input_size, cfg.loader, augment.statistics(cfg))
        loader = datasets.build_val_loader(cfg, sets.by_place(images), parts.rank, folder, transform=crop)
        loader = dataclasses.replace(loader, says_fallbacks=i == 0)  # for these are the same images, 75 times
        said = said_as(progress, parts, f"{name} {severity}, folder {i + 1} of {len(places)}")
        yield name, severity, count(net, loader, sets.single_truth(images), parts, progress=said)
        num_seen += len(images)


def _say_enlarged(corrupted: Corrupted, images: Images, input_size: int) -> None:
    side = min(images[0][0].size)
    if side < input_size:
        log.warning("%s: images have a side of %d pixels and are enlarged to --input-size %d", corrupted.name, side, input_size)


def _of_corruption(counts: dict[int, Counts], reference_error: float | None) -> dict:
    """What the report says of a corruption; accuracies and counts by severity, None for one that is missing."""
    acc1s = [counts[severity].acc1 if severity in counts else None for severity in SEVERITIES]
    return {
        "acc1": acc1s,
        "mean_acc1": scores.mean_acc1(acc1s),
        "ce": scores.corruption_error(acc1s, reference_error),
        "correct": [counts[severity].correct1 if severity in counts else None for severity in SEVERITIES],
        "num_images": [counts[severity].num_images if severity in counts else None for severity in SEVERITIES],
    }


def _say_corruption(corrupted: Corrupted, name: str, facts: dict) -> None:
    """One line; without a mean where a severity is missing, for the mean of the others would be that of easier or harder ones."""
    acc1s = " ".join("-" if acc1 is None else f"{acc1:.1f}" for acc1 in facts["acc1"])
    mean = "incomplete" if facts["mean_acc1"] is None else f"{facts['mean_acc1']:.1f}%"
    ce = "" if facts["ce"] is None else f"  CE {facts['ce']:.1f}%{_basis(corrupted)}"
    log.info("Accuracy on the %s, %s: %s  (severities 1 to 5: %s)%s", corrupted.name, name, mean, acc1s, ce)


def _basis(corrupted: Corrupted) -> str:
    return f" relative to {scores.CLEAN}" if corrupted.relative_to == scores.CLEAN else ""


def _say_unequal(corrupted: Corrupted, counts: dict[str, dict[int, Counts]]) -> None:
    """Warn where folders hold different numbers of images: all hold the same ones, corrupted, so that some are missing."""
    sizes = {f"{name} {severity}": one.num_images for name, found in counts.items() for severity, one in found.items()}
    most = max(sizes.values())
    fewer = [f"{name} ({size:,})" for name, size in sizes.items() if size < most]
    if fewer:
        log.warning("%s: of %s images at most, %d folders have fewer: %s", corrupted.name, f"{most:,}", len(fewer), ", ".join(fewer[:5]))
