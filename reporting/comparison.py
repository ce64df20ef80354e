"""Runs side by side: tables, one run against another, progress of running jobs."""

import argparse
import csv
import io
import json
import statistics
import sys
from collections.abc import Callable

from reporting import logs
from reporting.logs import Run
from run.errors import InputError

Row = dict[str, object]

SORT_KEYS = {  # --sort: keys of the row, the first that it has a value for deciding, and whether the largest comes first
    "best": (("best_acc1", "best_bbox_mAP", "best_segm_mAP", "best_mIoU"), True),
    "last": (("last_acc1", "last_bbox_mAP", "last_segm_mAP", "last_mIoU"), True),
    "ema": (("best_ema_acc1",), True),
    "epochs": (("epochs",), True),
    "speed": (("images_per_s",), True),
    "params": (("n_parameters",), False),
    "hours": (("hours",), False),
    "run": (("label",), False),
}
OTHER_MEASURES = [key for key in logs.LEADING if key != "test_acc1"]  # detectors' and segmenters'
DIGITS = {"table": 2, "markdown": 1}  # one as in published tables and in printf "%.1f" of the log's maximum: rounding 73.647 to 73.65 first would end at 73.7
MEAN_EPOCHS = 5  # one epoch's accuracy is noisy while the learning rate is high


# --- the table -------------------------------------------------------------------------------------------------------------------------


def summarise(run: Run) -> Row:
    """A run in one row; accuracies in percent and unrounded, `images_per_s` the median over epochs, None for what the log does not say.

    What detectors and segmenters alone have stands in their rows only."""
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
    } | _other_measures(run)


def _other_measures(run: Run) -> Row:
    """Best and last average precision and mean IoU, of a run that has them."""
    row: Row = {}
    for key in OTHER_MEASURES:
        epoch, best = run.best(key)
        if best is not None:
            row |= {f"best_{key}": best, f"best_{key}_epoch": epoch, f"last_{key}": run.last(key)}
    return row


def sort_rows(rows: list[Row], by: str) -> list[Row]:
    """Rows in the order of `SORT_KEYS[by]`, one key's after another's, those without a value last."""
    keys, is_descending = SORT_KEYS[by]
    deciding = [next((key for key in keys if row.get(key) is not None), None) for row in rows]
    ordered = []
    for key in keys:
        own = [row for row, one in zip(rows, deciding, strict=True) if one == key]
        ordered += sorted(own, key=lambda row, key=key: row[key], reverse=is_descending)
    return ordered + [row for row, one in zip(rows, deciding, strict=True) if one is None]


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
    *(
        column
        for key in OTHER_MEASURES
        for column in (
            (f"best {logs.LEADING[key]}", f"best_{key}", _accuracy),
            ("at epoch", f"best_{key}_epoch", _plain),
            (f"last {logs.LEADING[key]}", f"last_{key}", _accuracy),
        )
    ),
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
    return heading in ("run", "learning rate", "set")


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
    columns = dict.fromkeys(key for row in rows for key in row if key != "label")
    writer = csv.DictWriter(stream, fieldnames=columns, extrasaction="ignore", lineterminator="\n")
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
