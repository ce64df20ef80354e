"""A step's images as the student sees them, with crops, ops, mix and the teacher's labels written under them: an HTML page, or a PNG."""

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from distillation.seen import Seen, Shares, Step
from reporting import pages
from reporting.inspection import hide_frame, need_matplotlib
from reporting.pages import Markup, element, figure

SIDE = 320  # pixels of a source's long side on the page
PER_ROW = 8  # pictures of a PNG: each image as it is stored, and its views
LETTERS = 23  # of a line under an image of a PNG, per picture of it
INK = "#d55e00"  # of a crop's outline, on a white one


def title_of(step: Step) -> str:
    return f"Epoch {step.epoch}, step {step.step}: what the student sees"


def notes_of(step: Step, seen: Sequence[Seen]) -> list[str]:
    """What a reader must know of all of the images."""
    notes = [
        f"The first {len(seen)} of the step's {step.global_batch} images; {step.num_steps} steps per epoch; mix groups of {step.group_size}. "
        "Left: the image as it is stored, with its crop; right: what the student sees of it."
    ]
    return [*notes, f"The teacher's labels: {step.teacher}."] if step.teacher else notes


def described(one: Seen) -> list[str]:
    """The lines under an image: class and file, crop, ops, erased boxes, mix, target, teacher's label."""
    drawn = one.drawn
    crop = "the whole image"
    if drawn["box"] is not None:
        top, left, height, width = drawn["box"]
        crop = f"crop {height} x {width} at ({top}, {left}) of " + (
            f"{one.source.height} x {one.source.width}" if one.crops_source else "its resized or padded form"
        )
    lines = [
        f"class {one.label}, {'/'.join(one.name.rsplit('/', 2)[-2:])}",
        f"in place of a damaged one, {one.damaged}" if one.damaged else "",
        f"resized to {drawn['resized'][0]} x {drawn['resized'][1]}" if drawn["resized"] else "",
        crop + (", mirrored" if drawn["flip"] else "") + (", upside down" if drawn["vflip"] else ""),
        *_changes(drawn),
        *(f"view {i}, {line}" for i, split in enumerate(drawn["splits"], 2) for line in _changes(split) or ["unchanged"]),
        _mixed(one),
        f"to learn: {_told(one.target)}" if one.target else "",
        f"teacher: {_told(one.teacher)}" if one.teacher else "",
    ]
    return [line for line in lines if line]


def _changes(drawn: dict) -> list[str]:
    """Lines on the ops and the erased boxes of a view, where there are any."""
    ops = ", ".join(" ".join([name, *map(_argument, arguments)]) for name, arguments in drawn["ops"])
    erased = "; ".join(f"{height} x {width} at ({top}, {left})" for top, left, height, width in drawn["erased"])
    return [*([f"ops: {ops}"] if ops else []), *([f"erased: {erased}"] if erased else [])]


def _argument(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _mixed(one: Seen) -> str:
    if one.mix is None:
        return "not mixed"
    own = f"{one.mix.lam:.2f} of itself, the rest of image {one.mix.partner}"
    if one.mix.box is None:
        return f"mixup: {own}"
    top, bottom, left, right = one.mix.box
    return f"CutMix: {own}, in {bottom - top} x {right - left} at ({top}, {left})"


def _told(shares: Shares) -> str:
    return ", ".join(name if math.isnan(value) else f"{name} {value:.2f}" for name, value in shares)


def outline(one: Seen) -> tuple[int, int, int, int] | None:
    """The crop (top, left, height, width) where it is one of the stored image."""
    return one.drawn["box"] if one.crops_source else None


# --- the page --------------------------------------------------------------------------------------------------------------------------


def batch_page(step: Step, seen: Sequence[Seen]) -> str:
    cards = [_card(one) for one in seen]
    whole = pages.section("Images", element("div", *cards, class_="gallery wide"))
    return pages.page(title_of(step), notes_of(step, seen), [whole])


def _card(one: Seen) -> Markup:
    head, *lines = described(one)
    view = pages.image(Image.fromarray(one.pixels), f"Image {one.number} as the student sees it: " + "; ".join([head, *lines]))
    further = [pages.image(Image.fromarray(pixels), f"View {i} of image {one.number}") for i, pixels in enumerate(one.further, 2)]
    pictures = element("div", _source(one), view, *further, class_="pair")
    return figure(pictures, pages.lines(element("b", f"{one.number}: {head}"), *lines))


def _source(one: Seen) -> Markup:
    """The stored image with its crop drawn on it."""
    width, height = one.source.size
    small = pages.shrunk(one.source, SIDE)
    alt = f"Image {one.number} as it is stored: {one.name}"
    parts = [element("title", alt), element("image", href=pages.data_uri(small), width=width, height=height, preserveAspectRatio="none")]
    if (box := outline(one)) is not None:
        top, left, box_height, box_width = box
        place = {"x": left, "y": top, "width": box_width, "height": box_height, "fill": "none", "vector_effect": "non-scaling-stroke"}
        parts += [element("rect", stroke="#ffffff", stroke_width=4, **place), element("rect", stroke=INK, stroke_width=2, **place)]
    return element("svg", *parts, class_="picture", viewBox=f"0 0 {width} {height}", role="img", aria_label=alt)


# --- the picture -----------------------------------------------------------------------------------------------------------------------


def draw_batch(step: Step, seen: Sequence[Seen], out: Path) -> None:
    """The same as a PNG, where letters that no font at hand has are boxes. InputError without matplotlib."""
    figure_type, _ = need_matplotlib()
    num_pictures = 2 + len(seen[0].further)
    columns = min(max(1, PER_ROW // num_pictures), len(seen))
    rows = math.ceil(len(seen) / columns)
    texts = [[piece for line in described(one) for piece in textwrap.wrap(line, LETTERS * num_pictures, subsequent_indent="   ")] for one in seen]
    num_lines = max(map(len, texts))
    drawn = figure_type(figsize=(1.8 * num_pictures * columns, (1.8 + 0.145 * num_lines) * rows + 0.7), layout="constrained")
    drawn.suptitle(
        title_of(step) + "\n" + "\n".join(textwrap.fill(note, 25 * num_pictures * columns) for note in notes_of(step, seen)), fontsize=9, parse_math=False
    )
    parts = drawn.subfigures(rows, columns, squeeze=False).flatten()
    for part, one, text in zip(parts, seen, texts, strict=False):
        source, *views = part.subplots(1, num_pictures)
        source.imshow(one.source)
        if (box := outline(one)) is not None:
            source.add_patch(_rectangle(box))
        for view, pixels in zip(views, (one.pixels, *one.further), strict=True):
            view.imshow(pixels)
        for axes in (source, *views):
            hide_frame(axes)
        lines = [f"{one.number}: {text[0]}", *text[1:], *[""] * (num_lines - len(text))]
        part.supxlabel("\n".join(lines), fontsize=7, x=0.03, ha="left", parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        drawn.savefig(out, dpi=130, facecolor="white")


def _rectangle(box: tuple[int, int, int, int]):
    from matplotlib.patches import Rectangle

    top, left, height, width = box
    return Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=INK, linewidth=1.5)
