"""Runs side by side: tables, one run against another, progress of running jobs."""

import argparse
import csv
import io
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from reporting import logs
from reporting.logs import Run
from run.errors import InputError

Row = dict[str, object]

SORT_KEYS = {  # --sort: the row's key, and whether the largest comes first
    "best": ("best_acc1", True),
    "last": ("last_acc1", True),
    "ema": ("best_ema_acc1", True),
    "epochs": ("epochs", True),
    "speed": ("images_per_s", True),
    "params": ("n_parameters", False),
    "hours": ("hours", False),
    "run": ("label", False),
}
DIGITS = {"table": 2, "markdown": 1}  # one as in published tables and in printf "%.1f" of the log's maximum: rounding 73.647 to 73.65 first would end at 73.7
MEAN_EPOCHS = 5  # one epoch's accuracy is noisy while the learning rate is high
SPARKS = "▁▂▃▄▅▆▇█"


# --- the table -------------------------------------------------------------------------------------------------------------------------


def summarise(run: Run) -> Row:
    """A run in one row; accuracies in percent and unrounded, `images_per_s` the median over epochs, None for what the log does not say."""
    best_epoch, best_acc1 = run.best("test_acc1")
    best_ema_epoch, best_ema_acc1 = run.best("test_ema_acc1")
    speeds = [value for _, value in run.series("images_per_s")]
    durations_s = run.epoch_durations_s
    return {
        "run": run.path.stem,
        "path": str(run.path),
        "part": run.part,
        "best_acc1": best_acc1,
        "best_epoch": best_epoch,
        "last_acc1": run.last("test_acc1"),
        "last_epoch": run.last_epoch,
        "best_ema_acc1": best_ema_acc1,
        "best_ema_epoch": best_ema_epoch,
        "epochs": len(run.records),
        "n_parameters": next((record["n_parameters"] for record in run.records if "n_parameters" in record), None),
        "images_per_s": statistics.median(speeds) if speeds else None,
        "hours": sum(durations_s) / 3600 if durations_s else None,
    }


def sort_rows(rows: list[Row], by: str) -> list[Row]:
    """Rows in the order of `SORT_KEYS[by]`, those without a value last."""
    key, is_descending = SORT_KEYS[by]
    known = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key], reverse=is_descending)
    return known + [row for row in rows if row[key] is None]


def _accuracy(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}"


def _plain(value: object, _digits: int) -> str:
    return str(value)


def _millions(value: int, _digits: int) -> str:
    return f"{value / 1e6:.2f}M" if value >= 1e4 else str(value)


def _whole(value: float, _digits: int) -> str:
    return f"{value:.0f}"


def _hours(value: float, _digits: int) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.3f}"


Column = tuple[str, str, Callable[[object, int], str]]  # heading, the row's key, how to write it

SUMMARY_COLUMNS: list[Column] = [
    ("run", "label", _plain),
    ("best acc1", "best_acc1", _accuracy),
    ("at epoch", "best_epoch", _plain),
    ("last acc1", "last_acc1", _accuracy),
    ("best EMA acc1", "best_ema_acc1", _accuracy),
    ("at epoch", "best_ema_epoch", _plain),
    ("epochs", "epochs", _plain),
    ("params", "n_parameters", _millions),
    ("images/s", "images_per_s", _whole),
    ("hours", "hours", _hours),
]
AGAINST_COLUMNS: list[Column] = [
    ("run", "label", _plain),
    ("at epoch", "common_epoch", _plain),
    ("acc1", "common_acc1", _accuracy),
    ("reference", "reference_acc1", _accuracy),
    ("ahead", "ahead_acc1", _signed),
    (f"ahead, mean of {MEAN_EPOCHS}", "ahead_mean_acc1", _signed),
    ("learning rate", "lr_relation", _plain),
    ("expected best", "expected_best_acc1", _accuracy),
    ("by epoch", "expected_epoch", _plain),
    ("hours left", "hours_left", _hours),
]


def to_cells(rows: list[Row], columns: list[Column], digits: int) -> list[list[str]]:
    """Header and rows as text; a column that no row has a value for is left out, a missing value is a dash."""
    filled = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    lines = [[heading for heading, _, _ in filled]]
    lines += [["-" if row.get(key) is None else write(row[key], digits) for _, key, write in filled] for row in rows]
    return lines


def _is_left(heading: str) -> bool:
    return heading in ("run", "learning rate")


def as_table(cells: list[list[str]]) -> str:
    """Aligned columns for a terminal: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [text.ljust(width) if _is_left(heading) else text.rjust(width) for text, width, heading in zip(line, widths, cells[0], strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def as_markdown(cells: list[list[str]]) -> str:
    header, *lines = [[text.replace("|", "\\|") for text in line] for line in cells]
    rule = ["---" if _is_left(heading) else "---:" for heading in header]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def as_csv(rows: list[Row]) -> str:
    """The same values as JSON, unrounded, under the same names."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=[key for key in rows[0] if key != "label"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().rstrip("\n")


def as_json(rows: list[Row]) -> str:
    return json.dumps([{key: value for key, value in row.items() if key != "label"} for row in rows], indent=2, allow_nan=False)


def render(rows: list[Row], *, layout: str, digits: int | None, against: str) -> str:
    """The rows as `layout` (`table`, `csv`, `markdown`, `json`); `against` names the reference, empty without one."""
    if layout in ("csv", "json"):
        return as_csv(rows) if layout == "csv" else as_json(rows)
    write = as_table if layout == "table" else as_markdown
    digits = DIGITS[layout] if digits is None else digits
    text = write(to_cells(rows, SUMMARY_COLUMNS, digits))
    compared = [row for row in rows if row.get("common_epoch") is not None]
    if compared:
        text += f"\n\nAgainst {against}:\n\n" + write(to_cells(compared, AGAINST_COLUMNS, digits)) + f"\n\n{EXPECTATION}"
    return text


# --- against a reference ---------------------------------------------------------------------------------------------------------------

EXPECTATION = (
    f"Expected best: the error shrinks to the reference's end by the same ratio as the reference's did, from the mean of the last {MEAN_EPOCHS} epochs.\n"
    "Published 300-epoch runs held against one another: off by 0.5 points (median; nine in ten below 1.4) when cut after 100 epochs,\n"
    "by 0.5 (1.2) after 200; by 0.3 (1.0) where both end within 2 points. Runs whose learning rates differ are not comparable before the end."
)


def expected_best(acc1: float, reference_acc1: float, reference_best: float) -> float:
    """Best accuracy, in percent, if the error falls by the same ratio from here on as the reference's did; all at the same epoch.

    On published logs this was closer than adding the reference's remaining gain, which missed by a third to a half more."""
    if reference_acc1 >= 100:
        return acc1
    return 100 - (100 - acc1) * (100 - reference_best) / (100 - reference_acc1)


def compare_lr(run: Run, reference: Run) -> Row:
    """`lr_factor` (at the reference's peak over the common epochs), its smallest and largest value, and `lr_relation` in words; None without both columns."""
    of_reference = dict(reference.series("train_lr"))
    pairs = [(epoch, value, of_reference[epoch]) for epoch, value in run.series("train_lr") if of_reference.get(epoch, 0) > 0]
    if not pairs:
        return {"lr_factor": None, "lr_factor_min": None, "lr_factor_max": None, "lr_relation": None}
    ratios = [value / other for _, value, other in pairs]
    low, high = min(ratios), max(ratios)
    peak = max(range(len(pairs)), key=lambda index: pairs[index][2])
    if max(abs(low - 1), abs(high - 1)) < 1e-6:
        relation = "the same"
    elif high - low < 1e-3 * high:
        relation = f"x {ratios[peak]:.4g} at every epoch"
    else:
        start = next(epoch for (epoch, _, _), ratio in zip(pairs, ratios, strict=True) if abs(ratio - 1) >= 1e-6)
        relation = f"x {ratios[peak]:.4g} at the peak (x {low:.4g} to {high:.4g}, differing from epoch {start})"
    return {"lr_factor": ratios[peak], "lr_factor_min": low, "lr_factor_max": high, "lr_relation": relation}


def compare(run: Run, reference: Run) -> Row:
    """How far ahead of `reference` a run is at the last epoch both have, and where it will end; None where the logs do not say."""
    of_reference = dict(reference.series("test_acc1"))
    common = [(epoch, acc1, of_reference[epoch]) for epoch, acc1 in run.series("test_acc1") if epoch in of_reference]
    row: Row = dict.fromkeys(("common_epoch", "common_acc1", "reference_acc1", "ahead_acc1", "ahead_mean_acc1"))
    row |= compare_lr(run, reference)
    row |= dict.fromkeys(("expected_best_acc1", "expected_epoch", "hours_left"))
    if not common:
        return row
    epoch, acc1, reference_acc1 = common[-1]
    mean, reference_mean = (statistics.fmean(point[index] for point in common[-MEAN_EPOCHS:]) for index in (1, 2))
    row |= {"common_epoch": epoch, "common_acc1": acc1, "reference_acc1": reference_acc1}
    row |= {"ahead_acc1": acc1 - reference_acc1, "ahead_mean_acc1": mean - reference_mean}
    if run.last_epoch < reference.last_epoch:
        expected = expected_best(mean, reference_mean, reference.best("test_acc1")[1])
        row |= {"expected_best_acc1": max(expected, run.best("test_acc1")[1]), "expected_epoch": reference.last_epoch}
        row["hours_left"] = hours_left(run, reference.last_epoch)
    return row


def hours_left(run: Run, last_epoch: int) -> float | None:
    """Hours until `last_epoch` is done, at the run's median pace; None without times in the log."""
    durations_s = run.epoch_durations_s
    return statistics.median(durations_s) * max(last_epoch - run.last_epoch, 0) / 3600 if durations_s else None


def read_reference(name: str) -> tuple[Run, list[str]]:
    """The one run behind `--against`, and notes on its log. Raises InputError for none or several."""
    runs, notes = logs.read_logs([name])
    if len(runs) != 1:
        holds = "holds no run" if not runs else f"holds {len(runs)} runs ({', '.join(run.label for run in runs[:4])}{', ...' if len(runs) > 4 else ''})"
        raise InputError("\n".join([*notes, f"--against {name} {holds}: name one log"]))
    return runs[0], notes


# --- following a running job -----------------------------------------------------------------------------------------------------------


def newest_log(name: str) -> Path | None:
    """The file itself, or the log in a folder that was written to last; None if there is none yet."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    try:
        found = [log for log, _ in logs.find_logs([name]) if logs.read_log(log, is_named=False).runs]
    except InputError:
        return None
    return max(found, key=lambda log: log.stat().st_mtime, default=None)


def sparkline(values: list[float], width: int = 40) -> str:
    """The course of `values` in at most `width` characters, lowest to highest; the last value of each stretch is drawn."""
    count = min(width, len(values))
    picked = [values[(index + 1) * len(values) // count - 1] for index in range(count)]
    low, high = min(picked, default=0), max(picked, default=0)
    return "".join(SPARKS[int((value - low) / (high - low or 1) * (len(SPARKS) - 1))] for value in picked)


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def describe_progress(run: Run, *, last_epoch: int | None, reference: Run | None) -> tuple[str, str]:
    """Two phrases on a run's last epoch: how far it is and when it will end, and its measures."""
    record = run.records[-1]
    where = [run.label, f"epoch {record['epoch']}" + (f"/{last_epoch}" if last_epoch is not None else "")]
    left = None if last_epoch is None else hours_left(run, last_epoch)
    if left:
        end = run.path.stat().st_mtime + left * 3600
        where.append(f"{left:.1f} h left, until {time.strftime('%a %d %b %H:%M', time.localtime(end))}")
    elif last_epoch is not None and run.last_epoch >= last_epoch:
        where.append("finished")
    measures = [f"{name} {record[key]:{form}}" for name, key, form in PROGRESS if key in record]
    best_epoch, best_acc1 = run.best("test_acc1")
    measures += [f"best {best_acc1:.2f} at {best_epoch}"] if best_acc1 is not None else []
    if reference is not None:
        against = compare(run, reference)
        measures += [f"{against['ahead_acc1']:+.2f} against {reference.label}"] if against["ahead_acc1"] is not None else []
        measures += [f"expected best {against['expected_best_acc1']:.1f}"] if against["expected_best_acc1"] is not None else []
    return "  ".join(where), "  ".join(measures)


PROGRESS = (  # name, key of the record, format
    ("acc1", "test_acc1", ".2f"),
    ("ema", "test_ema_acc1", ".2f"),
    ("train loss", "train_loss", ".4f"),
    ("test loss", "test_loss", ".4f"),
    ("lr", "train_lr", ".2e"),
    ("img/s", "images_per_s", ".0f"),
)


class Follower:
    """Watches logs: one redrawn block per run on a terminal, else one line per new epoch."""

    def __init__(self, names: list[str], *, reference: Run | None, is_terminal: bool):
        self.names = names
        self.reference = reference
        self.is_terminal = is_terminal
        self.paths: dict[str, Path] = {}  # chosen once: of two jobs in one folder, the view must not jump to and fro
        self.printed: dict[str, int] = {}  # last epoch written out; -1 where only the waiting was
        self.num_drawn = 0

    def step(self) -> bool:
        """Read the logs again and show what is new; True when every run has reached its last epoch."""
        lines: list[str] = []
        num_finished = 0
        for name in self.names:
            path = self.paths.get(name) or newest_log(name)
            runs = logs.read_log(path).runs if path is not None and path.exists() else []
            if not runs:
                lines += self._waiting(name)
                continue
            self.paths[name] = path
            logs.label_runs(runs)
            last_epoch = self._last_epoch(path)
            lines += self._block(runs[-1], last_epoch) if self.is_terminal else self._new_lines(name, runs[-1], last_epoch)
            num_finished += last_epoch is not None and runs[-1].last_epoch >= last_epoch
        self._show(lines)
        return num_finished == len(self.names)

    def _last_epoch(self, path: Path) -> int | None:
        planned = logs.planned_epochs(path)
        if planned is not None:
            return planned - 1
        return self.reference.last_epoch if self.reference is not None else None

    def _waiting(self, name: str) -> list[str]:
        """On a terminal always, else the first time."""
        is_new = name not in self.printed
        self.printed.setdefault(name, -1)
        return [f"waiting for the first epoch in {name}"] if self.is_terminal or is_new else []

    def _block(self, run: Run, last_epoch: int | None) -> list[str]:
        """Progress, measures, and the courses of accuracy and loss so far."""
        where, measures = describe_progress(run, last_epoch=last_epoch, reference=self.reference)
        courses = [f"{name} {sparkline([value for _, value in run.series(key)])}" for name, key in (("acc1", "test_acc1"), ("train loss", "train_loss"))]
        return [f"{where}  (written {_ago(time.time() - run.path.stat().st_mtime)} ago)", f"  {measures}", "  " + "  ".join(courses)]

    def _new_lines(self, name: str, run: Run, last_epoch: int | None) -> list[str]:
        """The last epoch at first, then every epoch that was not yet written out."""
        known = self.printed.get(name, run.last_epoch - 1)
        self.printed[name] = run.last_epoch
        past = [Run(run.path, run.records[: index + 1], label=run.label) for index, record in enumerate(run.records) if record["epoch"] > known]
        return ["  ".join(describe_progress(state, last_epoch=last_epoch, reference=self.reference)) for state in past]

    def _show(self, lines: list[str]) -> None:
        """Over what was drawn before, on a terminal; lines that would wrap are cut, as the way back up counts them."""
        if self.is_terminal:
            width = shutil.get_terminal_size().columns
            back = f"\x1b[{self.num_drawn}F\x1b[J" if self.num_drawn else ""
            lines = [line[:width] for line in lines]
            lines[0] = back + lines[0]
            self.num_drawn = len(lines)
        for line in lines:
            print(line, flush=True)


def follow(names: list[str], *, reference: Run | None, interval_s: float) -> None:
    """Show the progress of running jobs until all are finished or Ctrl-C."""
    follower = Follower(names, reference=reference, is_terminal=sys.stdout.isatty())
    try:
        while not follower.step():
            time.sleep(interval_s)
    except KeyboardInterrupt:
        print("stopped following; the job goes on", file=sys.stderr)


# --- the command -----------------------------------------------------------------------------------------------------------------------


def show_tables(args: argparse.Namespace) -> list[Run]:
    """Print the table of `args.logs`; returns the runs in its order. Raises InputError if there are none."""
    runs, notes = logs.read_logs(args.logs)
    reference, reference_notes = read_reference(args.against) if args.against else (None, [])
    for note in dict.fromkeys(notes + reference_notes):
        print(note, file=sys.stderr)
    if not runs:
        raise InputError(f"nothing to compare: no epoch in {', '.join(args.logs)}")
    rows = [{"label": run.label, "index": index} | summarise(run) for index, run in enumerate(runs)]
    if reference is not None:
        for row, run in zip(rows, runs, strict=True):
            row |= compare(run, reference)
    rows = sort_rows(rows, args.sort)
    order = [row.pop("index") for row in rows]
    print(render(rows, layout=args.format, digits=args.digits, against=args.against or ""))
    return [runs[index] for index in order]
