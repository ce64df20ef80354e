"""Pages as a reader meets them: parsed, and opened in a headless Chromium where there is one."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from reporting.browser import NAMES, chromium, find_chromium

VOID = {"br", "img", "meta"}


class Page(HTMLParser):
    """A page's elements (name, attributes), its text, and what it would fetch. AssertionError where elements are not closed in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open_elements, self.elements, self.texts, self.fetched = [], [], [], []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open_elements == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        for name in ("src", "href", "data", "srcset", "poster"):
            if name in attributes and not attributes[name].startswith(("data:image/", "#")):
                self.fetched.append((tag, attributes[name]))
        if tag not in VOID:
            self.open_elements.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open_elements and self.open_elements.pop() == tag, tag

    def handle_data(self, data):
        if "style" in self.open_elements or "script" in self.open_elements:
            assert not re.search(r"@import|url\(|https?:|fetch\(|import\(", data)
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open_elements):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def all(self, tag: str) -> list[dict]:
        """Attributes of each element of that name."""
        return [attributes for name, attributes in self.elements if name == tag]


def read_page(path: Path) -> Page:
    """A page, of which it is clear that it fetches nothing, and that all pictures have words."""
    page = Page(path.read_text(encoding="utf-8"))
    assert page.fetched == []
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert all(attributes.get("aria-label") or attributes.get("aria-hidden") for attributes in page.all("svg"))
    return page


def browsed(path: Path, folder: Path, script: str = "") -> Page:
    """The page as Chromium has it once its scripts, and then `script`, have run; skips the test where there is no Chromium."""
    if find_chromium() is None:
        pytest.skip(f"no Chromium on the PATH ({', '.join(NAMES)}): Debian has it as chromium")
    errors = "<script>window.onerror = function (what) { document.body.dataset.fault = what; };</script>"
    text = path.read_text(encoding="utf-8").replace("<head>", f"<head>{errors}").replace("</body>", f"<script>{script}</script></body>")
    (folder / "opened.html").write_text(text, encoding="utf-8")
    page = Page(chromium(folder / "opened.html", "--dump-dom").decode())
    assert "data-fault" not in page.all("body")[0], page.all("body")[0]
    return page
