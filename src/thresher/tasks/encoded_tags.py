"""Rows of words as token ids, and what is said of them: a tag for every word, and entities as seqeval counts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from seqeval.metrics import classification_report
from seqeval.metrics.sequence_labeling import get_entities

from thresher.errors import DataError
from thresher.tasks.features import EncodedRows
from thresher.tasks.tag_rows import OUTSIDE


@dataclass(frozen=True, kw_only=True)
class EncodedTags(EncodedRows):
    """Rows of words as token ids; `labels`, where there are tags, holds a tag's number on a word's first token and -100 on
    every other.

    Attributes:
        names: the tags, in the order of a model's outputs.
        words: of every row.
        firsts: of every word the place of its first token; -1 where it was cut off, or the tokenizer gives it no token.
        tags: of every word, in IOB2; None without tags.
        lost: how many words were cut off.
        silent: how many words the tokenizer gives no token for (a zero-width space by itself, for instance).
        begun: how many entities began with I- (see `repaired`).
        left_out: how many rows are not among these, as they have no word to learn from.
    """

    names: tuple[str, ...]
    words: list[list[str]]
    firsts: list[list[int]]
    tags: list[list[str]] | None = None
    lost: int = 0
    silent: int = 0
    begun: int = 0
    left_out: int = 0

    def notice(self) -> str | None:
        parts = [] if (read := self._reading()) is None else [read]
        if self.silent:
            parts.append(f"{_count(self.silent, 'word')} without a token {_get(self.silent)} the tag O")
        if self.begun:
            begins = "entity begins" if self.begun == 1 else "entities begin"
            parts.append(f"{self.begun} {begins} with I-, which is read as B-")
        if self.empty:
            parts.append("1 row is empty" if self.empty == 1 else f"{self.empty} rows are empty")
        if self.left_out:
            parts.append(f"{_count(self.left_out, 'row')} without a word to learn from {_were(self.left_out)} left out")
        return "; ".join(parts) or None

    def _reading(self) -> str | None:
        """What of the rows is read, where it is not simply all."""
        if not self.truncated:
            return None
        rows = f"{self.truncated} of {len(self.rows)} rows {_were(self.truncated)}"
        cut = f"with {_count(self.lost, 'word')} cut off, which {_get(self.lost)} the tag O"
        return f"{rows} longer than {self.max_length} tokens, {cut if self.lost else 'in the middle of the last word'}"

    def select(self, index: Sequence[int] | NDArray[Any]) -> Self:
        """The rows of these numbers, some more than once where they are; the counts stay those of all."""
        numbers = [int(number) for number in index]
        return replace(self._of(numbers), rows=self.rows.select(numbers))

    def _of(self, numbers: Sequence[int]) -> Self:
        """The words of these rows, beside `rows` that are still all."""
        words, firsts = [self.words[number] for number in numbers], [self.firsts[number] for number in numbers]
        tags = None if self.tags is None else [self.tags[number] for number in numbers]
        return replace(self, words=words, firsts=firsts, tags=tags)

    def _windows_of(self, row: int) -> list[int]:
        """Of each word of a row the one of `rows` that shows it."""
        return [row] * len(self.words[row])

    def predicted(self, predictions: NDArray[Any]) -> list[list[str]]:
        """A tag for every word of every row; O for words that were not read.

        Args:
            predictions: [rows, N, tags] logits, as `measure.run.run` gives them; one for each of `rows`.

        Raises:
            DataError: the shape does not fit these rows.
        """
        rows, classes = len(self.rows), len(self.names)
        if predictions.ndim != 3 or (len(predictions), predictions.shape[2]) != (rows, classes):
            raise DataError(f"Predictions {predictions.shape} do not fit {rows} rows and {classes} tags.")
        made = []
        last = max((place for firsts in self.firsts for place in firsts), default=-1)
        if last >= predictions.shape[1] or np.isnan(predictions).all():
            what = "are no numbers" if last < predictions.shape[1] else f"end before token {last}, which begins a word"
            raise DataError(f"Predictions {predictions.shape} {what}.")
        for row, firsts in enumerate(self.firsts):
            places = np.array(firsts, dtype=np.int64)
            best = predictions[self._windows_of(row), places].argmax(-1) if len(places) else places
            made.append(
                [self.names[tag] if place >= 0 else OUTSIDE for place, tag in zip(firsts, best.tolist(), strict=True)]
            )
        return made

    def metrics(self, predictions: NDArray[Any]) -> dict[str, float]:
        """F1, precision and recall of all entities together (0 to 1, 0 where nothing is there to count).

        An entity is right where its type and both its ends are; one in words that were not read is missed.

        Raises:
            DataError: the rows have no tags, or the shape does not fit.
        """
        return _scores(self._counted(predictions).get("micro avg", {}))

    def report(self, predictions: NDArray[Any]) -> dict[str, dict[str, float]]:
        """The same of each type by itself, with `support`, its number of true entities. Arguments and errors as there."""
        found = self._counted(predictions)
        return {
            kind: _scores(values) | {"support": float(values["support"])}
            for kind, values in found.items()
            if not kind.endswith(" avg")
        }

    def _counted(self, predictions: NDArray[Any]) -> dict[str, Any]:
        if self.tags is None:
            raise DataError("These rows come without tags, so there is nothing to judge by.")
        predicted = self.predicted(predictions)
        if all(tag == OUTSIDE for rows in (self.tags, predicted) for row in rows for tag in row):
            return {}
        found: dict[str, Any] = classification_report(self.tags, predicted, output_dict=True, zero_division=0)
        return found

    def agreement(self, predictions: NDArray[Any], reference: NDArray[Any]) -> float:
        """The share of words with the same tag in both, of [rows, N, tags] logits each; 1 where there are no words."""
        pairs = zip(self.predicted(predictions), self.predicted(reference), strict=True)
        same = [one == other for ours, theirs in pairs for one, other in zip(ours, theirs, strict=True)]
        return float(np.mean(same)) if same else 1.0


@dataclass(frozen=True, kw_only=True)
class EncodedLongTags(EncodedTags):
    """Windows of rows of words as token ids; everything but `rows` is still of whole rows.

    Attributes:
        rows: one a window, in the order of the rows that they are of.
        owners: [windows] the number of each window's row; at least one window belongs to each.
        homes: of every word the window that its tag is read from: where the nearer end is farthest; `firsts` says where in it.
    """

    unit: ClassVar[str] = "windows"

    owners: list[int]
    homes: list[list[int]]

    def _reading(self) -> str | None:
        counts = np.bincount(self.owners, minlength=len(self.words))
        parts = []
        if long := int((counts > 1).sum()):
            what = f"{long} of {len(counts)} rows {'is' if long == 1 else 'are'} longer than {self.max_length} tokens"
            parts.append(f"{what} and read in {counts[counts > 1].sum()} windows")
        if self.truncated:
            parts.append(f"{_count(self.truncated, 'word')} longer than a window {_were(self.truncated)} cut")
        return "; ".join(parts) or None

    def select(self, index: Sequence[int] | NDArray[Any]) -> Self:
        """The windows of these numbers, which are all those of some rows, row after row."""
        windows = [int(number) for number in index]
        begins = [
            at for at, number in enumerate(windows) if number == 0 or self.owners[number - 1] != self.owners[number]
        ]
        numbers = [self.owners[windows[at]] for at in begins]
        moved = [at - windows[at] for at in begins]
        return replace(
            self._of(numbers),
            rows=self.rows.select(windows),
            owners=np.repeat(np.arange(len(begins)), np.diff([*begins, len(windows)])).tolist(),
            homes=[[home + by for home in self.homes[row]] for row, by in zip(numbers, moved, strict=True)],
        )

    def _windows_of(self, row: int) -> list[int]:
        return self.homes[row]


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The type, the first word and the word after the last of each entity."""
    return [(kind, first, last + 1) for kind, first, last in get_entities(list(tags))]


def _scores(values: dict[str, Any]) -> dict[str, float]:
    names = {"f1": "f1-score", "precision": "precision", "recall": "recall"}
    return {name: float(values.get(theirs, 0.0)) for name, theirs in names.items()}


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _get(number: int) -> str:
    return "gets" if number == 1 else "get"


__all__ = ["EncodedLongTags", "EncodedTags", "entities"]
