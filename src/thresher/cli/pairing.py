"""thresher index, thresher rank: candidates encoded once into a store, and ranked for a query."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from thresher.cli.options import DATA, OUTPUT, Column, Device, Json, assignments, place_of
from thresher.cli.screen import Interrupted, Result, command, notice, progress, quoted
from thresher.errors import DataError, OptionError, StoreError
from thresher.report.console import count, size, table

if TYPE_CHECKING:
    import datasets

    from thresher.pairs.keeping import Added, Index

ScorerDirectory = Annotated[
    str, typer.Option("--model", help="What a scorer was saved to.", metavar="DIR", rich_help_panel=DATA)
]
StoreDirectory = Annotated[
    str,
    typer.Option(
        "--store",
        help="Where the encoded candidates are: a directory; or a Lance table, NAME.lance or a URI as s3://bucket/name.",
        metavar="DIR",
        rich_help_panel=DATA,
    ),
]


@command
def index(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A .jsonl, .json, .csv, .tsv or .parquet file (also .gz) with the columns id and text."
        ),
    ],
    model: ScorerDirectory,
    store: StoreDirectory,
    column: Column = None,
    dtype: Annotated[
        Literal["float32", "float16", "int8"] | None,
        typer.Option(
            help="What vectors are kept in. Default: as in the store, in a new one float16.", rich_help_panel=OUTPUT
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Candidates encoded and committed at a time. Default: 2,048.",
            metavar="ROWS",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Processes that encode, one core each.", metavar="COUNT", rich_help_panel=OUTPUT),
    ] = 1,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Encode candidates once and keep them in a store, for thresher rank.

    Ids that are in the store already stay as they are: more files can be added, and after an interruption the same command goes
    on where it stopped.

    [bold]thresher index passages.jsonl --model scorer --store passages[/]
    """
    columns = assignments(column, "--column")
    place = place_of(device)

    from thresher.cli.data import read_rows
    from thresher.pairs.keeping import BATCH
    from thresher.scale import fill
    from thresher.tasks.data import map_columns

    rows = map_columns(read_rows(file), columns)
    names = candidate_ids(rows)
    scorer = open_scorer(model, place)
    check_texts(rows, scorer)  # all of them, so that nothing is encoded in vain
    with _opened(scorer, store, dtype) as opened, progress("encoding", len(rows)) as done:
        opened.store.hold()  # a writer that has to wait for another one changes nothing
        opened.store.remember_origin(str(Path(model).expanduser().resolve()))
        before = len(opened)
        candidates, size = zip(names, rows["text"], strict=True), batch or BATCH
        try:
            if workers > 1:
                added = fill(opened, model, candidates, workers=workers, batch=size, device=place, on_done=done)
            else:
                added = opened.add(candidates, batch=size, on_done=done)
        except KeyboardInterrupt:
            raise Interrupted(
                f"Interrupted. {count(len(opened) - before)} candidates were added to {store}, which holds "
                f"{count(len(opened))}; the same command goes on from there."
            ) from None
        return _indexed(opened, added, store)


@command
def rank(
    query: Annotated[
        list[str],
        typer.Argument(metavar="QUERY", help="A text; or the utterances of a dialogue, one by one, oldest first."),
    ],
    store: StoreDirectory,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="What the scorer was saved to. Default: where thresher index read it.",
            metavar="DIR",
            rich_help_panel=DATA,
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many to show.", rich_help_panel=OUTPUT)] = 10,
    ids: Annotated[
        Path | None,
        typer.Option(
            help="Rank only the candidates whose ids are in this text file, one a line.",
            metavar="FILE",
            rich_help_panel=DATA,
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Rank the candidates of a store for a query, best first.

    [bold]thresher rank "who wrote the iliad?" --store passages -k 5[/]
    """
    place = place_of(device)
    subset = None if ids is None else _listed(ids)
    # What is no UTF-8 on the command line came as stand-ins, which tokenizers refuse.
    texts = [text.encode("utf-8", "replace").decode() for text in query]
    if not "".join(texts).strip():
        raise OptionError("The query is empty; give a text to rank the candidates for.")

    from thresher.pairs.keeping import Index

    with Index.open(open_scorer(model or _scorer_of(store), place), store) as opened:
        opened.store.verify()
        found = opened.rank(texts[0] if len(texts) == 1 else texts, k, subset)
        among = len(opened) if subset is None else len(subset)
    rows = [(str(number), name, f"{score:.4f}") for number, (name, score) in enumerate(found, start=1)]
    return Result(
        {
            "store": store,
            "candidates": among,
            "ranked": [{"id": name, "score": score} for name, score in found],
        },
        [
            table("Best first", ("", "id", "score"), rows),
            f"{count(len(found))} of {count(among)} candidates in {store}.",
        ],
    )


def open_scorer(directory: str, place: str) -> Any:
    import transformers

    from thresher.pairs.saving import load

    transformers.utils.logging.disable_progress_bar()
    return load(directory, device=place)


def _opened(scorer: Any, store: str, dtype: str | None) -> Index:
    """The store that is there, or a new one."""
    from thresher.pairs.keeping import Index
    from thresher.pairs.store import holds_store

    if not holds_store(store):
        try:
            return Index.create(scorer, store, dtype=dtype or "float16")
        except StoreError:
            if not holds_store(store):  # else another writer made it in this moment
                raise
    opened = Index.open(scorer, store, dtype=dtype)
    try:
        opened.store.verify()  # more is not added to what nobody could read afterwards
    except StoreError:
        opened.close()
        raise
    notice(f"{store} holds {count(len(opened))} candidates; new ones are added to them")
    return opened


def _scorer_of(store: str) -> str:
    """Raises StoreError where there is no store, OptionError where it does not say it, or nothing lies there any more."""
    from thresher.pairs.store import open_store

    with open_store(store) as opened:
        found = opened.origin
    if found is None or not Path(found).is_dir():
        lost = f"its scorer was {found}, where nothing is now" if found else "it does not say where its scorer is"
        raise OptionError(f"{store}: {lost}; give --model DIR.")
    return found


def candidate_ids(rows: datasets.Dataset) -> list[str]:
    """The ids as texts. Raises DataError."""
    from thresher.pairs.cache import check_ids

    for name in ("id", "text"):
        if name not in rows.column_names:
            there = ", ".join(rows.column_names)
            raise DataError(
                f"Candidates need a column '{name}' (there are {there}); name another with --column {name}=…."
            )
    given = list(rows["id"])
    for number, name in enumerate(given, start=1):
        if name is None or name == "":
            raise DataError(f"Row {number} has no id; every candidate needs its own.")
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise DataError(f"Row {number} has the id {name!r}; an id is a text or a whole number.")
    names = [str(name) for name in given]
    check_ids(tuple(names))
    return names


def check_texts(rows: datasets.Dataset, scorer: Any) -> None:
    """Raises DataError at the row that has none."""
    from thresher.pairs.texts import check_row

    for number, text in enumerate(rows["text"], start=1):
        if text is None or not isinstance(text, str | list):
            raise DataError(f"Row {number} has {'no text' if text is None else f'the text {text!r}, which is none'}.")
        check_row(text, len(scorer.tokenizer), number)


def _indexed(opened: Index, added: Added, store: str) -> Result:
    schema = opened.store.schema
    about = {
        "store": store,
        "candidates": len(opened),
        "new": added.new,
        "there": added.there,
        "cut": added.cut,
        "dtype": schema.dtype,
        "vectors": schema.k,
        "dim": schema.dim,
        "ragged": schema.ragged,
        "bytes": opened.store.nbytes,
    }
    each = f"{'up to ' if schema.ragged else ''}{schema.k} x {schema.dim} in {schema.dtype}"
    rows = [
        ("candidates in the store", count(len(opened))),
        ("new", count(added.new)),
        ("there before", count(added.there)),
        ("kept of each", each),
        ("size on disk", size(opened.store.nbytes)),
    ]
    return Result(about, [table("Indexed", ("", "found"), rows), f'Next: thresher rank "…" --store {quoted(store)}'])


def _listed(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8; --ids takes a text file with one id a line.") from error
    found = [name for name in (line.rstrip("\r") for line in lines) if name]
    if not found:
        raise DataError(f"{file} holds no ids; write one a line, or leave --ids out.")
    return found
