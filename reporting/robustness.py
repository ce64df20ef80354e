"""How networks fare on other images, side by side: what `main.py --eval --report FILE.json` wrote, in a table and a picture."""

import html
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from reporting.comparison import Column, Row, _accuracy, _plain, _signed, as_csv, as_json, as_markdown, as_table, to_cells
from reporting.plots import _dress, _is_page, _matplotlib, _plain_text, _plotly, _save, _style, _write_page
from run.errors import InputError

DIGITS = 1  # as published
PER_ROW = 5  # panels
SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Result:
    """A report: accuracies by set, and what was measured on corrupted images, or None."""

    label: str
    path: Path
    accuracies: dict[str, dict]
    corrupted_name: str | None
    corrupted: dict | None


def read_results(names: list[str]) -> list[Result]:
    """The reports in these files, each by the shortest part of its path that tells them apart. InputError where one is none."""
    paths = [Path(name).expanduser() for name in names]
    stems = [path.stem for path in paths]
    labels = stems if len(set(stems)) == len(stems) else [str(path.with_suffix("")) for path in paths]
    if len(set(labels)) < len(labels):
        raise InputError(f"--robustness names {next(str(path) for path in paths if paths.count(path) > 1)} twice: once will do")
    return [_read(path, label) for path, label in zip(paths, labels, strict=True)]


def _read(path: Path, label: str) -> Result:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        name, corrupted = next(((key, value) for key, value in document.items() if isinstance(value, dict) and "corruptions" in value), (None, None))
        accuracies = {key: {"acc1": float(facts["acc1"]), "num_images": facts["num_images"]} for key, facts in document["accuracies"].items()}
        for facts in corrupted["corruptions"].values() if corrupted else ():
            if len(facts["acc1"]) != len(SEVERITIES):
                raise ValueError("a corruption has not five severities")
    except OSError as error:
        raise InputError(f"--robustness {path} cannot be read ({error.strerror}): name a file that main.py --eval --report FILE.json wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--robustness {path} is no report of main.py --eval --report FILE.json ({error}): name one") from error
    return Result(label, path, accuracies, name, corrupted)


# --- the table -------------------------------------------------------------------------------------------------------------------------


def _ordered(lists: list[list[str]]) -> list[str]:
    """What is in any of the lists, once, in order of appearance."""
    return list(dict.fromkeys(name for names in lists for name in names))


def rows_of(results: list[Result]) -> list[Row]:
    """A row per set and corruption: its accuracy, and where it is a corruption its error, for each report; of two, how far the second is ahead."""
    rows = []
    for name in _ordered([list(result.accuracies) for result in results]):
        values = {f"{result.label} acc1": result.accuracies.get(name, {}).get("acc1") for result in results}
        rows.append({"set": name, **values, **{f"{result.label} CE": None for result in results}})
    for name in _ordered([list(result.corrupted["corruptions"]) for result in results if result.corrupted]):
        facts = {result.label: result.corrupted["corruptions"].get(name, {}) if result.corrupted else {} for result in results}
        values = {f"{label} acc1": one.get("mean_acc1") for label, one in facts.items()}
        rows.append({"set": name, **values, **{f"{label} CE": one.get("ce") for label, one in facts.items()}})
    if any(result.corrupted for result in results):
        mces = {f"{result.label} CE": result.corrupted["mce"] if result.corrupted else None for result in results}
        rows.append({"set": "mCE", **{f"{result.label} acc1": None for result in results}, **mces})
    if len(results) == 2:
        for row in rows:
            first, second = (row[f"{result.label} acc1"] for result in results)
            row["ahead"] = None if first is None or second is None else second - first
    return rows


def notes_of(results: list[Result]) -> list[str]:
    """What a reader of the table must know of it: what errors are relative to, and what is missing or differs."""
    notes = []
    for basis in _ordered([[result.corrupted["relative_to"]] for result in results if result.corrupted]):
        labels = [result.label for result in results if result.corrupted and result.corrupted["relative_to"] == basis]
        whose = "" if len(labels) == len(results) else f" of {', '.join(labels)}"
        notes.append(
            f"CE{whose}: mean error over the five severities, relative to {basis}, in percent; mCE: their mean. acc1 of corruptions: mean over the severities."
        )
    for result in results:
        if result.corrupted and result.corrupted["missing"]:
            lacking = "; ".join(f"{name} {' '.join(map(str, severities))}" for name, severities in result.corrupted["missing"].items())
            notes.append(f"{result.label} lacks severities of corruptions, and so has no mCE: {lacking}")
    for name in _ordered([list(result.accuracies) for result in results]):
        sizes = [result.accuracies[name]["num_images"] for result in results if name in result.accuracies]
        if len(set(sizes)) > 1:
            notes.append(f"{name}: measured on different numbers of images ({', '.join(map(str, sizes))})")
    return notes


def render(results: list[Result], *, layout: str, digits: int | None) -> str:
    """The table as `layout` (`table`, `csv`, `markdown`, `json`), with its notes where it is for people."""
    rows = rows_of(results)
    if layout in ("csv", "json"):
        return as_csv(rows) if layout == "csv" else as_json(rows)
    columns: list[Column] = [("set", "set", _plain)]
    columns += [(f"{result.label} acc1", f"{result.label} acc1", _accuracy) for result in results]
    columns += [("ahead", "ahead", _signed)]
    columns += [(f"{result.label} CE", f"{result.label} CE", _accuracy) for result in results]
    write = as_table if layout == "table" else as_markdown
    text = write(to_cells(rows, columns, DIGITS if digits is None else digits))
    notes = notes_of(results)
    return "\n\n".join([text, "\n".join(notes)]) if notes else text


def show(names: list[str], *, layout: str, digits: int | None) -> list[Result]:
    """Print the table of these reports, and return them. InputError where one is none, or they hold nothing."""
    results = read_results(names)
    if not any(result.accuracies or result.corrupted for result in results):
        raise InputError(f"nothing to compare: no accuracy in {', '.join(names)}")
    sys.stdout.write(render(results, layout=layout, digits=digits) + "\n")
    return results


# --- the picture -----------------------------------------------------------------------------------------------------------------------


def plot(results: list[Result], *, out: Path) -> None:
    """Draw accuracy against severity, a panel per corruption and a line per report, all to one scale; severity 0 is the clean images.
    Raises InputError for a missing package or where nothing was measured on corrupted images."""
    names = _ordered([list(result.corrupted["corruptions"]) for result in results if result.corrupted])
    if not names:
        raise InputError("nothing to plot: none of the reports has accuracies on corrupted images; measure them with main.py --eval --inc-path DIR")
    (_page if _is_page(out) else _print)(results, names, out=out)


def points(result: Result, corruption: str) -> list[tuple[int, float]]:
    """(severity, top-1 accuracy) of what was measured, in order; severity 0 is the clean images."""
    facts = (result.corrupted or {"corruptions": {}})["corruptions"].get(corruption)
    if facts is None:
        return []
    clean = [(0, result.accuracies["clean"]["acc1"])] if "clean" in result.accuracies else []
    return clean + [(severity, acc1) for severity, acc1 in zip(SEVERITIES, facts["acc1"], strict=True) if acc1 is not None]


def _legend(result: Result) -> str:
    mce = result.corrupted["mce"] if result.corrupted else None
    return result.label if mce is None else f"{result.label} (mCE {mce:.1f})"


def _print(results: list[Result], names: list[str], *, out: Path) -> None:
    figure_type, _ = _matplotlib()
    num_columns = min(PER_ROW, len(names))
    num_rows = math.ceil(len(names) / num_columns)
    figure = figure_type(figsize=(2.2 * num_columns + 0.4, 2.1 * num_rows + 0.6), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).flatten()
    handles = {}
    for axes, name in zip(panels, names, strict=False):
        _dress(axes, title=name.replace("_", " "), x_name="")
        for position, result in enumerate(results):
            if found := points(result, name):
                color, (dashes, _), (marker, _) = _style(position)
                (line,) = axes.plot(*zip(*found, strict=True), color=color, dashes=dashes or (None, None), marker=marker, markersize=4, linewidth=1.3)
                handles[position] = line
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("severity (0: clean)", fontsize=9)
    figure.supylabel("Top-1 accuracy, %", fontsize=9)
    labels = [_plain_text(_legend(results[position])) for position in handles]
    figure.legend(handles.values(), labels, loc="outside upper center", ncols=min(len(handles), 3), fontsize=9, frameon=False, handlelength=4)
    _save(figure, out)


def _page(results: list[Result], names: list[str], *, out: Path) -> None:
    graph_objects, make_subplots = _plotly()
    num_columns = min(PER_ROW, len(names))
    num_rows = math.ceil(len(names) / num_columns)
    titles = [name.replace("_", " ") for name in names]
    figure = make_subplots(rows=num_rows, cols=num_columns, subplot_titles=titles, shared_xaxes="all", shared_yaxes="all")
    in_legend: set[int] = set()
    for i, name in enumerate(names):
        for position, result in enumerate(results):
            if found := points(result, name):
                color, (_, dash), (_, symbol) = _style(position)
                xs, ys = zip(*found, strict=True)
                hover = f"<b>{html.escape(result.label)}</b><br>severity %{{x}}: %{{y:.2f}} %<extra></extra>"
                shared = {"name": html.escape(_legend(result)), "legendgroup": str(position), "showlegend": position not in in_legend, "hovertemplate": hover}
                line, marker = {"color": color, "dash": dash, "width": 2}, {"color": color, "symbol": symbol, "size": 7}
                in_legend.add(position)
                trace = graph_objects.Scatter(x=xs, y=ys, mode="lines+markers", line=line, marker=marker, **shared)
                figure.add_trace(trace, row=1 + i // num_columns, col=1 + i % num_columns)
    figure.update_layout(height=240 * num_rows + 120)
    note = "Top-1 accuracy, %, against severity (0: clean images). Click a name to hide or show a network."
    _write_page(figure, out=out, title="Accuracy on corrupted images", note=note)
