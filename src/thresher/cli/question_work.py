"""Extractive question answering on the command line: rows are questions with passages, answers pieces of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import datasets
import numpy as np

from thresher.cli.truth import Truth
from thresher.cli.work import Scores, Work
from thresher.errors import OptionError, nearest
from thresher.model import find_encoder
from thresher.policy import PolicyConfig
from thresher.protection import with_segments
from thresher.tasks.answer_scores import METRICS
from thresher.tasks.answering import EncodedQuestions, QuestionTask
from thresher.tasks.features import EncodedRows
from thresher.tasks.questions import questions
from thresher.tasks.reading import Reading
from thresher.tasks.spans import Answer

NO_ANSWER = 0.0  # the threshold of SQuAD 2.0's own evaluation


@dataclass(frozen=True, kw_only=True)
class QuestionWork(Work):
    """threshold: by how much "no answer" must score above the best answer to be given; None: never. open: of a plain
    checkpoint, whose rows decide whether there may be no answer."""

    kind: ClassVar[str] = "qa"
    scored: ClassVar[bool] = True
    question: QuestionTask = field(default_factory=QuestionTask)
    measure: str = "f1"
    threshold: float | None = None
    open: bool = False

    def __post_init__(self) -> None:
        if self.measure not in METRICS:
            raise OptionError(f"There is no metric '{self.measure}' for qa{nearest(self.measure, METRICS)}")

    @property
    def metric(self) -> str:  # type: ignore[override]
        return self.measure

    def notes(self) -> dict[str, Any]:
        task = {"stride": self.question.stride, "longest": self.question.longest, "threshold": self.threshold}
        return super().notes() | {"pair": True, "question": {**task, "open": self.open}}

    @classmethod
    def _noted(cls, notes: Mapping[str, Any]) -> Self:
        task = notes["question"]
        question = QuestionTask(stride=task["stride"], longest=task["longest"])
        settings = {"measure": notes["metric"], "threshold": task["threshold"], "open": task["open"]}
        return cls(dict(notes["columns"]), notes["max_length"], question=question, **settings)

    def settled(self, rows: datasets.Dataset, columns: Mapping[str, str]) -> Work:
        if not self.open:
            return self
        return replace(self, threshold=no_answer(self.named(rows, columns)), columns=columns, open=False)

    def with_no_answer(self, threshold: float) -> Work:
        if not np.isfinite(threshold):
            raise OptionError(f"--no-answer is a finite score, not {threshold}.")
        return replace(self, threshold=threshold, open=False)

    def unlabelled(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Questions with their passages; also of single pairs, whose second text is the passage."""
        if "text" in rows.column_names:
            if "text_pair" not in rows.column_names:
                raise OptionError("A question is asked about a passage: give one --pair for each --text.")
            rows = rows.select_columns(["text", "text_pair"]).rename_columns(
                {"text": "question", "text_pair": "context"}
            )
        return questions(rows, labelled=False)

    def shown(self, rows: datasets.Dataset) -> list[str]:
        return list(rows["question"])

    def texts(self, rows: datasets.Dataset, tokenizer: Any, limit: int) -> Sequence[tuple[str, ...] | Reading]:
        return list(replace(self.question, max_length=limit).texts(rows, tokenizer))

    def _encode(self, rows: datasets.Dataset, tokenizer: Any, limit: int, labels: bool, training: bool) -> EncodedRows:
        task = replace(self.question, max_length=limit)
        return task.encode(rows, tokenizer, labelled=True if labels else None, training=training)

    def fitting(self, config: PolicyConfig, tokenizer: Any, model: Any) -> PolicyConfig:
        """The question stays; where there are no types, the separator ends it."""
        if not config.protect_segments:
            config = config.replace(protect_segments=(0,))
        return with_segments(config, tokenizer, find_encoder(model))

    def quality(self, truth: Truth | None, reference: np.ndarray) -> Callable[[np.ndarray], float] | None:
        return None if truth is None else lambda predictions: self.scores(predictions, truth)[self.measure]

    def scores(self, predictions: np.ndarray, truth: Truth | None) -> Scores:
        if truth is None or truth.questions is None:
            return {}
        return truth.questions.judge.metrics(truth.questions.texts(predictions, self.threshold))

    def remark(self, predictions: np.ndarray, truth: Truth | None) -> str | None:
        if truth is None or truth.questions is None or self.threshold is None:
            return None
        threshold, best = truth.questions.best_threshold(predictions)
        return (
            f"F1 on these questions is best, {100 * best:.1f} %, with --no-answer {threshold:.3f} (it is {self.threshold:g}); "
            "choose it on other rows than you report."
        )

    def alike(self, predictions: np.ndarray, reference: np.ndarray) -> Scores:
        """How often the likeliest start, and the likeliest end, of a window are the same."""
        ours, theirs = (np.nan_to_num(said, nan=-np.inf).argmax(1) for said in (predictions, reference))
        return {"agreement": float((ours == theirs).mean())}

    def answers(self, predictions: np.ndarray, encoded: EncodedRows) -> list[dict[str, Any]]:
        """Each question's answer ("" for none) with its place in characters, and the best ones with their probabilities."""
        assert isinstance(encoded, EncodedQuestions)
        found, nulls = encoded.answers(predictions), encoded.nulls(predictions).tolist()
        return [
            {"id": name, **_answer(best, null, self.threshold)}
            for name, best, null in zip(encoded.ids, found, nulls, strict=True)
        ]


def _answer(best: list[Answer], null: float, threshold: float | None) -> dict[str, Any]:
    """The answer that is given, and all that were considered. null: the score of "no answer"."""
    listed: list[dict[str, Any]] = [
        {"answer": one.text, "start": one.start, "end": one.end, "score": one.score} for one in best
    ]
    given = listed[0] if listed else {"answer": "", "start": None, "end": None, "probability": 1.0}
    if threshold is not None and np.isfinite(null):
        nothing: dict[str, Any] = {"answer": "", "start": None, "end": None, "score": null}
        if not best or null - best[0].score > threshold:
            given = nothing
        listed = sorted([*listed, nothing], key=lambda one: -one["score"])
    if listed:
        scores = np.array([one["score"] for one in listed])
        chances = np.exp(scores - scores.max())
        for one, chance in zip(listed, (chances / chances.sum()).tolist(), strict=True):
            one["probability"] = chance
    return {name: given[name] for name in ("answer", "start", "end", "probability")} | {"n_best": listed}


def no_answer(rows: datasets.Dataset) -> float | None:
    """The threshold for rows: None where each question has an answer, or nothing is said of answers."""
    found = questions(rows, labelled=None)
    if "answers" not in found.column_names or all(answers["text"] for answers in found["answers"]):
        return None
    return NO_ANSWER
