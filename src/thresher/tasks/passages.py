"""Questions and passages as tokens: how a tokenizer frames the two, and how a long passage is divided into windows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from thresher.errors import OptionError
from thresher.tasks.framing import PairParts, by_itself
from thresher.tasks.question_files import NOWHERE

_BATCH = 1000  # questions tokenised at a time, so that only one batch is ever held as Python lists

Spans = Sequence[tuple[int, int]]
Placed = Sequence[tuple[str, int]]  # answers and where they start


@dataclass(frozen=True)
class Frame:
    """How a tokenizer frames a question and a passage, and how many of their tokens fit.

    Attributes:
        before, between, after: the ids of the special tokens before, between and after the two.
        types: the token types of the five parts, of which a text shows its one type; None where there are none.
        room: for tokens of both texts together.
        longest: the most tokens of a question.
    """

    before: list[int]
    between: list[int]
    after: list[int]
    types: list[int] | None
    room: int
    longest: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Frame:
        """The frame of the pairs of `tokenizer`.

        Raises:
            OptionError: it is slow or makes no pairs, or `max_length` has no room for a token of either text.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise OptionError(
                "Answers are found by a fast tokenizer (a tokenizer.json beside the model), which knows offsets."
            )
        parts = PairParts.of(tokenizer)
        special = sum(map(len, parts.special))
        if max_length - special < 2:
            raise OptionError(
                f"A maximum length of {max_length} leaves no room for a token of the question and one of the passage beside "
                f"{special} special tokens."
            )
        types = None if parts.types is None else [part[0] if part else 0 for part in parts.types]
        room = max_length - special
        return cls(*parts.special, types, room, min(max_length // 2, room - 1))

    def begin(self, question: int) -> int:
        """The place of the passage's first token after a question of so many tokens."""
        return len(self.before) + question + len(self.between)

    def window(self, question: list[int], passage: list[int]) -> dict[str, list[int]]:
        """Token ids, and types where there are any."""
        parts = (self.before, question, self.between, passage, self.after)
        features = {"input_ids": list(itertools.chain.from_iterable(parts))}
        if self.types is not None:
            kinds = zip(self.types, parts, strict=True)
            features["token_type_ids"] = [kind for kind, part in kinds for _ in part]
        return features


def spread(count: int, capacity: int, stride: int) -> Iterator[tuple[int, int]]:
    """[start, end) of windows over `count` tokens that hold `capacity` each; neighbours share `stride`, at most half.

    Every token is in one of them, and none is within another.
    """
    step = capacity - min(stride, capacity // 2)
    for start in itertools.count(0, step):
        yield start, min(count, start + capacity)
        if start + capacity >= count:
            return


def tokens_of(offsets: NDArray[np.int64], start: int, end: int) -> tuple[int, int]:
    """The first and the last token that has a character of [start, end), by the offsets [n, 2] of all; the first is the
    later of the two where none has."""
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    return first, int(np.searchsorted(offsets[:, 0], end, side="left")) - 1


@dataclass(frozen=True)
class Tokenised:
    """A question and its passage in tokens.

    Attributes:
        ids: of the question, all of them.
        passage: the number of the passage among `Passages`.
        tokens: ids of the whole passage.
        span: the first and last token of the answer to learn; None where there is none.
        marked: [n] 1 for tokens of the evidence; None where rows have no evidence.
    """

    name: str
    question: str
    context: str
    ids: list[int]
    passage: int
    tokens: list[int]
    answers: Placed | None
    span: tuple[int, int] | None
    marked: NDArray[np.int64] | None


class Passages:
    """Passages as tokens, each tokenised once while questions of one batch ask about it.

    texts, offsets: of every passage so far, by its number: the text, and [n, 2] the characters that each token stands for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []
        self.offsets: list[NDArray[np.int64]] = []
        self._known: dict[str, tuple[int, list[int]]] = {}

    def of(self, contexts: Sequence[str]) -> dict[str, tuple[int, list[int]]]:
        """The number and the token ids of every context."""
        wanted = dict.fromkeys(contexts)
        known = {text: self._known[text] for text in wanted if text in self._known}
        new = [text for text in wanted if text not in known]
        if new:
            made = by_itself(self.tokenizer, new, return_offsets_mapping=True)
            for text, ids, offsets in zip(new, made["input_ids"], made["offset_mapping"], strict=True):
                known[text] = len(self.offsets), ids
                self.texts.append(text)
                self.offsets.append(np.array(offsets, dtype=np.int64).reshape(-1, 2))
        self._known = known
        return known


def tokenised(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, passages: Passages) -> Iterator[Tokenised]:
    """The questions of canonical rows, in order, in tokens; `passages` takes in what they are asked about."""
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        known = passages.of(batch["context"])
        asked = by_itself(tokenizer, batch["question"])["input_ids"]
        for i, (name, question, context) in enumerate(
            zip(batch["id"], batch["question"], batch["context"], strict=True)
        ):
            number, ids = known[context]
            offsets = passages.offsets[number]
            answers = None
            if "answers" in batch:
                given = batch["answers"][i]
                answers = list(zip(given["text"], given["answer_start"], strict=True))
            marked = _marked(offsets, batch["evidence"][i]) if "evidence" in batch else None
            yield Tokenised(
                name,
                question,
                passages.texts[number],
                asked[i],
                number,
                ids,
                answers,
                _span(offsets, answers or ()),
                marked,
            )


def _span(offsets: NDArray[np.int64], answers: Placed) -> tuple[int, int] | None:
    """The first and last token of the first answer that has any."""
    for text, start in answers:
        if start != NOWHERE:
            first, last = tokens_of(offsets, start, start + len(text))
            if first <= last:
                return first, last
    return None


def _marked(offsets: NDArray[np.int64], spans: Spans) -> NDArray[np.int64]:
    """[n] 1 for tokens that have a character of a span."""
    marked = np.zeros(len(offsets), dtype=np.int64)
    for start, end in spans:
        first, last = tokens_of(offsets, start, end)
        marked[first : last + 1] = 1
    return marked
