"""The page of an evaluation: accuracies, calibration, classes, confused pairs, and the most confident mistakes with their pictures.

It stays small however many classes and images there are: what grows with them is a row per class; pairs and pictures are so many at most."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from reporting import charts, pages
from reporting.outcomes import Calibration, ClassOutcome, Outcomes, by_class, calibrate, confident_mistakes, confused_pairs, confusion
from reporting.pages import Cell, Markup, element, figure, number, section

NUM_PAIRS, NUM_MISTAKES = 50, 48  # on the page
MAX_MATRIX = 30  # classes up to which the whole confusion matrix is shown
SIDE = 160  # pixels of a picture's long side

View = Callable[[int], tuple[Image.Image | None, str]]  # the picture at a place in the set, if it can be read, and its name
Sections = list[tuple[str, Markup]]


def evaluation_sections(outcomes: Outcomes, labels: Sequence[str], view: View) -> Sections:
    """What does not change when further sets are measured: calibration, classes, pairs and mistakes. `labels`: a name per class."""
    found = by_class(outcomes, len(labels))
    matrix = confusion(outcomes, len(labels)) if len(labels) <= MAX_MATRIX else None
    confused = confusions(confused_pairs(outcomes), [one.num_images for one in found], labels, matrix=matrix, what="images")
    return [_calibration(calibrate(outcomes)), _classes(found, labels), *confused, _mistakes(outcomes, labels, view)]


def confusions(pairs: list[tuple[int, int, int]], totals: Sequence[int], labels: Sequence[str], *, matrix: np.ndarray | None, what: str) -> Sections:
    """What classes are taken for: the most frequent `pairs` (class, what was said instead, how often), if any, and the `matrix` of few classes,
    (C, C) of classes by what was said. `what`: that which is counted, of which each class has so many as `totals` says."""
    sections = []
    if pairs:
        sections.append(_pairs(pairs, totals, labels))
    if matrix is not None and 1 < len(labels) <= MAX_MATRIX:
        sections.append(_matrix(matrix, labels, what))
    return sections


def evaluation_page(document: dict, sections: Sections, *, num_skipped: int) -> str:
    """The page. `document`: what `robustness.evaluation.Report` holds; `sections`: those of `evaluation_sections`."""
    clean = document["accuracies"]["clean"]
    weights = f"{document['weights']}{', EMA weights' if document['use_ema'] else ''}"
    intro = [
        f"Weights {weights}; images of {document['input_size']} pixels, crop {document['crop_pct']:g}{_differing(document)}; "
        f"{document['num_classes']} classes.",
        f"{clean['num_images']} images: top-1 {clean['acc1']:.2f} %, top-5 {clean['acc5']:.2f} %, loss {clean['loss']:.4f}.",
    ]
    if num_skipped:
        intro.append(f"{num_skipped} damaged images were left out.")
    return pages.page(f"Evaluation of {document['model']}", intro, [*_sets(document), *sections])


def _differing(document: dict) -> str:
    """What is not as usual in how images were cropped and the network asked."""
    said = [f"mode {document['crop_mode']}"] if document["crop_mode"] != "center" else []
    said += [f"resampling {document['interpolation']}"] if document["interpolation"] != "bicubic" else []
    said += ["each with its mirror image (--tta hflip)"] if document["tta"] != "none" else []
    return "".join(f", {one}" for one in said)


# --- accuracies ------------------------------------------------------------------------------------------------------------------------


def _sets(document: dict) -> Sections:
    """Tables of what was measured besides the validation images, if anything."""
    sections = []
    if len(document["accuracies"]) > 1:
        rows = [(name, number(facts["acc1"]), number(facts["acc5"]), number(facts["num_images"], "d")) for name, facts in document["accuracies"].items()]
        sections.append(section("Sets", pages.table(("set", "top-1, %", "top-5, %", "images"), rows, caption="Accuracy on every set")))
    for name, found in document.items():
        if isinstance(found, dict) and found.get("corruptions"):
            sections.append(_corruptions(name, found))
    return sections


def _corruptions(name: str, found: dict) -> tuple[str, Markup]:
    rows = [
        (corruption.replace("_", " "), *map(number, facts["acc1"]), number(facts["mean_acc1"]), number(facts["ce"]))
        for corruption, facts in found["corruptions"].items()
    ]
    header = ("corruption", *(f"severity {severity}" for severity in range(1, 6)), "mean", "CE, %")
    said = f"CE: mean error relative to {found['relative_to']}." + ("" if found["mce"] is None else f" mCE {found['mce']:.2f} %.")
    return section(name, element("p", said), pages.table(header, rows, caption="Top-1 accuracy, %, by corruption and severity", is_sortable=True))


# --- calibration -----------------------------------------------------------------------------------------------------------------------


def _calibration(found: Calibration) -> tuple[str, Markup]:
    lean = found.confidence - found.accuracy
    verdict = "as confident as it is accurate" if abs(lean) < 5e-4 else f"{100 * abs(lean):.1f} points {'over' if lean > 0 else 'under'}confident on average"
    text = element(
        "p",
        "Expected calibration error ",
        element("b", f"{100 * found.ece:.2f} %"),
        f" over {_num_bins(found)} bins of confidence; mean confidence {100 * found.confidence:.2f} %, accuracy {100 * found.accuracy:.2f} %: {verdict}.",
    )
    how = element("p", "A thick line is how often the network was right when it was so confident; shaded, how far that is from what it claimed.", class_="soft")
    bins = [(100 * one.low, 100 * one.high, 100 * one.confidence, 100 * one.accuracy, one.num_images) for one in found.bins]
    diagram = charts.reliability("Reliability diagram", bins, said="Reliability diagram: " + "; ".join(_said_bin(one) for one in bins))
    spread = _histogram(found)
    rows = [
        (Cell(f"{low:.1f} - {high:.1f}", low), number(count, "d"), number(confidence), number(accuracy), number(accuracy - confidence, "+.2f"))
        for low, high, confidence, accuracy, count in bins
    ]
    table = pages.table(("confidence, %", "images", "mean confidence, %", "top-1, %", "difference"), rows, caption="Bins of the reliability diagram")
    return section("Calibration", text, how, element("div", diagram, spread, class_="charts"), pages.folded("The bins as a table", table))


def _num_bins(found: Calibration) -> int:
    """Bins that confidence was sorted into, with images or without."""
    return round(1 / (found.bins[0].high - found.bins[0].low))


def _said_bin(one: tuple[float, float, float, float, int]) -> str:
    low, high, _, accuracy, num_images = one
    return f"{low:.0f} to {high:.0f} %: {accuracy:.0f} % of {num_images} right"


def _histogram(found: Calibration) -> Markup:
    num_bins = _num_bins(found)
    counts = [0] * num_bins
    for one in found.bins:
        counts[round(one.low * num_bins)] = one.num_images
    edges = [100 * index / num_bins for index in range(num_bins + 1)]
    return charts.bars("Images by confidence", counts, edges, x_name="confidence, %", y_name="images")


# --- classes ---------------------------------------------------------------------------------------------------------------------------


def _acc1(one: ClassOutcome) -> float | None:
    return 100 * one.num_right / one.num_images if one.num_images else None


def _classes(found: list[ClassOutcome], labels: Sequence[str]) -> tuple[str, Markup]:
    """A histogram of the classes' accuracies, and a row for each, the worst first."""
    accuracies = [_acc1(one) for one in found if one.num_images]
    counts, edges = np.histogram(accuracies, bins=20, range=(0, 100))
    chart = charts.bars("Classes by accuracy", counts.tolist(), edges.tolist(), x_name="top-1 accuracy of the class, %", y_name="classes")
    rows = [
        (
            labels[one.number],
            number(one.num_images, "d"),
            number(one.num_right, "d"),
            number(_acc1(one)),
            number(100 * one.confidence if one.num_images else None),
            "-" if one.taken_for is None else labels[one.taken_for],
            number(one.num_taken, "d"),
            number(one.num_false, "d"),
        )
        for one in sorted(found, key=lambda one: (not one.num_images, _acc1(one) or 0.0))
    ]
    header = ("class", "images", "right", "top-1, %", "mean confidence, %", "most often taken for", "times", "others taken for it")
    table = pages.table(header, rows, caption="Accuracy per class, the worst first", is_sortable=True, is_tall=True)
    absent = len(found) - len(accuracies)
    note = element("p", f"{absent} classes have no image.", class_="soft") if absent else ""
    return section("Accuracy per class", element("div", chart, class_="charts"), note, table)


def _pairs(pairs: list[tuple[int, int, int]], totals: Sequence[int], labels: Sequence[str]) -> tuple[str, Markup]:
    """A row for each of the most frequent confusions, with how often the other way round."""
    counts = {(target, prediction): count for target, prediction, count in pairs}
    rows = [
        (
            labels[target],
            labels[prediction],
            number(count, "d"),
            number(100 * count / totals[target], ".1f"),
            number(counts.get((prediction, target), 0), "d"),
        )
        for target, prediction, count in pairs[:NUM_PAIRS]
    ]
    header = ("class", "taken for", "times", "of the class, %", "the other way round")
    caption = f"The most frequent of {len(pairs)} confusions" if len(pairs) > NUM_PAIRS else "All confusions"
    return section("Most confused pairs", pages.table(header, rows, caption=caption, is_sortable=True, is_tall=True))


def _matrix(counts: np.ndarray, labels: Sequence[str], what: str) -> tuple[str, Markup]:
    """Class by class, tinted by its part of the class's row."""
    head = element("tr", element("th", "class"), *(element("th", label, scope="col", class_="number") for label in labels))
    rows = []
    for label, row in zip(labels, counts, strict=True):
        shares = row / max(row.sum(), 1)
        cells = [
            element("td", count, style=f"background:color-mix(in srgb,var(--s1) {70 * share:.0f}%,transparent)" if count else None)
            for count, share in zip(row.tolist(), shares.tolist(), strict=True)
        ]
        rows.append(element("tr", element("th", label, scope="row"), *cells))
    caption = f"{what.capitalize()} per class (rows) and what the network said (columns)"
    whole = element("table", element("caption", caption), element("thead", head), element("tbody", *rows), class_="matrix")
    return section("Confusion matrix", element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption))


# --- mistakes --------------------------------------------------------------------------------------------------------------------------


def _mistakes(outcomes: Outcomes, labels: Sequence[str], view: View) -> tuple[str, Markup]:
    """The most confident ones, each with the picture that the network saw."""
    chosen = confident_mistakes(outcomes, NUM_MISTAKES)
    num_wrong = int((~outcomes.is_right).sum())
    if not num_wrong:
        return section("Most confident mistakes", element("p", "Every image was recognised."))
    shown = [_mistake(outcomes, i, labels, view) for i in chosen.tolist()]
    said = f"{len(chosen)} of {num_wrong} mistakes, the most confident first; pictures are cropped as the network saw them."
    return section("Most confident mistakes", element("p", said, class_="soft"), element("div", *shown, class_="gallery"))


def _mistake(outcomes: Outcomes, i: int, labels: Sequence[str], view: View) -> Markup:
    picture, name = view(int(outcomes.places[i]))
    target, prediction = labels[outcomes.targets[i]], labels[outcomes.predictions[i]]
    shown = (
        element("div", "the image can be read no more", class_="missing")
        if picture is None
        else pages.image(pages.shrunk(picture, SIDE), f"An image of class {target}, taken for {prediction}")
    )
    said = element("span", f"said {prediction}, {100 * outcomes.confidences[i]:.1f} %", class_="bad")
    short = "/".join(name.rsplit("/", 2)[-2:])
    caption = pages.lines(said, element("b", f"is {target}, {100 * outcomes.target_confidences[i]:.1f} %"), element("span", short, title=name))
    return figure(shown, caption)
