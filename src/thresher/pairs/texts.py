"""Texts to the token ids that each side of a pair is read as, cut to their limits."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from thresher.errors import DataError
from thresher.tasks.framing import PairParts, by_itself
from thresher.tasks.responses import EOS

Text = str | Sequence[str] | Sequence[int]
"""A text; a dialogue (its utterances, oldest first); or token ids without special tokens."""


HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts around one text (before, after) and between two (between)."""

    before: list[int]
    after: list[int]
    between: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """Raises OptionError where the tokenizer makes no pairs."""
        before, between, after = PairParts.of(tokenizer).special
        return cls(before, after, between)


@dataclass(frozen=True)
class Read:
    """Token ids without special tokens, one list a text; `cut` counts the texts that were longer."""

    rows: list[list[int]]
    cut: int


def reads_as(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What of a tokenizer decides how a text is read, for JSON; not how long it may be, which every call sets anew."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one that is written in Python
        return [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    return {name: part for name, part in json.loads(backend.to_str()).items() if name not in ("truncation", "padding")}


def tokens_of(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, room: int) -> Read:
    """The token ids of every text, at most `room`: the first ones, of a dialogue the last ones.

    After every utterance of a dialogue comes [EOS] where the tokenizer knows it, else its separator.
    Raises DataError for what is neither a text, a dialogue nor token ids that the tokenizer has.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise DataError(f"A list of texts is expected, not {type(texts).__name__}.")
    parts = [parts_of(text, len(tokenizer)) for text in texts]
    known = _tokenized(list(dict.fromkeys(p for part in parts if part for p in part)), tokenizer)
    end = tokenizer.get_vocab().get(EOS, tokenizer.sep_token_id)
    rows, cut = [], 0
    for text, part in zip(texts, parts, strict=True):
        if part is None:
            ids: list[int] = list(text)  # type: ignore[arg-type]
        elif isinstance(text, str):
            ids = known[text]
        else:
            ids = [number for utterance in part for number in (*known[utterance], end)]
        cut += len(ids) > room
        dialogue = part is not None and not isinstance(text, str)
        rows.append(ids[-room:] if dialogue else ids[:room])
    return Read(rows, cut)


def parts_of(text: Any, vocabulary: int) -> list[str] | None:
    """The texts it is made of; None for token ids.

    Raises DataError for what is neither, or a token id that is not below `vocabulary`.
    """
    if isinstance(text, str):
        return [text]
    if isinstance(text, Sequence) and not isinstance(text, bytes):
        if text and all(isinstance(one, str) for one in text):
            return list(text)
        if text and all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in text):
            if (most := max(text)) >= vocabulary:
                raise DataError(
                    f"The tokenizer has token ids from 0 to {vocabulary - 1}, and {most} is not among them."
                )
            return None
    raise DataError(f"A text, a dialogue (a list of texts) or a list of token ids is expected, not {text!r:.80}.")


def check_row(text: Any, vocabulary: int, number: int) -> None:
    """Raises DataError, naming the row, for what `parts_of` refuses."""
    try:
        parts_of(text, vocabulary)
    except DataError as error:
        raise DataError(f"Row {number} has no text that can be read: {error}") from error


def pairs_of(given: Any) -> list[tuple[Text, Text]]:
    """(query, candidate) pairs as a list. Raises DataError for what is none, naming the pair (from 1)."""
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise DataError(f"A list of pairs, a query and a candidate each, is expected, not {given!r:.80}.")
    pairs = given.tolist() if isinstance(given, np.ndarray) else list(given)
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"Pair {number} is {pair!r:.80}, where a query and a candidate are expected.")
    return [(query, candidate) for query, candidate in pairs]


def one_pair(given: Any) -> bool:
    """Whether this is a single pair of texts, and no list of pairs."""
    return isinstance(given, list | tuple | np.ndarray) and len(given) == 2 and all(isinstance(x, str) for x in given)


def _tokenized(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    if not texts:
        return {}
    try:
        return dict(zip(texts, by_itself(tokenizer, texts)["input_ids"], strict=True))
    except (TypeError, UnicodeEncodeError) as error:
        for text in texts:
            if (half := HALF.search(text)) is not None:
                raise DataError(
                    f"A text has half a character (a lone surrogate), at {half.start()}: {text!r:.80}."
                ) from error
        raise


def pair(query: list[int], candidate: list[int], frame: Frame) -> tuple[list[int], list[int]]:
    """The token ids and types of a pair that is read as one; both without special tokens."""
    first = [*frame.before, *query, *frame.between[:1]]
    second = [*frame.between[1:], *candidate, *frame.after]
    return first + second, [0] * len(first) + [1] * len(second)


def flat(rows: Sequence[Sequence[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(rows))
