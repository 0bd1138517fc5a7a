"""Dialogues to the examples of BERT-FP post-training: a few utterances, and one that may be the next (Han et al. 2021)."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from thresher.errors import DataError, OptionError
from thresher.tasks.dialogues import dialogues as response_selection
from thresher.tasks.files import kind_of
from thresher.tasks.given import as_rows
from thresher.tasks.responses import EOS, PairFrame

RANDOM, SAME_DIALOGUE, NEXT = 0, 1, 2
"""The relevance of an utterance to a window: of another dialogue, elsewhere in the same one, the true next one."""

_BATCH = 1000  # dialogues tokenized at a time
_TRIES = 20  # of drawing another dialogue's utterance that does not read like the true next one


def read_dialogues(rows: datasets.Dataset) -> list[list[str]]:
    """The positive dialogues of rows, as lists of utterances; a null counts as an empty one.

    Args:
        rows: whole dialogues, in the column `turns`; or rows of response selection (see `tasks.dialogues.dialogues`),
            where each right response ends a dialogue and a row without one gives none.

    Raises:
        DataError: the columns are others, or a row (named, from 1) has no turns, something that is no text, or labels
            that do not fit its candidates.
    """
    rows = as_rows(rows)
    if "turns" in rows.column_names:
        return [_turns(turns, number) for number, turns in enumerate(rows.with_format(None)["turns"], start=1)]
    if "context" not in rows.column_names:
        there = ", ".join(rows.column_names)
        raise DataError(f"The rows are no dialogues (there are {there}): they need turns, or context and candidates.")
    return [
        [*row["context"], candidate]
        for row in response_selection(rows)
        for candidate, label in zip(row["candidates"], row["labels"], strict=True)
        if label
    ]


def _turns(turns: Any, row: int) -> list[str]:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"Row {row} has no turns: they are {turns!r}, where a list of texts is expected.")
    for turn in turns:
        if not isinstance(turn, str | None):
            raise DataError(f"Row {row} holds a {kind_of(turn)} among its turns, where a text is expected.")
    return [turn or "" for turn in turns]


class Windows:
    """Every window of `k` utterances of every dialogue, each with an utterance that may follow it.

    Segment A is the window, an [EOS] after every utterance. Segment B is the true next utterance (a quarter of the
    time; relevance 2), a random one of the same dialogue (a quarter; relevance 1) or of another (half; relevance 0).
    Which it is depends on nothing but the seed, the epoch and the window.

    Utterances of which the tokenizer leaves nothing are passed over. A dialogue of at most `k` utterances gives one
    window, all but its last; one of fewer than two gives none, nor an utterance to draw.

    `len` is the number of windows; `left_out` counts the dialogues that give none.

    Args:
        dialogues: lists of utterances.
        tokenizer: the model's own, with [EOS] (see `tasks.responses.prepare`).
        k: utterances in a window; 3 in the paper, 2 for Douban.
        max_length: the most tokens of an example, special tokens included. B keeps its first tokens, at most half of
            these; A keeps its last ones, as many as then fit.
        seed: of the draws.

    Raises:
        DataError: fewer than two dialogues have two utterances.
        OptionError: `k` is below 1, `max_length` leaves no room, or the tokenizer makes no pairs or has no [EOS].
    """

    def __init__(
        self,
        dialogues: Sequence[Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        k: int = 3,
        max_length: int = 240,
        seed: int = 0,
    ) -> None:
        if k < 1:
            raise OptionError(f"A window needs at least 1 utterance, not {k}.")
        self.left_out = 0
        self._k, self._seed = k, seed
        self._frame = PairFrame.of(tokenizer, EOS, max_length)
        self._special = frozenset([*tokenizer.all_special_ids, self._frame.eos])
        self._tokens = array("i")
        self._ends = array("q", [0])  # utterance u is _tokens[_ends[u] : _ends[u + 1]]
        self._firsts = array("q", [0])  # dialogue d has the utterances _firsts[d] to _firsts[d + 1]
        self._windows = array("q")  # dialogue, true next utterance, dialogue, true next utterance, ...
        for utterances in _tokenized(dialogues, tokenizer):
            self._add(utterances)
        usable = len(self._firsts) - 1
        if usable < 2:
            raise DataError(
                f"Post-training draws from at least two dialogues of two or more utterances; {usable} of these "
                f"{len(dialogues)} dialogues has that many."
            )

    def _add(self, utterances: list[list[int]]) -> None:
        if len(utterances) < 2:
            self.left_out += 1
            return
        dialogue, first = len(self._firsts) - 1, self._firsts[-1]
        for ids in utterances:
            self._tokens.extend(ids)
            self._ends.append(len(self._tokens))
        end = first + len(utterances)
        self._firsts.append(end)
        for following in range(min(first + self._k, end - 1), end):
            self._windows.extend((dialogue, following))

    def __len__(self) -> int:
        return len(self._windows) // 2

    def example(self, window: int, epoch: int) -> dict[str, Any]:
        """What a window gives in an epoch.

        Returns:
            `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer gives them, and `special_tokens_mask` (1
            for [EOS] too), lists of equal length; `relevance`, 0 to 2; and `seed`, to mask the example by.
        """
        frame = self._frame
        rng = random.Random(f"window {self._seed} {epoch} {window}")
        relevance, answer = self._draw(window, rng)
        second = self._utterance(answer)[: frame.longest].tolist()
        first = [token for u in self._place(window)[1] for token in (*self._utterance(u).tolist(), frame.eos)]
        first = first[len(second) - frame.room :]
        ids = [*frame.before, *first, *frame.between, *second, *frame.after]
        made = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if frame.types is not None:
            before, own, between, other, after = frame.types
            made["token_type_ids"] = [*before, *own[:1] * len(first), *between, *other[:1] * len(second), *after]
        made["special_tokens_mask"] = [int(token in self._special) for token in ids]
        return {**made, "relevance": relevance, "seed": rng.getrandbits(63)}

    def _draw(self, window: int, rng: random.Random) -> tuple[int, int]:
        """A relevance, and an utterance that has it.

        Never one that reads like the true next utterance for another (of other dialogues: as far as some tries avoid
        it). One inside the window only where its dialogue has no other outside, and one of another dialogue where it
        has no other at all.
        """
        own, inside, following = self._place(window)
        kind = rng.random()
        if kind < 0.25:
            return NEXT, following
        if kind < 0.5:
            others = [u for u in own if not self._alike(u, following)]
            drawn = [u for u in others if u not in inside] or others
            if drawn:
                return SAME_DIALOGUE, rng.choice(drawn)
        for _ in range(_TRIES):
            other = rng.randrange(self._firsts[-1] - len(own))
            other += len(own) if other >= own.start else 0
            if not self._alike(other, following):
                break
        return RANDOM, other

    def _place(self, window: int) -> tuple[range, range, int]:
        """The utterances of a window's dialogue, those of the window, and the one that follows them."""
        dialogue, following = self._windows[2 * window : 2 * window + 2]
        own = range(self._firsts[dialogue], self._firsts[dialogue + 1])
        return own, range(max(own.start, following - self._k), following), following

    def _utterance(self, index: int) -> NDArray[np.int32]:
        """Token ids, [N]."""
        return np.frombuffer(self._tokens, np.int32)[self._ends[index] : self._ends[index + 1]]

    def _alike(self, one: int, other: int) -> bool:
        return np.array_equal(self._utterance(one), self._utterance(other))


def _tokenized(dialogues: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[list[int]]]:
    """The utterances of each dialogue as token ids, without empty ones."""
    for start in range(0, len(dialogues), _BATCH):
        batch = dialogues[start : start + _BATCH]
        texts = [text for dialogue in batch for text in dialogue]
        if not texts:
            yield from ([] for _ in batch)
            continue
        # Like the candidates of a response selector: a special token that somebody wrote is text.
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids = iter(encoded["input_ids"])
        for dialogue in batch:
            yield [found for _ in dialogue if (found := next(ids))]
