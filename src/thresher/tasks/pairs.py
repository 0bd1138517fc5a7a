"""Rows of queries and candidates in one form, for scorers of pairs: to train on and to rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets

from thresher.errors import DataError
from thresher.tasks.dialogues import dialogues
from thresher.tasks.files import kind_of
from thresher.tasks.given import as_rows

_TEXTS = datasets.Sequence(datasets.Value("string"))
_NUMBERS = datasets.Sequence(datasets.Value("float64"))
_FEATURES = datasets.Features(query=_TEXTS, candidates=_TEXTS, labels=_NUMBERS)
_SIDES = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("query", "candidate"))


@dataclass(frozen=True)
class Pairs:
    """Queries, each with candidates.

    Attributes:
        rows: `query` (texts: the utterances of a dialogue, oldest first, or one text), `candidates` (texts, at least one) and
            `labels` (a number for each of them).
        dialogues: whether the queries are dialogues, which are cut from the front.
        ranked: whether labels are 1 for right and 0 for wrong among a query's candidates; else each row is one pair, and its
            label a class or a number.
    """

    rows: datasets.Dataset
    dialogues: bool
    ranked: bool

    def query(self, row: dict[str, Any]) -> str | list[str]:
        """A row's query as a scorer reads it."""
        return row["query"] if self.dialogues else row["query"][0]  # type: ignore[no-any-return]


def pairs(rows: datasets.Dataset) -> Pairs:
    """Rows of any of these columns in one form.

    Args:
        rows: what `dialogues` takes; or query with candidates and labels, or candidates and label, the index of the right one;
            or query and positive, and on request negatives (texts); or two texts (sentence1 and sentence2, premise and
            hypothesis, query and candidate) and label. A null among the texts counts as an empty text.

    Raises:
        DataError: there are no rows or none of these columns, or a row (named, from 1) has no candidates, something that is no
            text, or labels that do not fit.
    """
    rows = as_rows(rows)
    if not len(rows):
        raise DataError("There are no rows.")
    there = set(rows.column_names)
    if "context" in there:
        return Pairs(dialogues(rows).rename_column("context", "query"), True, True)
    if {"query", "candidates"} <= there and there & {"labels", "label"}:
        return Pairs(dialogues(_as_contexts(rows)).rename_column("context", "query"), False, True)
    if {"query", "positive"} <= there:
        return Pairs(_made(rows, _with_positive), False, True)
    for first, second in _SIDES:
        if {first, second, "label"} <= there:
            return Pairs(_made(rows, partial(_labelled, first=first, second=second)), False, False)
    raise DataError(
        f"The rows are no pairs (there are {', '.join(rows.column_names)}): they need context or query, with candidates and "
        "label or labels, or query and positive, or sentence1, sentence2 and label."
    )


def _as_contexts(rows: datasets.Dataset) -> datasets.Dataset:
    """Queries as dialogues of one utterance."""
    contexts = []
    for number, value in enumerate(rows.with_format(None)["query"], start=1):
        try:
            contexts.append([_text(value)])
        except TypeError as error:
            raise DataError(f"Row {number} holds {error}.") from error
    return rows.remove_columns("query").add_column("context", contexts)


def _with_positive(row: dict[str, Any]) -> tuple[str, list[str], list[float]]:
    wrong = [_text(text) for text in row.get("negatives") or []]
    return _text(row["query"]), [_text(row["positive"]), *wrong], [1.0, *[0.0] * len(wrong)]


def _labelled(row: dict[str, Any], first: str, second: str) -> tuple[str, list[str], list[float]]:
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise TypeError(f"the label {label!r}, where a number is expected")
    return _text(row[first]), [_text(row[second])], [float(label)]


def _text(value: Any) -> str:
    if not isinstance(value, str | None):
        raise TypeError(f"a {kind_of(value)} where a text is expected")
    return value or ""


def _made(rows: datasets.Dataset, one: Any) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {"query": [], "candidates": [], "labels": []}
    for number, row in enumerate(rows.with_format(None), start=1):
        try:
            query, candidates, labels = one(row)
        except TypeError as error:
            raise DataError(f"Row {number} holds {error}.") from error
        for column, value in zip(columns.values(), ([query], candidates, labels), strict=True):
            column.append(value)
    return datasets.Dataset.from_dict(columns, features=_FEATURES)
