"""Accuracy against cost: the models of a CSV or Markdown table as points, labelled, by family."""

import csv
import html
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reporting.plots import LOG_SCALE_FROM, _dress, _is_page, _matplotlib, _plain_text, _plotly, _save, _style, _write_page
from run.errors import InputError

SIDES = ((-1, 1), (1, -1), (1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))  # of a point: left (-1) or right (1), below or above
LABEL_COLUMNS = ("model", "run", "name", "variant")
FAMILY_COLUMNS = ("family", "series", "group")
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\s*([kKMGT](?![a-z]))?")
SCALES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Model:
    """One point of a scatter plot."""

    label: str
    family: str
    x: float
    y: float


def plot_scatter(table: Path, x_name: str, y_name: str, *, out: Path) -> None:
    """Draw column `y_name` against `x_name` of a CSV or Markdown `table` into `out`, one line per family of models.

    The family is the column family, series or group, or else the name without its size. Of a cell such as `74.7 / 73.2` the first number counts.
    Raises InputError where the table has no such columns or no numbers in them."""
    models = read_models(table, x_name, y_name)
    draw = _scatter_page if _is_page(out) else _scatter_print
    draw(_families(models), x_name=x_name, y_name=y_name, out=out)


def read_models(table: Path, x_name: str, y_name: str) -> list[Model]:
    """Points of the first table in the file that has both columns; columns that stand twice, side by side, are read one after the other.

    Raises InputError where there are none."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--scatter {table}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}; name a CSV file or a text with a Markdown table"
        ) from error
    tables = _markdown_tables(text) or [list(csv.reader(text.splitlines()))]
    wanted = [x_name.casefold(), y_name.casefold()]
    headers = [[_bare(cell).casefold() for cell in rows[0]] for rows in tables if rows]
    for header, rows in zip(headers, tables, strict=False):
        if all(name in header for name in wanted):
            models = _models(header, rows[1:], x_name=wanted[0], y_name=wanted[1])
            if not models:
                raise InputError(f"--scatter {table}: no row has a number in both '{x_name}' and '{y_name}'")
            return models
    known = "; ".join(", ".join(filter(None, header)) for header in headers[:5])
    raise InputError(f"--scatter {table}: no table with columns '{x_name}' and '{y_name}'; there are: {known or 'none'}")


def _markdown_tables(text: str) -> list[list[list[str]]]:
    """Tables of a Markdown text, as rows of cells with the header first: a table is a rule of dashes under a line, and the lines after it."""
    lines = text.splitlines()
    tables = []
    for index, line in enumerate(lines[1:], 1):
        if "|" in line and "-" in line and not line.strip(" |:-") and "|" in lines[index - 1]:
            end = next((later for later in range(index + 1, len(lines)) if "|" not in lines[later]), len(lines))
            tables.append([_markdown_cells(row) for row in (lines[index - 1], *lines[index + 1 : end])])
    return tables


def _markdown_cells(line: str) -> list[str]:
    return [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))]


def _bare(cell: str) -> str:
    """A cell without Markdown's emphasis, code marks and links."""
    return re.sub(r"[*`]|<[^>]*>", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell)).strip()


def _models(header: list[str], rows: list[list[str]], *, x_name: str, y_name: str) -> list[Model]:
    def places(names: tuple[str, ...]) -> list[int]:
        return next(([place for place, cell in enumerate(header) if cell == name] for name in names if name in header), [])

    labels, families = places(LABEL_COLUMNS) or [0], places(FAMILY_COLUMNS)
    models = []
    for index, (x_place, y_place) in enumerate(zip(places((x_name,)), places((y_name,)), strict=False)):
        label_place, family_place = labels[min(index, len(labels) - 1)], families[min(index, len(families) - 1)] if families else None
        for row in rows:
            cells = [_bare(cell) for cell in row] + [""] * (len(header) - len(row))
            x, y = read_number(cells[x_place]), read_number(cells[y_place])
            if x is not None and y is not None:
                label = cells[label_place]
                models.append(Model(label, cells[family_place] if family_place is not None else family_of(label), x, y))
    return models


def read_number(cell: str) -> float | None:
    """First number of a cell, its k, M, G or T multiplied out: `2.5M` is 2500000; None without one."""
    match = NUMBER.search(cell)
    return float(re.match(r"[^kKMGT\s]+", match.group().replace(",", "")).group()) * SCALES[match.group(1) or ""] if match else None


def family_of(label: str) -> str:
    """The name without its size: `recnext_m` of recnext_m3, `repvit_m` of repvit_m0_9, `lsnet` of lsnet_t."""
    without_number = re.sub(r"[\s\d._/-]+$", "", label)
    if without_number != label:
        return without_number or label
    stem, separator, size = label.rpartition("_")
    return stem if separator and len(size) <= 2 else label


def _families(models: list[Model]) -> dict[str, list[Model]]:
    """Models by family in order of appearance, each from left to right."""
    families: dict[str, list[Model]] = {}
    for model in models:
        families.setdefault(model.family, []).append(model)
    return {family: sorted(members, key=lambda model: model.x) for family, members in families.items()}


def _is_wide(families: dict[str, list[Model]], value: Callable[[Model], float]) -> bool:
    values = [value(model) for members in families.values() for model in members]
    return min(values) > 0 and max(values) >= LOG_SCALE_FROM * min(values)


def _scatter_print(families: dict[str, list[Model]], *, x_name: str, y_name: str, out: Path) -> None:
    figure_type, ticker = _matplotlib()
    figure = figure_type(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    is_log = _is_wide(families, lambda model: model.x)
    _dress(axes, title=y_name, x_name=x_name + (" (logarithmic)" if is_log else ""))
    if is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    is_large = max(model.x for members in families.values() for model in members) >= 1e5
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep="") if is_large else ticker.FormatStrFormatter("%g"))
    for position, (family, members) in enumerate(families.items()):
        color, (dashes, _), (marker, _) = _style(position)
        xs, ys = [model.x for model in members], [model.y for model in members]
        axes.plot(xs, ys, color=color, dashes=dashes or (None, None), marker=marker, markersize=6, linewidth=1.2, label=_plain_text(family))
    axes.margins(x=0.1, y=0.08)
    if len(families) > 1:
        axes.legend(fontsize=8, frameon=False, handlelength=4)
    _label_points(figure, axes, families)
    _save(figure, out)


def _label_points(figure, axes, families: dict[str, list[Model]]) -> None:
    """Write each model's name beside its point, on the side where it covers least of the lines, points and names already there."""
    figure.draw_without_rendering()  # settles the layout, so that places on the page are known
    taken = [place for members in families.values() for place in _places_on_page(axes, members)]
    leader = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
    for position, members in enumerate(families.values()):
        for model in members:
            ink = _darker(_style(position)[0])
            note = axes.annotate(_plain_text(model.label), (model.x, model.y), xytext=(0, 0), textcoords="offset points", fontsize=7, color=ink)
            places = [(side, distance) for distance in (1, 2.5) for side in SIDES]
            best = min(places, key=lambda place: _num_covered(_box_at(note, *place), taken, axes.bbox))
            left, bottom, right, top = _box_at(note, *best)
            note.set_in_layout(False)
            if best[1] > 1:
                axes.annotate("", (model.x, model.y), xytext=note.get_position(), textcoords="offset points", arrowprops=leader)
            taken += [(left + step * (right - left) / 16, y) for step in range(17) for y in (bottom, (bottom + top) / 2, top) for _ in range(2)]


def _darker(color: str) -> str:
    """Two thirds as bright, as letters need more contrast than lines."""
    return "#" + "".join(f"{int(color[start : start + 2], 16) * 2 // 3:02X}" for start in (1, 3, 5))


def _places_on_page(axes, members: list[Model]) -> list[tuple[float, float]]:
    """Pixels on a family's line, forty per stretch, its points counted several times: to cover these is worse."""
    corners = [tuple(corner) for corner in axes.transData.transform([(model.x, model.y) for model in members])]
    stretches = [
        (x + (next_x - x) * step / 40, y + (next_y - y) * step / 40) for (x, y), (next_x, next_y) in itertools.pairwise(corners) for step in range(1, 40)
    ]
    return stretches + [(x + dx, y + dy) for x, y in corners for dx in (-4, 0, 4) for dy in (-4, 0, 4)]


def _box_at(note, side: tuple[int, int], distance: float) -> tuple[float, float, float, float]:
    """Move the label to a side of its point; its left, bottom, right and top in pixels, with some room."""
    across, up = side
    note.set_position((7 * across * distance, (7 if across == 0 else 4) * up * distance))
    note.set_ha(("right", "center", "left")[across + 1])
    note.set_va(("top", "center", "bottom")[up + 1])
    box = note.get_window_extent().padded(4)
    return box.x0, box.y0, box.x1, box.y1


def _num_covered(box: tuple[float, float, float, float], taken: list[tuple[float, float]], frame) -> int:
    """Taken pixels within the box; a box that leaves the frame counts as worse than any other."""
    left, bottom, right, top = box
    is_outside = left < frame.x0 or right > frame.x1 or bottom < frame.y0 or top > frame.y1
    return sum(left <= x <= right and bottom <= y <= top for x, y in taken) + (len(taken) + 1) * is_outside


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from below `low` to above `high`."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**power for power in powers for digit in (1, 2, 5) if low / 3 < digit * 10.0**power < high * 3]


def _short(value: float) -> str:
    """`500M` for 500000000; plain below a hundred thousand."""
    letter = next((letter for letter in ("T", "G", "M") if value >= SCALES[letter]), "k") if value >= 1e5 else ""
    return f"{value / SCALES[letter]:g}{letter}"


def _scatter_page(families: dict[str, list[Model]], *, x_name: str, y_name: str, out: Path) -> None:
    graph_objects, _ = _plotly()
    figure = graph_objects.Figure()
    for position, (family, members) in enumerate(families.items()):
        color, (_, dash), (_, marker) = _style(position)
        hover = f"<b>%{{text}}</b><br>{html.escape(x_name)}: %{{x:.4~s}}<br>{html.escape(y_name)}: %{{y:.4~s}}<extra></extra>"
        line, symbol = {"color": color, "dash": dash, "width": 1.5}, {"color": color, "symbol": marker, "size": 9}
        xs, ys, labels = [model.x for model in members], [model.y for model in members], [html.escape(model.label) for model in members]
        figure.add_trace(
            graph_objects.Scatter(x=xs, y=ys, text=labels, name=html.escape(family), mode="lines+markers", line=line, marker=symbol, hovertemplate=hover)
        )
    is_log = _is_wide(families, lambda model: model.x)
    figure.update_xaxes(title_text=html.escape(x_name) + (" (logarithmic)" if is_log else ""), type="log" if is_log else "linear", exponentformat="SI")
    if is_log:
        ticks = _round_numbers(
            min(model.x for members in families.values() for model in members), max(model.x for members in families.values() for model in members)
        )
        figure.update_xaxes(tickvals=ticks, ticktext=[_short(tick) for tick in ticks])
    figure.update_yaxes(title_text=html.escape(y_name))
    figure.update_layout(height=640)
    _write_page(figure, out=out, title=f"{y_name} against {x_name}", note="Hover over a point for its name; click a family to hide or show it.")
