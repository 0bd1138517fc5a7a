"""What the report tests show, small and with text that would like to be markup, and a reader of pages."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from thresher.report import Chart, Figure, Report, Series, Table, TokenMap

HOSTILE = '<script>alert("x")</script>'

MAP = TokenMap(
    title=f"Review {HOSTILE}",
    tokens=("The", " film", " is", " not", " dull", "."),
    dropped_at=(1, 3, 1, None, None, 2),
    layers=4,
    note="positive, .98",
)
HOSTILE_MAP = TokenMap("t", (HOSTILE, " & more"), (None, 2), layers=2, note=HOSTILE)
CHART = Chart(
    title=f"Accuracy {HOSTILE}",
    x_label="Speedup $x$",
    y_label="Accuracy & more",
    series=(
        Series(HOSTILE, (1.0, 2.0, 3.0), (0.92, 0.91, 0.88)),
        Series("$other$", (1.5, 2.5), (0.90, 0.87), "points"),
        Series("before", (1.0,), (0.93,), "level"),
    ),
    note=HOSTILE,
)
REPORT = Report(
    title=f"SST-2 {HOSTILE}",
    summary=f"Twice as fast. {HOSTILE}",
    figures=(Figure("Speedup", "1.85x", HOSTILE), Figure("Accuracy", "92.4%")),
    tables=(Table("Settings", ("Method", "Speedup"), (("ltp", "1.85x"), (HOSTILE, "2.10x")), HOSTILE),),
    maps=(MAP, HOSTILE_MAP),
    charts=(CHART, CHART),
    settings={"Method": "ltp", HOSTILE: HOSTILE},
)

_VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """The elements, attributes and text of a page; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of that name."""
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def shown(self) -> str:
        """All text outside scripts and styles."""
        return "".join(self.text)


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE


@pytest.fixture(scope="session")
def token_map() -> TokenMap:
    return MAP


@pytest.fixture(scope="session")
def hostile_map() -> TokenMap:
    return HOSTILE_MAP


@pytest.fixture(scope="session")
def chart() -> Chart:
    return CHART


@pytest.fixture(scope="session")
def report() -> Report:
    return REPORT


@pytest.fixture(scope="session")
def read_page() -> type[Page]:
    return Page
