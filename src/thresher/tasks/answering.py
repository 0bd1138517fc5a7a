"""Extractive question answering: passages in windows that a model reads, and answers from what it says of them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from thresher.errors import DataError, OptionError
from thresher.tasks.answer_scores import AnswerJudge, best_threshold
from thresher.tasks.features import EncodedRows
from thresher.tasks.framing import by_itself
from thresher.tasks.passages import Frame, Passages, Tokenised, spread, tokenised
from thresher.tasks.question_files import NOWHERE
from thresher.tasks.questions import questions
from thresher.tasks.spans import Answer, Windows, best_answers, null_scores, with_marks

_WINDOWS = 4096  # windows held as Python lists


@dataclass(frozen=True, kw_only=True)
class EncodedQuestions(EncodedRows):
    """Windows of questions and passages as token ids; `truncated` and `empty` count questions.

    Attributes:
        rows: one a window, as in `EncodedRows`; `start_positions` and `end_positions` where questions have answers: the
            tokens at which the answer starts and ends in this window, or [CLS] twice where the window does not hold
            all of it; `evidence` where questions have it: 1 for each token of the evidence, 0 for every other.
        windows: what each of them shows.
        ids, contexts: of every question.
        accepted: the texts that are right for every question, none where it has no answer; None without answers.
        left_out: how many questions are not among these, as their answer stands nowhere in their passage.
        longest: the most tokens of an answer.
    """

    unit: ClassVar[str] = "windows"

    windows: Windows
    ids: list[str]
    contexts: list[str]
    accepted: list[list[str]] | None = None
    left_out: int = 0
    longest: int = 30

    def notice(self) -> str | None:
        parts = []
        of = f"of {len(self.ids)} questions"
        if self.truncated:
            were = "was" if self.truncated == 1 else "were"
            parts.append(f"{self.truncated} {of} {were} cut, to leave room for the passage in {self.max_length} tokens")
        if self.empty:
            parts.append(f"{self.empty} {of} {'is' if self.empty == 1 else 'are'} empty")
        if self.left_out:
            have = (
                "question is left out, whose answer stands"
                if self.left_out == 1
                else "questions are left out, whose answers stand"
            )
            parts.append(f"{self.left_out} {have} nowhere in the passage")
        return "; ".join(parts) or None

    @cached_property
    def judge(self) -> AnswerJudge:
        """What says what answers are worth.

        Raises:
            DataError: nothing is known of what is right.
        """
        if self.accepted is None:
            raise DataError("These questions come without answers, so there is nothing to judge by.")
        return AnswerJudge(self.accepted)

    def answers(self, predictions: NDArray[Any], n_best: int = 20) -> list[list[Answer]]:
        """The best answers to each question over all its windows, best first; none where no token of it was read.

        Args:
            predictions: [windows, N, 2] start and end logits, as `measure.run.run` gives them; NaN and -9,000 and less
                (dropped) are no place for an answer.
            n_best: answers a question at most.
        """
        return best_answers(predictions, self.windows, self.contexts, n_best=n_best, longest=self.longest)

    def nulls(self, predictions: NDArray[Any]) -> NDArray[np.float64]:
        """[questions] the score of "no answer": of the window that says it least (SQuAD 2.0)."""
        return null_scores(predictions, self.windows, len(self.ids))

    def texts(self, predictions: NDArray[Any], threshold: float | None = None) -> list[str]:
        """The answer to each question; "" for none.

        Args:
            predictions: see `answers`.
            threshold: by how much "no answer" must score above the best answer to be given; None: never.
        """
        found, nulls = self.answers(predictions, n_best=1), self.nulls(predictions)
        return [
            best[0].text if best and (threshold is None or null - best[0].score <= threshold) else ""
            for best, null in zip(found, nulls.tolist(), strict=True)
        ]

    def best_threshold(self, predictions: NDArray[Any]) -> tuple[float, float]:
        """The threshold of `texts` with which the mean F1 is highest, and that F1: both depend on these questions, so that
        other questions are to be scored with it (SQuAD 2.0).

        Raises:
            DataError: nothing is known of what is right.
        """
        found = [one[:1] for one in self.answers(predictions, n_best=1)]
        scores = np.array([one[0].score if one else -np.inf for one in found])
        return best_threshold(
            self.judge, [one[0].text if one else "" for one in found], self.nulls(predictions) - scores
        )


@dataclass(frozen=True)
class QuestionTask:
    """A question is read before the passage, and two logits a token say where its answer starts and ends.

    Attributes:
        max_length: the most tokens of a window, special tokens included. A question keeps its first tokens, at most half
            of these.
        stride: the tokens of the passage that neighbouring windows share, at most half of what they hold of it.
        longest: the most tokens of an answer.
    """

    max_length: int = 384
    stride: int = 128
    longest: int = 30

    def __post_init__(self) -> None:
        if self.stride < 0:
            raise OptionError(f"Windows share at least 0 tokens, not {self.stride}.")
        if self.longest < 1:
            raise OptionError(f"An answer has at least 1 token, not {self.longest}.")

    def encode(
        self,
        rows: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labelled: bool | None = None,
        training: bool = False,
    ) -> EncodedQuestions:
        """A row for each window: [CLS] question [SEP] part of the passage [SEP].

        Other tokenizers frame pairs their own way. A special token written out in a text is read as text. The first
        answer of a question that stands in its passage is the one to learn.

        Args:
            rows, labelled: what `questions` takes.
            tokenizer: the model's own, a fast one.
            training: leave out questions whose answers stand nowhere in the passage (not those without an answer).

        Raises:
            DataError: see `questions`; or no question is left.
            OptionError: the tokenizer is slow or makes no pairs, or `max_length` has no room for a token of either text.
        """
        frame = Frame.of(tokenizer, self.max_length)
        rows = questions(rows, labelled=labelled)
        tokens = Passages(tokenizer)
        batch = _Batch(frame)
        made: list[datasets.Dataset] = []
        ids: list[str] = []
        contexts: list[str] = []
        accepted: list[list[str]] = []
        truncated = empty = left_out = 0
        for found in tokenised(rows, tokenizer, tokens):
            if training and found.answers and all(start == NOWHERE for _, start in found.answers):
                left_out += 1
                continue
            truncated += len(found.ids) > frame.longest
            empty += not found.question.strip()
            batch.add(len(ids), found, self.stride)
            ids.append(found.name)
            contexts.append(found.context)
            accepted.append([text for text, _ in found.answers or ()])
            if len(batch) >= _WINDOWS:
                made.append(batch.rows())
        if len(batch):
            made.append(batch.rows())
        if not made:
            raise DataError("There is no question whose answer stands in its passage.")
        return EncodedQuestions(
            rows=datasets.concatenate_datasets(made),
            max_length=self.max_length,
            truncated=truncated,
            empty=empty,
            windows=Windows.of(batch.shown, tokens.offsets),
            ids=ids,
            contexts=contexts,
            accepted=accepted if "answers" in rows.column_names else None,
            left_out=left_out,
            longest=self.longest,
        )

    def texts(self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
        """Of every window that `encode` makes the question and the part of the passage, as far as they are read."""
        frame = Frame.of(tokenizer, self.max_length)
        rows = questions(rows, labelled=False)
        passages = Passages(tokenizer)
        made = []
        for found in tokenised(rows, tokenizer, passages):
            asked = by_itself(tokenizer, [found.question], return_offsets_mapping=True)["offset_mapping"][0]
            question = asked[: frame.longest]
            offsets = passages.offsets[found.passage]
            for start, end in spread(len(found.tokens), frame.room - len(question), self.stride):
                part = ""
                if end > start:
                    part = found.context[offsets[start, 0] : with_marks(found.context, offsets[end - 1, 1])]
                made.append((found.question[: question[-1][1] if question else 0], part))
        return made


class _Batch:
    """Windows on their way into rows. shown: of every window so far its question, its passage's number, the place of its
    first token of that passage, which one that is, and how many there are."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.shown: list[tuple[int, int, int, int, int]] = []
        self._columns: dict[str, list[Any]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._columns["input_ids"])

    def add(self, number: int, found: Tokenised, stride: int) -> None:
        question = found.ids[: self.frame.longest]
        begin = self.frame.begin(len(question))
        for start, end in spread(len(found.tokens), self.frame.room - len(question), stride):
            features = self.frame.window(question, found.tokens[start:end])
            for name, value in features.items():
                self._columns[name].append(value)
            if found.answers is not None:
                held = found.span is not None and start <= found.span[0] and found.span[1] < end
                shift = begin - start
                first, last = (found.span[0] + shift, found.span[1] + shift) if held and found.span else (0, 0)
                self._columns["start_positions"].append(first)
                self._columns["end_positions"].append(last)
            if found.marked is not None:
                marks = np.zeros(len(features["input_ids"]), dtype=np.int64)
                marks[begin : begin + end - start] = found.marked[start:end]
                self._columns["evidence"].append(marks.tolist())
            self.shown.append((number, found.passage, begin, start, end - start))

    def rows(self) -> datasets.Dataset:
        """What was added since the last call; through numpy, since a list of 384 numbers is slow to convert as such."""
        made: dict[str, pa.Array] = {}
        for name, values in self._columns.items():
            if not isinstance(values[0], list):
                made[name] = pa.array(values, pa.int64())
                continue
            ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
            flat = np.fromiter(itertools.chain.from_iterable(values), np.int64, ends[-1])
            made[name] = pa.ListArray.from_arrays(ends, flat)
            if name == "input_ids":
                made["attention_mask"] = pa.ListArray.from_arrays(ends, np.ones_like(flat))
        self._columns.clear()
        return datasets.Dataset.from_dict(made)
