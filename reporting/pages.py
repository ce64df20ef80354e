"""Self-contained HTML pages: elements that escape what they hold, tables, pictures as data URIs, the frame of a page; charts.py draws in them.

Nothing on a page is fetched from elsewhere, so it can be mailed, and opened without a network. Text is `Markup` or is escaped: what a class or a
file is called never becomes part of the page's structure.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

VOID = {"br", "img", "meta"}
TINY = 96  # pixels up to which a picture is enlarged with its pixels visible, and stored without loss
QUALITY = 82  # of pictures stored as JPEG


class Markup(str):
    """Text that is HTML already."""


@dataclass(frozen=True)
class Cell:
    """What a table's cell shows, and the number by which it sorts; `is_number` sets it to the right."""

    content: object
    value: float | None = None
    is_number: bool = True


def escaped(value: object) -> Markup:
    """`value` as text of a page, or as the value of an attribute. Bytes of file names that are no UTF-8 are spelt out, characters that no
    page may hold replaced."""
    if isinstance(value, Markup):
        return value
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return Markup(html.escape("".join(letter if letter in "\t\n" or ord(letter) >= 32 else "\N{REPLACEMENT CHARACTER}" for letter in text)))


def element(name: str, /, *content: object, **attributes: object) -> Markup:
    """`<name attributes>content</name>`, all of it escaped but `Markup`. Attributes that are None are left out; `class_` is written `class`,
    and `_` inside a name `-`."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"' for key, value in attributes.items() if value is not None)
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(content)}</{name}>")


def joined(parts: Iterable[object]) -> Markup:
    """The parts one after the other, escaped but `Markup`."""
    return Markup("".join(escaped(part) for part in parts))


def lines(*parts: object) -> Markup:
    """The parts that are not empty, each on a line of its own."""
    return Markup("<br>".join(escaped(part) for part in parts if part))


def listed(items: Iterable[object]) -> Markup:
    return element("ul", *(element("li", item) for item in items))


def folded(summary: str, *content: object) -> Markup:
    """Content that a click unfolds."""
    return element("details", element("summary", summary), *content)


# --- tables ----------------------------------------------------------------------------------------------------------------------------


def number(value: float | None, form: str = ".2f", unit: str = "") -> Cell:
    """A cell with a number, which may be missing: that is a dash, and sorts below all others."""
    return Cell("-", float("-inf")) if value is None else Cell(f"{value:{form}}{unit}", float(value))


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str, is_sortable: bool = False, is_tall: bool = False) -> Markup:
    """A table of cells: `Cell`, `Markup` or text, whose first one heads its row. `is_tall`: it scrolls in a frame of its own."""
    rows = [[cell if isinstance(cell, Cell) else Cell(cell, is_number=False) for cell in row] for row in rows]
    is_right = [bool(rows) and all(row[column].is_number for row in rows) for column in range(len(header))]
    head = element("tr", *(element("th", name, scope="col", class_="number" if right else None) for name, right in zip(header, is_right, strict=True)))
    body = [element("tr", *(_cell(cell, is_first=column == 0) for column, cell in enumerate(row))) for row in rows]
    whole = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", Markup("\n".join(body))),
        class_="sortable" if is_sortable else None,
    )
    return element("div", whole, class_="scroll tall" if is_tall else "scroll", tabindex=0, role="region", aria_label=caption)


def _cell(cell: Cell, *, is_first: bool) -> Markup:
    kind = "number" if cell.is_number else "long" if len(str(cell.content)) > 24 else None
    value = None if cell.value is None else "-1e308" if cell.value == float("-inf") else f"{cell.value:.10g}"
    if is_first:
        return element("th", cell.content, scope="row", class_=kind, data_value=value)
    return element("td", cell.content, class_=kind, data_value=value)


# --- pictures --------------------------------------------------------------------------------------------------------------------------


def data_uri(picture: Image.Image) -> str:
    """The picture inside a URI: small ones without loss, as PNG, larger ones as JPEG."""
    stream = io.BytesIO()
    kind = "png" if max(picture.size) <= TINY else "jpeg"
    picture.convert("RGB").save(stream, kind, **({"optimize": True} if kind == "png" else {"quality": QUALITY, "optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """The picture with a long side of at most `side` pixels."""
    return picture if max(picture.size) <= side else picture.resize([max(1, round(side * each / max(picture.size))) for each in picture.size])


def image(picture: Image.Image, alt: str) -> Markup:
    width, height = picture.size
    kind = "tiny" if max(picture.size) <= TINY else None
    return element("img", src=data_uri(picture), alt=alt, width=width, height=height, class_=kind)


def figure(content: object, caption: object) -> Markup:
    return element("figure", content, element("figcaption", caption))


# --- the page --------------------------------------------------------------------------------------------------------------------------


def section(title: str, *content: object) -> tuple[str, Markup]:
    """A part of a page: its title and what it holds, for `page`."""
    return title, joined(content)


def page(title: str, intro: Sequence[object], sections: Sequence[tuple[str, Markup]]) -> str:
    """The whole document: a heading, paragraphs, links to the sections, the sections."""
    here = Path(__file__)
    names = [f"part-{index}" for index in range(1, len(sections) + 1)]
    links = [element("a", heading, href=f"#{name}") for name, (heading, _) in zip(names, sections, strict=True)]
    body = [element("h1", title), *(part if isinstance(part, Markup) else element("p", part, class_="soft") for part in intro)]
    body += [element("nav", *links)] if len(links) > 1 else []
    body += [element("section", element("h2", heading, id=name), content) for name, (heading, content) in zip(names, sections, strict=True)]
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(here.with_name("page.css").read_text(encoding="utf-8"))),
    ]
    script = element("script", Markup(here.with_name("page.js").read_text(encoding="utf-8")))
    return f'<!doctype html>\n<html lang="en">\n<head>{joined(head)}</head>\n<body>\n{chr(10).join(body)}\n{script}\n</body>\n</html>\n'
