"""Records of what was measured: appended to benchmarks/results/*.json, and printed with whether each target holds."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "sentence-transformers", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


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
) -> dict[str, Any]:
    """Write one record (replacing an older one of the same id) and return it. target: e.g. ">= 2.5"."""
    entry = {
        "id": id,
        "what": what,
        "value": round(value, 5),
        "unit": unit,
        "target": target,
        "baseline": baseline,
        "spread": spread,
        "command": "python " + " ".join(a for a in sys.argv if not a.startswith("/")),
        "data": data,
        "split": split,
        "examples": examples,
        "seeds": seeds or [],
        "machine": machine(),
        "versions": versions(),
        "date": date.today().isoformat(),
        "note": note,
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


def main() -> None:
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
