"""The rows a model is scored on, and what scores its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from thresher.cli.data import source_and_split
from thresher.cli.gains import gains
from thresher.cli.graphs import OpenedGraph
from thresher.cli.models import Opened
from thresher.cli.truth import Truth
from thresher.cli.work import Work
from thresher.tasks import corpus
from thresher.tasks.retrieval import inverse_cloze, retrieval_metrics

Scores = dict[str, float]


@dataclass(frozen=True)
class Exam:
    """rows: encoded. truth: what answers are judged by, if anything. retrieval: scores embeddings, on the built-in corpus.
    unit: what a row is called."""

    work: Work
    rows: datasets.Dataset
    truth: Truth | None
    retrieval: Callable[[np.ndarray], Scores] | None = None
    unit: str = "rows"

    def scores(self, answers: np.ndarray) -> Scores:
        """What can be said of answers by themselves: nothing without labels."""
        return self.work.scores(answers, self.truth) | self._retrieval(answers)

    def gains(self, stock: np.ndarray, after: np.ndarray) -> dict[str, Any]:
        """The metrics of the answers of both, as `thresher.cli.gains.gains`."""
        found = gains(self.work, self.truth, stock, after)
        found["stock"].update(self._retrieval(stock))
        found["thresher"].update(self._retrieval(after))
        return found

    def _retrieval(self, answers: np.ndarray) -> Scores:
        return self.retrieval(answers) if self.retrieval else {}


def set_exam(
    opened: Opened | OpenedGraph,
    data: str,
    columns: Mapping[str, str],
    *,
    limit: int | None,
    seed: int,
    max_length: int | None,
    skip_bad: bool = False,
) -> Exam:
    """The rows of `data` for what the model is for. Raises OptionError for a model whose answers no command can score."""
    work = opened.text_work()
    rows = work.read(data, columns, limit=limit, seed=seed, skip_bad=skip_bad)
    work = work.settled(rows, columns)
    rows = work.named(rows, columns)
    retrieval = None
    if work.kind == "embedding" and source_and_split(data)[0] == corpus.NAME:
        rows, retrieval = _retrieval(rows, seed)
    encoded = work.encode(rows, opened.tokenizer, opened.limit(max_length), labels=False)
    return Exam(work, encoded.rows, Truth.of(encoded), retrieval, "texts" if retrieval else encoded.unit)


def _retrieval(rows: datasets.Dataset, seed: int) -> tuple[datasets.Dataset, Callable[[np.ndarray], Scores]]:
    """Sections and held-out sentences as one set of texts, and what scores its embeddings."""
    documents, queries, relevant = inverse_cloze(rows["text"][:], seed=seed)

    def score(embeddings: np.ndarray) -> Scores:
        return retrieval_metrics(embeddings[len(documents) :], embeddings[: len(documents)], relevant)

    return datasets.Dataset.from_dict({"text": documents + queries}), score
