"""From the records of peers.py: the best way that drops against the fastest others, and what dropping gains on top of int8 in
the exported graph, as records with their targets.

python benchmarks/peers_summary.py
"""

from __future__ import annotations

import json
import re
from typing import Any

from records import RESULTS, record

# Ways that run one sequence a core are no padded peers, but they are ways to run the undropped model.
ALONE = ("cores", "streams", "exported")
TARGETS = {"imdb": (2.5, 1.7), "squad": (2.5, 1.7), "wikiqa": (1.2, None)}
LATENCY = 1.4
REALISED = 0.85


def main() -> None:
    entries = json.loads((RESULTS / "peers.json").read_text())
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in entries:
        found = re.fullmatch(r"(peers-(?:imdb|squad|wikiqa)-b\d+(?:-\d+)?)-([a-z].*)", entry["id"])
        if found and not found[2].startswith("over-"):
            groups.setdefault(found[1], {})[found[2]] = entry
    for name, ways in groups.items():
        load, batch = name.split("-")[1:3]
        ours = best({way: e for way, e in ways.items() if "drop" in way})
        padded = best({w: e for w, e in ways.items() if "drop" not in w and "packed" not in w and not has(w, ALONE)})
        undropped = best({w: e for w, e in ways.items() if "drop" not in w})
        if not (ours and padded and undropped):
            continue
        over_padded, over_undropped = TARGETS[load]
        if batch == "b1":
            long = re.search(r"b1-(128|256|384)$", name)
            over_padded, over_undropped = (LATENCY if long else None), None
        for other, bar, what in (
            (padded, over_padded, "the fastest padded peer"),
            (undropped, over_undropped, "the fastest way to run the model undropped"),
        ):
            suffix = "over-padded" if other is padded and what.endswith("peer") else "over-undropped"
            record(
                "peers", f"{name}-{suffix}", f"{label(ours)} over {what}", ours["value"] / other["value"], "x",
                target=None if bar is None else f">= {bar}", baseline=label(other), data=ours["data"], split=ours["split"],
                examples=ours["examples"], seeds=ours["seeds"], note="of two ratios over stock, each paired",
            )  # fmt: skip
            print(f"{name}-{suffix}: {label(ours)} / {label(other)} = {ours['value'] / other['value']:.2f} (>= {bar})")

        if batch != "b1" and {"exported-int8", "exported-drop-int8"} <= set(ways):
            realised(name, ways)


def realised(name: str, ways: dict[str, dict[str, Any]]) -> None:
    """What dropping gains over the same exported int8 graph without it, as a share of the FLOPs ratio of the timed rows."""
    ours = ways["exported-drop-int8"]
    flops = ours["spread"].get("flops")
    if flops is None:  # timed before it was kept
        return
    gained = ours["value"] / ways["exported-int8"]["value"]
    record(
        "peers", f"{name}-over-exported", f"{label(ours)} over the same export dropping nothing, as a share of its FLOPs ratio",
        gained / flops, "ratio", target=f">= {REALISED}", spread={"clock": round(gained, 3), "flops": round(flops, 3)},
        baseline=label(ways["exported-int8"]), data=ours["data"], split=ours["split"], examples=ours["examples"],
        seeds=ours["seeds"], note="both ratios of the rows that are timed",
    )  # fmt: skip
    print(f"{name}-over-exported: {gained:.2f} of {flops:.2f} = {gained / flops:.2f} (>= {REALISED})")


def has(way: str, parts: tuple[str, ...]) -> bool:
    return any(part in way for part in parts)


def best(ways: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    return max(ways.values(), key=lambda e: e["value"], default=None)


def label(entry: dict[str, Any]) -> str:
    spread = entry["spread"]
    quality = {k: v for k, v in spread.items() if k in ("accuracy", "MRR", "span_F1", "token_F1")}
    detail = "".join(f", {k.replace('_', ' ')} {v:.3f}" for k, v in quality.items())
    return entry["what"].split(":")[0] + detail


if __name__ == "__main__":
    main()
