"""Reading training logs: with console_logs.py, all that knows their formats.

A log is one JSON object per epoch (ours, and those the DeiT family publishes), timm's `summary.csv` or what a program printed. Logs of real jobs
are cut, resumed and concatenated: what is read is as much as can be trusted, and every line left out is accounted for in a note. Nothing here
imports torch, so that tables appear at once.
"""

import csv
import fnmatch
import glob
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from reporting import console_logs
from run.errors import InputError

Record = dict[str, float]  # one epoch, by our key names; `epoch` and `n_parameters` are whole, the others may be NaN or absent; accuracies in percent

SPELLINGS = {  # our key: what DeiT's descendants and timm call the same column
    "train_lr": ("train_lr", "lr"),
    "train_loss": ("train_loss",),
    "test_loss": ("test_loss", "eval_loss"),
    "test_acc1": ("test_acc1", "eval_top1", "eval_prec1"),
    "test_acc5": ("test_acc5", "eval_top5", "eval_prec5"),
    "epoch": ("epoch",),
    "n_parameters": ("n_parameters",),
    "test_ema_acc1": ("test_ema_acc1", "test_acc1_ema", "eval_ema_top1", "eval_top1_ema"),
    "images_per_s": ("images_per_s",),
    "epoch_s": ("epoch_s",),
    "eval_s": ("eval_s",),
    "data_wait_s": ("data_wait_s",),
    "skipped_steps": ("skipped_steps",),
    "bad_images": ("bad_images",),
    "test_bad_images": ("test_bad_images",),
}
# What decides which epoch is best, and its name: of classifiers, detectors and segmenters. A run has the first that its log has.
LEADING = {"test_acc1": "acc1", "bbox_mAP": "box AP", "segm_mAP": "mask AP", "mIoU": "mIoU"}
FRACTIONS = ("bbox_mAP", "bbox_mAP_50", "bbox_mAP_75", "segm_mAP", "segm_mAP_50", "segm_mAP_75", "mIoU", "mAcc", "aAcc")  # in logs; -1: nothing to measure
SPELLINGS |= {key: (key,) for key in FRACTIONS}
MEASURES = ("train_loss", "test_loss", *LEADING, "test_ema_acc1")  # an object without any of these is no epoch
GENERIC_STEMS = ("log", "log_rank0", "summary")  # every run's file has this name: the folder's says more
FOLDER_PATTERNS = ("*.txt", "*.log", "*.jsonl", "summary.csv")
SET_ASIDE = "log_dropped.txt"  # where our training keeps the lines that a resumed run repeats: no run of its own
STEPS = "train_log.txt"  # where detection and segmentation have a line every few steps: its evaluations are those of log.txt


@dataclass
class Run:
    """One training run: its epochs in order, each once. `part` counts from 1 where a file holds several runs."""

    path: Path
    records: list[Record]
    part: int | None = None
    label: str = ""

    def series(self, key: str) -> list[tuple[int, float]]:
        """(epoch, value) wherever `key` has a finite value."""
        return [(record["epoch"], record[key]) for record in self.records if math.isfinite(record.get(key, math.nan))]

    def best(self, key: str) -> tuple[int, float] | tuple[None, None]:
        """(epoch, value) of the largest value of `key`, the first of equals; (None, None) without any."""
        return max(self.series(key), key=lambda point: point[1], default=(None, None))

    def last(self, key: str) -> float | None:
        """Value of `key` at the last epoch; None where that is missing or not finite."""
        value = self.records[-1].get(key, math.nan)
        return value if math.isfinite(value) else None

    @property
    def measure(self) -> str:
        """Key of what decides which epoch is best."""
        return next((key for key in LEADING if any(key in record for record in self.records)), "test_acc1")

    @property
    def last_epoch(self) -> int:
        return self.records[-1]["epoch"]

    @property
    def epoch_durations_s(self) -> list[float]:
        """Seconds of training and evaluation of each epoch that says so."""
        evaluation_s = dict(self.series("eval_s"))
        return [seconds + evaluation_s.get(epoch, 0.0) for epoch, seconds in self.series("epoch_s")]


@dataclass
class Reading:
    """What a file yielded: its runs, and one sentence for each thing that was left out or put right."""

    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_logs(names: list[str]) -> list[tuple[Path, bool]]:
    """(file, whether it was named itself) for files, folders (searched at every depth) and globs, each file once.

    Raises InputError for a name that leads nowhere."""
    found: dict[Path, tuple[Path, bool]] = {}
    for name in names:
        path = Path(name).expanduser()
        paths = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        matches = [match for each in paths for match in ([(log, False) for log in _folder_logs(each)] if each.is_dir() else [(each, True)])]
        if not matches:
            problem = "no log in this folder" if paths else "no such file or folder"
            raise InputError(f"{name}: {problem}; name a log.txt, a summary.csv or a folder that holds some")
        for match, is_named in matches:
            found.setdefault(match.resolve(), (match, is_named))
    return list(found.values())


def _folder_logs(folder: Path) -> list[Path]:
    """Files in `folder` that may be logs, sorted; hidden folders (environments, version control) are not entered."""
    found = []
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(place, name) for name in names if name not in (SET_ASIDE, STEPS) and any(fnmatch.fnmatch(name, pattern) for pattern in FOLDER_PATTERNS)]
    return sorted(found)


def read_log(path: Path, *, is_named: bool = True) -> Reading:
    """Runs of one file, and notes on what was left out; without runs, a note says why.

    A file that was not named and holds neither a JSON object nor an evaluation is taken for another text and passed over in silence.
    Raises InputError if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a log.txt, a summary.csv or a folder that holds some") from error
    if b"\0" in content[:512].rstrip(b"\0"):
        return Reading(notes=["is no text"])
    text = content.decode("utf-8-sig", errors="replace").replace("\0", " ")  # some file systems pad with NUL when a machine goes down
    if not text.strip():
        return Reading(notes=["is empty: no epoch was written"])
    objects, notes = _csv_objects(text) if _is_csv(text) else _json_objects(text)
    if not any(map(_record, objects)) and console_logs.ACCURACY.search(text):
        objects, notes = console_logs.read_epochs(text)
    if not objects and not is_named and not text.lstrip().startswith("{"):
        return Reading()
    records = [record for record in map(_record, objects) if record]
    if not records:
        return Reading(notes=[f"holds no epoch: no whole JSON line or CSV row with {', '.join(MEASURES[:3])} or the like"])
    if len(records) < len(objects):
        notes.append(f"{_lines(len(objects) - len(records))} without loss and accuracy left out")
    notes += _number_epochs(records)
    runs = [Run(path, part) for part in _split(records, notes)]
    for index, run in enumerate(runs, 1):
        run.part = index if len(runs) > 1 else None
        notes += _oddities(run)
    return Reading(runs, notes)


def _is_csv(text: str) -> bool:
    columns = text.lstrip().partition("\n")[0].strip().split(",")
    return "epoch" in columns and len(columns) > 1


def _csv_objects(text: str) -> tuple[list[dict], list[str]]:
    """Rows by column name. A header may come again, with other columns where a run was resumed otherwise; rows of another length are left out, and noted."""
    rows = csv.reader(line for line in text.splitlines() if line.strip())
    objects: list[dict] = []
    header: list[str] = []
    num_headers = num_odd = 0
    try:
        for row in rows:
            if "epoch" in row:
                header = row
                num_headers += 1
            elif len(row) == len(header):
                objects.append(dict(zip(header, row, strict=True)))
            else:
                num_odd += 1
    except csv.Error:
        num_odd += 1
    notes = [f"{_lines(num_headers - 1)} left out: the header again, from a resumed run"] if num_headers > 1 else []
    if num_odd:
        notes.append(f"{_lines(num_odd)} left out: another number of columns than the header's (half-written?)")
    return objects, notes


def _json_objects(text: str) -> tuple[list[dict], list[str]]:
    """JSON objects wherever they stand, one per line or not, as jq sees them; what stands between is left out, and noted."""
    decoder = json.JSONDecoder()
    objects: list[dict] = []
    between: list[str] = []
    end = position = 0
    while (start := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, start)
        except ValueError:
            position = start + 1  # a whole object may follow a half-written one on the same line
            continue
        except RecursionError:  # brackets without end: no log has these, and to try each would take long
            position = text.find("\n", start) % (len(text) + 1)
            continue
        between += _pieces(text[end:start])
        objects.append(value)
        end = position
    tail = _pieces(text[end:])
    notes = [f"{_lines(len(between))} left out: not whole JSON objects"] if between else []
    if tail:
        is_cut = len(tail) == 1 and tail[0].startswith("{")
        notes.append("half-written last line left out" if is_cut else f"{_lines(len(tail))} at the end left out: not whole JSON objects")
    return objects, notes


def _pieces(gap: str) -> list[str]:
    """Lines of the text between objects that are more than the punctuation of a JSON list."""
    return [line.strip() for line in gap.splitlines() if line.strip(" \t\r,[]")]


def _record(values: dict) -> Record:
    """The epoch's numbers by our names; empty if there is no loss and no accuracy among them."""
    record = {}
    for key, spellings in SPELLINGS.items():
        number = next((number for spelling in spellings if spelling in values and (number := _number(values[spelling])) is not None), None)
        if number is not None:
            record[key] = (100 * number if number >= 0 else math.nan) if key in FRACTIONS else number
    for key in ("epoch", "n_parameters"):
        if math.isfinite(record.get(key, math.nan)):
            record[key] = int(record[key])
        else:
            record.pop(key, None)
    return record if any(key in record for key in MEASURES) else {}


def _number(value) -> float | None:
    """A number, from JSON or from text; None for anything else. A null is NaN: strict JSON has no other way to write it."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _number_epochs(records: list[Record]) -> list[str]:
    """Give epochs without a number the one after the previous, in place; a note if there were any."""
    num_missing = 0
    previous = -1
    for record in records:
        if "epoch" not in record:
            record["epoch"] = previous + 1
            num_missing += 1
        previous = record["epoch"]
    return [f"{_lines(num_missing)} without an epoch number: counted from the line before"] if num_missing else []


def _split(records: list[Record], notes: list[str]) -> list[list[Record]]:
    """The runs of a file, each with every epoch once and in order; adds to `notes` what that took.

    Networks of different size are different runs. Lines said twice are one. An epoch that comes again is a resumed job's: the later line counts."""
    distinct = list({tuple(sorted((key, str(value)) for key, value in record.items())): record for record in records}.values())
    if len(distinct) < len(records):
        notes.append(f"{_lines(len(records) - len(distinct))} left out that repeat another word for word")
    by_size: dict[int | None, list[Record]] = {}
    size = next((record["n_parameters"] for record in distinct if "n_parameters" in record), None)
    for record in distinct:
        size = record.get("n_parameters", size)
        by_size.setdefault(size, []).append(record)
    runs = [_last_occurrences(start, notes) for group in by_size.values() for start in _starts(group, notes)]
    if len(by_size) > 1:
        notes.append(f"holds runs of {len(by_size)} networks ({', '.join(f'{size:,}' for size in by_size)} parameters): one row each")
    elif len(runs) > 1:
        notes.append(f"holds {len(runs)} runs: the job was started afresh before the earlier one's last epoch was reached again; one row each")
    return runs


def _starts(records: list[Record], notes: list[str]) -> list[list[Record]]:
    """Split where the first epoch comes again: the job was started afresh. An earlier start that a later one overtakes is left out, and noted."""
    first = min(_epochs(records))
    starts: list[list[Record]] = [[]]
    for record in records:
        if record["epoch"] == first and first in _epochs(starts[-1]):
            starts.append([])
        starts[-1].append(record)
    kept = []
    for index, start in enumerate(starts):
        reach = max(_epochs(start))
        if any(max(_epochs(later)) >= reach for later in starts[index + 1 :]):
            notes.append(f"{_lines(len(start))} left out: an earlier start ({_ranges(_epochs(start))}{_best_text(start)}) that a later one overtook")
        else:
            kept.append(start)
    return kept


def _last_occurrences(records: list[Record], notes: list[str]) -> list[Record]:
    """Each epoch's last record, in order of epochs; notes say which came again, and whether the last line is not the last epoch."""
    latest = {record["epoch"]: record for record in records}
    superseded = [record for record in records if latest[record["epoch"]] is not record]
    kept = [latest[epoch] for epoch in sorted(latest)]
    if superseded:
        text = f"{_lines(len(superseded))} left out: {_ranges(_epochs(superseded))} came again, and the last of each counts"
        measure = _as_run(records).measure
        best, best_kept = (_as_run(group).best(measure)[1] for group in (superseded, kept))
        notes.append(text + (f" (theirs was the highest {measure}, {best:.3f})" if best is not None and best > (best_kept or -math.inf) else ""))
    if records[-1]["epoch"] != kept[-1]["epoch"]:
        notes.append(f"lines are out of order: the last one is of epoch {records[-1]['epoch']}, the highest is {kept[-1]['epoch']}")
    return kept


def _oddities(run: Run) -> list[str]:
    """Notes on epochs that are missing and on accuracies that are absent or not finite."""
    notes = []
    epochs = _epochs(run.records)
    missing = sorted(set(range(min(epochs), min(max(epochs), min(epochs) + 10**6))) - epochs)
    if missing:
        notes.append(f"{_ranges(set(missing))} missing")
    measure = run.measure
    num_finite = len(run.series(measure))
    num_given = sum(measure in record for record in run.records)
    if num_finite < num_given:
        notes.append(f"{measure} is not finite at {num_given - num_finite} of {len(run.records)} epochs, which count for no maximum")
    if num_given < len(run.records):
        notes.append(f"no {measure} at {len(run.records) - num_given} of {len(run.records)} epochs")
    return notes


def _epochs(records: list[Record]) -> set[int]:
    return {record["epoch"] for record in records}


def _best_text(records: list[Record]) -> str:
    measure = _as_run(records).measure
    _, best = _as_run(records).best(measure)
    return "" if best is None else f", best {measure} {best:.3f}"


def _as_run(records: list[Record]) -> Run:
    """Records of a file on their own, to ask them what a run is asked."""
    return Run(Path(), records)


def _lines(count: int) -> str:
    return f"{count} line{'s' if count != 1 else ''}"


def _ranges(epochs: set[int]) -> str:
    """`epochs 3-7, 9`; at most five ranges are spelt out."""
    ranges: list[list[int]] = []
    for epoch in sorted(epochs):
        if ranges and epoch == ranges[-1][1] + 1:
            ranges[-1][1] = epoch
        else:
            ranges.append([epoch, epoch])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return ("epoch " if len(epochs) == 1 else "epochs ") + ", ".join(texts[:5]) + (f" and {len(texts) - 5} more ranges" if len(texts) > 5 else "")


def label_runs(runs: list[Run]) -> None:
    """Give each run the shortest name that tells it from the others: the file's, after as many folders as that takes."""
    parts = [_name_parts(run.path) for run in runs]
    depth = [1] * len(runs)
    while True:
        labels = ["/".join(names[-count:]) + (f"#{run.part}" if run.part else "") for run, names, count in zip(runs, parts, depth, strict=True)]
        clashing = [index for index, label in enumerate(labels) if labels.count(label) > 1 and depth[index] < len(parts[index])]
        if not clashing:
            break
        for index in clashing:
            depth[index] += 1
    for run, label in zip(runs, labels, strict=True):
        run.label = label


def _name_parts(path: Path) -> list[str]:
    """Folders and stem; without the stem where every run has the same one."""
    path = path.resolve()
    folders = list(path.parent.parts[1:])
    return folders if path.stem in GENERIC_STEMS and folders else [*folders, path.stem]


def read_logs(names: list[str]) -> tuple[list[Run], list[str]]:
    """Runs behind files, folders and globs, labelled, and one `file: note` line for each thing left out. InputError for a name that leads nowhere."""
    runs: list[Run] = []
    notes: list[str] = []
    for path, is_named in find_logs(names):
        reading = read_log(path, is_named=is_named)
        runs += reading.runs
        notes += [f"{path}: {note}" for note in reading.notes]
    label_runs(runs)
    return runs, notes


def planned_epochs(path: Path) -> int | None:
    """Epochs the run behind a log was asked for, from the `args.yaml` beside it; None if there is none. A segmenter's are its stretches of iterations."""
    try:
        text = (path.parent / "args.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = {name: int(value) for name, value in re.findall(r"^\s*(epochs|iterations|eval_interval):\s*(\d+)\s*$", text, re.MULTILINE)}
    if "epochs" in found or not found.get("eval_interval"):
        return found.get("epochs")
    return found.get("iterations", 0) // found["eval_interval"]
