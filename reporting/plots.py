"""Pictures of runs and models: training curves, and accuracy against cost. Files for print (.png, .svg, .pdf) and self-contained pages (.html).

Colours are Okabe and Ito's, which the colour-blind can tell apart; every curve also has its own dashes, so that it reads in grey.
matplotlib and plotly are imported where they draw: nothing else of the project needs them (`pip install -r requirements-plots.txt`).
"""

import csv
import html
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reporting.logs import Run
from run.errors import InputError

# Okabe and Ito's palette, darkest first; its yellow is left out, as it vanishes on white paper.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Five against seven colours: 35 curves pass before a pair comes again. (matplotlib's dashes in line widths, plotly's)
DASHES = (((), "solid"), ((5, 1.5), "dash"), ((1, 1.2), "dot"), ((6, 1.5, 1, 1.5), "dashdot"), ((10, 2), "12px,3px"))
MARKERS = (("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("D", "diamond"), ("v", "triangle-down"), ("P", "cross"))
PRINT_SUFFIXES = (".png", ".svg", ".pdf")
PAGE_SUFFIX = ".html"
RAW_ALPHA = 0.45
SETTLED_AFTER = 0.05  # part of a run whose falling loss would squeeze the rest of the axis; it leaves the frame instead
LOG_SCALE_FROM = 8  # an axis whose largest value is so many times the smallest is drawn logarithmically
SIDES = ((-1, 1), (1, -1), (1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))  # of a point: left (-1) or right (1), below or above
LABEL_COLUMNS = ("model", "run", "name", "variant")
FAMILY_COLUMNS = ("family", "series", "group")
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\s*([kKMGT](?![a-z]))?")
SCALES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Panel:
    """One set of axes: a quantity over epochs. `start` is the first epoch shown; `is_smoothed` where it is noisy enough to need it."""

    title: str
    key: str
    start: int = 0
    is_smoothed: bool = True


@dataclass(frozen=True)
class Model:
    """One point of a scatter plot."""

    label: str
    family: str
    x: float
    y: float


# --- training curves -------------------------------------------------------------------------------------------------------------------


def plot_curves(runs: list[Run], *, out: Path, smooth_epochs: int | None = None) -> None:
    """Draw accuracy, losses and learning rate of `runs`, in their order, into `out`; raw and as a centred mean of `smooth_epochs`.

    Without that number, over 3 % of the longest run and at least 3 epochs.

    Raises InputError for a missing package or nothing to draw."""
    rows = _panels(runs)
    if not rows:
        raise InputError("nothing to plot: the logs hold no finite value")
    draw = _curves_page if _is_page(out) else _curves_print
    draw(runs, rows, out=out, smooth_epochs=smooth_epochs or _window(max(len(run.records) for run in runs)))


def checked_path(name: str) -> Path:
    """Where to draw. Raises InputError for a suffix that is no picture's and for a folder that is not there."""
    out = Path(name).expanduser()
    if out.suffix.lower() not in (*PRINT_SUFFIXES, PAGE_SUFFIX):
        raise InputError(f"--plot {name}: no picture has the suffix '{out.suffix}'; use {', '.join(PRINT_SUFFIXES)} or {PAGE_SUFFIX}")
    if not out.parent.is_dir():
        raise InputError(f"--plot {name}: there is no folder {out.parent}; create it first")
    return out


def _is_page(out: Path) -> bool:
    return out.suffix.lower() == PAGE_SUFFIX


def _window(num_epochs: int) -> int:
    """Epochs to smooth over in a run of `num_epochs`: 9 of 300; odd, so that as many lie on either side."""
    return max(round(0.03 * num_epochs) // 2 * 2 + 1, 3)


def _panels(runs: list[Run]) -> list[list[Panel]]:
    """Rows of axes for what the logs hold: accuracies above, losses and learning rate below."""
    last = max(run.last_epoch for run in runs)
    first = min(run.records[0]["epoch"] for run in runs)
    late = first + 2 * (last - first) // 3
    accuracies = [
        Panel("Top-1 accuracy, %", "test_acc1"),
        Panel("Top-1 accuracy, %, last third", "test_acc1", start=late),
        Panel("Top-1 accuracy of the EMA, %", "test_ema_acc1"),
    ]
    others = [Panel("Training loss", "train_loss"), Panel("Test loss", "test_loss"), Panel("Learning rate", "train_lr", is_smoothed=False)]
    rows = [[panel for panel in row if any(_visible(run, panel) for run in runs)] for row in (accuracies, others)]
    return [row for row in rows if row]


def _visible(run: Run, panel: Panel) -> Points:
    return [point for point in run.series(panel.key) if point[0] >= panel.start]


def smooth(points: Points, num_epochs: int) -> Points:
    """Mean of up to `num_epochs` values around each point. The window shrinks towards both ends evenly, so that it never leans to one side."""
    values = [value for _, value in points]
    half = num_epochs // 2
    smoothed = []
    for index, (epoch, _) in enumerate(points):
        reach = min(half, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        smoothed.append((epoch, sum(window) / len(window)))
    return smoothed


def _lines(run: Run, panel: Panel, smooth_epochs: int) -> tuple[Points, Points]:
    """Raw and smoothed points of a panel; smoothed over the whole run, so that a window does not change where a panel starts."""
    raw = run.series(panel.key)
    smoothed = smooth(raw, smooth_epochs) if panel.is_smoothed else raw
    return [point for point in raw if point[0] >= panel.start], [point for point in smoothed if point[0] >= panel.start]


def _limits(runs: list[Run], panel: Panel) -> tuple[float, float]:
    """Lowest and highest value to show, with a margin; of losses, that of the first epochs does not count."""
    points = [point for run in runs for point in _visible(run, panel)]
    first, last = min(epoch for epoch, _ in points), max(epoch for epoch, _ in points)
    settled = first + SETTLED_AFTER * (last - first) if "loss" in panel.key else first
    values = [value for epoch, value in points if epoch >= settled]
    margin = 0.04 * (max(values) - min(values)) or 0.04 * abs(values[0]) or 1.0
    return min(values) - margin, max(values) + margin


def _legend_text(run: Run) -> str:
    _, best = run.best("test_acc1")
    return run.label if best is None else f"{run.label} ({best:.2f})"


def _caption(smooth_epochs: int) -> str:
    smoothing = f"thin: each epoch; thick: mean of {smooth_epochs // 2 * 2 + 1} epochs around" if smooth_epochs > 1 else "each epoch as it is"
    return f"{smoothing}; in brackets: best top-1 accuracy, %; the falling loss of the first epochs leaves the frame"


def _curves_print(runs: list[Run], rows: list[list[Panel]], *, out: Path, smooth_epochs: int) -> None:
    figure_type, _ = _matplotlib()
    type_size = 8 if len(runs) <= 12 else 7
    letters = max(len(_legend_text(run)) for run in runs) + 10
    columns = min(max(1250 // type_size // letters, 1), 4, len(runs))  # a line of type of this size holds some 1250 / size letters
    figure = figure_type(figsize=(11, 3.1 * len(rows) + 0.19 * math.ceil(len(runs) / columns) + 0.5), layout="constrained")
    grid = figure.add_gridspec(len(rows), math.lcm(*map(len, rows)))
    handles: dict[int, object] = {}
    for row_index, row in enumerate(rows):
        span = grid.ncols // len(row)
        for index, panel in enumerate(row):
            axes = figure.add_subplot(grid[row_index, index * span : (index + 1) * span])
            _dress(axes, title=panel.title, x_name="epoch")
            for position, run in enumerate(runs):
                if _visible(run, panel):
                    handles[position] = _draw_run(axes, run, panel, position=position, smooth_epochs=smooth_epochs)
            axes.set_ylim(_limits(runs, panel))
    labels = [_plain_text(_legend_text(runs[position])) for position in handles]
    figure.legend(
        handles.values(),
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize=type_size,
        frameon=False,
        handlelength=4,
        title=_caption(smooth_epochs),
        title_fontsize=8,
    )
    _save(figure, out)


def _draw_run(axes, run: Run, panel: Panel, *, position: int, smooth_epochs: int):
    """Draw one run's raw and smoothed line; returns the smoothed one, for the legend."""
    raw, smoothed = _lines(run, panel, smooth_epochs)
    color, (dashes, _), (marker, _) = _style(position)
    if panel.is_smoothed and smooth_epochs > 1:
        axes.plot(*zip(*raw, strict=True), color=color, alpha=RAW_ALPHA, linewidth=0.7)
    spacing = max(len(smoothed) // 6, 1)
    markers = {"marker": marker, "markersize": 4, "markevery": (position * spacing // 7 % spacing, spacing)}
    (line,) = axes.plot(*zip(*smoothed, strict=True), color=color, dashes=dashes or (None, None), linewidth=1.4, **markers)
    return line


def _style(position: int) -> tuple[str, tuple, tuple]:
    return COLORS[position % len(COLORS)], DASHES[position % len(DASHES)], MARKERS[position % len(MARKERS)]


def _dress(axes, *, title: str, x_name: str) -> None:
    """Light grid, no box, small type: the curves are what is seen."""
    axes.set_title(_plain_text(title), fontsize=10, loc="left")
    axes.set_xlabel(_plain_text(x_name), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#DDDDDD", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter("{x:g}")


def _plain_text(text: str) -> str:
    """Text that matplotlib shows as it is: `$` would start a formula, and a legend leaves out what starts with `_`."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _save(figure, out: Path) -> None:
    """Write by suffix, the same bytes each time: no date, and names of SVG parts that do not change."""
    import matplotlib

    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(out.suffix.lower())
    with matplotlib.rc_context({"svg.hashsalt": "understudy"}):
        figure.savefig(out, dpi=160, metadata=metadata, facecolor="white")


def _matplotlib():
    """matplotlib's figure type and its ticker module; without pyplot, which would look for a screen. Raises InputError without the package."""
    try:
        from matplotlib import ticker
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need matplotlib: pip install -r requirements-plots.txt, or write an .html page with plotly") from error
    return Figure, ticker


def _plotly():
    """plotly's graph objects and its `make_subplots`. Raises InputError without the package."""
    try:
        from plotly import graph_objects
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise InputError("an .html page needs plotly: pip install -r requirements-plots.txt, or write a .png or .svg with matplotlib") from error
    return graph_objects, make_subplots


def _curves_page(runs: list[Run], rows: list[list[Panel]], *, out: Path, smooth_epochs: int) -> None:
    graph_objects, make_subplots = _plotly()
    num_columns = math.lcm(*map(len, rows))
    specs = [[{"colspan": num_columns // len(row)} if column % (num_columns // len(row)) == 0 else None for column in range(num_columns)] for row in rows]
    titles = [panel.title for row in rows for panel in row]
    figure = make_subplots(rows=len(rows), cols=num_columns, specs=specs, subplot_titles=titles, horizontal_spacing=0.055, vertical_spacing=0.13)
    in_legend: set[int] = set()
    for row_index, row in enumerate(rows, 1):
        for index, panel in enumerate(row):
            for position, run in enumerate(runs):
                for trace in _page_traces(graph_objects, run, panel, position=position, smooth_epochs=smooth_epochs):
                    is_key = trace.meta == "thick" and position not in in_legend
                    in_legend |= {position} if is_key else set()
                    trace.showlegend = is_key
                    figure.add_trace(trace, row=row_index, col=1 + index * num_columns // len(row))
            figure.update_xaxes(title_text="epoch", row=row_index, col=1 + index * num_columns // len(row))
            figure.update_yaxes(range=_limits(runs, panel), row=row_index, col=1 + index * num_columns // len(row))
    letters = max(len(_legend_text(run)) for run in runs) + 8
    height = 340 * len(rows) + 90 + 26 * math.ceil(len(runs) * letters / 160)
    figure.update_layout(hovermode="closest", height=height, updatemenus=[_line_menu(figure)] if smooth_epochs > 1 else [])
    note = f"{_caption(smooth_epochs)}. Click a name to hide or show a run, double-click to see it alone; drag to zoom, double-click to return."
    _write_page(figure, out=out, title="Training curves", note=note)


def _page_traces(graph_objects, run: Run, panel: Panel, *, position: int, smooth_epochs: int) -> list:
    """The thin raw line and the thick smoothed one, one legend entry for both; hovering shows the raw value on either."""
    raw, smoothed = _lines(run, panel, smooth_epochs)
    if not raw:
        return []
    color, (_, dash), _ = _style(position)
    name = html.escape(_legend_text(run))
    number = "%{customdata:.3e}" if panel.key == "train_lr" else "%{customdata:.4f}" if "loss" in panel.key else "%{customdata:.3f}"
    hover = f"<b>{html.escape(run.label)}</b><br>epoch %{{x}}: {number}<extra></extra>"
    shared = {"name": name, "legendgroup": str(position), "mode": "lines", "customdata": [value for _, value in raw], "hovertemplate": hover}
    epochs, values = zip(*smoothed, strict=True)
    thick = graph_objects.Scatter(x=epochs, y=values, line={"color": color, "dash": dash, "width": 2}, meta="thick", **shared)
    if not panel.is_smoothed or smooth_epochs <= 1:
        return [thick]
    epochs, values = zip(*raw, strict=True)
    thin = graph_objects.Scatter(x=epochs, y=values, line={"color": color, "width": 1}, opacity=RAW_ALPHA + 0.1, meta="thin", **shared)
    return [thin, thick]


def _line_menu(figure) -> dict:
    """Buttons that fade the raw or the smoothed lines. Fading, as hiding would undo which runs the reader has switched off."""
    is_thin = [trace.meta == "thin" for trace in figure.data]
    has_thin = {(trace.legendgroup, trace.xaxis) for trace in figure.data if trace.meta == "thin"}
    alone = [(trace.legendgroup, trace.xaxis) not in has_thin for trace in figure.data]  # such a line is raw already
    both = [RAW_ALPHA + 0.1 if thin else 1.0 for thin in is_thin]
    raw = [1.0 if thin or single else 0.0 for thin, single in zip(is_thin, alone, strict=True)]
    smoothed = [0.0 if thin else 1.0 for thin in is_thin]
    buttons = [
        {"label": label, "method": "restyle", "args": [{"opacity": opacities}]} for label, opacities in (("both", both), ("smoothed", smoothed), ("raw", raw))
    ]
    return {"type": "buttons", "direction": "right", "buttons": buttons, "x": 0.0, "xanchor": "left", "y": 1.06, "yanchor": "bottom", "showactive": True}


def _write_page(figure, *, out: Path, title: str, note: str) -> None:
    """One file with plotly's script inside: opened without a network, it shows everything."""
    figure.update_layout(template="plotly_white", font={"family": "system-ui, sans-serif", "size": 12}, margin={"t": 80, "l": 50, "r": 20, "b": 40})
    figure.update_layout(legend={"groupclick": "togglegroup", "orientation": "h", "y": -0.1, "yanchor": "top"})
    body = figure.to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False, "responsive": True})
    style = "body{font-family:system-ui,sans-serif;margin:1rem 1.5rem;color:#222}h1{font-size:1.3rem;margin:0}p{margin:.3rem 0;color:#555}"
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    out.write_text(
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(note)}</p>\n{body}\n</body></html>\n',
        encoding="utf-8",
    )


# --- accuracy against cost -------------------------------------------------------------------------------------------------------------


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
