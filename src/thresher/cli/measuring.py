"""thresher evaluate, thresher bench: what was kept, and what was gained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli.gains import STOCK_IS, gains, gains_table
from thresher.cli.options import (
    DATA,
    OUTPUT,
    BatchSize,
    Column,
    DataSource,
    Device,
    Json,
    Limit,
    MaxLength,
    ModelDirectory,
    Seed,
    assignments,
    place_of,
)
from thresher.cli.screen import Result, command, progress
from thresher.errors import OptionError
from thresher.report.console import count, ratio, seconds, table

if TYPE_CHECKING:
    import datasets

    from thresher.cli.models import Opened
    from thresher.measure.latency import Comparison, Spread


@command
def evaluate(
    directory: ModelDirectory,
    data: DataSource,
    column: Column = None,
    max_length: MaxLength = None,
    limit: Limit = None,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Score a model with and without dropping, and count the FLOPs saved.

    Embedders are scored by cosine to themselves undropped; on python-docs also by retrieval.

    [bold]thresher evaluate faster imdb:test --limit 2000[/]
    """
    place = place_of(device)

    from thresher.cli.data import labels_of, read_rows, source_and_split
    from thresher.cli.models import open_model
    from thresher.measure.run import run, run_packed
    from thresher.tasks import corpus

    opened = open_model(directory, place)
    work = opened.text_work()
    rows = work.named(read_rows(data, split="test", limit=limit, seed=seed), assignments(column, "--column"))
    retrieval = work.kind == "embedding" and source_and_split(data)[0] == corpus.NAME
    if retrieval:
        texts, score = _retrieval(rows, seed)
        encoded = work.encode(texts, opened.tokenizer, opened.limit(max_length), labels=False)
    else:
        encoded = work.encode(rows, opened.tokenizer, opened.limit(max_length), labels=False)
    truth = labels_of(encoded)
    with progress("evaluating", 2 * len(encoded.rows)) as done:
        options: dict[str, Any] = {"batch_size": batch_size, "on_batch": done}
        stock = run_packed(opened.model, encoded.rows, **options).predictions
        after = run(opened.model, encoded.rows, **options)
    found = gains(work, truth, stock, after.predictions)
    if retrieval:
        found["stock"].update(score(stock))
        found["thresher"].update(score(after.predictions))
    title = f"{directory} on {count(len(encoded.rows))} {'texts' if retrieval else 'rows'}"
    return Result(
        {"directory": directory, "data": data, "rows": len(encoded.rows), "speedup": after.speedup, **found},
        [gains_table(title, found, after.speedup), STOCK_IS],
    )


@command
def bench(
    directory: ModelDirectory,
    data: DataSource,
    batch_size: Annotated[
        str, typer.Option(help="Rows run at a time, one size or several.", metavar="ROWS,…", rich_help_panel=OUTPUT)
    ] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds after one to warm up.", rich_help_panel=OUTPUT)] = 7,
    column: Column = None,
    max_length: MaxLength = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Rows of DATA, drawn with --seed.", metavar="ROWS", rich_help_panel=DATA)
    ] = 128,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Measure the speedup on this machine: paired, interleaved runs, padding's share apart.

    [bold]thresher bench faster imdb:test --batch-size 1,32[/]
    """
    sizes, place = _sizes(batch_size), place_of(device)

    from thresher.cli.data import read_rows
    from thresher.cli.models import open_model
    from thresher.measure.latency import compare

    opened = open_model(directory, place)
    rows = opened.work.named(read_rows(data, split="test", limit=limit, seed=seed), assignments(column, "--column"))
    encoded = _texts_only(opened, rows, max_length)
    comparisons = []
    with progress("timing", (rounds + 1) * len(sizes)) as done:
        for size in sizes:
            comparisons.append(compare(opened.model, encoded, size, rounds, on_round=lambda _: done(1)))
    first = comparisons[0]
    return Result(
        {
            "directory": directory,
            "data": data,
            "rows": first.rows,
            "tokens_per_row": first.tokens_per_row,
            "threads": first.threads,
            "device": first.device,
            "rounds": rounds,
            "flops": first.flops,
            "batch_sizes": [_record(one) for one in comparisons],
        },
        [
            table(
                f"{directory}: {count(first.rows)} rows of {first.tokens_per_row:.0f} tokens, {rounds} rounds",
                ("batch", "padding only", "measured", "FLOPs", "over sorted stock"),
                [
                    (size, _spread(one.padding_only), _spread(one.measured), ratio(one.flops), _spread(one.over_sorted))
                    for size, one in zip(sizes, comparisons, strict=True)
                ],
            ),
            "Padding only: stock padded / packed. Measured: packed / thresher. Both in arrival order. Over sorted stock: stock "
            "/ thresher, both sorted by length. Medians and quartiles of paired rounds.",
            table(
                f"Time a row on {first.device}, {first.threads} thread{'s' if first.threads > 1 else ''}",
                ("batch", *first.timings),
                [
                    (size, *(seconds(timing.median / one.rows) for timing in one.timings.values()))
                    for size, one in zip(sizes, comparisons, strict=True)
                ],
            ),
        ],
    )


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise OptionError(f"--batch-size takes whole numbers of at least 1, such as 1,8,32, not {text!r}.")
    return sizes


def _texts_only(opened: Opened, rows: datasets.Dataset, max_length: int | None) -> datasets.Dataset:
    """Encoded rows without labels, which timing has no use for."""
    from thresher.tasks.text import canonical

    rows = canonical(rows)
    unlabelled = rows.remove_columns([name for name in rows.column_names if name not in ("text", "text_pair")])
    return opened.work.encode(unlabelled, opened.tokenizer, opened.limit(max_length), labels=False).rows


def _retrieval(rows: datasets.Dataset, seed: int) -> tuple[datasets.Dataset, Any]:
    """Sections and held-out sentences as one set of texts, and what scores its embeddings."""
    import datasets

    from thresher.tasks.retrieval import inverse_cloze, retrieval_metrics

    documents, queries, relevant = inverse_cloze(rows["text"][:], seed=seed)

    def score(embeddings: Any) -> dict[str, float]:
        return retrieval_metrics(embeddings[len(documents) :], embeddings[: len(documents)], relevant)

    return datasets.Dataset.from_dict({"text": documents + queries}), score


def _spread(value: Spread) -> str:
    return f"{ratio(value.median)} ({value.low:.2f}-{value.high:.2f})"


def _record(one: Comparison) -> dict[str, Any]:
    return {
        "batch_size": one.batch_size,
        "padding_only": vars(one.padding_only),
        "measured": vars(one.measured),
        "over_sorted": vars(one.over_sorted),
        "seconds": {name: vars(timing.seconds) for name, timing in one.timings.items()},
    }
