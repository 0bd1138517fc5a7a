"""Texts longer than a model reads: overlapping windows, whose answers are averaged into one for each text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from thresher.errors import DataError, OptionError
from thresher.settings import is_whole
from thresher.tasks.features import EncodedRows, length_limit, texts_of
from thresher.tasks.given import as_rows
from thresher.tasks.reading import Reading

STRIDE = 64

_BATCH = 1000  # texts tokenised at a time
_KEPT = ("input_ids", "attention_mask", "token_type_ids")
_NUMBERS = datasets.Sequence(datasets.Value("int64"))


@dataclass(frozen=True, kw_only=True)
class EncodedLongTexts(EncodedRows):
    """Windows of texts as token ids; `empty` counts texts, and none is cut.

    Attributes:
        rows: one a window, in the order of the texts, as in `EncodedRows`; each with the label of its text.
        firsts: [texts] the first window of each; at least one window belongs to each.
        weights: [windows] tokens of the text in each, those shared with a neighbour counted in both; at least 1.
        labels: of every text; None without labels.
    """

    unit: ClassVar[str] = "windows"

    firsts: NDArray[np.int64]
    weights: NDArray[np.float64]
    labels: Sequence[int] | Sequence[float] | None = None

    def notice(self) -> str | None:
        parts = []
        counts = np.diff(self.firsts, append=len(self.weights))
        if long := int((counts > 1).sum()):
            what = f"{long} of {len(counts)} texts {'is' if long == 1 else 'are'} longer than {self.max_length} tokens"
            parts.append(f"{what} and read in {counts[counts > 1].sum()} windows")
        if (rest := super().notice()) is not None:
            parts.append(rest)
        return "; ".join(parts) or None

    @property
    def owners(self) -> list[int]:
        """[windows] the number of each window's text."""
        return np.repeat(np.arange(len(self.firsts)), np.diff(self.firsts, append=len(self.weights))).tolist()

    def select(self, index: Sequence[int] | NDArray[Any]) -> EncodedLongTexts:
        """The windows of these numbers, which are all those of some texts, text after text; the counts stay those of all."""
        windows = np.asarray(index, dtype=np.int64)
        firsts = np.flatnonzero(np.isin(windows, self.firsts))
        owners = self.owners
        labels = None if self.labels is None else [self.labels[owners[window]] for window in windows[firsts]]
        rows = self.rows.select(windows)
        return replace(self, rows=rows, firsts=firsts, weights=self.weights[windows], labels=labels)

    def averaged(self, predictions: NDArray[Any]) -> NDArray[Any]:
        """What is said of each text: the mean of what is said of its windows, weighted by their tokens.

        Args:
            predictions: [windows, ...] logits or values.

        Returns:
            [texts, ...]

        Raises:
            DataError: there are not as many predictions as windows.
        """
        if len(predictions) != len(self.weights):
            raise DataError(f"{len(predictions)} predictions do not fit {len(self.weights)} windows.")
        weights = self.weights.reshape(-1, *[1] * (predictions.ndim - 1))
        sums = np.add.reduceat(predictions * weights, self.firsts, axis=0)
        means: NDArray[Any] = sums / np.add.reduceat(weights, self.firsts, axis=0)
        return means.astype(np.result_type(predictions.dtype, np.float32))


def encode_windows(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    labels: Sequence[int] | Sequence[float] | None = None,
    *,
    stride: int = STRIDE,
) -> EncodedLongTexts:
    """Tokenize the texts of the column `text`, whole: each into as many windows as it takes.

    A text that fits gives one window, the same as if it were read without windows.

    Args:
        rows: the texts; null counts as an empty text, and a number as its digits.
        tokenizer: the model's own, a fast one.
        max_length: the most tokens of a window, special tokens included; as in `encode_texts`.
        labels: one a text, or None.
        stride: the tokens that neighbouring windows share.

    Raises:
        DataError: there are no rows or no column `text`, a value is not a text (row from 1), or labels are of other rows.
        OptionError: the tokenizer is slow, `max_length` has no room for a token beside the special ones, or windows that
            share so many tokens would never get on.
    """
    rows = as_rows(rows)
    if not len(rows):
        raise DataError("There are no rows to encode.")
    if "text" not in rows.column_names:
        raise DataError(f"Long texts are read from a column 'text' (there are {', '.join(rows.column_names)}).")
    if labels is not None and len(labels) != len(rows):
        raise DataError(f"{len(labels)} labels do not fit {len(rows)} texts.")
    limit = _limit(tokenizer, max_length, stride)
    special = tokenizer.num_special_tokens_to_add()
    columns: dict[str, list[Any]] = {}
    owners: list[int] = []
    empty = 0
    for start in range(0, len(rows), _BATCH):
        texts = texts_of(rows[start : start + _BATCH]["text"], "text", start)
        empty += sum(not text.strip() for text in texts)
        found = _windows(tokenizer, texts, limit, stride)
        owners += [start + number for number in found["overflow_to_sample_mapping"]]
        for name in _KEPT:
            if name in found:
                columns.setdefault(name, []).extend(found[name])
    features = dict.fromkeys(columns, _NUMBERS)
    if labels is not None:
        columns["labels"] = [labels[owner] for owner in owners]
        features["labels"] = datasets.Value("int64" if all(map(is_whole, labels)) else "float64")
    return EncodedLongTexts(
        rows=datasets.Dataset.from_dict(columns, features=datasets.Features(features)),
        max_length=limit,
        empty=empty,
        firsts=np.searchsorted(owners, np.arange(len(rows))),
        weights=np.array([max(1, len(ids) - special) for ids in columns["input_ids"]], dtype=np.float64),
        labels=labels,
    )


def window_readings(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, *, stride: int = STRIDE
) -> list[Reading]:
    """Every window that `encode_windows` makes of `texts`, with its part of the text. Arguments and errors as there."""
    found = _windows(tokenizer, list(texts), _limit(tokenizer, max_length, stride), stride, return_offsets_mapping=True)
    made = []
    for window, owner in enumerate(found["overflow_to_sample_mapping"]):
        sides = found.sequence_ids(window)
        places = [tuple(map(int, place)) for place in found["offset_mapping"][window]]
        own = [place for place, side in zip(places, sides, strict=True) if side is not None]
        first, last = (own[0][0], own[-1][1]) if own else (0, 0)
        offsets = tuple(
            (0, 0) if side is None else (start - first, end - first)
            for (start, end), side in zip(places, sides, strict=True)
        )
        inputs = {name: found[name][window] for name in _KEPT if name in found}
        made.append(Reading((texts[owner][first:last],), inputs, offsets, tuple(sides)))
    return made


def _limit(tokenizer: PreTrainedTokenizerBase, max_length: int | None, stride: int) -> int:
    if not tokenizer.is_fast:
        raise OptionError(
            "Windows need a fast tokenizer (a tokenizer.json beside the model), which goes on where it has cut; "
            f"{type(tokenizer).__name__} is none."
        )
    limit = length_limit(tokenizer, max_length)
    room = limit - tokenizer.num_special_tokens_to_add()
    if not is_whole(stride) or not 0 <= stride < room:
        raise OptionError(
            f"A window of {limit} tokens has room for {room} of a text, so neighbouring ones share 0 to {room - 1} of them, "
            f"not {stride}."
        )
    return limit


def _windows(tokenizer: PreTrainedTokenizerBase, texts: list[str], limit: int, stride: int, **options: Any) -> Any:
    return tokenizer(
        texts,
        truncation=True,
        max_length=limit,
        stride=stride,
        return_overflowing_tokens=True,
        padding=False,
        return_attention_mask=True,
        verbose=False,
        **options,
    )


__all__ = ["STRIDE", "EncodedLongTexts", "encode_windows", "window_readings"]
