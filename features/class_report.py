"""What an evaluation found of each class, in the file that --report names: a page, all figures as JSON, or a table as CSV, by its ending."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from features import pictures
from features.config import BackboneConfig
from reporting import charts, pages
from reporting.pages import Markup, element, number, section
from reporting.plots import PAGE_SUFFIX
from run import disk
from run.errors import DamagedImage

NUMBERS = ".json"
NUM_VIEWS, SIDE = 12, 320  # pictures on the page, and pixels of the long side of each
Figures = dict[str, float]  # by name, fractions of 1


class View(NamedTuple):
    """A picture's name, and the picture under what is there and under what was found, both (H, W, 3) uint8."""

    name: str
    truth: np.ndarray
    found: np.ndarray


def views(files: Sequence[str], look: Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Iterator[View]:
    """A few of the `files`, evenly spread, without damaged ones: `look` gives the two pictures of a View for a place and the image there, as it lies."""
    for k in range(count := min(NUM_VIEWS, len(files))):
        place = k * len(files) // count
        try:
            picture = pictures.read_picture(files[place], turns=False)
        except DamagedImage:
            continue
        yield View(Path(files[place]).name, *look(place, picture))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassReport:
    """`figures`: those of the whole, by published name. `per_class`: columns by published name, each by class, without those that it is not
    defined for. All fractions of 1; -1 where there is nothing to measure. `counted` says what `counts` counts, by class. `headings`: what the page
    calls figures and columns; `judged`: a sentence on what was evaluated; `sections`: further parts of the page; `views`: pictures for it."""

    figures: Figures
    per_class: dict[str, Figures]
    class_names: list[str]
    judged: str
    counted: str
    counts: list[int]
    headings: dict[str, str]
    sections: tuple[tuple[str, Markup], ...] = ()
    views: Iterable[View] = ()


def is_page(cfg: BackboneConfig) -> bool:
    """Whether --report asks for a page."""
    return bool(cfg.report) and Path(cfg.report).suffix.lower() == PAGE_SUFFIX


def check_writable(cfg: BackboneConfig) -> None:
    """InputError where the file of --report cannot be written: before an evaluation, not after it."""
    if cfg.report:
        disk.check_writable(Path(cfg.report), flag="--report")


def write(cfg: BackboneConfig, report: ClassReport) -> None:
    """Write the file of --report. InputError where it cannot be written."""
    path = Path(cfg.report)
    if is_page(cfg) or path.suffix.lower() == NUMBERS:
        text = _page(cfg, report) if is_page(cfg) else _numbers(cfg, report)
        with disk.writing(f"--report {path}", "name another file"):
            disk.write_whole(path, text)
        return
    with disk.writing_csv(path, ["class", *report.per_class], flag="--report") as writer:
        for name in report.class_names:
            writer.writerow([name, *(f"{values[name]:.6f}" if name in values else "" for values in report.per_class.values())])


def _numbers(cfg: BackboneConfig, report: ClassReport) -> str:
    classes = {name: {key: values.get(name) for key, values in report.per_class.items()} for name in report.class_names}
    for name, count in zip(report.class_names, report.counts, strict=True):
        classes[name][report.counted] = count
    return json.dumps({"model": cfg.model, "weights": cfg.resume, "figures": report.figures, "classes": classes}, indent=2) + "\n"


def _page(cfg: BackboneConfig, report: ClassReport) -> str:
    rows = [(report.headings[name], _percent(value)) for name, value in report.figures.items()]
    figures = section("Figures", pages.table(("figure", "%"), rows, caption="Of all classes together"))
    size = " x ".join(map(str, cfg.max_size))
    used = f"Weights {cfg.resume}; images resized to fit into {size} pixels; {len(report.class_names)} classes."
    sections = [figures, _classes(report), *report.sections, *_pictures(report.views)]
    return pages.page(f"Evaluation of {cfg.model}, {cfg.command.rpartition(' ')[2]}", [used, report.judged], sections)


def _pictures(shown: Iterable[View]) -> list[tuple[str, Markup]]:
    """A gallery of pairs: what is there, and what was found."""
    figures = []
    for one in shown:
        pair = (
            pages.image(pages.shrunk(Image.fromarray(view), SIDE), f"{one.name}: {what}")
            for view, what in ((one.truth, "what is there"), (one.found, "what was found"))
        )
        figures.append(pages.figure(element("div", *pair, class_="pair"), one.name))
    if not figures:
        return []
    said = element("p", f"{len(figures)} of the pictures, evenly spread; left what is there, right what was found.", class_="soft")
    return [section("Pictures", said, element("div", *figures, class_="gallery wide"))]


def _percent(value: float | None) -> pages.Cell:
    return number(None if value is None or value < 0 else 100 * value)


def _classes(report: ClassReport) -> tuple[str, Markup]:
    """A histogram of the first column, and a row for each class, the worst in it first, those without a value last."""
    key, first = next(iter(report.per_class.items()))
    what = report.headings[key]
    counts, edges = np.histogram([100 * value for value in first.values()], bins=20, range=(0, 100))
    chart = charts.bars(f"Classes by {what}", counts.tolist(), edges.tolist(), x_name=f"{what} of the class, %", y_name="classes")
    count_of = dict(zip(report.class_names, report.counts, strict=True))
    order = sorted(report.class_names, key=lambda name: (name not in first, first.get(name, 0.0)))
    rows = [(name, number(count_of[name], "d"), *(_percent(values.get(name)) for values in report.per_class.values())) for name in order]
    header = ("class", report.counted, *(f"{report.headings[key]}, %" for key in report.per_class))
    table = pages.table(header, rows, caption=f"Every class, the one of the lowest {what} first", is_sortable=True, is_tall=True)
    return section("Classes", element("div", chart, class_="charts"), table)
