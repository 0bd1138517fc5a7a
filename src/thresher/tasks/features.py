"""Texts to token ids, with a count of what was cut or empty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
from transformers import PreTrainedTokenizerBase

from thresher.errors import DataError, OptionError
from thresher.settings import is_whole
from thresher.tasks.files import kind_of

DEFAULT_MAX_LENGTH = 512

_BATCH = 1000  # rows tokenised at a time, so that only one batch is ever held as Python lists
_KEPT = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class EncodedRows:
    """Texts as token ids.

    Attributes:
        rows: `input_ids` and `attention_mask`, `token_type_ids` where the tokenizer gives them, and `labels` where the
            rows have them; not padded.
        max_length: the most tokens a row may have.
        truncated: how many rows were longer and were cut.
        empty: how many rows hold an empty text (of a pair: at least one).
        unit: what a row is called.
    """

    unit: ClassVar[str] = "rows"

    rows: datasets.Dataset
    max_length: int
    truncated: int = 0
    empty: int = 0

    def notice(self) -> str | None:
        """What a user should know about these rows, a sentence without its full stop; None when there is nothing."""
        parts = []
        if self.truncated:
            were = "was" if self.truncated == 1 else "were"
            longer = f"longer than {self.max_length} tokens"
            parts.append(f"{self.truncated} of {len(self.rows)} texts {were} {longer} and {were} cut")
        if self.empty:
            parts.append("1 text is empty" if self.empty == 1 else f"{self.empty} texts are empty")
        return "; ".join(parts) or None


def encode_texts(
    rows: datasets.Dataset,
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    labels: Sequence[int] | Sequence[float] | None = None,
) -> EncodedRows:
    """Tokenize one text a row, or two.

    Args:
        rows: the texts; null counts as an empty text, and a number as its digits.
        columns: the column of the text, or those of a pair.
        tokenizer: the model's own.
        max_length: the most tokens a row may have, special tokens included; None for what the tokenizer says the model
            reads, but at most 512. Of a pair, the longer text is cut first.
        labels: one a row, or None.

    Raises:
        DataError: there are no rows, or a value is not a text (row from 1).
        OptionError: `max_length` has no room for a token beside the special ones.
    """
    if not len(rows):
        raise DataError("There are no rows to encode.")
    limit = length_limit(tokenizer, max_length, pair=len(columns) == 2)
    kind = datasets.Value("int64" if labels is not None and all(map(is_whole, labels)) else "float64")
    encoded, truncated, empty = [], 0, 0
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        texts = [texts_of(batch[column], column, start) for column in columns]
        empty += sum(not all(text.strip() for text in row) for row in zip(*texts, strict=True))
        features, cut = _tokenize(tokenizer, texts, limit)
        truncated += cut
        # Declared types, because a batch whose texts are all empty would not show them.
        schema: dict[str, Any] = {name: datasets.Sequence(datasets.Value("int64")) for name in features}
        if labels is not None:
            features["labels"] = list(labels[start : start + _BATCH])
            schema["labels"] = kind
        encoded.append(datasets.Dataset.from_dict(features, features=datasets.Features(schema)))
    return EncodedRows(datasets.concatenate_datasets(encoded), limit, truncated, empty)


def length_limit(tokenizer: PreTrainedTokenizerBase, max_length: int | None, *, pair: bool = False) -> int:
    """The most tokens of a row. Arguments and errors as in `encode_texts`."""
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length is not None and not is_whole(max_length):
        raise OptionError(f"A maximum length is a whole number of tokens, not {max_length!r}.")
    limit = min(tokenizer.model_max_length, DEFAULT_MAX_LENGTH) if max_length is None else int(max_length)
    if limit <= special:
        raise OptionError(f"A maximum length of {limit} leaves no room for text beside {special} special tokens.")
    return limit


def texts_of(values: Sequence[Any], column: str, offset: int) -> list[str]:
    """The texts of a column, of which the first is row `offset` (from 0). Errors as in `encode_texts`."""
    for row, value in enumerate(values, start=offset + 1):
        if not isinstance(value, str | int | float | None):
            raise DataError(f"Row {row} holds a {kind_of(value)} in the column '{column}', where a text is expected.")
    return ["" if value is None else str(value) for value in values]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[str]], limit: int
) -> tuple[dict[str, list[Any]], int]:
    """Features of a batch, and how many of its rows were cut."""
    whole = tokenizer(*texts, truncation=False, padding=False, return_attention_mask=True, verbose=False)
    features: dict[str, list[Any]] = {name: list(whole[name]) for name in _KEPT if name in whole}
    # Only an uncut row shows that it is too long, so those few are tokenized again.
    long = [i for i, ids in enumerate(features["input_ids"]) if len(ids) > limit]
    if long:
        again = ([side[i] for i in long] for side in texts)
        cut = tokenizer(*again, truncation=True, max_length=limit, padding=False, return_attention_mask=True)
        for name, column in features.items():
            for i, value in zip(long, cut[name], strict=True):
                column[i] = value
    return features, len(long)
