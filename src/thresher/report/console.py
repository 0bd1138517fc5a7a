"""Numbers and tables as people read them, on the console and in the report."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from thresher.report._support import needs

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "—"
# A number, perhaps with a sign, a bound, a unit or a spread: "-0.4", "<0.01", "12.3 ms", "1 h 02 min", "92.4 ± 0.3".
_NUMBER = re.compile(r"[-+~<>±]?\s*\.?\d[\d,.]*(e[-+]?\d+)?(x|%|\s?[a-zA-Zµ]{1,6}(/s)?)?((\s|\s*±\s*)\d.*)?")


def ratio(value: float) -> str:
    """`1.85x`; three figures are as many as a measured ratio deserves."""
    if not math.isfinite(value):
        return MISSING
    places = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{places}f}x"


def points(difference: float) -> str:
    """A difference between two values of a 0..1 metric, in points: -0.004 is `-0.4`."""
    if not math.isfinite(difference):
        return MISSING
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def seconds(value: float) -> str:
    """A duration in the unit that suits it: `850 µs`, `12.3 ms`, `1.85 s`, `2 min 05 s`, `1 h 02 min`."""
    if not math.isfinite(value):
        return MISSING
    if value < 0:
        return "-" + seconds(-value)
    # Each limit lies where the smaller unit would round up to one of the larger.
    for limit, scale, unit in ((0.9995e-3, 1e6, "µs"), (0.9995, 1e3, "ms"), (59.95, 1.0, "s")):
        if value < limit:
            return f"{_three_figures(value * scale)} {unit}"
    if round(value) < 3600:
        return f"{round(value) // 60} min {round(value) % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def count(value: float) -> str:
    """`12,345`."""
    return f"{round(value):,}" if math.isfinite(value) else MISSING


def size(value: float) -> str:
    """Bytes in the unit that suits them: `812 B`, `4.13 kB`, `90.9 MB`."""
    for limit, scale, unit in ((999.5, 1.0, "B"), (999.5e3, 1e3, "kB"), (999.5e6, 1e6, "MB")):
        if value < limit:
            return f"{_three_figures(value / scale) if scale > 1 else count(value)} {unit}"
    return f"{_three_figures(value / 1e9)} GB"


def percent(share: float) -> str:
    """`98.4%`."""
    return f"{100 * share:.1f}%" if math.isfinite(share) else MISSING


def _three_figures(value: float) -> str:
    if value == 0:
        return "0"
    places = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{places}f}"


def numeric_columns(width: int, rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which of `width` columns hold only numbers, with or without a unit, and so line up on the right."""
    flags = []
    for column in range(width):
        cells = [row[column].strip() for row in rows if column < len(row)]
        filled = [cell for cell in cells if cell not in ("", "-", MISSING)]
        flags.append(bool(filled) and all(_NUMBER.fullmatch(cell) for cell in filled))
    return flags


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str | None = None) -> Table:
    """A table for a rich console; columns of numbers stand on the right, and cells are shown as they are."""
    with needs("rich"):
        from rich import box
        from rich.table import Table
        from rich.text import Text
    cells = [[str(cell) for cell in row] for row in rows]
    shown = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption=Text(note, style="dim") if note else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name, numeric in zip(columns, numeric_columns(len(columns), cells), strict=True):
        shown.add_column(Text(name), justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for row in cells:
        # As Text, because a cell may be a token such as "[SEP]", which rich would take for markup.
        shown.add_row(*(Text(cell) for cell in row))
    return shown
