"""Charts: every value drawn, every name told, and labels that never cover each other."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import ThresherError
from thresher.report import Chart, Series, chart_svg, save_chart
from thresher.report._drawing import spread


def _texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_names_are_text_and_never_markup_or_mathematics(hostile: str, chart: Chart) -> None:
    svg = chart_svg(chart)
    assert {hostile, "$other$", "before", "Speedup $x$", "Accuracy & more"} <= set(_texts(svg))
    assert "<script" not in svg


def test_colours_follow_the_page(hostile: str, chart: Chart) -> None:
    svg = chart_svg(chart)
    assert "var(--series-1, #0072b2)" in svg and "var(--chart-ink, " in svg
    root = ElementTree.fromstring(svg)
    assert root.get("width") is None and root.get("viewBox") == "0 0 720 380"
    assert root.get("role") == "img" and hostile in (root.get("aria-label") or "")


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_charts_are_saved_by_suffix(tmp_path: Path, suffix: str, chart: Chart) -> None:
    path = save_chart(chart, tmp_path / f"chart{suffix}")
    start = path.read_bytes()[:8]
    assert start == b"\x89PNG\r\n\x1a\n" if suffix == ".png" else start == b"<?xml ve"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == ".svg":
        texts = _texts(path.read_text(encoding="utf-8"))
        assert chart.title in texts and "var(" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["chart.pdf", "chart"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str, chart: Chart) -> None:
    with pytest.raises(ThresherError, match=r"\.svg or \.png"):
        save_chart(chart, tmp_path / name)


def test_a_log_axis_has_plain_numbers() -> None:
    texts = _texts(chart_svg(Chart("t", "x", "y", (Series("a", (1, 10, 100), (1, 2, 3)),), log_x=True)))
    assert {"1", "10", "100"} <= set(texts) and not any("$" in text for text in texts)


@pytest.mark.parametrize(
    "series",
    [
        (),
        (Series("none", (), ()),),
        (Series("one", (1.0,), (0.5,)),),
        (Series("holes", (1.0, 2.0, math.nan), (math.nan, 0.5, 0.1)), Series("void", (math.nan,), (math.inf,))),
        (Series("level", (math.nan,), (0.9,), "level"),),
        tuple(Series(f"a rather long name, number {i}" * 2, (1.0, 2.0), (0.5, 0.5)) for i in range(30)),
    ],
)
@pytest.mark.parametrize("log_x", [False, True])
def test_odd_data_still_make_a_chart(series: tuple[Series, ...], log_x: bool) -> None:
    drawn = ElementTree.fromstring(chart_svg(Chart("t", "x", "y", series, log_x=log_x)))
    assert drawn.tag.endswith("svg")


def test_series_of_one_name_share_a_colour_and_a_label() -> None:
    twice = (
        Series("ltp", (1.0, 2.0), (0.9, 0.8)),
        Series("ltp", (1.5,), (0.7,), "points"),
        Series("x", (1.0,), (0.6,)),
    )
    svg = chart_svg(Chart("t", "x", "y", twice))
    assert _texts(svg).count("ltp") == 1
    assert set(re.findall(r"--series-\d", svg)) == {"--series-1", "--series-2"}


def test_series_check_themselves() -> None:
    with pytest.raises(ThresherError, match="2 x values and 1 y values"):
        Series("a", (1.0, 2.0), (1.0,))
    with pytest.raises(ThresherError, match="known are line, points, level"):
        Series("a", (1.0,), (1.0,), "bars")  # type: ignore[arg-type]


def test_the_users_own_settings_come_back(chart: Chart) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"text.parse_math": True, "lines.linewidth": 9.0}):
        chart_svg(chart)
        assert matplotlib.rcParams["lines.linewidth"] == 9.0 and matplotlib.rcParams["text.parse_math"]
    assert dict(matplotlib.rcParams) == before


@given(st.lists(st.floats(-50, 450), max_size=12), st.floats(1, 40))
def test_labels_stay_apart_in_order_and_inside(wanted: list[float], gap: float) -> None:
    wanted, height = sorted(wanted), 400.0
    placed = spread(wanted, gap, height)
    room = min(gap, height / max(len(wanted) - 1, 1))
    assert len(placed) == len(wanted)
    assert all(-1e-6 <= p <= height + 1e-6 for p in placed)
    assert all(b - a >= room - 1e-6 for a, b in pairwise(placed))


@given(st.integers(1, 9))
def test_labels_with_room_enough_stay_put(n: int) -> None:
    wanted = [40.0 * i for i in range(n)]
    assert spread(wanted, 20.0, 400.0) == wanted
