"""thresher fit: from a model, rows and a target to a model that reads less."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from thresher.cli.gains import STOCK_IS, gains, gains_table
from thresher.cli.options import (
    DATA,
    EVALUATIONS,
    METHOD,
    TRAINING,
    BatchSize,
    Column,
    DataSource,
    Device,
    Evaluations,
    ExitSetting,
    Json,
    Kind,
    Limit,
    MaxLength,
    MaxLoss,
    MethodSetting,
    Precision,
    Searcher,
    Seed,
    SkipBad,
    Speedup,
    ValidationLimit,
    Windows,
    assignments,
    directory_to_write,
    exit_config,
    method_config,
    one_target,
    place_of,
    stage_overrides,
)
from thresher.cli.resume import resumable
from thresher.cli.screen import Result, command, notice, progress_bar, quoted
from thresher.errors import OptionError
from thresher.report.console import count, seconds

if TYPE_CHECKING:
    import numpy as np

    from thresher.cli.models import Opened
    from thresher.exits import ExitConfig
    from thresher.policy import PolicyConfig
    from thresher.tasks.features import EncodedRows

LABEL_FREE = {"label_weight": 0.0, "distil_weight": 1.0}


@command
def fit(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint's directory, a hub name, or the built-in minilm.")
    ],
    data: DataSource,
    out: Annotated[
        Path,
        typer.Option(
            help="Where the model goes, as an ordinary checkpoint with thresher.json beside it.", metavar="DIR"
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="Its name, from thresher methods. Default: ltp, or with --exit alone none.", rich_help_panel=METHOD
        ),
    ] = None,
    settings: MethodSetting = None,
    exit: Annotated[
        str | None,
        typer.Option(
            help="Let rows leave early by this exit, from thresher methods; it is trained after the method.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    exit_settings: ExitSetting = None,
    speedup: Speedup = None,
    max_loss: MaxLoss = None,
    validation: Annotated[
        str | None,
        typer.Option(help="Rows the target is met on. Default: a tenth of DATA.", metavar="DATA", rich_help_panel=DATA),
    ] = None,
    validation_limit: ValidationLimit = None,
    column: Column = None,
    task: Annotated[
        Kind | None,
        typer.Option(
            "--task",
            "--kind",
            help="Default: what labels and model suggest; python-docs: embedding.",
            rich_help_panel=DATA,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy (default), f1 or matthews; spearman (default), pearson or mse; cosine; f1 (default) or exact_match; "
            "of tags f1 (default), precision or recall.",
            rich_help_panel=DATA,
        ),
    ] = None,
    max_length: MaxLength = None,
    windows: Windows = None,
    limit: Limit = None,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    fine_tune: Annotated[
        bool | None,
        typer.Option(
            "--fine-tune/--no-fine-tune",
            help="Fine-tune on the labels first. Default: when the checkpoint has no trained head.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    no_labels: Annotated[
        bool, typer.Option("--no-labels", help="Learn only what the model says itself.", rich_help_panel=TRAINING)
    ] = False,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="A setting of every training stage (epochs=2) or of one (soft.learning_rate=1e-4). Repeat for each.",
            metavar="NAME=VALUE",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    precision: Precision = "auto",
    evaluations: Evaluations = None,
    sampler: Searcher = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Train a model with a method until a target holds, and save it.

    An interrupted run goes on when the same command is given again.

    [bold]thresher fit minilm imdb:train --validation imdb:test --speedup 2 --out faster[/]
    """
    one_target(speedup, max_loss, required=False)
    config, leaving = _configs(method, settings, exit, exit_settings, labels=not no_labels)
    overrides = stage_overrides(stage)
    columns = assignments(column, "--column")
    place = place_of(device)
    begun = time.monotonic()

    from thresher.cli.data import kind_asked, numbered_as_read, training_rows
    from thresher.cli.graphs import in_windows
    from thresher.cli.starting import open_start
    from thresher.targets import refuse_one_answer

    kind = kind_asked(task, data)
    limits = (limit, validation_limit)
    rows, held_out = training_rows(data, validation, limits, seed, kind, columns, skip_bad=skip_bad)
    with numbered_as_read(rows):
        start, new_head = open_start(
            model,
            rows,
            place,
            kind=kind,
            metric=metric,
            columns=columns,
            max_length=max_length,
            seed=seed,
            labels=not no_labels,
        )
    start = in_windows(start, windows)
    lessons = _lessons(start.work.kind, new_head, fine_tune, no_labels, overrides)
    config = None if config is None else start.work.fitting(config, start.tokenizer, start.model)
    encoded = start.encode(rows, columns, labels=lessons.labels, training=True)
    if not lessons.labels:
        encoded = _without_labels(encoded)
    _refuse_unserved(config, encoded)
    if lessons.labels:
        refuse_one_answer(encoded.rows, start.work.kind, data)
    checked = start.encode(held_out, columns, labels=lessons.labels)
    directory_to_write(out)
    run_settings = {
        "model": model,
        "data": data,
        "limit": limit,
        "skip_bad": skip_bad,
        "validation": validation,
        "columns": columns,
        "method": None if config is None else config.method,
        "settings": {} if config is None else config.to_dict(),
        "exit": None if leaving is None else leaving.method,
        "exit_settings": {} if leaving is None else leaving.to_dict(),
        "max_length": start.limit(),
        "windows": windows,
        **dataclasses.asdict(lessons),
        "precision": precision,
        "seed": seed,
    }
    options = {
        "speedup": speedup,
        "max_loss": max_loss,
        "seed": seed,
        "precision": precision,
        "use_cpu": place == "cpu",
        "search": {name: v for name, v in (("evaluations", evaluations), ("sampler", sampler)) if v is not None},
    }
    with resumable(out, run_settings):
        as_read = contextlib.nullcontext() if len(encoded.rows) != len(rows) else numbered_as_read(rows)
        with as_read:
            found = _train(start, config, encoded, checked, out, lessons, batch_size, options | {"exit": leaving})
    found["seconds"] = time.monotonic() - begun
    return Result(found, _shown(found, validation or data, checked.unit))


def _configs(
    method: str | None,
    settings: list[str] | None,
    exit: str | None,
    exit_settings: list[str] | None,
    *,
    labels: bool,
) -> tuple[PolicyConfig | None, ExitConfig | None]:
    """The method and the exit that were asked for: LTP where none was, no method where only an exit was."""
    if exit_settings and exit is None:
        raise OptionError("--set-exit needs --exit, the exit whose setting it is.")
    if settings and exit is not None and method is None:
        raise OptionError("--set needs --method, the method whose setting it is; the exit's are set by --set-exit.")
    leaving = None if exit is None else exit_config(exit, exit_settings)
    if leaving is not None and leaving.labelled and not labels:
        raise OptionError(f"--no-labels: the exit {leaving.method!r} learns from labels; {_instead(leaving)}.")
    if method is None and leaving is not None:
        return None, leaving
    config = method_config(method or "ltp", settings)
    if config.labelled and not labels:
        raise OptionError(f"--no-labels: the method {config.method!r} learns from labels; take another method.")
    return config, leaving


def _instead(exit: ExitConfig) -> str:
    """What to do without labels: take an exit for the same heads that learns from the model, where there is one."""
    from thresher.exits import EXIT_CONFIGS

    if not type(exit)().labelled:
        return "leave out --set-exit learns"
    others = [
        name for name, kind in EXIT_CONFIGS.items() if not kind().labelled and set(kind.serves) & set(exit.serves)
    ]
    return f"take {' or '.join(sorted(others))}" if others else "leave it out"


@dataclass(frozen=True)
class Lessons:
    """What the model learns from. labels: whether the rows' own. stages: what overrides the settings of the stages."""

    labels: bool
    fine_tune: bool
    stages: dict[str, Any]


def _lessons(kind: str, new_head: bool, fine_tune: bool | None, no_labels: bool, overrides: dict[str, Any]) -> Lessons:
    """Whether to learn from labels and to fine-tune first. Raises OptionError where the options do not go together."""
    if fine_tune and kind == "embedding":
        raise OptionError("--fine-tune is for classification and regression; embeddings learn from the model itself.")
    if fine_tune and no_labels:
        raise OptionError("--fine-tune needs labels; leave out --no-labels.")
    if new_head and fine_tune is False:
        notice("The checkpoint has no trained head and is not fine-tuned first: its answers begin as noise")
    labels = not no_labels and kind != "embedding"
    return Lessons(
        labels, new_head if fine_tune is None else fine_tune, overrides if labels else LABEL_FREE | overrides
    )


def _without_labels(encoded: EncodedRows) -> EncodedRows:
    """Rows that a method which would like labels finds none in."""
    from thresher.targets import LABELS

    return replace(encoded, rows=encoded.rows.remove_columns([n for n in LABELS if n in encoded.rows.column_names]))


def _refuse_unserved(config: PolicyConfig | None, encoded: EncodedRows) -> None:
    """Rather now than after fine-tuning. Raises OptionError for rows that a method has nothing to learn from in."""
    from thresher.comparing.contestants import WANTED, answered

    if config is not None and config.serves == "answers" and not answered(encoded.rows):
        raise OptionError(f"The method {config.method!r} {WANTED['answers']}; give such rows, or another method.")


def _train(
    start: Opened,
    config: PolicyConfig | None,
    encoded: EncodedRows,
    checked: EncodedRows,
    out: Path,
    lessons: Lessons,
    batch_size: int | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Train on `encoded` and save; what the model then gains on `checked`, over the one that the method started from."""
    from thresher.cli.truth import Truth
    from thresher.measure.run import run, run_packed
    from thresher.model import attachment_of
    from thresher.training import fit as train

    truth = Truth.of(checked) if lessons.labels else None
    reference = run_packed(start.model, checked.rows, batch_size=batch_size).predictions
    before: list[np.ndarray] = []
    searches = config is not None and config.searches
    with progress_bar() as bar:
        fitted = train(
            start.model,
            config,
            encoded.rows,
            start.tokenizer,
            out,
            validation=checked.rows,
            quality=start.work.quality(truth, reference),
            fine_tune=lessons.fine_tune,
            overrides=lessons.stages,
            notes={"task": start.work.notes()},
            on_start=before.append,
            on_stage=lambda now: notice(
                f"Training stage {now.name}: {now.epochs:g} epochs, {len(encoded.rows):,} rows"
            ),
            progress=False,
            callbacks=[bar_callback(bar)],
            **options | {"search": _with_bar(options["search"], bar) if searches else options["search"]},
        )
    after = run(fitted, checked.rows, batch_size=batch_size)
    policy, exit = attachment_of(fitted).policy, attachment_of(fitted).exit
    return {
        "directory": str(out),
        "method": policy.config.method if policy else None,
        "strength": policy.config.strength if policy else None,
        "exit": exit.config.to_dict() | {"name": exit.config.method} if exit else None,
        "task": start.work.notes(),
        "rows": len(encoded.rows),
        "validation_rows": len(checked.rows),
        "epoch": attachment_of(fitted).notes.get("epoch"),
        "speedup": after.speedup,
        **gains(start.work, truth, before[0], after.predictions),
    }


def _with_bar(search: dict[str, Any], bar: Any) -> dict[str, Any]:
    """The settings of a search with its progress on a rich bar."""
    tries = search.get("evaluations", EVALUATIONS)
    task: list[Any] = []

    def tried(point: Any) -> None:
        if not task:
            task.append(bar.add_task("searching", total=tries))
        bar.update(task[0], advance=1)

    return {**search, "evaluations": tries, "on_evaluation": tried}


def _shown(found: dict[str, Any], data: str, unit: str) -> list[RenderableType]:
    out = found["directory"]
    names = [name for name in (found["method"], found["exit"] and found["exit"]["name"]) if name]
    title = f"{' with '.join(names)} on {count(found['validation_rows'])} validation {unit}"
    return [
        gains_table(title, found, found["speedup"]),
        STOCK_IS,
        *_of_epoch(found["epoch"]),
        f"Saved to {out} after {seconds(found['seconds'])}.",
        f"Next: thresher bench {quoted(out)} {quoted(data)}",
    ]


def _of_epoch(epoch: dict[str, Any] | None) -> list[str]:
    return [f"Kept the model of epoch {epoch['number']} of the stage {epoch['stage']}."] if epoch else []


def bar_callback(bar: Any) -> Any:
    """The trainer's steps on a rich bar, with the time left."""
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.task = bar.add_task("training", total=state.max_steps, completed=state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            bar.update(self.task, completed=state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if logs and "loss" in logs:
                bar.update(self.task, description=f"training, loss {float(logs['loss']):.3f}")

    return Bar()
