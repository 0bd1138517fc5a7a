"""What a comparison found, as records, with its report and its chart in the documents.

    thresher compare MODEL imdb:train --test imdb:test --max-loss 0.01 --speedups 1.5,2,3 --out RUNS/compare-imdb
    python benchmarks/comparisons.py imdb --run RUNS/compare-imdb --command "thresher compare ..."

--command: the one that made it, as it stands in the documents; it is kept with each record.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from records import record

DOCS = Path(__file__).parent.parent / "docs"
KINDS = {"speedup": "{:g}x asked for", "max_loss": "at most {:g} points lost"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--run", type=Path, required=True, help="the comparison's OUT")
    parser.add_argument("--command", required=True)
    args = parser.parse_args()
    found = json.loads((args.run / "comparison.json").read_text())
    whole = {"html": (args.run / "comparison.html").read_text(), "svg": (args.run / "frontier.svg").read_text()}
    for text in whole.values():
        if str(args.run) in text or str(Path.home()) in text:
            raise SystemExit(
                f"The report of {args.run} names folders of this machine; it does not belong in the documents."
            )
    for one in found["points"]:
        write(args, found, one)
    if found["pick"]:
        write_pick(args, found)
    (DOCS / "reports").mkdir(exist_ok=True)
    (DOCS / "reports" / f"compare-{args.name}.html").write_text(whole["html"])
    (DOCS / "img" / f"compare-{args.name}.svg").write_text(whole["svg"])


def write(args: argparse.Namespace, found: dict[str, Any], one: dict[str, Any]) -> None:
    kind, value = one["target"].split("=")
    asked = KINDS[kind].format(100 * float(value) if kind == "max_loss" else float(value))
    spread = {
        "flops_speedup": round(one["judged"]["speedup"], 3),
        "standard_error": one["error"] and round(100 * one["error"], 2),
    }
    spread |= wall_clock(one)
    record(
        "comparisons",
        f"compare-{args.name}-{one['contestant']}-{re.sub('[^0-9a-z.]', '-', one['target'])}",
        f"{found['metric']} lost by {one['contestant']}, {asked}",
        100 * one["loss"],
        "points",
        spread=spread,
        cell=(f"{found['metric']} lost on {args.name}, in points", one["contestant"], asked),
        **about(args, found),
    )


def write_pick(args: argparse.Namespace, found: dict[str, Any]) -> None:
    pick = found["pick"]
    record(
        "comparisons",
        f"compare-{args.name}-pick",
        f"FLOPs speedup of the pick, {pick['contestant']}, on the rows that judge",
        pick["judged"]["speedup"],
        "x",
        spread={"points_lost": round(100 * pick["loss"], 2), **wall_clock(pick)},
        **about(args, found),
    )


def wall_clock(one: dict[str, Any]) -> dict[str, float]:
    """The measured speedup of a point that was timed, and what leaving padding out gains by itself."""
    found = one["measured"]
    return {name: round(found[name]["median"], 3) for name in ("measured", "padding_only")} if found else {}


def about(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    judged = found["parts"]["judged"]
    return {
        "data": args.name,
        "split": judged["what"],
        "examples": judged["rows"],
        "seeds": [found["settings"]["seed"]],
        "baseline": f"the start, packed, nothing dropped: {found['metric']} {100 * found['baseline']['judged']:.2f} %",
        "note": f"{args.command}; settings chosen on {found['parts']['chosen']['rows']} rows",
    }


if __name__ == "__main__":
    main()
