"""thresher fit-scorer, and thresher evaluate of what it saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli.options import (
    DATA,
    METHOD,
    OUTPUT,
    TRAINING,
    Column,
    DataSource,
    Device,
    Json,
    Limit,
    Precision,
    Seed,
    assignments,
    convert,
    directory_to_write,
    field_types,
    place_of,
)
from thresher.cli.screen import Result, command, notice, progress, progress_bar, quoted
from thresher.errors import OptionError, nearest
from thresher.report.console import count, table

if TYPE_CHECKING:
    import datasets

    from thresher.pairs.cache import Cache
    from thresher.pairs.evaluation import Ranked

OF_CANDIDATES = ("id", "text")
"""The columns of a corpus; what else --column names is its queries'."""


@command
def fit_scorer(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint's directory, a hub name, or the built-in minilm.")
    ],
    data: DataSource,
    out: Annotated[Path, typer.Option(help="Where the scorer goes.", metavar="DIR", rich_help_panel=OUTPUT)],
    scorer: Annotated[
        str,
        typer.Option(help="mixencoder, dual, poly, colbert, deformer, virt or cross.", rich_help_panel=METHOD),
    ] = "mixencoder",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the scorer, such as k=2, layers=-3,-2,-1 or lexical=32. Repeat for each.",
            metavar="NAME=VALUE",
            rich_help_panel=METHOD,
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="A method that needs no training (thresher methods), to reduce queries and the pairs that are read together. "
            "Default: what MODEL was fitted with.",
            metavar="METHOD",
            rich_help_panel=METHOD,
        ),
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="A setting of the loss: temperature=.05 (usual for cosine), negatives=16, distil_weight=1. Repeat for each.",
            metavar="NAME=VALUE",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="A saved scorer to distil from.", metavar="DIR", rich_help_panel=TRAINING),
    ] = None,
    hard: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Wrong candidates of its own that a query brings at most. Default: all.",
            metavar="COUNT",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(rich_help_panel=TRAINING)] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries a step.", rich_help_panel=TRAINING)] = 64,
    learning_rate: Annotated[float, typer.Option(rich_help_panel=TRAINING)] = 2e-5,
    own_learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Of the scorer's own weights (interactions, codes, heads). Default: as the encoder's.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            help="Queries with candidates to rank afterwards. Default: none.", metavar="DATA", rich_help_panel=DATA
        ),
    ] = None,
    column: Column = None,
    limit: Limit = None,
    seed: Seed = 0,
    precision: Precision = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Train a scorer of one query and many candidates, and save it for thresher evaluate, index and rank.

    DATA holds queries (or contexts) with candidates and label or labels, or with a positive. An interrupted run goes on when
    the same command is given again.

    [bold]thresher fit-scorer minilm wikiqa:train --validation wikiqa:validation --set k=2 --out scorer[/]
    """
    columns = assignments(column, "--column")
    place = place_of(device)

    from transformers import set_seed

    from thresher.cli.checkpoints import find
    from thresher.cli.data import numbered_as_read, read_rows
    from thresher.pairs.evaluation import evaluate, rankable
    from thresher.pairs.losses import PairLoss
    from thresher.pairs.saving import load, scorer_class
    from thresher.tasks.data import map_columns

    kind = scorer_class(scorer)
    made: dict[str, Any] = _values(kind.config_class, settings, "--set")
    lessons = PairLoss(**_values(PairLoss, loss, "--loss"))
    if teacher is not None and not lessons.distil_weight:
        raise OptionError("--teacher teaches nothing without a weight; add --loss distil_weight=1, or leave it out.")
    rows = map_columns(read_rows(data, split="train", limit=limit, seed=seed), columns)
    checked = None if validation is None else map_columns(read_rows(validation, split="validation"), columns)
    set_seed(seed)  # for weights that are new
    new = kind.from_encoder(find(model), policy=policy, **made)
    held_out = None if checked is None else rankable(new, checked)
    directory_to_write(out)
    run = {"model": model, "data": data, "limit": limit, "columns": columns, "scorer": new.signature, "policy": policy,
           "teacher": teacher, "loss": dataclasses.asdict(lessons)}  # fmt: skip
    options = {"hard": hard, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate,
               "own_learning_rate": own_learning_rate, "seed": seed, "precision": precision,
               "use_cpu": place == "cpu"}  # fmt: skip
    taught = None if teacher is None else load(teacher)
    with numbered_as_read(rows):
        metrics = _trained(new, rows, out, run, options, lessons, taught)
    about = {"directory": str(out), "scorer": scorer, "rows": len(rows), "loss": metrics["train_loss"]}
    shown: list[Any] = []
    if held_out is not None:
        with progress("evaluating", len(held_out.rows)) as done:
            found = evaluate(new.to(place), held_out, on_done=done)
        about |= _about(found)
        shown.append(_ranking(f"{scorer} on {validation}", found))
    kept = not new.joint and new.config.classes <= 1
    following = (
        f"thresher index FILE --model {quoted(out)} --store STORE" if kept else f"thresher evaluate {quoted(out)} DATA"
    )
    return Result(about, [*shown, f"Saved to {out}.", *([f"Next: {following}"] if new.config.classes <= 1 else [])])


def _trained(
    scorer: Any, rows: Any, out: Path, run: dict[str, Any], options: dict[str, Any], loss: Any, teacher: Any
) -> dict[str, float]:
    """Train into `out`/training, save, and take that folder away again."""
    from thresher.cli.fitting import bar_callback
    from thresher.cli.resume import resumable
    from thresher.pairs.learning import train

    with resumable(out, run | options), progress_bar() as bar:
        metrics = train(
            scorer,
            rows,
            out / "training",
            loss=loss,
            teacher=teacher,
            progress=False,
            callbacks=[bar_callback(bar)],
            **options,
        )
        scorer.save(out)
    for what, says in (("cut", "texts were longer than their limit and were cut"),
                       ("left_out", "queries have no right candidate and were left out")):  # fmt: skip
        if metrics[what]:
            notice(f"{count(int(metrics[what]))} {says}")
    return metrics


def _values(kind: type, items: list[str] | None, option: str) -> dict[str, Any]:
    """Settings of a dataclass from `name=value`. Raises OptionError for one that it does not have."""
    hints, given = field_types(kind), assignments(items, option)
    for name in given:
        if name not in hints:
            raise OptionError(f"{option} has no {name!r}{nearest(name, hints)}")
    return {name: convert(name, text, hints[name]) for name, text in given.items()}


# thresher evaluate, where the directory holds a scorer.


def holds_scorer(directory: str) -> bool:
    return (Path(directory).expanduser() / "scorer.json").is_file()


def evaluate_scorer(
    directory: str,
    data: str,
    columns: Mapping[str, str],
    candidates: str | None,
    store: str | None,
    drawn: Mapping[str, Any],
    device: str,
    refused: Mapping[str, object],
) -> Result:
    """Rank the candidates of every query, or one corpus.

    columns: those of the candidates too (id, text), where these are a file. drawn: limit and seed.
    refused: options that say nothing of a scorer, by name.
    """
    for option, value in refused.items():
        if value is not None:
            raise OptionError(f"{option} is not for a scorer, which {directory} holds; leave it out.")
    if candidates is not None and store is not None:
        raise OptionError("Give --candidates or --store, not both.")

    from thresher.cli.data import numbered_as_read, read_rows
    from thresher.cli.pairing import open_scorer
    from thresher.pairs.evaluation import evaluate, evaluate_corpus
    from thresher.pairs.keeping import Index
    from thresher.tasks.data import map_columns

    scorer = open_scorer(directory, place_of(device))
    theirs = {} if candidates is None else {name: columns[name] for name in OF_CANDIDATES if name in columns}
    own = {name: column for name, column in columns.items() if name not in theirs}
    rows = map_columns(read_rows(data, split="test", **drawn), own)
    if "relevant" in rows.column_names and candidates is None and store is None:
        raise OptionError("Queries with relevant ids need their corpus; give --candidates FILE or --store DIR.")
    corpus = None if candidates is None else _encoded(scorer, map_columns(read_rows(candidates), theirs), rows)
    with progress("evaluating", len(rows)) as done, numbered_as_read(rows):
        if store is not None:
            with Index.open(scorer, store) as index:
                index.store.verify()
                found = evaluate_corpus(scorer, rows, index, on_done=done)
        elif corpus is not None:
            found = evaluate_corpus(scorer, rows, corpus, on_done=done)
        else:
            found = evaluate(scorer, rows, on_done=done)
    if found.cut:
        notice(f"{count(found.cut)} texts were longer than the scorer's limits and were cut")
    about = {"directory": directory, "data": data, "scorer": scorer.config.kind, "rows": len(rows), **_about(found)}
    return Result(about, [_ranking(f"{directory} on {data}", found)])


def _encoded(scorer: Any, rows: datasets.Dataset, queries: datasets.Dataset) -> Cache:
    """A file's candidates, encoded once all else is checked."""
    from thresher.cli.data import numbered_as_read
    from thresher.cli.pairing import candidate_ids, check_texts
    from thresher.pairs.evaluation import relevant_places

    names = candidate_ids(rows)
    check_texts(rows, scorer)
    with numbered_as_read(queries):
        relevant_places(scorer, queries, names)
    return scorer.encode_candidates(list(rows["text"]), names)  # type: ignore[no-any-return]


def _about(found: Ranked) -> dict[str, Any]:
    return {
        "queries": found.queries,
        "candidates": found.candidates,
        "left_out": found.left_out,
        "metrics": found.metrics,
    }


def _ranking(title: str, found: Ranked) -> Any:
    rows = [(name, f"{value:.4f}") for name, value in found.metrics.items()]
    left = [("queries without a right candidate, left out", count(found.left_out))] if found.left_out else []
    more = [("queries", count(found.queries)), ("candidates", count(found.candidates)), *left]
    return table(title, ("", "found"), [*rows, *more])
