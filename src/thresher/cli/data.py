"""Rows by the words of the command line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from thresher.cli.screen import notice
from thresher.errors import DataError, OptionError
from thresher.tasks import corpus
from thresher.tasks.data import load_rows
from thresher.tasks.dialogues import load_dialogues
from thresher.tasks.questions import load_questions, questions

HELD_OUT = 0.1
NAMED = ("qa", "response")  # tasks whose rows are named as they are read
NESTED = {"data", "paragraphs", "qas"}  # of SQuAD's and MRQA's layouts


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
    columns: Mapping[str, str] | None = None,
    usual: Mapping[str, str] | None = None,
    labelled: bool = True,
    skip_bad: bool = False,
) -> datasets.Dataset:
    """The rows of `spec`; a limit draws them with `seed`. split: for the built-in corpus, when `spec` names none. kind: the
    task, where that is known: dialogues and questions have file formats of their own, and dialogues labels unless not
    `labelled`. columns, usual: what fields of those two are called, see `load_questions`; other rows keep their names.
    skip_bad: leave out bad questions, each of them named in a notice, and their number in a last one.

    Raises OptionError when `skip_bad` is asked of rows that are no questions about passages, and for questions in a layout of
    theirs where the task is not known.
    """
    name, named = source_and_split(spec)
    if name == corpus.NAME and named is None:
        named = split
        notice(f"{corpus.NAME} without a split: taking {named}")
    drawn = {"split": named, "limit": limit, "seed": None if limit is None else seed}
    naming = {"columns": columns, "usual": usual}
    if skip_bad and kind not in (None, "qa"):
        raise OptionError(f"--skip-bad is for questions about passages (qa); this is {kind}.")
    if kind == "response":
        return load_dialogues(name, **drawn, **naming, labelled=labelled)  # type: ignore[arg-type]
    known = None if labelled else False
    if kind == "qa":
        with _skipping() as on_bad:
            return load_questions(name, **drawn, **naming, labelled=known, skip_bad=skip_bad, on_bad=on_bad)  # type: ignore[arg-type]
    rows = load_rows(name, **drawn)  # type: ignore[arg-type]
    if kind is None and (layout := NESTED & {*rows.column_names}):
        raise OptionError(
            f"{name} holds '{layout.pop()}', as files of questions about passages do; say that these are such with --task qa."
        )
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
        notice(f"Skipped {name}: it {error}")

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


def kind_asked(task: str | None, data: str) -> str | None:
    """The task that was asked for; the built-in corpus has but one."""
    return "embedding" if task is None and source_and_split(data)[0] == corpus.NAME else task


def training_rows(
    data: str,
    validation: str | None,
    limits: tuple[int | None, int | None],
    seed: int,
    kind: str | None,
    columns: Mapping[str, str],
    *,
    skip_bad: bool = False,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The rows to train on, and those that a target is met on: of `validation`, or held out. limits: of the two."""
    how: dict[str, Any] = {"seed": seed, "kind": kind, "columns": columns, "skip_bad": skip_bad}
    rows = read_rows(data, split="train", limit=limits[0], **how)
    if validation is None:
        return hold_out(rows, seed, columns)
    return rows, read_rows(validation, split="test", limit=limits[1], **how)


@contextlib.contextmanager
def numbered_as_read(rows: datasets.Dataset) -> Iterator[None]:
    """Inside this block an error that begins with a row's number tells the one it had before rows were drawn or held out."""
    try:
        yield
    except DataError as error:
        found = re.match(r"Row (\d+)\b", str(error))
        # Where rows were picked, a data set keeps which; there is no public name for it.
        picked = getattr(rows, "_indices", None)
        if found is None or picked is None:
            raise
        number = picked.column(0)[int(found[1]) - 1].as_py() + 1
        raise DataError(f"Row {number}{str(error)[found.end() :]}") from error


def passages(rows: datasets.Dataset, columns: Mapping[str, str]) -> list[str] | None:
    """Of each row the passage that it asks about; None where rows are no questions. columns: names they may yet have to get."""
    if not {"question", "context", "answers"} <= {*rows.column_names, *columns}:
        return None
    name = columns.get("context", "context")
    return list(rows[name if name in rows.column_names else "context"])


def hold_out(
    rows: datasets.Dataset, seed: int, columns: Mapping[str, str] | None = None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training rows, and the tenth of them that is kept back; of questions about passages, those about a tenth of these, more
    or less: who learned from a passage would know it."""
    if len(rows) < 2:
        raise DataError("One row cannot be divided into training and validation rows; give --validation FILE.")
    count = max(1, round(len(rows) * HELD_OUT))
    order = np.random.default_rng(seed).permutation(len(rows))
    if (texts := passages(rows, columns or {})) is not None:
        order, count = _by_passage(texts, order, count)
    notice(f"No --validation: {count:,} of the {len(rows):,} rows are held out (seed {seed})")
    return _picked(rows, sorted(order[count:])), _picked(rows, sorted(order[:count]))


def _picked(rows: datasets.Dataset, places: Sequence[int]) -> datasets.Dataset:
    """The rows at these places. A data set forgets where neighbours stood before, unless its order had been changed; here it
    has, so that `numbered_as_read` finds it."""
    last = len(rows) - 1
    return rows.select(range(last, -1, -1)).select([last - place for place in places])


def _by_passage(texts: Sequence[str], order: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """The same order, but with all questions about a passage where the first of them stands; and how many of the first ones
    are at least `count` of them about whole passages, and leave some."""
    rows: dict[str, list[int]] = {}
    for number in order.tolist():
        rows.setdefault(texts[number], []).append(number)
    if len(rows) < 2:
        raise DataError(
            "Questions about one passage cannot be divided into training and validation rows; give --validation."
        )
    ends = np.cumsum([len(numbers) for numbers in rows.values()])
    kept = min(int(np.searchsorted(ends, count)), len(ends) - 2)
    return np.array([number for numbers in rows.values() for number in numbers]), int(ends[kept])
