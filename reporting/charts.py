"""Charts of a page, as inline SVG in the page's colours: curves, bars, a reliability diagram. Each says in words what it shows, to who cannot see it.

matplotlib's SVG, which print has, draws letters as outlines in fixed colours: too large for a page of many charts, unreadable on a dark one, and
silent to a screen reader.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reporting.pages import Markup, element, joined
from reporting.plots import COLORS, DASHES

WIDTH, HEIGHT = 400, 250  # of a chart, in units of its view box: pixels at the usual size
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 10, 38  # margins around the axes
MAX_POINTS = 600  # of a line: more do not show

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A curve. `style` counts through colours and dashes; a `is_faint` one is drawn thin, under the others."""

    label: str
    points: Points
    style: int = 0
    is_faint: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    step = 10 ** math.floor(math.log10((high - low) / count or 1))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _spread(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5))


@dataclass(frozen=True)
class _Axes:
    """Where numbers lie in a chart."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        return LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def up(self, value: float) -> float:
        part = min(max((value - self.y[0]) / (self.y[1] - self.y[0]), -0.05), 1.05)  # beyond the axes a curve leaves the frame
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    def frame(self, x_name: str, y_name: str, *, counts: bool = False, counts_x: bool = False) -> Markup:
        """Grid, numbers and names of the axes; whole numbers alone where the upright one `counts`, or with `counts_x` the level one."""
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = []
        for value in [tick for tick in ticks(*self.y) if not counts or tick == int(tick)]:
            y = f"{self.up(value):.1f}"
            parts.append(element("line", x1=LEFT, x2=right, y1=y, y2=y, class_="frame"))
            parts.append(element("text", f"{value:.6g}", x=LEFT - 6, y=y, dy="0.32em", text_anchor="end"))
        for value in [tick for tick in ticks(*self.x) if not counts_x or tick == int(tick)]:
            x = f"{self.across(value):.1f}"
            parts.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="frame"))
            parts.append(element("text", f"{value:g}", x=x, y=bottom + 16, text_anchor="middle"))
        middle = (TOP + bottom) / 2
        parts.append(element("text", x_name, x=(LEFT + right) / 2, y=HEIGHT - 4, text_anchor="middle"))
        parts.append(element("text", y_name, x=12, y=middle, transform=f"rotate(-90 12 {middle})", text_anchor="middle"))
        return joined(parts)


def _svg(said: str, *parts: object) -> Markup:
    return element("svg", element("title", said), *parts, class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=said)


def _titled(title: str, chart: Markup) -> Markup:
    return element("figure", element("figcaption", title), chart)


def _stroke(style: int) -> dict[str, str | None]:
    dashes, _ = DASHES[style % len(DASHES)]
    pattern = " ".join(f"{1.6 * length:g}" for length in dashes) or None
    return {"stroke": f"var(--s{style % len(COLORS)})", "stroke_dasharray": pattern, "fill": "none"}


def _thinned(points: Points) -> Points:
    """At most `MAX_POINTS` of the points, evenly spread, with the last."""
    step = math.ceil(len(points) / MAX_POINTS)
    return [*points[: len(points) - 1 : step], points[-1]]


def _drawn(line: Line, axes: _Axes) -> Markup:
    points = _thinned(line.points)
    if len(points) == 1:
        (x, y), color = points[0], _stroke(line.style)["stroke"]
        return element("circle", element("title", line.label), cx=f"{axes.across(x):.1f}", cy=f"{axes.up(y):.1f}", r=3, fill=color)
    places = " ".join(f"{axes.across(x):.1f},{axes.up(y):.1f}" for x, y in points)
    look = {"stroke_width": 0.8, "stroke_opacity": 0.45} if line.is_faint else {"stroke_width": 1.8}
    dashes = {"stroke_dasharray": None} if line.is_faint else {}
    return element("polyline", element("title", line.label), points=places, **(_stroke(line.style) | look | dashes))


def curves(title: str, lines: Sequence[Line], *, x_name: str, y_name: str, limits: tuple[float, float]) -> Markup:
    """A figure of lines, each with at least one point; values beyond `limits` leave the frame."""
    xs = [x for line in lines for x, _ in line.points]
    axes = _Axes(_spread(min(xs), max(xs)), _spread(*limits))
    order = sorted(lines, key=lambda line: not line.is_faint)
    shown = [line for line in lines if not line.is_faint]
    said = f"{title} over {x_name}: " + "; ".join(f"{line.label} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in shown[:12])
    said += f"; and {len(shown) - 12} more" if len(shown) > 12 else ""
    return _titled(title, _svg(said, axes.frame(x_name, y_name, counts_x=all(x == int(x) for x in xs)), *(_drawn(line, axes) for line in order)))


def legend(labels: Sequence[str]) -> Markup:
    """Which line is whose, by style, for all charts of a page."""
    items = []
    for style, label in enumerate(labels):
        stroke = element("line", x1=0, x2=40, y1=6, y2=6, stroke_width=2.2, **_stroke(style))
        items.append(element("li", element("svg", stroke, viewBox="0 0 40 12", aria_hidden="true"), label))
    return element("ul", *items, class_="legend")


def bars(title: str, counts: Sequence[int], edges: Sequence[float], *, x_name: str, y_name: str) -> Markup:
    """A figure of a histogram: `counts` between neighbouring `edges`."""
    axes = _Axes((edges[0], edges[-1]), (0, max(*counts, 1)))
    drawn = []
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        said = element("title", f"{left:g} to {right:g}: {count}")
        drawn.append(_bar(axes, left, right, 0, count, said))
    said = f"{title}: " + "; ".join(f"{left:g} to {right:g}: {count}" for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True) if count)
    return _titled(title, _svg(said, axes.frame(x_name, y_name, counts=True), *drawn))


def _bar(axes: _Axes, left: float, right: float, low: float, high: float, said: Markup, kind: str = "bar") -> Markup:
    x, y = axes.across(left) + 0.6, axes.up(high)
    return element("rect", said, x=f"{x:.1f}", y=f"{y:.1f}", width=f"{axes.across(right) - x - 0.6:.1f}", height=f"{axes.up(low) - y:.1f}", class_=kind)


def reliability(title: str, bins: Sequence[tuple[float, float, float, float, int]], *, said: str) -> Markup:
    """A figure of a reliability diagram. `bins`: lower and upper edge, mean confidence and accuracy, all in percent, and the number of images of
    each bin that has some; a thick line is the accuracy, the gap between it and confidence is shaded."""
    axes = _Axes((0, 100), (0, 100))
    drawn = []
    for low, high, confidence, accuracy, num_images in bins:
        words = element("title", f"confidence {low:.0f} to {high:.0f} %: {num_images} images, {confidence:.1f} % confident, {accuracy:.1f} % right")
        between = min(accuracy, confidence), max(accuracy, confidence)
        top = f"{axes.up(accuracy):.1f}"
        drawn.append(_bar(axes, low, high, 0, between[0], words))
        drawn.append(_bar(axes, low, high, *between, words, "gap"))
        drawn.append(element("line", x1=f"{axes.across(low):.1f}", x2=f"{axes.across(high):.1f}", y1=top, y2=top, class_="mark"))
    ideal = element(
        "line", x1=axes.across(0), y1=axes.up(0), x2=axes.across(100), y2=axes.up(100), stroke="currentColor", stroke_dasharray="4 3", stroke_width=1
    )
    return _titled(title, _svg(said, axes.frame("confidence, %", "accuracy, %"), *drawn, ideal))
