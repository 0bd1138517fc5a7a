"""Records of what was measured: appended to benchmarks/results/*.json, and printed with whether each target holds."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The processor's name, its family and model (one name can stand for several generations), and how many cores there are."""
    told: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            told.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    name = told.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{what} {told[key]}" for what, key in (("family", "cpu family"), ("model", "model")) if key in told]
    return f"{name} ({', '.join(numbers)}), {os.cpu_count()} cores" if numbers else f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "sentence-transformers", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command(arguments: list[str]) -> str:
    """The command line, each folder of this machine replaced by the name of its option: --data-dir DATA-DIR."""
    words = [f"benchmarks/{Path(arguments[0]).name}"]
    for before, word in pairwise(arguments):
        words.append(before.lstrip("-").upper() if before.startswith("--") and "/" in word else word)
    return "python " + " ".join(words)


def record(
    file: str,
    id: str,
    what: str,
    value: float,
    unit: str,
    *,
    target: str | None = None,
    baseline: str = "",
    spread: Any = None,
    data: str = "",
    split: str = "",
    examples: int | None = None,
    seeds: list[int] | None = None,
    note: str = "",
    cell: tuple[str, str, str] | None = None,
    shown: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Write one record (replacing an older one of the same id) and return it. target: e.g. ">= 2.5".

    cell: heading, row and column of a table in which the documents show it, with the "flops_speedup" of its spread or, where
        there is none, what `shown` names of it, or all.
    """
    entry = {
        "id": id,
        "what": what,
        "value": round(value, 5),
        "unit": unit,
        "target": target,
        "baseline": baseline,
        "spread": spread,
        "command": command(sys.argv),
        "data": data,
        "split": split,
        "examples": examples,
        "seeds": seeds or [],
        "machine": machine(),
        "versions": versions(),
        "date": date.today().isoformat(),
        "note": note,
        **({"cell": cell} if cell else {}),
        **({"shown": shown} if shown is not None else {}),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{file}.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    entries = [e for e in entries if e["id"] != id] + [entry]
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(entries, indent=1) + "\n")
    staged.replace(path)
    return entry


def holds(entry: dict[str, Any]) -> bool | None:
    """Whether a record meets its target; None without one."""
    if entry["target"] is None:
        return None
    sign, bound = entry["target"].split()
    return entry["value"] >= float(bound) if sign == ">=" else entry["value"] <= float(bound)


def all_entries() -> dict[str, dict[str, Any]]:
    """Every record by its id."""
    return {e["id"]: e for path in sorted(RESULTS.glob("*.json")) for e in json.loads(path.read_text())}


def headline(entries: dict[str, dict[str, Any]]) -> str:
    """The one figure of the README's first screen."""
    value = {name: entry["value"] for name, entry in entries.items()}
    served, over_peer = value["peers-imdb-b32-exported-drop-int8"], value["peers-imdb-b32-over-padded"]
    before, after = (
        100 * entries[f"peers-imdb-b32-{way}"]["spread"]["accuracy"] for way in ("stock-padded", "exported-drop-int8")
    )
    embedding, fewer, mrr = value["demo-measured"], value["demo-flops"], value["demo-mrr"]
    return (
        f"> **IMDb, MiniLM-L6 on two cores: {served:.0f}x faster than stock Hugging Face** in padded batches, "
        f"{over_peer:.1f}x faster than the fastest other way we found (OpenVINO int8); accuracy {before:.1f} to {after:.1f} % "
        f"(tokens drop and rows leave early; exported in int8). **Embedding documents for search: {embedding:.1f}x faster** "
        f"({fewer:.1f}x fewer FLOPs), MRR {mrr:+.3f}, against the same model already run without padding."
    )


def summary(entries: dict[str, dict[str, Any]]) -> str:
    """How many of the targets hold."""
    verdicts = [holds(entry) for entry in entries.values() if entry["target"]]
    return (
        f"Of {len(verdicts)} targets that were set before anything was measured {sum(map(bool, verdicts))} hold; the others "
        "stand as missed, each with its figure, in [what was measured](docs/experiments.md), which also says why."
    )


def markdown(entries: list[dict[str, Any]]) -> str:
    """Records as tables: one of those without a cell, missed targets marked, and one a heading of the others."""
    alone = [entry for entry in entries if not entry.get("cell")]
    tables = [_listed(alone)] if alone else []
    headings = dict.fromkeys(entry["cell"][0] for entry in entries if entry.get("cell"))
    tables += [
        _grid(heading, [e for e in entries if e.get("cell") and e["cell"][0] == heading]) for heading in headings
    ]
    return "\n\n".join(tables)


def _grid(heading: str, entries: list[dict[str, Any]]) -> str:
    """Each cell: the value, and the FLOPs ratio that it was found at, or else what its spread says."""
    rows, columns = (list(dict.fromkeys(entry["cell"][place] for entry in entries)) for place in (1, 2))
    columns.sort(key=lambda name: float((re.findall(r"\d+(?:\.\d+)?", name) or [0])[0]))
    found = {tuple(entry["cell"][1:]): entry for entry in entries}

    def said(row: str, column: str) -> str:
        entry = found.get((row, column))
        if entry is None:
            return "-"
        spread = entry["spread"] or {}
        error, ratio = spread.get("standard_error"), spread.get("flops_speedup")
        names = entry.get("shown", [name for name in spread if name != "standard_error"])
        beside = ", ".join(f"{name} {spread[name]}" for name in names) if ratio is None else f"{ratio:.2f}x"
        return f"{entry['value']:.2f}{f' ± {error}' if error else ''}{f' ({beside})' if beside else ''}"

    lines = [f"| {heading} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {row} | {' | '.join(said(row, column) for column in columns)} |" for row in rows]
    against = dict.fromkeys(entry["baseline"] for entry in entries if entry["baseline"])
    return "\n".join([*lines, "", f"Against {'; '.join(against)}."] if against else lines)


def _listed(entries: list[dict[str, Any]]) -> str:
    lines = ["| record | what | value | target | holds | against |", "|---|---|---|---|---|---|"]
    for entry in entries:
        verdict = {True: "yes", False: "**missed**", None: ""}[holds(entry)]
        spread = entry["spread"]
        detail = ""
        if isinstance(spread, dict):
            detail = " (" + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in spread.items()) + ")"
        elif isinstance(spread, list) and len(spread) > 1:
            kind = "seeds" if len(entry["seeds"]) > 1 else "quartiles"
            detail = f" ({kind} " + ", ".join(f"{v:.4g}" for v in spread) + ")"
        value = f"{entry['value']:.4g} {entry['unit']}{detail}"
        lines.append(
            f"| {entry['id']} | {entry['what']} | {value} | {entry['target'] or ''} | {verdict} | {entry['baseline']} |"
        )
    return "\n".join(lines)


MADE = {"headline": headline, "summary": summary}


def fill(text: str) -> str:
    """`text` with what stands between `<!-- figures:NAME -->` and `<!-- figures:end -->` made anew from the records.

    NAME: headline, summary, targets (every record that has one), or the name of a results file.
    """
    entries = all_entries()

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name in MADE:
            body = MADE[name](entries)
        elif name == "targets":
            body = _listed([e for e in entries.values() if e["target"]])
        else:
            body = markdown(json.loads((RESULTS / f"{name}.json").read_text()))
        return f"<!-- figures:{name} -->\n{body}\n<!-- figures:end -->"

    return re.sub(r"<!-- figures:(?!end)(\w+) -->.*?<!-- figures:end -->", block, text, flags=re.DOTALL)


ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    "README.md",
    "docs/experiments.md",
    *sorted(f"docs/experiments/{f.name}" for f in ROOT.glob("docs/experiments/*.md")),
)


def main() -> None:
    """Print every record; with --write also put the figures into the README and the docs."""
    if "--write" in sys.argv:
        for name in DOCUMENTS:
            path = ROOT / name
            path.write_text(fill(path.read_text()))
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Every record, and whether its target holds")
    for column in ("id", "what", "value", "target", "holds", "baseline"):
        table.add_column(column, overflow="fold")
    for path in sorted(RESULTS.glob("*.json")):
        for entry in json.loads(path.read_text()):
            verdict = {True: "yes", False: "MISSED", None: ""}[holds(entry)]
            value = f"{entry['value']:.4g} {entry['unit']}"
            table.add_row(entry["id"], entry["what"], value, entry["target"] or "", verdict, entry["baseline"])
    Console().print(table)


if __name__ == "__main__":
    main()
