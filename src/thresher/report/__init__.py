"""Reports: which words stopped being read, where, and what was gained. Plain data in, text, pages and plots out."""

from __future__ import annotations

from thresher.report.chart import Chart, Series, chart_svg, save_chart
from thresher.report.console import count, points, ratio, seconds, table
from thresher.report.frontier import frontier_chart, pareto
from thresher.report.page import Figure, Report, Table, render, write_report
from thresher.report.tokens import TokenMap, legend, surface_tokens, to_html, to_plain, to_terminal

__all__ = [
    "Chart",
    "Figure",
    "Report",
    "Series",
    "Table",
    "TokenMap",
    "chart_svg",
    "count",
    "frontier_chart",
    "legend",
    "pareto",
    "points",
    "ratio",
    "render",
    "save_chart",
    "seconds",
    "surface_tokens",
    "table",
    "to_html",
    "to_plain",
    "to_terminal",
    "write_report",
]
