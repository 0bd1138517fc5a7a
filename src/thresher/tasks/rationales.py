"""Texts with human rationales, as ERASER has them: words, a class, and which stretches of words a person called the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerBase

from thresher.errors import DataError, OptionError
from thresher.tasks.features import length_limit
from thresher.tasks.given import as_rows
from thresher.tasks.labels import class_numbers

Span = tuple[int, int]  # [start, end) of words
NOT_READ = np.nan


@dataclass(frozen=True)
class RationaleRows:
    """Documents by their words, encoded so that what is said of tokens can be said of words.

    Attributes:
        rows: `input_ids`, `attention_mask` and `labels`, `token_type_ids` where the tokenizer gives them; not padded.
        words: the words of each document.
        rationales: of each document, [start, end) of the words that are reasons, in order, each once.
        word_of: of each document, the word that each token is of; -1 for special tokens.
        truncated: how many documents were longer than the tokens that are read.
        empty: how many rationales cover no word, as some of ERASER's; they are left out.
    """

    rows: datasets.Dataset
    words: tuple[tuple[str, ...], ...]
    rationales: tuple[tuple[Span, ...], ...]
    word_of: tuple[NDArray[np.int64], ...]
    truncated: int = 0
    empty: int = 0

    def __len__(self) -> int:
        return len(self.words)

    def word_scores(self, scores: Sequence[ArrayLike]) -> list[NDArray[np.float64]]:
        """Of each document a score a word: the largest of its tokens'; NOT_READ (nan) for words beyond what is read.

        scores: of each document one number a token, special tokens included.
        Raises DataError for another number of documents or tokens, or a score that is not a finite number.
        """
        if not isinstance(scores, Sequence | np.ndarray) or isinstance(scores, str):
            raise DataError(f"Give a list of scores, one array a document, not {scores!r:.60}.")
        if len(scores) != len(self):
            raise DataError(f"There are scores of {len(scores)} documents, but {len(self)} documents.")
        found = []
        for number, (given, word_of, words) in enumerate(zip(scores, self.word_of, self.words, strict=True), start=1):
            values = numbers(given)
            if values is None or values.shape != word_of.shape or not np.isfinite(values).all():
                what = "what is no numbers" if values is None else f"an array of shape {values.shape}"
                more = " with other values" if values is not None and values.shape == word_of.shape else ""
                raise DataError(
                    f"Row {number} needs one finite score for each of its {len(word_of)} tokens, not {what}{more}."
                )
            out = np.full(len(words), -np.inf)
            np.maximum.at(out, word_of[word_of >= 0], values[word_of >= 0])
            found.append(np.where(np.isneginf(out), NOT_READ, out))
        return found


def encode_rationales(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    label_names: Sequence[str] | None = None,
) -> RationaleRows:
    """Rows with `tokens` (words), `label` and `rationales` ([start, end) of words) for a model.

    max_length: the most tokens a row may have; None for what the tokenizer says the model reads, but at most 512.
    Raises DataError, naming the row (from 1), for a column that is missing, words that are no texts, and a rationale that is no
    span or lies outside the words; OptionError for a tokenizer that does not know which word a token is of.
    """
    rows = as_rows(rows)
    for name in ("tokens", "label", "rationales"):
        if name not in rows.column_names:
            raise DataError(f"Rows with rationales need a column '{name}' (there are {', '.join(rows.column_names)}).")
    if not len(rows):
        raise DataError("There are no rows to encode.")
    if not tokenizer.is_fast:
        raise OptionError("Rationales need a fast tokenizer (a tokenizer.json beside the model), which knows words.")
    words = tuple(_words(number, given) for number, given in enumerate(rows["tokens"][:], start=1))
    spans = [
        [_span(number, span, len(text)) for span in _spans(number, given)]
        for number, (given, text) in enumerate(zip(rows["rationales"][:], words, strict=True), start=1)
    ]
    rationales = tuple(tuple(sorted({(start, end) for start, end in some if start < end})) for some in spans)
    empty = sum(start == end for some in spans for start, end in some)
    limit = length_limit(tokenizer, max_length)
    features: dict[str, list[Any]] = {}
    word_of, truncated = [], 0

    def tokens(text: Sequence[str], limit: int) -> Any:
        how = {"is_split_into_words": True, "split_special_tokens": True, "truncation": True, "max_length": limit}
        return tokenizer(list(text), **how)

    for text in words:
        encoded = tokens(text, limit)
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            if name in encoded:
                features.setdefault(name, []).append(encoded[name])
        of = np.array([-1 if word is None else word for word in encoded.word_ids()], dtype=np.int64)
        truncated += len(of) == limit and len(tokens(text, limit + 1)["input_ids"]) > limit
        word_of.append(of)
    features["labels"] = class_numbers(rows["label"][:], label_names, None)
    return RationaleRows(datasets.Dataset.from_dict(features), words, rationales, tuple(word_of), truncated, empty)


def numbers(given: ArrayLike) -> NDArray[np.float64] | None:
    """As an array; None for what is none of numbers."""
    try:
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        return None


def _words(number: int, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not given or not all(isinstance(word, str) for word in given):
        raise DataError(f"Row {number} must have its words in 'tokens', a list of texts that is not empty.")
    return tuple(given)


def _spans(number: int, given: Any) -> list[Any]:
    if not isinstance(given, list | None):
        raise DataError(f"Row {number} has the rationales {given!r}, which are no list of [start, end) of words.")
    return given or []


def _is_place(end: Any) -> bool:
    """Also 2.0: one end that is no whole number makes floats of all that a column has."""
    return type(end) is int or (type(end) is float and end.is_integer())


def _span(number: int, span: Any, length: int) -> Span:
    if not isinstance(span, list | tuple) or len(span) != 2 or not all(map(_is_place, span)):
        raise DataError(f"Row {number} has the rationale {span!r}, which is not [start, end) of words.")
    start, end = map(int, span)
    if not 0 <= start <= end <= length:
        raise DataError(
            f"Row {number} has the rationale [{start}, {end}), which does not lie inside its {length} words."
        )
    return start, end


__all__ = ["NOT_READ", "RationaleRows", "Span", "encode_rationales"]
