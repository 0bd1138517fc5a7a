"""thresher search: one retention configuration for every speedup, without training."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli.options import (
    DATA,
    EVALUATIONS,
    OUTPUT,
    BatchSize,
    ChangedModel,
    Column,
    DataSource,
    Device,
    Evaluations,
    Json,
    MaxLength,
    MethodSetting,
    MethodToAttach,
    ModelDirectory,
    Searcher,
    Seed,
    SkipBad,
    assignments,
    directory_to_write,
    file_to_write,
    place_of,
    untrained_method,
)
from thresher.cli.screen import Interrupted, Result, command, notice, progress, quoted
from thresher.errors import OptionError
from thresher.report.console import count, points, ratio, table

if TYPE_CHECKING:
    import numpy as np

    from thresher.cli.models import Opened
    from thresher.cli.truth import Truth
    from thresher.cli.work import Work
    from thresher.frontier import Frontier, Point
    from thresher.policy import PolicyConfig


@command
def search(
    directory: ModelDirectory,
    data: DataSource,
    evaluations: Evaluations = None,
    sampler: Searcher = None,
    method: MethodToAttach = None,
    settings: MethodSetting = None,
    column: Column = None,
    max_length: MaxLength = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Rows of DATA, drawn with --seed.", metavar="ROWS", rich_help_panel=DATA)
    ] = 500,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    out: ChangedModel = None,
    chart: Annotated[
        Path | None,
        typer.Option(help="Draw what was tried (.svg or .png).", metavar="FILE", rich_help_panel=OUTPUT),
    ] = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Find how many tokens each layer should keep, for every speedup at once, on DATA. Nothing is trained.

    The frontier is saved with the model; evaluate, predict and bench pick a point of it by --speedup. An interrupted search
    goes on when the same command is given again.

    [bold]thresher search faster imdb:test --evaluations 100 --chart frontier.svg[/]
    """
    columns = assignments(column, "--column")
    tries = evaluations or EVALUATIONS
    config = untrained_method(method, settings)
    if config is not None and out is None:
        raise OptionError("--method attaches a policy that DIR was not saved with; give --out for the result.")
    target = out or Path(directory).expanduser()
    directory_to_write(target)
    if chart is not None:
        _chart_to_write(chart)
    place = place_of(device)

    from thresher.cli.truth import Truth
    from thresher.measure.run import run_packed
    from thresher.model import attachment_of, policy_of
    from thresher.searching import search as find

    opened = _opened(directory, place, config)
    rows = opened.work.read(data, columns, limit=limit, seed=seed, skip_bad=skip_bad)
    work = opened.text_work().settled(rows, columns)
    attachment_of(opened.model).notes["task"] = work.notes()
    encoded = opened.encode(rows, columns, max_length=max_length)
    stock = run_packed(opened.model, encoded.rows, batch_size=batch_size).predictions
    label, quality = _quality(work, Truth.of(encoded), stock)
    tried: list[Point] = []
    with _resumable(target / "search") as kept, progress("searching", tries) as done:

        def note(point: Point) -> None:
            tried.append(point)
            done(1)

        found = find(
            opened.model,
            encoded.rows,
            quality=quality,
            label=label,
            evaluations=tries,
            sampler=sampler or "nsga2",
            seed=seed,
            batch_size=batch_size,
            directory=kept,
            on_evaluation=note,
        )
        opened.save(target)
    about = {
        "directory": str(target),
        "method": policy_of(opened.model).config.method,
        "rows": len(rows),
        "evaluations": len(tried),
        "metric": label,
        "stock": quality(stock),
    }
    if chart is not None:
        _draw(chart, tried, about)
    shown = [
        _table(found, about),
        *([f"Drawn in {chart}."] if chart else []),
        f"Saved to {target}.",
        f"Next: thresher evaluate {quoted(target)} {quoted(data)} --speedup {_middle(found)}",
    ]
    return Result({**about, "frontier": found.to_list(), "chart": chart and str(chart)}, shown)


def _opened(directory: str, place: str, config: PolicyConfig | None) -> Opened:
    """The model with its method, or with that of `config`. Raises OptionError where there is neither."""
    import thresher
    from thresher.cli.models import open_model

    opened = open_model(directory, place, plain_is_news=config is None)
    if config is not None:
        thresher.attach(opened.model, opened.work.fitting(config, opened.tokenizer, opened.model))
    elif not opened.has_policy:
        raise OptionError(
            f"{directory} has no method to search for; give one that needs no training (--method attention-mass --out DIR), or "
            "run thresher fit."
        )
    return opened


def _quality(work: Work, truth: Truth | None, stock: np.ndarray) -> tuple[str, Callable[[np.ndarray], float]]:
    """What is searched for and its name: the task's metric, or without labels how alike the answers are to the undropped."""
    measured = work.quality(truth, stock)
    if measured is not None:
        return work.metric, measured
    (label,) = work.alike(stock, stock)
    return label, lambda answers: work.alike(answers, stock)[label]


@contextlib.contextmanager
def _resumable(work: Path) -> Iterator[Path]:
    """Where evaluations are kept; it goes when the block is done, and stays when that is interrupted or fails."""
    from thresher.searching import FILE

    if (work / FILE).is_file():
        notice(f"Going on with the unfinished search in {work}")
    try:
        yield work
    except KeyboardInterrupt:
        if not (work / FILE).is_file():
            raise
        raise Interrupted(
            f"Interrupted. What was evaluated is kept in {work}; the same command goes on from there."
        ) from None
    shutil.rmtree(work, ignore_errors=True)


def _chart_to_write(file: Path) -> None:
    """Fail before the work rather than after it."""
    if file.suffix.lower() not in (".svg", ".png"):
        raise OptionError(f"--chart takes a .svg or .png file, not {file}.")
    file_to_write(file)


def _draw(file: Path, tried: list[Point], about: dict[str, Any]) -> None:
    from thresher.report.chart import save_chart
    from thresher.report.frontier import frontier_chart

    file.parent.mkdir(parents=True, exist_ok=True)
    measured = [(point.speedup, point.quality) for point in tried if math.isfinite(point.quality)]
    drawing = frontier_chart({about["method"]: measured}, baseline=about["stock"], quality_label=about["metric"])
    save_chart(drawing, file)


def _table(found: Frontier, about: dict[str, Any]) -> Any:
    before = about["stock"]
    return table(
        f"{about['method']} on {count(about['rows'])} rows, {count(about['evaluations'])} configurations tried",
        ("FLOPs speedup", about["metric"], "points", "kept after each layer"),
        [
            (
                ratio(p.speedup),
                f"{p.quality:.4f}",
                points(p.quality - before),
                " ".join(f"{f:.2f}" for f in p.retention),
            )
            for p in found.points
        ],
        f"Without dropping: {before:.4f}. Measured on the rows that it was searched on; evaluate on others.",
    )


def _middle(found: Frontier) -> str:
    """A speedup that the frontier has, for an example."""
    return f"{int(10 * found.points[len(found.points) // 2].speedup) / 10:g}"
