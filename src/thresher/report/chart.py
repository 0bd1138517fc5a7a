"""Charts as data, shown as SVG that follows its page's theme, or saved to a file."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal, get_args

from thresher.errors import ThresherError
from thresher.report._drawing import THEME, png, svg
from thresher.report._support import write_whole

Style = Literal["line", "points", "level"]


@dataclass(frozen=True)
class Series:
    """Values that belong together; series of one name share a colour and a label, so a line can have points beside it.

    A `level` is a dashed line across the whole chart at each of its `ys`, with a dot at `xs` unless that is NaN.
    """

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    style: Style = "line"

    def __post_init__(self) -> None:
        if len(self.xs) != len(self.ys):
            raise ThresherError(f"Series {self.name!r} has {len(self.xs)} x values and {len(self.ys)} y values.")
        if self.style not in get_args(Style):
            raise ThresherError(
                f"Series {self.name!r} has style {self.style!r}; known are {', '.join(get_args(Style))}."
            )


@dataclass(frozen=True)
class Chart:
    """A chart as data; `note` is a sentence for under it."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    note: str = ""


def chart_svg(chart: Chart) -> str:
    """The chart as an `<svg>` element for a page, whose colours follow the page's light or dark theme."""
    drawing = svg(chart, titled=False)
    # Inside a page a colour becomes a CSS variable, with itself as what holds where the page sets none.
    drawing = re.sub(
        r"#[0-9a-f]{6}(?=[;\"])", lambda hit: f"var({THEME[hit[0]]}, {hit[0]})" if hit[0] in THEME else hit[0], drawing
    )
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # numbered anew in every drawing, they would clash on a page
    label = escape(f"{chart.title}: {chart.y_label} over {chart.x_label}")
    # Without a size of its own the drawing takes the width its page gives it; its viewBox keeps the proportions.
    opening, rest = drawing.split(">", 1)
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{label}">{rest}'


def save_chart(chart: Chart, path: str | os.PathLike[str]) -> Path:
    """Write the chart, with its title, as `.svg` or `.png` by the suffix of `path`, in one step."""
    suffix = Path(path).suffix.lower()
    if suffix == ".svg":
        return write_whole(path, '<?xml version="1.0" encoding="utf-8"?>\n' + svg(chart, titled=True))
    if suffix == ".png":
        return write_whole(path, png(chart))
    raise ThresherError(f"Charts are saved as .svg or .png, not as {suffix or 'a file without a suffix'}.")
