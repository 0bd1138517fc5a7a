"""What a comparison found, as people read it: the tables of the console and the page, the drawing, and what each word means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.comparing.contestants import TRAINED_ON
from thresher.comparing.keeping import CHART, PAGE
from thresher.comparing.standings import Standing, lost
from thresher.methods import CONFIGS
from thresher.report import (
    Chart,
    Figure,
    Report,
    Series,
    Table,
    count,
    points,
    ratio,
    save_chart,
    write_report,
)
from thresher.report.console import MISSING

if TYPE_CHECKING:
    from thresher.comparing.recipe import Comparison

COLUMNS = ("method", "FLOPs speedup", "quality", "points lost", "± standard error", "measured", "when chosen")
WORDS = (
    (
        "the start",
        "The model that every method begins with, fine-tuned once. It runs packed, that is without any padding, and drops "
        "nothing: this is the baseline of every speedup and of every loss.",
    ),
    (
        "FLOPs speedup",
        "FLOPs of the start divided by FLOPs spent, on the judged rows, the method's own work counted. Padding is on neither "
        "side.",
    ),
    (
        "measured",
        "Seconds of the same model packed with nothing dropped divided by its seconds as it is set, in interleaved rounds on "
        "this machine: the median, with the quartiles.",
    ),
    (
        "points lost",
        "Hundredths of the quality by which the start is better, on the judged rows; negative where the method is better. The "
        "standard error is that of this difference on as many rows as there are.",
    ),
    (
        "when chosen",
        "FLOPs speedup and quality on the rows that the setting was chosen on. The frontier and the pick follow from these "
        "alone, so that no setting was chosen by what judges it.",
    ),
    (
        "a+b",
        "A union: tokens drop as a says, and rows leave early as b says. Both are trained for the same budget together.",
    ),
    ("the frontier", "The settings that read less and that no other one beats in both speedup and quality."),
    (
        "a pass",
        "One example read forward and backward. What a teacher reads is not counted; a step that reads its batch several "
        "times counts each.",
    ),
    (
        "random, first, last",
        "Controls, without any training: tokens are dropped blindly. What a method gains over them is its own.",
    ),
    (
        TRAINED_ON,
        "A control: the start trained on for as many passes with nothing dropped, so what more training alone gains.",
    ),
)


def write_page(comparison: Comparison, directory: Path) -> None:
    """comparison.html and frontier.svg."""
    save_chart(chart_of(comparison), directory / CHART)
    write_report(report_of(comparison), directory / PAGE)


def report_of(comparison: Comparison) -> Report:
    tables = [
        Table(
            "The frontier",
            COLUMNS,
            rows(comparison, comparison.frontier),
            f"{baseline_line(comparison)} {padding_line(comparison)}".rstrip(),
        ),
        Table("Every setting of every method", COLUMNS[:5] + COLUMNS[6:], _all(comparison)),
        Table("Which rows did what", ("rows", "what for"), _parts(comparison)),
    ]
    if left := left_rows(comparison):
        tables.append(Table("Left out", ("method", "why"), left))
    tables.append(Table("What each word means", ("word", "meaning"), WORDS))
    return Report(
        title="Every method on one task",
        summary=verdict(comparison),
        figures=tuple(_figures(comparison)),
        tables=tuple(tables),
        charts=(chart_of(comparison),),
        settings={
            name: str(value)
            for name, value in {**comparison.settings, **comparison.versions}.items()
            if not isinstance(value, list)
        },
    )


def verdict(comparison: Comparison) -> str:
    """The pick in one sentence, or what comes nearest to the target."""
    picked, near = comparison.pick, comparison.nearest
    if picked is not None:
        sure = "" if picked.error is None else f" (± {100 * picked.error:.1f})"
        return (
            f"For {comparison.target} the pick is {picked.contestant}: {ratio(picked.judged.speedup)} fewer FLOPs and "
            f"{lost(picked.loss)}{sure} of {comparison.label} lost on rows that nothing was chosen on.{_too_much(comparison)}"
            f"{_blind(picked)}"
        )
    if near is None:
        return f"No method read less than the start, so nothing meets {comparison.target}."
    return (
        f"Nothing meets {comparison.target}; of what the methods were set to, the nearest is {near.contestant} with "
        f"{ratio(near.chosen.speedup)} and {lost(comparison.baseline[0] - near.chosen.quality)} lost on the rows that settings "
        "are chosen on."
    )


def _blind(picked: Standing) -> str:
    """What to make of a control as the pick; empty for a method."""
    kind = CONFIGS.get(picked.contestant)
    if kind is None or not kind.control:
        return ""
    return (
        " That is a control, which drops tokens blindly: no method did better, so none has learned enough. Give --passes more "
        "(passes=), or more rows to choose on."
    )


def _too_much(comparison: Comparison) -> str:
    """What to make of a pick that loses more than was allowed on the rows that judge it; empty for any other."""
    picked, target = comparison.pick, comparison.target
    if picked is None or target.kind != "max_loss" or picked.loss <= target.value:
        return ""
    return (
        f" That is more than was asked for: {comparison.parts[0][1]} rows are few to choose a setting on. Give more with "
        "--validation (validation=), or ask for less."
    )


def rows(comparison: Comparison, standings: Sequence[Standing]) -> tuple[tuple[str, ...], ...]:
    """Of COLUMNS; the pick has a star."""
    return tuple(
        (
            one.contestant + (" *" if one == comparison.pick else ""),
            ratio(one.judged.speedup),
            f"{one.judged.quality:.4f}",
            points(one.loss).lstrip("+"),
            MISSING if one.error is None or math.isnan(one.error) else f"{100 * one.error:.1f}",
            MISSING if one.measured is None else spread(one.measured["measured"]),
            f"{ratio(one.chosen.speedup)}, {one.chosen.quality:.4f}",
        )
        for one in standings
    )


def baseline_line(comparison: Comparison) -> str:
    """What everything is compared with."""
    chosen, judged = comparison.baseline
    star = "* the pick. " if comparison.pick is not None else ""
    return (
        f"{star}The start, packed, nothing dropped: {comparison.label} {judged:.4f} on {comparison.parts[1][0]} "
        f"({chosen:.4f} where settings are chosen)."
    )


def padding_line(comparison: Comparison) -> str:
    """What leaving out padding gains by itself; empty where no wall-clock was taken."""
    timed = [one.measured for one in (comparison.pick, *comparison.frontier) if one is not None and one.measured]
    if not timed:
        return ""
    return f"Leaving out padding alone gains {spread(timed[0]['padding_only'])}, and is in no other figure."


def spread(value: Any) -> str:
    return f"{ratio(value['median'])} ({value['low']:.2f}-{value['high']:.2f})"


def left_rows(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    """Methods without points, and targets that a method does not meet, with the reasons."""
    missed = [
        (f"{name}, {key.replace('=', ' ')}", reason)
        for name, of in comparison.missed.items()
        for key, reason in of.items()
    ]
    return (*comparison.left_out.items(), *missed)


def chart_of(comparison: Comparison) -> Chart:
    """Judged quality over judged speedup: each method's settings as points, the frontier as a line."""
    series = []
    for name in dict.fromkeys(one.contestant for one in comparison.standings):
        own = [one for one in comparison.standings if one.contestant == name]
        series.append(_series(name, own, "points"))
    series.append(_series("the frontier", comparison.frontier, "line"))
    if comparison.pick is not None:
        series.append(_series("the pick", [comparison.pick], "line"))
    quality = comparison.baseline[1]
    series.append(Series("the start", (1.0,), (quality,), "level"))
    if comparison.target.kind == "max_loss" and comparison.target.value:
        floor = quality - comparison.target.value
        series.append(Series(f"{lost(comparison.target.value)} lost", (math.nan,), (floor,), "level"))
    return Chart(
        title=f"{comparison.label} against speedup",
        x_label="FLOPs speedup over the same model without padding",
        y_label=comparison.label,
        series=tuple(series),
        log_x=any(one.judged.speedup >= 10 for one in comparison.standings),
        note="Up and to the right is better. The line joins the settings that no other one beat on the rows for choosing; all "
        "points are drawn where the judged rows put them.",
    )


def _series(name: str, standings: Sequence[Standing], style: Any) -> Series:
    return Series(
        name, tuple(one.judged.speedup for one in standings), tuple(one.judged.quality for one in standings), style
    )


def _all(comparison: Comparison) -> tuple[tuple[str, ...], ...]:
    return tuple((*row[:5], row[6]) for row in rows(comparison, comparison.standings))


def _parts(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    (chosen, first), (judged, second) = comparison.parts
    passes = max(comparison.passes.values(), default=0)
    return (
        ("the training rows", f"every method was trained on them, for {count(passes)} passes at most"),
        (
            f"{chosen}, {count(first)} rows",
            "settings were searched and set to speedups on them; frontier and pick chosen",
        ),
        (f"{judged}, {count(second)} rows", "every figure is of them; nothing was chosen on them"),
    )


def _figures(comparison: Comparison) -> list[Figure]:
    figures = [Figure(comparison.label, f"{comparison.baseline[1]:.4f}", "the start, packed, nothing dropped")]
    if (one := comparison.pick) is None:
        return figures
    error = "" if one.error is None else f"standard error {100 * one.error:.1f}"
    figures += [
        Figure("The pick", one.contestant, str(comparison.target)),
        Figure("FLOPs", ratio(one.judged.speedup), "against the same model without padding"),
        Figure("Points lost", points(one.loss).lstrip("+"), error),
    ]
    if one.measured is not None:
        figures += [
            Figure("Measured", ratio(one.measured["measured"]["median"]), "the same comparison, in time"),
            Figure("Padding alone", ratio(one.measured["padding_only"]["median"]), "in no other figure"),
        ]
    return figures


__all__ = ["COLUMNS", "baseline_line", "left_rows", "padding_line", "report_of", "rows", "verdict", "write_page"]
