"""The HTML report of a run: one file that can be mailed, archived and opened years later without a network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from thresher.errors import ThresherError
from thresher.report._support import needs, render_template, write_whole
from thresher.report.chart import Chart, Series, chart_svg, save_chart
from thresher.report.console import numeric_columns
from thresher.report.tokens import TokenMap, map_view

__all__ = ["Chart", "Figure", "Report", "Series", "Table", "chart_svg", "render", "save_chart", "write_report"]


@dataclass(frozen=True)
class Figure:
    """A headline number: `Figure("Speedup", "1.85x", "median of 30 paired runs")`."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under column names; columns of numbers are set on the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ThresherError(f"Every row of the table {self.title!r} needs {len(self.columns)} cells.")


@dataclass(frozen=True)
class Report:
    """What a run has to show; `summary` is one sentence, `settings` what is needed to run it again."""

    title: str
    summary: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    maps: tuple[TokenMap, ...] = ()
    charts: tuple[Chart, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


def render(report: Report) -> str:
    """The report as a self-contained HTML page."""
    with needs("jinja2"):
        from markupsafe import Markup
    return render_template(
        "page.html.j2",
        title=report.title,
        report=report,
        # Safe as markup: the text inside was escaped when the drawing was written.
        charts=[(chart, Markup(chart_svg(chart))) for chart in report.charts],
        tables=[(table, numeric_columns(len(table.columns), table.rows)) for table in report.tables],
        maps=[map_view(one) for one in report.maps],
    )


def write_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write the page to `path` in one step; a failure leaves what was there before, and nothing else."""
    return write_whole(path, render(report))
