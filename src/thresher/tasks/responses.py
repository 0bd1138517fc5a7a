"""Response selection: a context with each candidate response as the pair that a cross-encoder reads."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thresher.errors import OptionError, nearest
from thresher.tasks.dialogues import dialogues
from thresher.tasks.features import EncodedRows
from thresher.tasks.framing import PairParts, by_itself

EOS = "[EOS]"
Choice = Literal["last", "first", "random", "kth-from-last"]

_BATCH = 1000  # dialogues encoded at a time, so that only one batch is ever held as Python lists


@dataclass(frozen=True)
class Utterances:
    """Which utterances of a context the model reads (ASE 4.1.1); those of a shorter context all, in their order.

    Attributes:
        kind: "last" and "first" `k`; "random", `k` drawn for each dialogue; "kth-from-last", that one alone (k = 1 is
            the last), or the first one where the context is shorter.
        k: at least 1.
        seed: of the draw, which depends on it and on the dialogue's place among the rows.

    Raises:
        OptionError: an unknown kind, or `k` below 1.
    """

    kind: Choice
    k: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Choice):
            raise OptionError(
                f"There is no choice of utterances '{self.kind}'{nearest(str(self.kind), get_args(Choice))}"
            )
        if self.k < 1:
            raise OptionError(f"A choice of utterances takes at least 1, not {self.k}.")

    def of(self, count: int, row: int) -> list[int]:
        """The indices chosen of `count` utterances of the dialogue in `row` (from 0), ascending."""
        k = min(self.k, count)
        if self.kind == "random":
            return sorted(random.Random(f"utterances {self.seed} {row}").sample(range(count), k))
        start = 0 if self.kind == "first" else count - k
        return list(range(start, start + (1 if self.kind == "kth-from-last" else k)))


@dataclass(frozen=True)
class EncodedDialogues(EncodedRows):
    """Pairs of a context and a candidate as token ids; `empty` counts the pairs of which either has no text.

    Attributes:
        rows: as in `EncodedRows`, with `labels` (1.0 or 0.0: one logit learns them by binary cross-entropy) and `group`
            (the number of the dialogue, from 0).
        unanswered: how many dialogues have no right response; the metrics of a ranking leave them out.
    """

    unanswered: int = 0

    def notice(self) -> str | None:
        parts = []
        of = f"of {len(self.rows)} pairs"
        if self.truncated:
            parts.append(
                f"{self.truncated} {of} {'was' if self.truncated == 1 else 'were'} cut to {self.max_length} tokens"
            )
        if self.empty:
            parts.append(f"{self.empty} {of} {'has' if self.empty == 1 else 'have'} an empty context or response")
        if self.unanswered:
            have = "dialogue has" if self.unanswered == 1 else "dialogues have"
            parts.append(f"{self.unanswered} {have} no right response (left out of ranking metrics)")
        return "; ".join(parts) or None


@dataclass(frozen=True)
class ResponseTask:
    """A context and a candidate response are read together, and one logit says how well they fit.

    Attributes:
        max_length: the most tokens of a pair, special tokens included. A response keeps its first tokens, at most half
            of these; the context keeps its last ones, as many as then fit.
        eos: the token after every utterance of the context (BERT-FP); `prepare` adds it.
        utterances: which ones of the context are read; None for all.
    """

    max_length: int = 256
    eos: str = EOS
    utterances: Utterances | None = None

    def encode(
        self,
        rows: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        negatives: int | None = None,
        seed: int = 0,
        parts: bool = False,
    ) -> EncodedDialogues:
        """A row for each candidate: [CLS] utterance [EOS] ... utterance [EOS] [SEP] response [SEP].

        Other tokenizers frame pairs their own way (<s> context </s></s> response </s>). A special token written out in
        a text is read as text.

        Args:
            rows: what `dialogues` takes.
            tokenizer: the model's own, with the token `eos`.
            negatives: None for every candidate, to rank them. For training: how many wrong candidates are drawn for
                each right one, or for a dialogue without a right one.
            seed: of that draw, which depends on it and on the dialogue's place among the rows.
            parts: adds the column `utterance`: the number of each token's utterance in the whole context, 0 for the
                last one; -1 for tokens of the response and special ones, [EOS] included. See `thirds`.

        Raises:
            DataError: see `dialogues`.
            OptionError: the tokenizer makes no pairs or has no token `eos`, `max_length` has no room for a token of
                either text, or `negatives` is below 1.
        """
        if negatives is not None and negatives < 1:
            raise OptionError(f"Training draws at least 1 wrong candidate for each right one, not {negatives}.")
        rows = dialogues(rows)
        frame = PairFrame.of(tokenizer, self.eos, self.max_length)
        made, truncated, empty, unanswered = [], 0, 0, 0
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            found = enumerate(zip(batch["context"], batch["candidates"], batch["labels"], strict=True), start)
            picked = [self._picked(group, *dialogue, negatives, seed) for group, dialogue in found]
            columns, cut = _columns(frame, picked, _token_ids(tokenizer, picked), parts)
            made.append(_encoded(columns))
            truncated += cut
            empty += sum(one.blanks() for one in picked)
            unanswered += sum(1 not in one.labels for one in picked)
        return EncodedDialogues(datasets.concatenate_datasets(made), self.max_length, truncated, empty, unanswered)

    def texts(self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
        """Of every pair that `encode` makes of unlabelled rows the two texts, as far as they are read."""
        frame = PairFrame.of(tokenizer, self.eos, self.max_length)
        found = []
        for group, row in enumerate(dialogues(rows, labelled=False)):
            picked = self._picked(group, row["context"], row["candidates"], row["labels"], None, 0)
            context = " ".join(f"{text} {self.eos}" for text in picked.context)
            starts = [start for start, _ in _offsets(tokenizer, context)]
            for response in picked.responses:
                ends = [end for _, end in _offsets(tokenizer, response)][: frame.longest]
                kept = min(len(starts), frame.room - len(ends))
                found.append((context[starts[-kept] :], response[: ends[-1] if ends else 0]))
        return found

    def _picked(
        self,
        group: int,
        context: list[str],
        candidates: list[str],
        labels: list[int],
        negatives: int | None,
        seed: int,
    ) -> _Picked:
        count = len(context)
        read = range(count) if self.utterances is None else self.utterances.of(count, group)
        kept = range(len(labels)) if negatives is None else _drawn(labels, negatives, f"{seed} {group}")
        return _Picked(
            group,
            [context[i] for i in read],
            [count - 1 - i for i in read],
            [candidates[i] for i in kept],
            [labels[i] for i in kept],
        )


def thirds(utterance: Sequence[int]) -> list[int]:
    """The third of the context that each token lies in: 0 the oldest, 2 the latest, -1 outside (ASE, figure 5).

    Args:
        utterance: [N], a row of the column that `ResponseTask.encode` makes with `parts`. The tokens it numbers are
            divided as evenly as they can be, however long the utterances are.
    """
    count = sum(number >= 0 for number in utterance)
    place = itertools.count()
    return [3 * next(place) // count if number >= 0 else -1 for number in utterance]


def prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos: str = EOS) -> int:
    """Give tokenizer and model the token that ends an utterance; its id.

    Where it is new, its embedding begins as that of the separator. A model that knows it already stays as it is.
    """
    new = eos not in tokenizer.get_vocab()
    tokenizer.add_special_tokens({"extra_special_tokens": [eos]}, replace_extra_special_tokens=False)
    number: int = tokenizer.get_vocab()[eos]
    grows = number >= len(_weights(model)[0])  # some checkpoints have rows to spare, which are not to be cut off
    if grows:
        model.resize_token_embeddings(number + 1, mean_resizing=False)
    if new or grows:
        for weight in _weights(model):
            weight[number] = weight[tokenizer.sep_token_id]
    return number


def _weights(model: PreTrainedModel) -> list[Any]:
    """[V, D] of the input embeddings, and of the output embeddings where the model has them."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer.weight.data for layer in layers if layer is not None]


@dataclass(frozen=True)
class _Picked:
    """What is read of one dialogue. numbers: of each utterance, in the whole context, from the last."""

    group: int
    context: list[str]
    numbers: list[int]
    responses: list[str]
    labels: list[int]

    def blanks(self) -> int:
        """How many of the pairs lack the text of either side."""
        blank = not any(map(str.strip, self.context))
        return sum(blank or not response.strip() for response in self.responses)


@dataclass(frozen=True)
class PairFrame:
    """How a tokenizer frames a context and a response, and how many of their tokens fit.

    Attributes:
        before, between, after: the ids of the special tokens before, between and after the two.
        types: the token types of the five parts, of which a text shows its one type at least once; None where the
            tokenizer gives no types.
        eos: the id of the token after every utterance.
        room: for tokens of both texts together.
        longest: the most tokens of a response.
    """

    before: list[int]
    between: list[int]
    after: list[int]
    types: list[list[int]] | None
    eos: int
    room: int
    longest: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, eos: str, max_length: int) -> PairFrame:
        """The frame of the pairs of `tokenizer`.

        Raises:
            OptionError: it has no token `eos` or makes no pairs, or `max_length` has no room for a token of either text.
        """
        number = tokenizer.get_vocab().get(eos)
        if number is None:
            raise OptionError(f"The tokenizer has no token {eos}; call thresher.tasks.responses.prepare first.")
        parts = PairParts.of(tokenizer)
        before, between, after = parts.special
        room = max_length - len(before) - len(between) - len(after)
        if room < 3:
            raise OptionError(
                f"A maximum length of {max_length} leaves no room for a token of an utterance, its {eos} and a token of "
                f"the response beside {max_length - room} special tokens."
            )
        types = None if parts.types is None else list(parts.types)
        return cls(before, between, after, types, number, room, min(max_length // 2, room - 2))

    def pair(self, context: list[int], numbers: list[int], response: list[int]) -> tuple[dict[str, list[int]], bool]:
        """The features of a pair, and whether it was cut.

        context: its token ids, at least one. numbers: the utterance of each of them, or empty for no such feature.
        """
        answer = response[: self.longest]
        kept = min(len(context), self.room - len(answer))
        ids = self.before + context[-kept:] + self.between + answer + self.after
        features = {"input_ids": ids}
        if self.types:
            before, first, between, second, after = self.types
            features["token_type_ids"] = before + first[:1] * kept + between + second[:1] * len(answer) + after
        if numbers:
            outside = [-1] * (len(ids) - len(self.before) - kept)
            features["utterance"] = [-1] * len(self.before) + numbers[-kept:] + outside
        return features, kept < len(context) or len(answer) < len(response)


def _offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return found["offset_mapping"]  # type: ignore[no-any-return]


def _drawn(labels: list[int], negatives: int, seed: str) -> list[int]:
    """The indices of the right candidates and of the wrong ones drawn for them, ascending."""
    right = [i for i, label in enumerate(labels) if label]
    wrong = [i for i, label in enumerate(labels) if not label]
    count = min(len(wrong), negatives * max(1, len(right)))
    return sorted(right + random.Random(f"negatives {seed}").sample(wrong, count))


def _token_ids(tokenizer: PreTrainedTokenizerBase, picked: list[_Picked]) -> dict[str, list[int]]:
    """Token ids of every text, without special tokens."""
    texts = list(dict.fromkeys(text for one in picked for text in (*one.context, *one.responses)))
    return dict(zip(texts, by_itself(tokenizer, texts)["input_ids"], strict=True))


def _columns(
    frame: PairFrame, picked: list[_Picked], ids: dict[str, list[int]], parts: bool
) -> tuple[dict[str, list[Any]], int]:
    """The columns of all pairs, and how many of the pairs were cut. ids: of every text."""
    columns: dict[str, list[Any]] = defaultdict(list)
    cut = 0
    for one in picked:
        context, numbers = [], []
        for text, number in zip(one.context, one.numbers, strict=True):
            context += [*ids[text], frame.eos]
            if parts:
                numbers += [number] * len(ids[text]) + [-1]
        for text, label in zip(one.responses, one.labels, strict=True):
            features, was_cut = frame.pair(context, numbers, ids[text])
            cut += was_cut
            for name, value in features.items():
                columns[name].append(value)
            columns["labels"].append(float(label))
            columns["group"].append(one.group)
    return columns, cut


def _encoded(columns: dict[str, list[Any]]) -> datasets.Dataset:
    """Columns of lists and of numbers as rows; through numpy, since a list of 256 numbers is slow to convert as such."""
    made: dict[str, pa.Array] = {}
    for name, values in columns.items():
        if name in ("labels", "group"):
            made[name] = pa.array(values, pa.float64() if name == "labels" else pa.int64())
            continue
        ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
        flat = np.fromiter(itertools.chain.from_iterable(values), np.int64, ends[-1])
        made[name] = pa.ListArray.from_arrays(ends, flat)
        if name == "input_ids":
            made["attention_mask"] = pa.ListArray.from_arrays(ends, np.ones_like(flat))
    return datasets.Dataset.from_dict(made)
