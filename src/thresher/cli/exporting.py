"""thresher export: the model as one graph that runs without torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from thresher.cli.gains import checked_rows
from thresher.cli.options import (
    DATA,
    OUTPUT,
    AtSpeedup,
    Column,
    Json,
    MaxLength,
    ModelDirectory,
    Seed,
    SkipBad,
    assignments,
    directory_to_write,
)
from thresher.cli.screen import Result, command, notice, quoted
from thresher.errors import OptionError
from thresher.report.console import count, size, table

if TYPE_CHECKING:
    from thresher.cli.models import Opened
    from thresher.exported.runner import Row


@command
def export(
    directory: ModelDirectory,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Where the graph goes, with its tokenizer and exported.json.")
    ],
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="Rows as for fit, to check the graph with; OpenVINO's int8 needs them. Default: random tokens.",
        ),
    ] = None,
    runtime: Annotated[
        Literal["onnx", "openvino"], typer.Option(help="ONNX Runtime or OpenVINO.", rich_help_panel=OUTPUT)
    ] = "onnx",
    int8: Annotated[
        bool | None,
        typer.Option(
            "--int8/--no-int8",
            help="The layers' weights in int8. Default: as thresher quantize left the model.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    speedup: AtSpeedup = None,
    column: Column = None,
    max_length: MaxLength = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Rows of DATA, drawn with --seed.", metavar="ROWS", rich_help_panel=DATA)
    ] = 64,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> Result:
    """Write a model as one graph that drops inside itself, for a CPU without torch, and check it against the model.

    Then predict, evaluate and bench take OUT, and so does thresher.Runner from Python.

    [bold]thresher export faster faster-onnx imdb:test --int8[/]
    """
    columns = assignments(column, "--column")
    if columns and data is None:
        raise OptionError("--column needs DATA, whose columns it names.")
    if skip_bad and data is None:
        raise OptionError("--skip-bad needs DATA, whose rows may be bad.")
    directory_to_write(out, graph=True)

    import thresher
    from thresher.cli.models import open_in_float32

    opened = open_in_float32(directory, speedup=speedup)
    rows = _rows(opened, data, columns, limit, seed, max_length, skip_bad)
    notice(
        f"Writing {directory} as a graph and checking it on {f'{count(len(rows))} rows' if rows else 'random tokens'}"
    )
    made = thresher.export(
        opened.model,
        out,
        runtime=runtime,
        int8=int8,
        tokenizer=opened.tokenizer,
        rows=rows,
        max_length=opened.limit(max_length),
    )
    checked = {name: value for name, value in asdict(made).items() if isinstance(value, float)}
    return _result(out, checked, opened.work.kind, rows, data)


def _rows(
    opened: Opened,
    data: str | None,
    columns: dict[str, str],
    limit: int,
    seed: int,
    max_length: int | None,
    skip_bad: bool,
) -> list[Row] | None:
    """Token ids of the rows of `data`. What the model is for goes into its notes, which the graph will carry."""
    from thresher.cli.graphs import feeds
    from thresher.model import attachment_of

    work, rows = opened.work, None
    if data is not None:
        given = work.read(data, columns, limit=limit, seed=seed, labelled=False, skip_bad=skip_bad)
        work = work.settled(given, columns)
        texts = work.unlabelled(work.named(given, columns))
        rows = feeds(work.encode(texts, opened.tokenizer, opened.limit(max_length), labels=False).rows)
    attachment_of(opened.model).notes["task"] = work.notes()
    return rows


def _result(out: Path, checked: dict[str, float], kind: str, rows: list[Row] | None, data: str | None) -> Result:
    from thresher.cli.graphs import described
    from thresher.exported import directory

    manifest = directory.read(out)
    taken = sum((out / name).stat().st_size for name in (*manifest.files, directory.MANIFEST))
    found: dict[str, Any] = {
        "directory": str(out),
        "runtime": manifest.runtime,
        "int8": manifest.int8,
        "method": manifest.method,
        "exit": manifest.exit,
        "max_length": manifest.max_length,
        "rows": None if rows is None else len(rows),
        **checked,
        "bytes": taken,
    }
    answers = data is None and kind != "other"
    follow = f'predict {quoted(out)} --text "…"' if answers else f"bench {quoted(out)} {quoted(data or 'DATA')}"
    return Result(
        found,
        [
            table(
                f"{out}: {described(manifest)}, up to {manifest.max_length} tokens",
                ("", "found"),
                [*checked_rows(checked, classes=kind in ("classification", "other")), ("size on disk", size(taken))],
            ),
            "Difference in float32: from the torch engine, where the same tokens were dropped and rows left alike; with ties "
            "a rounding decides. Difference of int8: from the graph in float32.",
            f"Next: thresher {follow}",
        ],
    )
