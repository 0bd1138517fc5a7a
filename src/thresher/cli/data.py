"""Rows by the words of the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np

from thresher.cli.screen import notice
from thresher.errors import DataError, OptionError
from thresher.tasks import corpus
from thresher.tasks.data import load_rows
from thresher.tasks.dialogues import load_dialogues
from thresher.tasks.questions import load_questions, questions

HELD_OUT = 0.1


def source_and_split(spec: str) -> tuple[str, str | None]:
    """`imdb:train` as its name and split; a path that exists is never taken apart."""
    name, colon, split = spec.rpartition(":")
    if not colon or Path(spec).expanduser().exists() or not split.replace("-", "").replace("_", "").isalnum():
        return spec, None
    return name, split


def read_rows(
    spec: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    kind: str | None = None,
    labelled: bool = True,
    skip_bad: bool = False,
) -> datasets.Dataset:
    """The rows of `spec`; a limit draws them with `seed`. split: for the built-in corpus, when `spec` names none. kind: the
    task, where that is known: dialogues and questions have file formats of their own, and dialogues labels unless not
    `labelled`. skip_bad: leave out bad questions, each of them named in a notice, and their number in a last one.

    Raises OptionError when `skip_bad` is asked of rows that are no questions about passages.
    """
    name, named = source_and_split(spec)
    if name == corpus.NAME and named is None:
        named = split
        notice(f"{corpus.NAME} without a split: taking {named}")
    drawn = {"split": named, "limit": limit, "seed": None if limit is None else seed}
    if skip_bad and kind not in (None, "qa"):
        raise OptionError(f"--skip-bad is for questions about passages (qa); this is {kind}.")
    if kind == "response":
        return load_dialogues(name, **drawn, labelled=labelled)  # type: ignore[arg-type]
    known = None if labelled else False
    if kind == "qa":
        with _skipping() as on_bad:
            return load_questions(name, **drawn, labelled=known, skip_bad=skip_bad, on_bad=on_bad)  # type: ignore[arg-type]
    rows = load_rows(name, **drawn)  # type: ignore[arg-type]
    if not skip_bad:
        return rows
    if not holds_questions(rows):
        raise OptionError("--skip-bad is for questions about passages; say that these are such with --task qa.")
    with _skipping() as on_bad:
        return questions(rows, labelled=known, skip_bad=True, on_bad=on_bad)


@contextlib.contextmanager
def _skipping() -> Iterator[Callable[[str, str], None]]:
    """What is called with the id of each question that is skipped and what is wrong with it; their number at the end."""
    bad: list[str] = []

    def tell(name: str, error: str) -> None:
        bad.append(name)
        notice(f"The question '{name}' {error}; it is skipped")

    try:
        yield tell
    finally:
        if bad:
            notice(f"{len(bad):,} bad {'question was' if len(bad) == 1 else 'questions were'} skipped")


def holds_dialogues(rows: datasets.Dataset) -> bool:
    """Whether rows are contexts with candidate responses."""
    there = set(rows.column_names)
    return "context" in there and bool({"candidates", "positives"} & there)


def holds_questions(rows: datasets.Dataset) -> bool:
    """Whether rows are questions with passages and answers to learn from."""
    return {"question", "context", "answers"} <= set(rows.column_names)


def holds_tags(rows: datasets.Dataset) -> bool:
    """Whether rows are words with their tags."""
    there = set(rows.column_names)
    return "tokens" in there and bool({"tags", "ner_tags"} & there)


def hold_out(rows: datasets.Dataset, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training rows, and the tenth of them that is kept back; of questions about passages, those about a tenth of these, more
    or less: who learned from a passage would know it."""
    if len(rows) < 2:
        raise DataError("One row cannot be divided into training and validation rows; give --validation FILE.")
    count = max(1, round(len(rows) * HELD_OUT))
    order = np.random.default_rng(seed).permutation(len(rows))
    if holds_questions(rows):
        order, count = _by_passage(rows["context"], order, count)
    notice(f"No --validation: {count:,} of the {len(rows):,} rows are held out (seed {seed})")
    return rows.select(sorted(order[count:])), rows.select(sorted(order[:count]))


def _by_passage(contexts: Iterable[str], order: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """The same order, but with all questions about a passage where the first of them stands; and how many of the first ones
    are at least `count` of them about whole passages, and leave some."""
    rows: dict[str, list[int]] = {}
    texts = list(contexts)
    for number in order.tolist():
        rows.setdefault(texts[number], []).append(number)
    if len(rows) < 2:
        raise DataError(
            "Questions about one passage cannot be divided into training and validation rows; give --validation."
        )
    ends = np.cumsum([len(numbers) for numbers in rows.values()])
    kept = min(int(np.searchsorted(ends, count)), len(ends) - 2)
    return np.array([number for numbers in rows.values() for number in numbers]), int(ends[kept])
