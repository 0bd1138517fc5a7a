"""The chart of `peers.py`: a bar for every way, as long as it is faster than the stock model, its quality at its end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peers_report import gains, label

INK, RULE, PEER, OURS, SURFACE = "#4a5058", "#dedbd4", "#b4b0a8", "#0072b2", "#fffffe"
LOOK = {
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 72,
    "font.size": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "thresher",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.major.size": 0,
}


def draw(found: list[Any], parts: list[str], path: Path, title: str, batch: int) -> None:
    """One panel a part, the ways in the order of the last part's speed; quartiles as a line at the bar's end."""
    import matplotlib
    from matplotlib.figure import Figure

    by_part = {part: gains(found, part) for part in parts}
    alive = sorted((m for m in found if not m.reason), key=lambda m: by_part[parts[-1]][m.way.id].median)
    with matplotlib.rc_context({**LOOK, "font.family": ["DejaVu Sans"]}):
        widths = [1.0] * (len(parts) - 1) + [2.0]
        size = (11.0 if len(parts) == 1 else 7.0 + 1.9 * len(parts), 1.2 + 0.34 * len(alive))
        figure = Figure(figsize=size, layout="constrained", facecolor=SURFACE)
        panels = figure.subplots(1, len(parts), sharey=True, squeeze=False, width_ratios=widths)[0]
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
        for axes, part in zip(panels, parts, strict=True):
            axes.set_facecolor("none")
            spreads = [by_part[part][m.way.id] for m in alive]
            values = [s.median for s in spreads]
            colours = [OURS if m.way.ours else PEER for m in alive]
            axes.barh(range(len(alive)), values, color=colours, height=0.7)
            for y, (m, s) in enumerate(zip(alive, spreads, strict=True)):
                axes.plot((s.low, s.high), (y, y), color=INK, linewidth=1.2)
                quality = f"  {m.quality}" if part == parts[-1] else ""
                axes.text(max(s.high, s.median), y, f" {s.median:.1f}x{quality}", va="center", fontsize=10)
            axes.set_yticks(range(len(alive)), [label(m.way, batch) for m in alive])
            room = 1.3 if part != parts[-1] else 1.75 if len(parts) == 1 else 2.6
            axes.set_xlim(0, max(s.high for s in spreads) * room)
            axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            if len(parts) > 1:
                axes.set_title("the rows' own lengths" if part == "real" else f"{part} tokens", loc="left", fontsize=11)
        figure.supxlabel("times faster than stock Hugging Face", fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = path.read_text(encoding="utf-8")
    font = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
    path.write_text(re.sub(r"'DejaVu Sans'[^;\"]*", font, text).rstrip() + "\n", encoding="utf-8")
