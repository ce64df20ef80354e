"""The page of a set of runs: their best rows, the settings that differ, curves, rates and waits, what was resumed and left out, environments.

It knows of a run what its log says and what lies beside that: args.yaml, the lines that a resumed run set aside, lists of damaged images,
TensorBoard's files. Published logs have nothing beside them: their part of the page is shorter."""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from reporting import charts, logs, pages, plots
from reporting.charts import Line
from reporting.comparison import SUMMARY_COLUMNS, hours_left, sort_rows, summarise
from reporting.logs import GENERIC_STEMS, SET_ASIDE, Run
from reporting.pages import Cell, Markup, element, listed, number, section
from run import config
from run.errors import InputError
from run.settings import Settings

UNCOMPARED = ("output_dir", "overwrite", "resume")  # differ between any two runs
MAX_RAW = 8  # runs whose every epoch is drawn under the smoothed curves
NUM_LISTED = 20  # damaged images that are named
DIGITS = 2  # of accuracies
BAD_LISTS = {"bad_images_train.txt": "damaged training images", "bad_images_val.txt": "damaged validation images"}
Sections = list[tuple[str, Markup]]


@dataclass
class Beside:
    """What lies beside a run's log: its settings, lines about machine and versions, the times of its starts (seconds since 1970), the epochs
    whose lines were set aside, lists of damaged images by what they list; notes on what of that cannot be read."""

    settings: dict = field(default_factory=dict)
    environment: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    set_aside: list[int] = field(default_factory=list)
    damaged: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def task(self, tasks: Sequence[Settings]) -> Settings | None:
        """The settings of the command that args.yaml names; None where it names none of them."""
        return next((task for task in tasks if any(line.startswith((f"{task.prog} ", f"python {task.prog} ")) for line in self.environment)), None)


def read_beside(log: Path) -> Beside:
    """What lies beside a log that is the only one of its folder by name; beside others, nothing is taken for theirs."""
    beside = Beside()
    if log.stem not in GENERIC_STEMS:
        return beside
    text = _text(log.with_name("args.yaml"), beside)
    beside.environment = [line.removeprefix("# ").strip() for line in text.splitlines() if line.startswith("# ")]
    try:
        settings = yaml.safe_load(text)
        beside.settings = settings if isinstance(settings, dict) else {}
    except yaml.YAMLError as error:
        beside.notes.append(f"args.yaml is no YAML ({str(error).splitlines()[0]}): its settings are left out")
    beside.starts = sorted(
        int(match[1]) for path in log.parent.glob("events.out.tfevents.*") if (match := re.match(r"events\.out\.tfevents\.(\d+)", path.name))
    )
    beside.set_aside = [int(epoch) for epoch in re.findall(r'"epoch": (\d+)', _text(log.with_name(SET_ASIDE), beside))]
    for name, what in BAD_LISTS.items():
        if found := _text(log.with_name(name), beside).splitlines():
            beside.damaged[what] = found
    return beside


def _text(path: Path, beside: Beside) -> str:
    """What is in the file; nothing where there is none, or, with a note, where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        beside.notes.append(f"{path.name} cannot be read ({error.strerror})")
        return ""


def run_page(names: list[str], *, tasks: Sequence[Settings] = (config.SETTINGS,)) -> str:
    """The page of the runs behind files, folders and globs, the best first. `tasks`: the settings of the commands whose defaults are known.
    InputError where there is none."""
    runs, notes = logs.read_logs(names)
    if not runs:
        raise InputError("\n".join([*notes, f"nothing to report: no epoch in {', '.join(names)}"]))
    rows = sort_rows([{"label": run.label, "of": run} | summarise(run) for run in runs], "best")
    runs = [row["of"] for row in rows]
    besides = [read_beside(run.path) for run in runs]
    title = f"Run {runs[0].label}" if len(runs) == 1 else f"{len(runs)} runs"
    intro = [_course(runs[0], besides[0]) if len(runs) == 1 else "The run with the best accuracy comes first, in every table and legend."]
    sections = [_best(rows), *_settings(runs, besides, tasks), _curves(runs), *_rates(runs), _events(runs, besides, notes), *_environment(runs, besides)]
    return pages.page(title, intro, sections)


def _course(run: Run, beside: Beside) -> str:
    """How far one run is."""
    planned = config.epochs_of_run(beside.settings) or (logs.planned_epochs(run.path) if run.path.stem in GENERIC_STEMS else None)
    first, last = run.records[0]["epoch"], run.last_epoch
    if planned is None or last >= planned:  # a run that went on for longer keeps its first args.yaml
        return f"{len(run.records)} epochs, {first} to {last}."
    left = hours_left(run, planned - 1)
    state = "finished" if last >= planned - 1 else "unfinished" + (f", about {left:.1f} h left" if left else "")
    return f"{last + 1} of {planned} epochs: {state}."


# --- best rows and settings --------------------------------------------------------------------------------------------------------------


def _best(rows: list[dict]) -> tuple[str, Markup]:
    columns = [(heading, key, form) for heading, key, form in SUMMARY_COLUMNS if any(row.get(key) is not None for row in rows)]
    cells = [[_summary_cell(row.get(key), form) for _, key, form in columns] for row in rows]
    header = [heading for heading, *_ in columns]
    return section("Best rows", pages.table(header, cells, caption="Accuracies in percent; hours of training and evaluation", is_sortable=len(rows) > 1))


def _summary_cell(value: object, form: Callable[[object, int], str]) -> Cell:
    if value is None:
        return number(None)
    is_number = not isinstance(value, str)
    return Cell(form(value, DIGITS), float(value) if is_number else None, is_number)


def _said(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return {None: "none", True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)


def _settings(runs: Sequence[Run], besides: Sequence[Beside], tasks: Sequence[Settings]) -> Sections:
    """Of several runs the settings in which they differ; of one, those that are not the defaults; the others folded, and so is what one run
    has and another has not, as it is of another task or another version."""
    known = [(run, beside.settings) for run, beside in zip(runs, besides, strict=True) if beside.settings]
    if not known:
        return []
    labels, columns = [run.label for run, _ in known], [settings for _, settings in known]
    title, what = "Settings that differ", "in which the runs differ"
    if len(known) == 1:
        task = next(beside for beside in besides if beside.settings).task(tasks)
        if task is None:
            rows = [(name, _said(value)) for name, value in columns[0].items()]
            return [section("Settings", pages.table(("setting", "value"), rows, caption="All settings of the run"))]
        defaults = {name: one.default for name, one in task.fields.items()}
        labels, columns = ["default", *labels], [defaults, *columns]
        title, what = "Settings that are not the defaults", "that are not the defaults"
    names = [name for name in dict.fromkeys(name for settings in columns for name in settings) if name not in UNCOMPARED]
    values = {name: [_said(settings[name]) for settings in columns if name in settings] for name in names}
    differing = [name for name in names if len(set(values[name])) > 1]
    alike = [(name, values[name][0]) for name in names if len(values[name]) == len(columns) and name not in differing]
    partial = [name for name in names if len(values[name]) < len(columns) and name not in differing] if len(known) > 1 else []

    def compared(names: list[str], caption: str) -> Markup:
        rows = [(name, *(_said(settings[name]) if name in settings else "-" for settings in columns)) for name in names]
        return pages.table(("setting", *labels), rows, caption=caption)

    content = [compared(differing, f"Settings {what}") if differing else element("p", f"There are none {what}.")]
    if alike:
        content.append(pages.folded(f"{len(alike)} other settings", pages.table(("setting", "value"), alike, caption="The other settings")))
    if partial:
        content.append(pages.folded(f"{len(partial)} settings that only some of the runs have", compared(partial, "Settings that only some of the runs have")))
    return [section(title, *content)]


# --- curves ------------------------------------------------------------------------------------------------------------------------------


def _curves(runs: Sequence[Run]) -> tuple[str, Markup]:
    """Accuracies, losses and learning rate as `compare_logs.py --plot` draws them, rates and waits below."""
    window = plots._window(max(len(run.records) for run in runs))
    figures = []
    for panel in [panel for row in plots._panels(list(runs)) for panel in row]:
        lines = []
        for style, run in enumerate(runs):
            raw, smoothed = plots._lines(run, panel, window)
            if not raw:
                continue
            best = _best_of(raw, panel.key)
            lines.append(Line(f"{run.label}{best}", smoothed, style))
            if panel.is_smoothed and len(runs) <= MAX_RAW and len(raw) > 1:
                lines.append(Line(run.label, raw, style, is_faint=True))
        unit = "%" if "%" in panel.title else "loss" if "loss" in panel.title else ""
        figures.append(charts.curves(panel.title, lines, x_name="epoch", y_name=unit, limits=plots._limits(list(runs), panel)))
    for title, unit, points_of in (("Training images per second", "images/s", _speed), ("Time spent waiting for data, %", "%", _wait_share)):
        lines = [Line(run.label, points, style) for style, run in enumerate(runs) if (points := points_of(run))]
        if lines:
            top = max(value for line in lines for _, value in line.points)
            figures.append(charts.curves(title, lines, x_name="epoch", y_name=unit, limits=(0, 1.05 * top or 1.0)))
    note = (
        f"Thick: mean of {window} epochs around"
        + ("; thin: each epoch." if len(runs) <= MAX_RAW else ".")
        + (" The falling loss of the first epochs leaves the frame." if plots.fall_epochs(list(runs)) else "")
    )
    return section("Curves", charts.legend([run.label for run in runs]), element("div", *figures, class_="charts"), element("p", note, class_="soft"))


def _best_of(points: list[tuple[int, float]], key: str) -> str:
    """The best epoch of a curve, for who points at it; of a learning rate nothing."""
    if key == "train_lr":
        return ""
    epoch, value = (min if "loss" in key else max)(points, key=lambda point: point[1])
    return f", best {value:.4g} at epoch {epoch}"


def _speed(run: Run) -> list[tuple[int, float]]:
    return run.series("images_per_s")


def _wait_share(run: Run) -> list[tuple[int, float]]:
    """Percent of each epoch's training time."""
    duration_s = dict(run.series("epoch_s"))
    return [(epoch, 100 * seconds / duration_s[epoch]) for epoch, seconds in run.series("data_wait_s") if duration_s.get(epoch, 0) > 0]


# --- rates and waits ---------------------------------------------------------------------------------------------------------------------


def _rates(runs: Sequence[Run]) -> Sections:
    """A row for each run whose log tells of times."""
    rows = []
    for run in runs:
        speeds, durations_s, evaluations_s, waits = ([value for _, value in run.series(key)] for key in ("images_per_s", "epoch_s", "eval_s", "data_wait_s"))
        if not (speeds or durations_s):
            continue
        share = 100 * sum(waits) / sum(durations_s) if waits and sum(durations_s) > 0 else None
        shares = [value for _, value in _wait_share(run)]
        rows.append(
            (
                run.label,
                number(statistics.median(speeds) if speeds else None, ".0f"),
                Cell(f"{min(speeds):.0f} - {max(speeds):.0f}", min(speeds)) if speeds else number(None),
                number(statistics.median(durations_s) if durations_s else None, ".1f"),
                number(statistics.median(evaluations_s) if evaluations_s else None, ".1f"),
                number(share, ".1f"),
                number(max(shares, default=None), ".1f"),
            )
        )
    if not rows:
        return []
    header = ("run", "images/s", "lowest - highest", "epoch, s", "evaluation, s", "waited for data, %", "most in an epoch, %")
    return [
        section("Rates and waits", pages.table(header, rows, caption="Medians over epochs; waits are part of the training time", is_sortable=len(rows) > 1))
    ]


# --- what was resumed and left out -------------------------------------------------------------------------------------------------------


def _events(runs: Sequence[Run], besides: Sequence[Beside], notes: list[str]) -> tuple[str, Markup]:
    parts = []
    for run, beside in zip(runs, besides, strict=True):
        said = [*_resumed(beside), *_skipped(run), *beside.notes]
        lists = [_damaged(what, found) for what, found in beside.damaged.items()]
        if said or lists:
            parts += [element("h3", run.label), listed(said) if said else "", *lists]
    if notes:
        parts += [element("h3", "Left out of the logs, or put right"), listed(notes)]
    return section("Resumed and left out", *(parts or [element("p", "The logs tell of nothing that was resumed, skipped or left out.")]))


def _resumed(beside: Beside) -> list[str]:
    said = []
    if len(beside.starts) > 1:
        when = ", ".join(time.strftime("%Y-%m-%d %H:%M", time.gmtime(start)) for start in beside.starts[:10])
        said.append(f"started {len(beside.starts)} times: {when}{', ...' if len(beside.starts) > 10 else ''} (UTC)")
    if beside.set_aside:
        said.append(f"{len(beside.set_aside)} lines of the log were set aside, as {logs._ranges(set(beside.set_aside))} were trained again")
    return said


def _skipped(run: Run) -> list[str]:
    """Steps and images that were left out, by epoch."""
    kinds = {
        "skipped_steps": "steps were left out, as their loss or gradients were not finite",
        "bad_images": "times another image stood in for a damaged one in training",
        "test_bad_images": "times a damaged image was left out of an evaluation",
    }
    said = []
    for key, what in kinds.items():
        found = [(epoch, value) for epoch, value in run.series(key) if value > 0]
        if found:
            said.append(f"{sum(value for _, value in found):.0f} {what}, in {logs._ranges({epoch for epoch, _ in found})}")
    return said


def _damaged(what: str, found: list[str]) -> Markup:
    rest = [f"and {len(found) - NUM_LISTED} more"] if len(found) > NUM_LISTED else []
    return pages.folded(f"{len(found)} {what}", listed([*found[:NUM_LISTED], *rest]))


def _environment(runs: Sequence[Run], besides: Sequence[Beside]) -> Sections:
    """Commit, versions and machine; runs of the same one together."""
    found: dict[tuple[str, ...], list[str]] = {}
    for run, beside in zip(runs, besides, strict=True):
        lines = tuple(line for line in beside.environment if "--config <this file>" not in line)
        if lines:
            found.setdefault(lines, []).append(run.label)
    if not found:
        return []
    content = [part for lines, labels in found.items() for part in (element("h3", ", ".join(labels)), listed(lines))]
    return [section("Environment", *content)]
