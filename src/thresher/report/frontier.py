"""What is gained against what is lost: the points no other point beats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from thresher.report.chart import Chart, Series

Point = tuple[float, float]

_LOG_FROM = 10.0  # a speedup beyond which equal ratios deserve equal distances


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other matches in both coordinates and beats in one, higher being better in both.

    In order of the first coordinate, each once; a point with a NaN was not measured and is left out.
    """
    front: list[Point] = []
    for x, y in sorted(((x, y) for x, y in points if not (math.isnan(x) or math.isnan(y))), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def frontier_chart(
    points_by_method: Mapping[str, Sequence[Point]],
    *,
    baseline: float,
    quality_label: str,
    max_loss: float | None = None,
) -> Chart:
    """Quality over speedup, (speedup, quality) points by method: a line along each frontier, the rest as points.

    `baseline` is the quality of the model before dropping; `max_loss` (0.01 is one point) adds the floor it allows.
    """
    series = []
    for method, points in points_by_method.items():
        front = pareto(points)
        beaten = sorted(set(points) - set(front))
        if front:
            series.append(Series(method, *_split(front), "line"))
        if beaten:
            series.append(Series(method, *_split(beaten), "points"))
    series.append(Series("before dropping", (1.0,), (baseline,), "level"))
    note = "Up and to the right is better; a line joins the settings no other setting of that method beats."
    if max_loss is not None:
        lost = f"{100 * abs(max_loss):g}"
        allowed = f"at most {lost} point{'s' if lost != '1' else ''} lost"
        series.append(Series(allowed, (math.nan,), (baseline - abs(max_loss),), "level"))
    return Chart(
        title=f"{quality_label} against speedup",
        x_label="Speedup over the same model without padding",
        y_label=quality_label,
        series=tuple(series),
        log_x=any(x >= _LOG_FROM for points in points_by_method.values() for x, _ in points),
        note=note,
    )


def _split(points: Sequence[Point]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(x for x, _ in points), tuple(y for _, y in points)
