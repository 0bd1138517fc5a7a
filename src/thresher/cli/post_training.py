"""thresher post-train: an encoder learns from dialogues before it is fine-tuned to select responses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thresher.cli.options import (
    DATA,
    TRAINING,
    Column,
    DataSource,
    Device,
    Json,
    Limit,
    Precision,
    Seed,
    assignments,
    directory_to_write,
    place_of,
)
from thresher.cli.screen import Result, command, progress_bar, quoted
from thresher.report.console import count, percent, table

NAMES = {
    "mlm_loss": "loss of masked words",
    "relevance_loss": "loss of relevance",
    "relevance_accuracy": "relevance told right",
}


@command
def post_train(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint's directory, a hub name, or the built-in minilm.")
    ],
    data: DataSource,
    out: Annotated[
        Path, typer.Option(help="Where the encoder goes: an ordinary checkpoint to fit from.", metavar="DIR")
    ],
    column: Column = None,
    limit: Limit = None,
    utterances: Annotated[
        int, typer.Option(min=1, help="Utterances before the one that is judged.", rich_help_panel=TRAINING)
    ] = 3,
    max_length: Annotated[
        int, typer.Option(help="Tokens of an example.", metavar="TOKENS", rich_help_panel=DATA)
    ] = 240,
    epochs: Annotated[float, typer.Option(help="Each draws anew.", rich_help_panel=TRAINING)] = 1.0,
    train_batch: Annotated[
        int, typer.Option("--batch-size", min=1, help="Examples of a step.", rich_help_panel=TRAINING)
    ] = 50,
    learning_rate: Annotated[float, typer.Option(rich_help_panel=TRAINING)] = 1.5e-5,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Post-train an encoder on dialogues (BERT-FP): masked words, and how an utterance relates to those before it.

    DATA has turns (whole dialogues), or context, candidates and label. An interrupted run goes on when the same command is
    given again.

    [bold]thresher post-train minilm dialogues.jsonl --out post-trained[/]
    """
    directory_to_write(out)
    place = place_of(device)

    from thresher.cli.checkpoints import find
    from thresher.cli.data import read_rows
    from thresher.cli.fitting import bar_callback
    from thresher.tasks.data import map_columns
    from thresher.training import post_train as train

    rows = map_columns(read_rows(data, split="train", limit=limit, seed=seed), assignments(column, "--column"))
    with progress_bar() as bar:
        found = train(
            find(model),
            rows,
            out,
            k=utterances,
            max_length=max_length,
            epochs=epochs,
            batch_size=train_batch,
            learning_rate=learning_rate,
            seed=seed,
            precision=precision,
            progress=False,
            callbacks=[bar_callback(bar)],
            use_cpu=place == "cpu",
        )
    shown = {name: found[name] for name in (*NAMES, "windows", "left_out")}
    cells = [
        (label, percent(found[name]) if name == "relevance_accuracy" else f"{found[name]:.4f}")
        for name, label in NAMES.items()
    ]
    return Result(
        {"directory": str(out), "dialogues": len(rows), **shown},
        [
            table(f"{count(int(found['windows']))} windows of {count(len(rows))} dialogues", ("", ""), cells),
            f"Saved to {out}.",
            f"Next: thresher fit {quoted(out)} DATA --task response --method ase --speedup 1.5 --out DIR",
        ],
    )
