"""Pictures of runs and models: training curves, and accuracy against cost. Files for print (.png, .svg, .pdf) and self-contained pages (.html).

Colours are Okabe and Ito's, which the colour-blind can tell apart; every curve also has its own dashes, so that it reads in grey.
matplotlib and plotly are imported where they draw: nothing else of the project needs them (`pip install -r requirements-plots.txt`).
"""

import html
import math
from dataclasses import dataclass
from pathlib import Path

from reporting.logs import LEADING, Run
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
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Panel:
    """One set of axes: a quantity over epochs. `start` is the first epoch shown; `is_smoothed` where it is noisy enough to need it."""

    title: str
    key: str
    start: int = 0
    is_smoothed: bool = True


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


def checked_path(name: str, *, flag: str = "--plot", endings: tuple[str, ...] = (*PRINT_SUFFIXES, PAGE_SUFFIX)) -> Path:
    """Where to draw. InputError for an ending that is none of the `endings` and for a folder that is not there."""
    out = Path(name).expanduser()
    if out.suffix.lower() not in endings:
        raise InputError(f"{flag} {name}: end the name in {', '.join(endings[:-1])}{' or ' if len(endings) > 1 else ''}{endings[-1]}")
    if not out.parent.is_dir():
        raise InputError(f"{flag} {name}: there is no folder {out.parent}; create it first")
    return out


def _is_page(out: Path) -> bool:
    return out.suffix.lower() == PAGE_SUFFIX


def _window(num_epochs: int) -> int:
    """Epochs to smooth over in a run of `num_epochs`: 9 of 300; odd, so that as many lie on either side."""
    return max(round(0.03 * num_epochs) // 2 * 2 + 1, 3)


def _panels(runs: list[Run]) -> list[list[Panel]]:
    """Rows of axes for what the logs hold: accuracies above, of detectors and segmenters below them, then losses and learning rate."""
    last = max(run.last_epoch for run in runs)
    first = min(run.records[0]["epoch"] for run in runs)
    late = first + 2 * (last - first) // 3
    accuracies = [
        Panel("Top-1 accuracy, %", "test_acc1"),
        Panel("Top-1 accuracy, %, last third", "test_acc1", start=late),
        Panel("Top-1 accuracy of the EMA, %", "test_ema_acc1"),
    ]
    detection = [Panel("Box AP, %", "bbox_mAP"), Panel("Box AP at half overlap, %", "bbox_mAP_50"), Panel("Mask AP, %", "segm_mAP")]
    segmentation = [Panel("Mean IoU, %", "mIoU"), Panel("Mean accuracy of the classes, %", "mAcc"), Panel("Accuracy of the pixels, %", "aAcc")]
    others = [Panel("Training loss", "train_loss"), Panel("Test loss", "test_loss"), Panel("Learning rate", "train_lr", is_smoothed=False)]
    rows = [[panel for panel in row if any(_visible(run, panel) for run in runs)] for row in (accuracies, detection, segmentation, others)]
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
    first = min(epoch for epoch, _ in points)
    settled = first + fall_epochs(runs) if "loss" in panel.key else first
    values = [value for epoch, value in points if epoch >= settled]
    margin = 0.04 * (max(values) - min(values)) or 0.04 * abs(values[0]) or 1.0
    return min(values) - margin, max(values) + margin


def fall_epochs(runs: list[Run]) -> float:
    """Epochs of falling loss that are let out of the frame; none of short runs, whose first epoch alone would be."""
    fall = SETTLED_AFTER * (max(run.last_epoch for run in runs) - min(run.records[0]["epoch"] for run in runs))
    return fall if fall >= 1 else 0.0


def _legend_text(run: Run) -> str:
    _, best = run.best(run.measure)
    return run.label if best is None else f"{run.label} ({best:.2f})"


def _caption(runs: list[Run], smooth_epochs: int) -> str:
    smoothing = f"thin: each epoch; thick: mean of {smooth_epochs // 2 * 2 + 1} epochs around" if smooth_epochs > 1 else "each epoch as it is"
    measures = {run.measure for run in runs}
    best = " or ".join("top-1 accuracy" if key == "test_acc1" else name for key, name in LEADING.items() if key in measures)
    leaves = "; the falling loss of the first epochs leaves the frame" if fall_epochs(runs) else ""
    return f"{smoothing}; in brackets: best {best}, %{leaves}"


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
        title=_caption(runs, smooth_epochs),
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
    note = f"{_caption(runs, smooth_epochs)}. Click a name to hide or show a run, double-click to see it alone; drag to zoom, double-click to return."
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
