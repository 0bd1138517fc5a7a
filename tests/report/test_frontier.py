"""The frontier against the definition, and the chart made of it."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from thresher.report import chart_svg, frontier_chart, pareto

# Few distinct values, so that ties and duplicates are common.
_COORDINATE = st.integers(0, 6).map(float) | st.floats(0, 6)
_POINTS = st.lists(st.tuples(_COORDINATE, _COORDINATE), max_size=25)


def _by_definition(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    def beats(q: tuple[float, float], p: tuple[float, float]) -> bool:
        return q[0] >= p[0] and q[1] >= p[1] and q != p

    return sorted({p for p in points if not any(beats(q, p) for q in points)})


@given(_POINTS)
def test_pareto_is_its_definition(points: list[tuple[float, float]]) -> None:
    assert pareto(points) == _by_definition(points)


@given(_POINTS)
def test_pareto_of_a_frontier_is_itself(points: list[tuple[float, float]]) -> None:
    assert pareto(pareto(points)) == pareto(points)


def test_what_was_not_measured_is_left_out() -> None:
    assert pareto([(1.0, math.nan), (math.nan, 9.0), (2.0, 0.5)]) == [(2.0, 0.5)]


def test_the_chart_parts_the_frontier_from_the_beaten() -> None:
    chart = frontier_chart(
        {"ltp": [(2.0, 0.9), (1.5, 0.85), (3.0, 0.8)], "random": [], "lost": [(math.nan, 0.5)]},
        baseline=0.92,
        quality_label="Accuracy",
        max_loss=0.01,
    )
    by_style = {(s.name, s.style): (s.xs, s.ys) for s in chart.series}
    assert by_style["ltp", "line"] == ((2.0, 3.0), (0.9, 0.8))
    assert by_style["ltp", "points"] == ((1.5,), (0.85,))
    assert by_style["before dropping", "level"] == ((1.0,), (0.92,))
    assert math.isclose(by_style["at most 1 point lost", "level"][1][0], 0.91)
    assert not any(name == "random" for name, _ in by_style)
    assert not chart.log_x and "Accuracy" in chart.title
    assert "at most 1 point lost" in chart_svg(chart)


def test_large_speedups_get_a_log_axis() -> None:
    assert frontier_chart({"a": [(1.0, 0.9), (40.0, 0.8)]}, baseline=0.9, quality_label="F1").log_x
