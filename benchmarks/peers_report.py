"""What `peers.py` says of its measurements: the table on the screen, and the records."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from peers_data import LOADS, Quality
from peers_ways import Built, Way
from records import record
from thresher.measure.latency import Spread, Timing, ratio

BASELINE = "stock-padded"


@dataclass
class Measured:
    """One way: its callable, answers on the quality rows and what they are worth, or the reason why there are none.

    timings: by part, "real" for the rows' own lengths, else the number of tokens.
    """

    way: Way
    built: Built | None = None
    answers: list[Any] = field(default_factory=list)
    quality: Quality | None = None
    reason: str = ""
    timings: dict[str, Timing] = field(default_factory=dict)


def label(way: Way, batch: int) -> str:
    """Without what is said of batches where there are none."""
    return (
        way.label
        if batch > 1
        else way.label.removesuffix(", arrival order").removesuffix(", padded").removesuffix(", sorted")
    )


def gains(found: list[Measured], part: str, over: str = BASELINE) -> dict[str, Spread]:
    """How many times faster each way is than the way `over`; nothing where that was not measured."""
    base = next((m.timings[part] for m in found if m.way.id == over and not m.reason), None)
    return {} if base is None else {m.way.id: ratio(base, m.timings[part]) for m in found if not m.reason}


def threads(args: argparse.Namespace) -> str:
    return "1 thread" if args.threads == 1 else f"{args.threads} threads"


def title(args: argparse.Namespace, about: dict[str, Any]) -> str:
    kind = "one request at a time" if args.batch == 1 else f"batch {args.batch}"
    return f"{args.load}, {kind}, {threads(args)}, {about['tokens']:.0f} tokens a row"


def report(found: list[Measured], parts: dict[str, list[Any]], args: argparse.Namespace, about: dict[str, Any]) -> None:
    print(f"\n{title(args, about)}; quality on {about['quality_rows']} rows; {about['minutes']:.1f} minutes\n")
    for part, rows in parts.items():
        print(f"{part if part == 'real' else part + ' tokens'}: {len(rows)} rows, {args.rounds} rounds")
        print(f"{'':44} {'ms a row':>9} {'x stock':>8} {'quartiles':>13} {'x packed':>9}  quality")
        padded, packed = gains(found, part), gains(found, part, "packed")
        for m in found:
            if m.reason:
                print(f"{label(m.way, args.batch):44} not measured: {m.reason}")
                continue
            gain, ms = padded[m.way.id], 1e3 * m.timings[part].median / len(rows)
            over = f"{packed[m.way.id].median:9.2f}" if packed else f"{'':9}"
            quartiles = f"{gain.low:.2f}-{gain.high:.2f}"
            note = f" ({m.built.note})" if m.built.note else ""
            print(
                f"{label(m.way, args.batch):44} {ms:9.2f} {gain.median:8.2f} {quartiles:>13} {over}  {m.quality}{note}"
            )
        print(flush=True)


def write(found: list[Measured], parts: dict[str, list[Any]], args: argparse.Namespace, about: dict[str, Any]) -> None:
    """One record for each way and part."""
    for part, rows in parts.items():
        padded, packed = gains(found, part), gains(found, part, "packed")
        at, asked = (
            ("", title(args, about)) if part == "real" else (f"-{part}", f"{args.load}, one request of {part} tokens")
        )
        for m in found:
            if m.reason:
                continue
            gain, quality = padded[m.way.id], m.quality
            spread = {
                "first_quartile": round(gain.low, 3),
                "third_quartile": round(gain.high, 3),
                "ms_a_row": round(1e3 * m.timings[part].median / len(rows), 3),
            }
            if packed:
                spread["over_packed"] = round(packed[m.way.id].median, 3)
            if m.built is not None and m.built.flops is not None:
                spread["flops"] = round(m.built.flops(rows), 3)
            if quality.value is not None:
                spread[quality.measure.replace(" ", "_")] = round(quality.value, 4)
            record(
                "peers",
                f"peers-{args.load}-b{args.batch}{at}-{m.way.id}",
                f"{label(m.way, args.batch)}: {asked}",
                gain.median,
                "x",
                baseline="stock Hugging Face (torch float32, SDPA), "
                + ("padded, arrival order" if args.batch > 1 else "one request at a time"),
                spread={**spread, "agreement": round(quality.agreement, 4)},
                data=args.load if args.data_dir else f"random ids with {args.load}'s lengths",
                split=LOADS[args.load].split if args.data_dir else "",
                examples=len(rows),
                seeds=[0],
                note=_note(m, args, about),
            )


def _note(m: Measured, args: argparse.Namespace, about: dict[str, Any]) -> str:
    versions = []
    for package in ("onnxruntime", "openvino", "nncf"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    measure = f"{m.quality.measure} and agreement" if m.quality.value is not None else "no fine-tuned model: agreement"
    if m.quality.value is None and about["tuned"]:
        measure = "no labels for this head: agreement"
    parts = (
        m.built.note,
        f"{threads(args)}, {args.rounds} rounds, rows cut at {about['max_tokens']} tokens",
        f"{about['head']} head" + ("" if about["tuned"] else " drawn at random"),
        f"{measure} with the stock answers on {about['quality_rows']} rows, largest difference {m.quality.largest:.2g}",
        ", ".join(versions),
    )
    return "; ".join(filter(None, parts))
