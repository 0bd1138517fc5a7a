"""thresher methods, thresher demo: what there is, and a first look at it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from thresher.cli.options import DATA, OUTPUT, Device, Json, directory_to_write, place_of
from thresher.cli.screen import Result, TokenMapView, command, notice, progress_bar, quoted
from thresher.report.console import table


@command
def methods(as_json: Json = False) -> Result:
    """List the methods and the early exits with their settings and defaults.

    [bold]thresher methods[/]
    """
    from thresher.exits import EXIT_CONFIGS
    from thresher.methods import CONFIGS

    found = [_described(config) for _, config in sorted(CONFIGS.items())]
    rows = [
        (
            one["name"],
            one["what"],
            "yes: " + ", ".join(one["stages"]) if one["needs_training"] else "no",
            "yes" if one["exports"] else "no",
            " ".join(f"{name}={_value(value)}" for name, value in one["settings"].items()),
        )
        for one in found
    ]
    shared = ", ".join(f"{name}={_value(value)}" for name, value in _shared().items())
    exits = [_exit_described(config) for _, config in sorted(EXIT_CONFIGS.items())]
    exit_rows = [
        (
            one["name"],
            one["what"],
            ", ".join(one["serves"]),
            "labels" if one["needs_labels"] else "the model",
            "yes" if one["exports"] else "no",
            " ".join(f"{name}={_value(value)}" for name, value in one["settings"].items()),
        )
        for one in exits
    ]
    return Result(
        {"methods": found, "shared_settings": _shared(), "exits": exits},
        [
            table(
                "Methods",
                ("name", "what it does", "needs training", "exports", "settings (--set)"),
                rows,
                f"Every method also takes {shared}; one that needs no training gets better with it. Those that export can be "
                "written as a graph with thresher export.",
            ),
            table(
                "Early exits",
                ("name", "what it does", "serves", "learns from", "exports", "settings (--set-exit)"),
                exit_rows,
                "Every exit also takes strength=1.0, goes with every method (tokee: none) or alone, and is trained by fit.",
            ),
        ],
    )


@command
def demo(
    out: Annotated[Path, typer.Option(help="Where the model goes.", metavar="DIR", rich_help_panel=OUTPUT)] = Path(
        "thresher-demo"
    ),
    seed: Annotated[int, typer.Option(help="For every random choice.", rich_help_panel=DATA)] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Make a small model faster on this machine, without a download, and measure it.

    [bold]thresher demo --out thresher-demo[/]
    """
    place = place_of(device)
    directory_to_write(out)

    from rich.text import Text

    from thresher.demo import run_demo

    with progress_bar(percent=True) as bar:
        whole = bar.add_task("demo", total=1.0)
        found = run_demo(
            out,
            seed=seed,
            device=place,
            on_step=notice,
            on_progress=lambda share: bar.update(whole, completed=share),
        )

    result = found.table()
    shown: list[Any] = [table(result.title, result.columns, result.rows, result.note)]
    for search in found.searches:
        verdict = "found its section" if search.right else "found another section"
        shown += [Text(f"\n“{search.query}” {verdict}:", style="bold"), TokenMapView(search.map)]
    return Result(
        {"directory": str(out), **found.numbers()},
        [
            *shown,
            f"The model is in {out / 'model'}, the report in {out / 'report.html'}.",
            f'Next: thresher explain {quoted(out / "model")} --text "…"',
        ],
    )


def _shared() -> dict[str, Any]:
    from thresher.policy import PolicyConfig

    return {field.name: field.default for field in dataclasses.fields(PolicyConfig)}


def _described(config: Any) -> dict[str, Any]:
    from thresher.methods import build
    from thresher.policy import Geometry

    # The sizes do not matter to what is asked of it.
    policy = build(config(), Geometry(layers=6, hidden=8, heads=1, intermediate=16))
    shared = _shared()
    return {
        "name": config.method,
        "what": _first_sentence(config.__doc__ or ""),
        "needs_training": policy.needs_training,
        "stages": [stage.name for stage in policy.stages()],
        "exports": config.exports,
        "settings": {f.name: f.default for f in dataclasses.fields(config) if f.name not in shared},
    }


def _exit_described(config: Any) -> dict[str, Any]:
    return {
        "name": config.method,
        "what": _first_sentence(config.__doc__ or ""),
        "serves": list(config.serves),
        "needs_labels": config.labelled,
        "exports": config.exports,
        "settings": {f.name: f.default for f in dataclasses.fields(config) if f.name != "strength"},
    }


def _first_sentence(doc: str) -> str:
    paragraph = " ".join(doc.strip().split("\n\n")[0].split())
    return re.split(r"(?<!\beq)\.\s", paragraph, maxsplit=1)[0].rstrip(".") + "."


def _value(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
