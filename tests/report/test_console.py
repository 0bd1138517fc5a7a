"""Numbers as people read them, and tables that line them up."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from thresher.report import count, points, ratio, seconds, table
from thresher.report.console import numeric_columns, percent, size


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.8531, "1.85x"), (0.5, "0.50x"), (9.996, "10.0x"), (12.34, "12.3x"), (99.96, "100x"), (1234.5, "1,234x")],
)
def test_ratio(value: float, text: str) -> None:
    assert ratio(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.004, "-0.4"), (0.0123, "+1.2"), (0.0, "0.0"), (-0.0001, "0.0"), (0.0001, "0.0"), (-1, "-100.0")],
)
def test_points(value: float, text: str) -> None:
    assert points(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 µs"),
        (2.5e-6, "2.50 µs"),
        (850e-6, "850 µs"),
        (0.99999e-3, "1.00 ms"),
        (0.0123, "12.3 ms"),
        (0.9999, "1.00 s"),
        (1.849, "1.85 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3720, "1 h 02 min"),
        (-0.0123, "-12.3 ms"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(812, "812 B"), (999.6, "1.00 kB"), (141_234, "141 kB"), (90_900_000, "90.9 MB"), (1.2e9, "1.20 GB")],
)
def test_size(value: float, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.984, "98.4%"), (0, "0.0%"), (1, "100.0%"), (math.nan, "—")])
def test_percent(value: float, text: str) -> None:
    assert percent(value) == text


@pytest.mark.parametrize(("value", "text"), [(12345, "12,345"), (0, "0"), (-1200, "-1,200"), (999.6, "1,000")])
def test_count(value: float, text: str) -> None:
    assert count(value) == text


def test_what_was_not_measured_is_a_dash() -> None:
    assert {f(v) for f in (ratio, points, seconds, count) for v in (math.nan, math.inf, -math.inf)} == {"—"}


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e9, max_value=1e9))
def test_every_formatted_number_lines_up(value: float) -> None:
    assert numeric_columns(1, [[f(value)] for f in (ratio, points, seconds, count)]) == [True]


def test_columns_of_words_or_nothing_are_not_numbers() -> None:
    rows = [["ltp", "1.85x", "", "2026-01-31", "92.4 ± 0.3"], ["3 small words here", "—", "—", "1", "<0.01"]]
    assert numeric_columns(5, rows) == [False, True, False, False, True]


def test_table_aligns_numbers_and_shows_cells_as_they_are() -> None:
    shown = table("Settings [a]", ["Token", "Speedup"], [["[SEP]", "1.85x"], ["[/bold]", 12]], note="on one core")
    assert [column.justify for column in shown.columns] == ["left", "right"]
    stream = io.StringIO()
    Console(file=stream, width=60).print(shown)
    for text in ("Settings [a]", "[SEP]", "[/bold]", "1.85x", "12", "on one core"):
        assert text in stream.getvalue()
