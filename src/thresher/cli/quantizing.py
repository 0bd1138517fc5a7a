"""thresher quantize: int8 on the CPU, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli.gains import points_rows
from thresher.cli.options import (
    BatchSize,
    Column,
    DataSource,
    Json,
    Limit,
    MaxLength,
    ModelDirectory,
    Seed,
    SkipBad,
    assignments,
    directory_to_write,
)
from thresher.cli.screen import Result, command, progress, quoted
from thresher.report.console import count, ratio, table

if TYPE_CHECKING:
    from thresher.cli.models import Opened
    from thresher.cli.scoring import Exam
    from thresher.measure.run import Run

ALIKE = {"agreement": "same answers", "pearson": "pearson with float32", "cosine": "cosine to float32"}


@command
def quantize(
    directory: ModelDirectory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the model goes; may be DIR itself.")],
    data: DataSource,
    column: Column = None,
    max_length: MaxLength = None,
    limit: Limit = None,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    batch_size: BatchSize = None,
    as_json: Json = False,
) -> Result:
    """Compute a model's layers in int8 on the CPU, and measure on DATA what that costs.

    The float32 weights stay in the checkpoint; what is saved is that int8 is to be used.

    [bold]thresher quantize faster faster-int8 imdb:test --limit 2000[/]
    """
    directory_to_write(out)

    from thresher.cli.models import open_in_float32
    from thresher.cli.scoring import set_exam
    from thresher.model import attachment_of

    opened = open_in_float32(directory)
    columns = assignments(column, "--column")
    exam = set_exam(opened, data, columns, limit=limit, seed=seed, max_length=max_length, skip_bad=skip_bad)
    attachment_of(opened.model).notes["task"] = exam.work.notes()
    before, after = _both(opened, exam, batch_size)
    opened.save(out)
    alike = exam.work.alike(after.predictions, before.predictions)
    found: dict[str, Any] = {
        "float32": exam.scores(before.predictions),
        "int8": exam.scores(after.predictions),
    }
    rows = [
        *points_rows(found["float32"], found["int8"]),
        *((ALIKE[name], "", f"{value:.4f}", "") for name, value in alike.items()),
        ("FLOPs speedup", ratio(before.speedup), ratio(after.speedup), ""),
    ]
    return Result(
        {
            "directory": str(out),
            "data": data,
            "rows": len(exam.rows),
            **found,
            "alike": alike,
            "speedup": {"float32": before.speedup, "int8": after.speedup},
        },
        [
            table(f"int8 on {count(len(exam.rows))} {exam.unit}", ("", "float32", "int8", "points"), rows),
            "Both with the method as attached. FLOPs count what is read, and so what int8 changes in the choice of tokens.",
            f"Saved to {out}.",
            f"Next: thresher bench {quoted(out)} {quoted(data)}",
        ],
    )


def _both(opened: Opened, exam: Exam, batch_size: int | None) -> tuple[Run, Run]:
    """Answers in float32 and in int8, in which the model is left."""
    import thresher
    from thresher.model import attachment_of

    with progress("measuring", 2 * len(exam.rows)) as done:
        attachment_of(opened.model).engine.set_precision("float32")
        before = opened.answer(exam.rows, batch_size=batch_size, on_done=done)
        thresher.quantize(opened.model)
        return before, opened.answer(exam.rows, batch_size=batch_size, on_done=done)
