"""The report: whole, self-contained, inert, legible, and written in one step."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import thresher.report
from thresher.errors import ThresherError
from thresher.report import Report, Table, render, write_report


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return render(report)


def test_everything_given_is_shown(html: str, read_page: Callable[[str], Any]) -> None:
    shown = read_page(html).shown
    for text in (
        "Twice as fast.",
        "1.85x",
        "92.4%",
        "2.10x",
        "positive, .98",
        "The film is not dull.",
        "ltp",
        "$other$",
    ):
        assert text in shown


def test_markup_in_any_field_is_inert(html: str, hostile: str, read_page: Callable[[str], Any]) -> None:
    page = read_page(html)
    assert len(page.all("script")) == 1 and "alert" not in page.scripts[0]
    # title, h1, summary, figure, table cell and note, setting's name and value, map's title, note and text, chart's ...
    assert page.shown.count(hostile) >= 13


def test_nothing_is_fetched(html: str, read_page: Callable[[str], Any]) -> None:
    page = read_page(html)
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object"}
        assert "src" not in attributes and "href" not in attributes
        reference = attributes.get("xlink:href")
        assert reference is None or reference.startswith("#")
    assert not re.search(r"url\((?!#)|@import", html)


def test_the_policy_admits_only_the_pages_own_script(html: str, read_page: Callable[[str], Any]) -> None:
    page = read_page(html)
    digest = base64.b64encode(hashlib.sha256("".join(page.scripts).encode()).digest()).decode()
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_charts_on_one_page_do_not_clash(html: str, read_page: Callable[[str], Any]) -> None:
    page = read_page(html)
    targets = {(a.get("xlink:href") or "")[1:] for a in page.all("use")}
    assert targets <= {a["id"] for _, a in page.elements if "id" in a}
    assert "id" not in {key for attributes in page.all("g") for key in attributes}


def test_an_empty_report_is_a_page_without_sections(read_page: Callable[[str], Any]) -> None:
    page = read_page(render(Report("Nothing", "Nothing was measured.")))
    assert "Nothing was measured." in page.shown and page.all("section") == []


def test_numbers_stand_on_the_right(html: str, read_page: Callable[[str], Any]) -> None:
    page = read_page(html)
    assert [a.get("class") for a in page.all("th")] == [None, "number"]
    assert [a.get("class") for a in page.all("td")] == [None, "number"] * 2


def test_a_ragged_table_is_refused() -> None:
    with pytest.raises(ThresherError, match="'T' needs 2 cells"):
        Table("T", ("a", "b"), (("1",),))


def test_the_same_report_gives_the_same_page(html: str, report: Report) -> None:
    assert render(report) == html


def test_writing_replaces_the_old_page_and_leaves_nothing_else(tmp_path: Path, html: str, report: Report) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_report(report, path) == path
    assert path.read_text(encoding="utf-8") == html
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "report.html"
    path.write_text("old")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"thresher.report._support.os.{step}", full)
            with pytest.raises(ThresherError, match=r"Cannot write .*report\.html: No space left on device\."):
                write_report(Report("t", "s"), path)
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("thresher.report._support.os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_report(Report("t", "s"), tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ThresherError, match="No such file or directory"):
        write_report(Report("t", "s"), tmp_path / "nowhere" / "report.html")
    with pytest.raises(ThresherError, match="directory"):
        write_report(Report("t", "s"), tmp_path)
    assert os.listdir(tmp_path) == []


def test_undecodable_text_does_not_cost_the_report(tmp_path: Path) -> None:
    write_report(Report("caf\udce9", "s"), tmp_path / "r.html")
    assert "caf?" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from thresher.report import _support

    _support._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ThresherError, match=r'pip install "thresher\[demo\]"'):
        thresher.report.to_html([], "t")


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _over(top: str, alpha: float, ground: str) -> str:
    """The colour of `r g b` painted so thick over `ground`."""
    below = [int(ground[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(
        f"{round(int(t) * alpha + b * (1 - alpha)):02x}" for t, b in zip(top.split(), below, strict=True)
    )


@pytest.mark.parametrize("dark", [False, True])
def test_both_themes_have_enough_contrast(dark: bool) -> None:
    from thresher.report._drawing import THEME

    css = (Path(thresher.report.__file__).parent / "templates" / "style.css").read_text()
    light_block, dark_block = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    colours = {name: colour for colour, name in THEME.items()}
    for block in (light_block, dark_block)[: 1 + dark]:
        colours |= dict(re.findall(r"(--[\w-]+): ([^;]+);", block))
    for text in ("--ink", "--muted", "--accent"):
        assert _contrast(colours[text], colours["--paper"]) >= 4.5
    assert _contrast(colours["--chart-ink"], colours["--surface"]) >= 4.5
    for number in range(1, 7):  # lines are not text: 3 is what WCAG asks of them
        assert _contrast(colours[f"--series-{number}"], colours["--surface"]) >= 3
    assert _contrast(colours["--ink"], _over(colours["--grain"], 0.55, colours["--paper"])) >= 4.5
    for a in (i / 20 for i in range(20)):  # a dropped word: its letters darken with its ground
        ground = _over(colours["--grain"], 0.42 * a, colours["--paper"])
        ink = " ".join(str(int(colours["--ink"][i : i + 2], 16)) for i in (1, 3, 5))
        assert _contrast(_over(ink, a, colours["--muted"]), ground) >= 4.5
