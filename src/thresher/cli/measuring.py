"""thresher evaluate: what was kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cli.gains import STOCK_IS_THIS, checked_rows, gains_table, slower
from thresher.cli.options import (
    DATA,
    AnsweringDirectory,
    AtSpeedup,
    AtThreshold,
    BatchSize,
    Column,
    DataSource,
    Device,
    ExitSetting,
    Json,
    Limit,
    MaxLength,
    NoAnswer,
    Seed,
    SkipBad,
    Windows,
    Workers,
    assignments,
)
from thresher.cli.screen import Result, command, notice, progress
from thresher.errors import OptionError
from thresher.report.console import count, ratio, table

if TYPE_CHECKING:
    from thresher.cli.graphs import OpenedGraph
    from thresher.cli.models import Opened
    from thresher.cli.scoring import Exam
    from thresher.measure.run import Run


@command
def evaluate(
    directory: AnsweringDirectory,
    data: DataSource,
    speedup: AtSpeedup = None,
    tau: AtThreshold = None,
    exit_settings: ExitSetting = None,
    column: Column = None,
    max_length: MaxLength = None,
    windows: Windows = None,
    no_answer: NoAnswer = None,
    limit: Limit = None,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    batch_size: BatchSize = None,
    workers: Workers = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            help="Of a scorer: the corpus that queries with relevant ids are ranked against, with the columns id and text.",
            metavar="DATA",
            rich_help_panel=DATA,
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Of a scorer: that corpus as thresher index kept it.", metavar="DIR", rich_help_panel=DATA),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Score a model with and without dropping, and count the FLOPs saved.

    Embedders are scored by cosine to themselves undropped; on python-docs also by retrieval. An exported directory has only
    itself: its scores stand beside what its export was checked to differ by. A scorer (thresher fit-scorer) ranks the
    candidates of each query, or one corpus for all.

    [bold]thresher evaluate faster imdb:test --limit 2000[/]
    """
    from thresher.cli.scorers import evaluate_scorer, holds_scorer

    columns = assignments(column, "--column")
    if holds_scorer(directory):
        refused = {"--speedup": speedup, "--tau": tau, "--set-exit": exit_settings or None, "--max-length": max_length,
                   "--windows": windows, "--no-answer": no_answer, "--skip-bad": skip_bad or None, "--batch-size": batch_size,
                   "--workers": workers}  # fmt: skip
        drawn = {"limit": limit, "seed": seed}
        return evaluate_scorer(directory, data, columns, candidates, store, drawn, device, refused)
    if candidates is not None or store is not None:
        raise OptionError(f"--candidates and --store are for a scorer, and {directory} holds none; leave them out.")

    from thresher.cli.graphs import OpenedGraph, answering_from, in_windows, open_to_answer
    from thresher.cli.scoring import set_exam

    how = {"speedup": speedup, "tau": tau, "exit_settings": exit_settings}
    opened = open_to_answer(directory, device, batch_size=batch_size, workers=workers, **how)  # type: ignore[arg-type]
    opened = answering_from(in_windows(opened, windows), no_answer)
    exam = set_exam(opened, data, columns, limit=limit, seed=seed, max_length=max_length, skip_bad=skip_bad)
    about = {"directory": directory, "data": data, "rows": len(exam.rows)}
    title = f"{directory} on {count(len(exam.rows))} {exam.unit}"
    if isinstance(opened, OpenedGraph):
        return _of_graph(opened, exam, about, title)
    return _of_model(opened, exam, batch_size, about, title)


def _of_model(opened: Opened, exam: Exam, batch_size: int | None, about: dict[str, object], title: str) -> Result:
    from thresher.measure.run import run_packed

    with progress("evaluating", 2 * len(exam.rows)) as done:
        stock = run_packed(opened.model, exam.rows, batch_size=batch_size, on_batch=done).predictions
        after = opened.answer(exam.rows, batch_size=batch_size, on_done=done)
    found = exam.gains(stock, after.predictions)
    shown = [gains_table(title, found, after.speedup), STOCK_IS_THIS]
    if left := _left(opened, after):
        found["left_after"] = left
        shown.append(
            f"Left after layer {', '.join(f'{layer}: {share:.0%}' for layer, share in left.items())} of the rows."
        )
    if (said := exam.work.remark(after.predictions, exam.truth)) is not None:
        shown.append(said)
    if (remark := slower(about["directory"], _tokens(exam), after.speedup)) is not None:
        shown.append(remark)
    return Result({**about, "speedup": after.speedup, **found}, shown)


def _left(opened: Opened, after: Run) -> dict[str, float]:
    """The share of the rows that left after each layer, of a model with an exit; the last layer's answered at the end."""
    from thresher.model import attachment_of

    attached = attachment_of(opened.model)
    if attached.exit is None:
        return {}
    rows = [layer for trace in after.traces for layer in trace.exited_at]
    return {str(layer): rows.count(layer) / len(rows) for layer in range(1, attached.engine.entrance.calls + 1)}


def _tokens(exam: Exam) -> float:
    """Of a row, on average."""
    return sum(map(len, exam.rows["input_ids"])) / len(exam.rows)


def _of_graph(opened: OpenedGraph, exam: Exam, about: dict[str, object], title: str) -> Result:
    from thresher.cli.graphs import described

    with progress("evaluating", len(exam.rows)) as done:
        after = opened.answer(exam.rows, on_done=done)
    scores, manifest = exam.scores(after.predictions), opened.runner.manifest
    if not scores:
        notice(
            "Without labels there is nothing to score an exported graph by; evaluate the saved model for its agreement"
        )
    rows = [(name, f"{value:.4f}") for name, value in scores.items()]
    remark = slower(about["directory"], _tokens(exam), after.speedup, graph=True)
    return Result(
        {
            **about,
            "runtime": manifest.runtime,
            "int8": manifest.int8,
            "method": manifest.method,
            "exit": manifest.exit,
            "speedup": after.speedup,
            "metric": exam.work.metric if exam.work.metric in scores else None,
            "thresher": scores,
            "checked": manifest.checked,
        },
        [
            table(
                f"{title}: {described(manifest)}", ("", "exported"), [*rows, ("FLOPs speedup", ratio(after.speedup))]
            ),
            table(
                "Checked when it was exported",
                ("", "found"),
                checked_rows(manifest.checked, classes=exam.work.kind == "classification"),
            ),
            *([] if remark is None else [remark]),
        ],
    )
