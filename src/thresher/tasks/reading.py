"""A row as a model reads it, and where in its text each token stands: what a token map is drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from thresher.errors import DataError, OptionError
from thresher.tasks.features import length_limit

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Reading:
    """One row.

    Attributes:
        sides: the text, or both of a pair.
        inputs: what the model takes, [N] each.
        offsets: of each token [start, end) in the characters of its side; (0, 0) for special tokens.
        sequence_ids: the side of each token, from 0; None for special ones.
        words: of a row of words the number of each token's, None for special ones; None where a row is a text.
    """

    sides: tuple[str, ...]
    inputs: Mapping[str, list[int]]
    offsets: tuple[tuple[int, int], ...]
    sequence_ids: tuple[int | None, ...]
    words: tuple[int | None, ...] | None = None

    @classmethod
    def of(
        cls, text: str | Sequence[str], tokenizer: Any, max_length: int | None = None, *, plain: bool = False
    ) -> Self:
        """A text or a pair, cut to `max_length` tokens. plain: special tokens that are written out are text as well.

        Raises OptionError for a tokenizer that knows no offsets and a length without room for a text, DataError for what is
        no text.
        """
        sides = tuple(text) if isinstance(text, list | tuple) else (text,)
        if not 1 <= len(sides) <= 2 or not all(isinstance(side, str) for side in sides):
            raise DataError(f"A row is a text or a pair of texts, not {text!r:.60}.")
        limit = _limit(tokenizer, max_length, pair=len(sides) == 2)
        options = {"split_special_tokens": True} if plain else {}
        found = tokenizer(*sides, truncation=True, max_length=limit, return_offsets_mapping=True, **options)
        offsets = tuple((int(start), int(end)) for start, end in found["offset_mapping"])
        return cls(sides, _inputs(found), offsets, tuple(found.sequence_ids(0)))

    @classmethod
    def of_words(cls, words: Sequence[str], tokenizer: Any, max_length: int | None = None) -> Self:
        """A row of words as taggers read it, each tokenized by itself; its text is the words with spaces between them. Raises
        what `of` raises."""
        limit = _limit(tokenizer, max_length, pair=False)
        how = {"is_split_into_words": True, "split_special_tokens": True, "return_offsets_mapping": True}
        found = tokenizer(list(words), truncation=True, max_length=limit, **how)
        starts = [0]
        for word in words:
            starts.append(starts[-1] + len(word) + 1)
        numbers = tuple(found.word_ids(0))
        offsets = tuple(
            (0, 0)
            if number is None
            else (starts[number] + int(start), starts[number] + min(int(end), len(words[number])))
            for number, (start, end) in zip(numbers, found["offset_mapping"], strict=True)
        )
        sides = tuple(None if number is None else 0 for number in numbers)
        return cls((" ".join(words),), _inputs(found), offsets, sides, numbers)


def _limit(tokenizer: Any, max_length: int | None, *, pair: bool) -> int:
    if not getattr(tokenizer, "is_fast", False):
        raise OptionError("Token maps need a fast tokenizer (a tokenizer.json beside the model), which knows offsets.")
    return length_limit(tokenizer, max_length, pair=pair)


def _inputs(found: Any) -> dict[str, list[int]]:
    return {name: list(found[name]) for name in INPUTS if name in found}


__all__ = ["Reading"]
