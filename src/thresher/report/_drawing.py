"""How charts look: matplotlib, without its habits."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from thresher.report._support import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from thresher.report.chart import Chart

_INK, _SURFACE, _RULE = "#4a5058", "#fffffe", "#dedbd4"
# After Okabe and Ito, told apart by colour-blind readers too, the pale ones darkened to stand out on white; each series
# has a marker as well, for print and for those who see no colours.
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#c0689a", "#3d9ad1", "#c08000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# The names a page may give our colours.
THEME = {_INK: "--chart-ink", _SURFACE: "--surface", _RULE: "--rule"} | {
    colour: f"--series-{i}" for i, colour in enumerate(_SERIES, 1)
}
_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"

_WIDTH, _HEIGHT, _SIZE = 720.0, 380.0, 12.0  # in points, which are the SVG's own units
_LINE_HEIGHT = 1.5 * _SIZE
_LONGEST_LABEL = 28


def svg(chart: Chart, *, titled: bool) -> str:
    """The drawing as an `<svg>` element; on a page of its own (`titled`) it brings its title and background."""
    with _look():
        stream = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        _draw(chart, titled=titled).savefig(stream, format="svg", transparent=not titled, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]  # an XML declaration and a doctype have no place inside a page
    return re.sub(r"'DejaVu Sans'[^;\"]*", _FONT, text).rstrip() + "\n"


def png(chart: Chart) -> bytes:
    """The titled drawing as pixels, at twice the density of a plain screen or more."""
    with _look():
        stream = io.BytesIO()
        _draw(chart, titled=True).savefig(stream, format="png", dpi=200, facecolor=_SURFACE)
    return stream.getvalue()


@contextmanager
def _look() -> Iterator[None]:
    """Our look whatever the user's own matplotlibrc says, and theirs again afterwards."""
    with needs("matplotlib"):
        import matplotlib
    ours: dict[str, Any] = {
        "axes.axisbelow": True,
        "axes.edgecolor": _RULE,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.labelcolor": _INK,
        "axes.labelpad": 10,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.dpi": 72,
        "font.family": ["DejaVu Sans"],
        "font.size": _SIZE,
        "grid.color": _RULE,
        "grid.linewidth": 0.8,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "svg.fonttype": "none",  # letters stay letters: searchable, and in the page's own font
        "svg.hashsalt": "thresher",  # the same chart gives the same bytes
        "text.color": _INK,
        "text.parse_math": False,  # a "$" in a name is a dollar
        "xtick.color": _INK,
        "ytick.color": _INK,
        "xtick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.major.size": 0,
        "xtick.major.pad": 8,
        "ytick.major.pad": 8,
    }
    # The backend is the user's affair: leave it out, lest a window system be looked for.
    look: dict[Any, Any] = {**matplotlib.rcParamsDefault, **ours}
    del look["backend"]
    with matplotlib.rc_context(look):
        yield


def _draw(chart: Chart, *, titled: bool) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
    renderer = FigureCanvasAgg(figure).get_renderer()
    widths = [
        renderer.get_text_width_height_descent(_short(series.name), FontProperties(size=_SIZE), False)[0]
        for series in chart.series
    ]
    left, right = 72.0, 44.0 + max(widths, default=0.0)
    top, bottom = (48.0 if titled else 16.0), 60.0
    axes = figure.add_axes(
        (left / _WIDTH, bottom / _HEIGHT, (_WIDTH - left - right) / _WIDTH, (_HEIGHT - top - bottom) / _HEIGHT)
    )
    if titled:
        axes.set_title(chart.title, loc="left", fontweight="bold", pad=20)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.margins(x=0.04, y=0.1)
    if chart.log_x:
        _log_axis(axes)

    looks: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys(series.name for series in chart.series if series.style != "level"):
        looks[name] = (_SERIES[len(looks) % len(_SERIES)], _MARKERS[len(looks) % len(_MARKERS)])
    ends: dict[str, tuple[float, float]] = {}  # where each name's rightmost point lies
    for series in chart.series:
        points = [(x, y) for x, y in zip(series.xs, series.ys, strict=True) if _drawable(x, y, chart.log_x)]
        if series.style == "level":
            for y in filter(math.isfinite, series.ys):
                axes.axhline(y, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1.5)
                ends[series.name] = (math.inf, y)
            for x, y in points:
                axes.plot(x, y, color=_INK, marker="o", markersize=7, markeredgecolor=_SURFACE, markeredgewidth=1.2)
            continue
        if not points:
            continue
        colour, marker = looks[series.name]
        joined = series.style == "line"
        xs, ys = zip(*points, strict=True)
        axes.plot(
            xs,
            ys,
            color=colour,
            linestyle="-" if joined else "none",
            marker=marker,
            markersize=7 if joined else 5,
            markeredgecolor=_SURFACE,
            markeredgewidth=1.2 if joined else 0.6,
            alpha=1.0 if joined else 0.55,
            clip_on=False,
        )
        ends[series.name] = max([*points, ends[series.name]] if series.name in ends else points)
    _label(axes, ends, looks)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"


def _drawable(x: float, y: float, log_x: bool) -> bool:
    return math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x)


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label(axes: Axes, ends: dict[str, tuple[float, float]], looks: dict[str, tuple[str, str]]) -> None:
    """Name every series in the right margin, level with its last point or as near as the other names allow."""
    box = axes.get_window_extent()
    (x_low, x_high), to_pixels = axes.get_xlim(), axes.transData.transform
    order = sorted(ends, key=lambda name: ends[name][1])
    wanted = [float(to_pixels((x_low, ends[name][1]))[1] - box.y0) for name in order]
    for name, height in zip(order, spread(wanted, _LINE_HEIGHT, box.height), strict=True):
        x, y = ends[name]
        # Positions from here on: across in axes widths, up in axes heights.
        level, margin = height / box.height, 1 + 14 / box.width
        start = axes.transAxes.inverted().transform(to_pixels((min(x, x_high), y)))
        colour, marker = looks.get(name, (_INK, ""))
        axes.plot(
            (start[0], margin),
            (start[1], level),
            transform=axes.transAxes,
            color=colour,
            linewidth=0.8,
            linestyle=(0, (1, 2)),
            clip_on=False,
            zorder=1.4,
        )
        text_at = margin + 6 / box.width
        if marker:
            text_at += 8 / box.width
            axes.plot(
                margin + 4 / box.width, level, transform=axes.transAxes, color=colour, marker=marker, markersize=7,
                markeredgecolor=_SURFACE, clip_on=False,
            )  # fmt: skip
        axes.text(text_at, level, _short(name), transform=axes.transAxes, va="center_baseline")


def spread(wanted: Sequence[float], gap: float, height: float) -> list[float]:
    """Ascending heights moved apart to at least `gap`, as little as it takes, within 0..`height`."""
    gap = min(gap, height / max(len(wanted) - 1, 1))
    # Neighbours that want the same room become one block, standing where its members' wishes average out.
    blocks: list[tuple[float, int]] = []  # (lowest member's place, members)
    for value in wanted:
        low, size = value, 1
        while True:
            low = min(max(low, 0.0), height - gap * (size - 1))
            if not blocks or blocks[-1][0] + gap * blocks[-1][1] <= low:
                break
            below, members = blocks.pop()
            low = (below * members + (low - gap * members) * size) / (members + size)
            size += members
        blocks.append((low, size))
    return [low + gap * i for low, size in blocks for i in range(size)]
