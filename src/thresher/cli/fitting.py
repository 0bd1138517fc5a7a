"""thresher fit: from a model, rows and a target to a model that reads less."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli.gains import STOCK_IS, gains, gains_table
from thresher.cli.options import (
    DATA,
    METHOD,
    TRAINING,
    BatchSize,
    Column,
    DataSource,
    Json,
    Kind,
    Limit,
    MaxLength,
    MaxLoss,
    MethodSetting,
    Precision,
    Seed,
    Speedup,
    assignments,
    directory_to_write,
    method_config,
    one_target,
    stage_overrides,
)
from thresher.cli.resume import resumable
from thresher.cli.screen import Result, command, notice, progress_bar
from thresher.errors import OptionError
from thresher.report.console import count, seconds

if TYPE_CHECKING:
    import numpy as np


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
    method: Annotated[str, typer.Option(help="Its name, from thresher methods.", rich_help_panel=METHOD)] = "ltp",
    settings: MethodSetting = None,
    speedup: Speedup = None,
    max_loss: MaxLoss = None,
    validation: Annotated[
        str | None,
        typer.Option(help="Rows the target is met on. Default: a tenth of DATA.", metavar="DATA", rich_help_panel=DATA),
    ] = None,
    validation_limit: Annotated[
        int | None,
        typer.Option(help="Use this many rows of --validation. Default: all.", metavar="ROWS", rich_help_panel=DATA),
    ] = None,
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
            help="accuracy (default), f1 or matthews; spearman (default), pearson or mse; cosine.", rich_help_panel=DATA
        ),
    ] = None,
    max_length: MaxLength = None,
    limit: Limit = None,
    seed: Seed = 0,
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
    precision: Annotated[
        Precision, typer.Option(help="auto: bfloat16 where the machine multiplies it fast.", rich_help_panel=TRAINING)
    ] = "auto",
    batch_size: BatchSize = 32,
    as_json: Json = False,
) -> Result:
    """Train a model with a method until a target holds, and save it.

    An interrupted run goes on when the same command is given again.

    [bold]thresher fit minilm imdb:train --validation imdb:test --speedup 2 --out faster[/]
    """
    one_target(speedup, max_loss, required=False)
    config = method_config(method, settings)
    overrides = stage_overrides(stage)
    columns = assignments(column, "--column")
    begun = time.monotonic()

    from thresher.cli.data import hold_out, labels_of, read_rows, source_and_split
    from thresher.cli.models import open_start
    from thresher.measure.run import run, run_packed
    from thresher.model import attachment_of
    from thresher.tasks import corpus
    from thresher.training import fit as train

    rows = read_rows(data, split="train", limit=limit, seed=seed)
    if task is None and source_and_split(data)[0] == corpus.NAME:
        task = "embedding"
    if validation is None:
        rows, held_out = hold_out(rows, seed)
    else:
        held_out = read_rows(validation, split="test", limit=validation_limit, seed=seed)
    start, new_head = open_start(
        model,
        rows,
        kind=task,
        metric=metric,
        columns=columns,
        max_length=max_length,
        seed=seed,
        labels=not no_labels,
    )
    labelled = not no_labels and start.work.kind != "embedding"
    if fine_tune and start.work.kind == "embedding":
        raise OptionError("--fine-tune is for classification and regression; embeddings learn from the model itself.")
    if fine_tune and no_labels:
        raise OptionError("--fine-tune needs labels; leave out --no-labels.")
    fine_tune = new_head if fine_tune is None else fine_tune
    if new_head and not fine_tune:
        notice("The checkpoint has no trained head and is not fine-tuned first: its answers begin as noise")
    if not labelled:
        overrides = {**LABEL_FREE, **overrides}
    encoded, checked = (start.encode(part, columns, labels=labelled) for part in (rows, held_out))
    directory_to_write(out)
    truth = labels_of(checked) if labelled else None
    stock = run_packed(start.model, checked.rows, batch_size=batch_size).predictions
    run_settings = {
        "model": model,
        "data": data,
        "limit": limit,
        "validation": validation,
        "columns": columns,
        "method": config.method,
        "settings": config.to_dict(),
        "max_length": start.limit(),
        "labels": labelled,
        "fine_tune": fine_tune,
        "stages": overrides,
        "seed": seed,
    }
    before: list[np.ndarray] = []
    with resumable(out, run_settings):
        with progress_bar() as bar:
            fitted = train(
                start.model,
                config,
                encoded.rows,
                start.tokenizer,
                out,
                validation=checked.rows,
                speedup=speedup,
                max_loss=max_loss,
                quality=start.work.quality(truth, stock),
                fine_tune=fine_tune,
                overrides=overrides,
                seed=seed,
                precision=precision,
                notes={"task": start.work.notes()},
                on_start=before.append,
                on_stage=lambda now: notice(
                    f"Training stage {now.name}: {now.epochs:g} epochs, {len(encoded.rows):,} rows"
                ),
                progress=False,
                callbacks=[_bar_callback(bar)],
            )
        after = run(fitted, checked.rows, batch_size=batch_size)
    result = gains(start.work, truth, before[0], after.predictions)
    data_out: dict[str, Any] = {
        "directory": str(out),
        "method": config.method,
        "strength": attachment_of(fitted).policy.config.strength,  # type: ignore[union-attr]
        "task": start.work.notes(),
        "rows": len(encoded.rows),
        "validation_rows": len(checked.rows),
        "speedup": after.speedup,
        **result,
        "seconds": time.monotonic() - begun,
    }
    return Result(
        data_out,
        [
            gains_table(
                f"{config.method} on {count(len(checked.rows))} validation rows",
                result,
                after.speedup,
            ),
            STOCK_IS,
            f"Saved to {out} after {seconds(data_out['seconds'])}.",
            f"Next: thresher bench {out} {validation or data}",
        ],
    )


def _bar_callback(bar: Any) -> Any:
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
