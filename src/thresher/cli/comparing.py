"""thresher compare: every method that applies, on the user's own task, and the model that a target picks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from thresher.cli.options import (
    DATA,
    METHOD,
    OUTPUT,
    TRAINING,
    Column,
    DataSource,
    Device,
    Evaluations,
    Json,
    Kind,
    Limit,
    MaxLength,
    MaxLoss,
    Precision,
    Searcher,
    Seed,
    Speedup,
    ValidationLimit,
    assignments,
    directory_to_write,
    one_target,
    place_of,
    stage_overrides,
)
from thresher.cli.screen import Interrupted, Result, command, notice, progress_bar, quoted
from thresher.errors import OptionError
from thresher.report.console import seconds, table

if TYPE_CHECKING:
    import datasets
    import numpy as np

    from thresher.cli.models import Opened
    from thresher.cli.truth import Truth
    from thresher.cli.work import Work
    from thresher.comparing import Comparison, Part
    from thresher.tasks.features import EncodedRows

PASSES = 5000
SPEEDUPS = "1.25,1.5,2,2.5,3,4"
FEW = 20  # fewer rows may share a label by chance


@command
def compare(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint's directory, a hub name, or the built-in minilm.")
    ],
    data: DataSource,
    out: Annotated[
        Path,
        typer.Option(help="Where the report, the picked model and all others go.", metavar="DIR"),
    ],
    passes: Annotated[
        int,
        typer.Option(min=1, help="Examples that each method reads forward and backward.", rich_help_panel=TRAINING),
    ] = PASSES,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Their names (see thresher methods). Default: all that apply, and controls that any should beat.",
            metavar="NAME,…",
            rich_help_panel=METHOD,
        ),
    ] = None,
    speedup: Speedup = None,
    max_loss: MaxLoss = None,
    speedups: Annotated[
        str, typer.Option(help="What every method is set to besides.", metavar="RATIO,…", rich_help_panel=METHOD)
    ] = SPEEDUPS,
    trained_at: Annotated[
        float | None,
        typer.Option(
            help="The speedup that methods train for which learn a single one. Default: --speedup, or 2.",
            metavar="RATIO",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            help="Rows that settings are chosen on. Default: a tenth of DATA.", metavar="DATA", rich_help_panel=DATA
        ),
    ] = None,
    validation_limit: ValidationLimit = None,
    test: Annotated[
        str | None,
        typer.Option(
            help="Rows that settings are judged by. Default: one half of the validation rows; the other half chooses.",
            metavar="DATA",
            rich_help_panel=DATA,
        ),
    ] = None,
    test_limit: Annotated[
        int | None,
        typer.Option(help="Use this many rows of --test. Default: all.", metavar="ROWS", rich_help_panel=DATA),
    ] = None,
    column: Column = None,
    task: Annotated[
        Kind | None,
        typer.Option(help="Default: what labels and model suggest; python-docs: embedding.", rich_help_panel=DATA),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="What is lost or kept; see thresher fit --help.", rich_help_panel=DATA)
    ] = None,
    max_length: MaxLength = None,
    limit: Limit = None,
    seed: Seed = 0,
    fine_tune: Annotated[
        bool | None,
        typer.Option(
            "--fine-tune/--no-fine-tune",
            help="Fine-tune the start on the labels, once. Default: when the checkpoint has no trained head.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    start_passes: Annotated[
        int | None,
        typer.Option(min=1, help="Examples that --fine-tune reads. Default: --passes.", rich_help_panel=TRAINING),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="A setting of every training stage of every method (batch_size=32). Repeat for each.",
            metavar="NAME=VALUE",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    precision: Precision = "auto",
    evaluations: Evaluations = None,
    sampler: Searcher = None,
    rounds: Annotated[
        int,
        typer.Option(
            min=0, help="Timed rounds of each point of the frontier; 0: no wall-clock.", rich_help_panel=OUTPUT
        ),
    ] = 7,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Train every method alike on your task and judge all of them on rows that nothing was chosen on.

    One start, the same budget for each, one frontier, and the model that your target picks (default: --max-loss 0.01). An
    interrupted run goes on when the same command is given again; another target uses what is trained.

    [bold]thresher compare minilm imdb:train --test imdb:test --passes 5000 --speedup 3 --out compared[/]
    """
    one_target(speedup, max_loss, required=False)
    for name, given, needed in (("validation", validation, validation_limit), ("test", test, test_limit)):
        if needed is not None and given is None:
            raise OptionError(f"--{name}-limit is of the rows of --{name}; give that too, or leave it out.")
    levels = _numbers(speedups, "--speedups")
    names = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    columns = assignments(column, "--column")
    overrides = stage_overrides(stage)
    place = place_of(device)
    begun = time.monotonic()

    from thresher.cli.data import kind_asked, numbered_as_read
    from thresher.cli.starting import open_start
    from thresher.comparing import Clock
    from thresher.comparing import compare as contest
    from thresher.comparing.contestants import contestants
    from thresher.comparing.keeping import RUN
    from thresher.targets import refuse_one_answer

    contestants(names)  # rather now than after the model
    directory_to_write(out)
    kind = kind_asked(task, data)
    rows, parts = _rows(data, validation, test, (limit, validation_limit, test_limit), seed, kind, columns)
    with numbered_as_read(rows):
        start, new_head = open_start(
            model, rows, place, kind=kind, metric=metric, columns=columns, max_length=max_length, seed=seed
        )
    labels = start.work.kind != "embedding"
    if fine_tune and not labels:
        raise OptionError("--fine-tune is for classification and regression; embeddings learn from the model itself.")
    encoded = start.encode(rows, columns, labels=labels, training=True)
    refuse_one_answer(encoded.rows, start.work.kind, data)
    judging = [(name, start.encode(part, columns, labels=labels)) for name, part in parts]
    for name, part in judging:
        if len(part.rows) >= FEW:
            refuse_one_answer(part.rows, start.work.kind, name)
    chosen, judged = (_part(start, part, name) for name, part in judging)
    with _resumable(out), progress_bar(percent=True) as bar:
        shown = bar.add_task("comparing", total=1.0)

        going_on = [f"Going on with the comparison in {out}"] if (out / RUN).is_file() else []

        def step(text: str) -> None:
            if going_on:  # not before the settings were found to be the same
                notice(going_on.pop())
            bar.update(shown, description=text)
            if not bar.console.is_terminal:
                notice(text)

        found = contest(
            start.model,
            encoded.rows,
            start.tokenizer,
            out,
            validation=chosen,
            test=judged,
            label=start.work.metric,
            methods=names,
            passes=passes,
            speedups=levels,
            speedup=speedup,
            max_loss=max_loss,
            fine_tune=new_head if fine_tune is None else fine_tune,
            start_passes=start_passes,
            trained_at=trained_at,
            evaluations=evaluations or 100,
            sampler=sampler or "nsga2",
            overrides=overrides,
            fitting=lambda config: start.work.fitting(config, start.tokenizer, start.model),
            clock=Clock(rounds=rounds) if rounds else None,
            seed=seed,
            notes={"task": start.work.notes()},
            on_step=step,
            on_share=lambda share: bar.update(shown, completed=share),
            precision=precision,
            use_cpu=place == "cpu",
        )
    return Result(
        {**found.to_dict(), "seconds": time.monotonic() - begun},
        _shown(found, test or validation or data, time.monotonic() - begun),
    )


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"{option} takes numbers, such as {SPEEDUPS}, not {text!r}.") from None


def _rows(
    data: str,
    validation: str | None,
    test: str | None,
    limits: tuple[int | None, int | None, int | None],
    seed: int,
    kind: str | None,
    columns: dict[str, str],
) -> tuple[datasets.Dataset, list[tuple[str, datasets.Dataset]]]:
    """The rows to train on; and by name those that settings are chosen on, and those that they are judged by."""
    from thresher.cli.data import passages, read_rows, training_rows
    from thresher.comparing.judging import halves

    rows, held_out = training_rows(data, validation, limits[:2], seed, kind, columns)
    name = validation or f"the held-out rows of {data}"
    if test is not None:
        judged_by = read_rows(test, split="test", limit=limits[2], seed=seed, kind=kind, columns=columns)
        return rows, [(name, held_out), (test, judged_by)]
    chosen, judged = halves(passages(held_out, columns) or range(len(held_out)), seed)
    return rows, [
        (f"one half of {name}", held_out.select(chosen)),
        (f"the other half of {name}", held_out.select(judged)),
    ]


# --- what answers are worth ------------------------------------------------------------------------------------------------


def _part(start: Opened, encoded: EncodedRows, name: str) -> Part:
    """Encoded rows, and what the task's metric says of answers to them."""
    from thresher.cli.truth import Truth
    from thresher.comparing import Part
    from thresher.measure.run import run_packed

    truth = Truth.of(encoded)
    if truth is None:  # embeddings, which are compared with those of the model as it is
        reference = run_packed(start.model, encoded.rows).predictions
        quality = start.work.quality(None, reference)
        return Part(encoded.rows, quality, each=lambda now: _cosines(now, reference), name=name)
    quality, each = start.work.quality(truth, _nothing()), _each(start.work, truth)
    drawn = None if each is not None else _drawn(start.work, truth)
    return Part(encoded.rows, quality, each, drawn, name, truth=list(truth.labels), owners=truth.owners)


def _each(work: Work, truth: Truth) -> Callable[[np.ndarray], np.ndarray] | None:
    """Where the metric is a mean over rows, dialogues or questions, its value for each of them."""
    import numpy as np

    if truth.questions is not None:
        questions, threshold = truth.questions, getattr(work, "threshold", None)
        place = ("exact_match", "f1").index(work.metric)
        return lambda said: questions.judge.each(questions.texts(said, threshold))[place]
    labels = np.array(truth.labels) if work.kind in ("classification", "regression", "response") else None
    if labels is not None and work.metric == "accuracy":
        return lambda said: (truth.joined(said).argmax(-1) == labels).astype(float)
    if labels is not None and work.metric == "mse":
        return lambda said: -((truth.joined(said).reshape(-1) - labels) ** 2)
    if truth.groups is not None:
        groups, true = np.array(truth.groups), np.array(truth.labels)
        dialogues = [of for of in (np.flatnonzero(groups == group) for group in np.unique(groups)) if true[of].any()]
        return lambda said: np.array([_of(work, truth, dialogue)(said[dialogue]) for dialogue in dialogues])
    return None


def _drawn(work: Work, truth: Truth) -> Callable[[np.ndarray, Any], float]:
    import numpy as np

    def quality(said: np.ndarray, units: Any) -> float:
        index = np.concatenate(units)
        return _of(work, truth, index)(said[index])

    return quality


def _of(work: Work, truth: Truth, index: np.ndarray) -> Callable[[np.ndarray], float]:
    """The metric on the rows of these numbers."""
    found = work.quality(truth.select(index), _nothing())
    assert found is not None
    return found


def _cosines(now: np.ndarray, reference: np.ndarray) -> np.ndarray:
    import numpy as np

    from thresher.tasks.retrieval import agreement

    return np.array([agreement(now[i : i + 1], reference[i : i + 1])["cosine"] for i in range(len(now))])


def _nothing() -> np.ndarray:
    """A reference, where labels judge and nobody looks at one."""
    import numpy as np

    return np.zeros(0)


# --- what is shown -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _resumable(out: Path) -> Iterator[None]:
    from thresher.comparing.keeping import RUN

    try:
        yield
    except KeyboardInterrupt:
        if not (out / RUN).is_file():
            raise
        raise Interrupted(
            f"Interrupted. What was trained and measured is kept in {out}; the same command goes on from there."
        ) from None


def _shown(found: Comparison, data: str, taken: float) -> list[RenderableType]:
    from thresher.comparing.page import COLUMNS, baseline_line, left_rows, padding_line, rows, verdict

    parts: list[RenderableType] = [table("The frontier", COLUMNS, rows(found, found.frontier)), baseline_line(found)]
    if padding := padding_line(found):
        parts.append(padding)
    if left := left_rows(found):
        parts.append(table("Left out", ("method", "why"), left))
    parts.append(verdict(found))
    parts.append(f"Report: {found.directory / 'comparison.html'}, after {seconds(taken)}.")
    if found.best is not None:
        parts.append(f"Next: thresher bench {quoted(found.best)} {quoted(data)}")
    return parts
