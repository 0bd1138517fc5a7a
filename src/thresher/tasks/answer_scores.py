"""Exact match and F1 of extracted answers, as the official evaluations of SQuAD define them.

Where some question has no answer, that of 2.0, else that of 1.1. They differ in texts that are nothing but articles and
punctuation: 2.0 does not count these among the right ones, in 1.1 they match exactly and have an F1 of 0.
Source: rajpurkar.github.io/SQuAD-explorer (evaluate-v1.1.py, evaluate-v2.0.py).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from thresher.errors import OptionError

METRICS = ("f1", "exact_match")

_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """Lower case, without (ASCII) punctuation, articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


class AnswerJudge:
    """What answers to a set of questions are worth, each by the most alike of the texts that are right.

    accepted: of every question the texts that are right; none where it has no answer, and no answer is right.
    """

    def __init__(self, accepted: Sequence[Sequence[str]]) -> None:
        self.answerable = np.array([bool(texts) for texts in accepted], dtype=bool)
        self._two = not self.answerable.all()
        self._right = [list(dict.fromkeys(map(normalised, texts))) for texts in accepted]
        if self._two:
            self._right = [list(filter(None, texts)) or [""] for texts in self._right]
        self._counted = [[Counter(text.split()) for text in texts] for texts in self._right]

    def each(self, answers: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[questions] exact match (0 or 1) and F1 of the answer to each question, "" for none.

        Raises:
            OptionError: there are not as many answers as questions.
        """
        if len(answers) != len(self._right):
            raise OptionError(f"{len(answers)} answers do not fit {len(self._right)} questions.")
        exact, f1 = np.zeros(len(answers)), np.zeros(len(answers))
        for i, (answer, right, counted) in enumerate(
            zip(map(normalised, answers), self._right, self._counted, strict=True)
        ):
            exact[i] = answer in right
            f1[i] = (
                1.0 if exact[i] and (answer or self._two) else max(_f1(Counter(answer.split()), one) for one in counted)
            )
        return exact, f1

    def metrics(self, answers: Sequence[str]) -> dict[str, float]:
        """The means, 0 to 1: `f1` and `exact_match`; where some questions have an answer and some have none, also those of
        either: `has_answer_f1`, `has_answer_exact_match` and `no_answer` (both are the same there)."""
        exact, f1 = self.each(answers)
        found = {"f1": float(f1.mean()), "exact_match": float(exact.mean())}
        has = self.answerable
        if has.any() and not has.all():
            found["has_answer_f1"] = float(f1[has].mean())
            found["has_answer_exact_match"] = float(exact[has].mean())
            found["no_answer"] = float(exact[~has].mean())
        return found


def best_threshold(judge: AnswerJudge, answers: Sequence[str], nulls: NDArray[np.float64]) -> tuple[float, float]:
    """The threshold on `nulls` above which no answer is given that makes the mean F1 highest, and that F1 (SQuAD 2.0).

    Args:
        answers: the best answer to each question, "" where there is none.
        nulls: [questions] by how much "no answer" scores above it.
    """
    given = judge.each(answers)[1]
    withheld = judge.each([""] * len(answers))[1]
    order = np.argsort(nulls, kind="stable")
    totals = np.concatenate([[withheld.sum()], withheld.sum() + np.cumsum((given - withheld)[order])])
    sorted_nulls = nulls[order]
    # A threshold cannot divide questions of equal scores.
    possible = np.concatenate([[True], np.append(sorted_nulls[1:] > sorted_nulls[:-1], True)])
    best = int(np.where(possible, totals, -np.inf).argmax())
    threshold = float(sorted_nulls[best - 1]) if best else float(np.nextafter(sorted_nulls[0], -np.inf))
    return threshold, float(totals[best] / len(given))


def _f1(answer: Counter[str], right: Counter[str]) -> float:
    same = (answer & right).total()
    if not same:
        return 0.0
    return 2 * same / (answer.total() + right.total())
