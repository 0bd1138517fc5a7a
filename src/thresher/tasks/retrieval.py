"""Held-out-sentence retrieval (the inverse cloze task): find the section that a sentence was taken from."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thresher.errors import DataError

MIN_SENTENCES = 4
MIN_WORDS, MAX_WORDS = 8, 40

_TIE = 1e-12  # equal vectors may differ by a rounding when their products are summed in another order
_CHUNK = 1024  # queries scored at a time, so the similarity matrix stays small
_SENTENCE = re.compile(r"(?:^|(?<=\s))[\"'“‘(*]*[A-Z][^\n]*?[.!?][\"'”’)*]*(?=$|\s+[\"'“‘(*]*[A-Z])", re.MULTILINE)


class HasText(Protocol):
    """Anything with a text, such as `thresher.tasks.corpus.Section`."""

    @property
    def text(self) -> str: ...


def inverse_cloze(
    sections: Iterable[HasText | str], *, seed: int, queries: int | None = None
) -> tuple[list[str], list[str], list[int]]:
    """Take one sentence out of sections; the sentence must then find its section among all of them.

    A section gives a query when it has at least four sentences and one of 8 to 40 words that stands nowhere else in the
    collection. The same sections and seed always give the same queries.

    Args:
        sections: sections or plain texts; the paragraphs of a text are separated by newlines.
        seed: decides which sentence is taken, and which sections give one when `queries` asks for fewer.
        queries: how many queries to make; None for one from every section that can give one.

    Returns:
        The documents (all sections in order, without the sentences taken), the queries in the order of their sections,
        and for each query the index of its document.

    Raises:
        DataError: no section, or fewer sections than `queries`, can give a query.
    """
    documents = [section if isinstance(section, str) else section.text for section in sections]
    everything = "\n".join(documents)
    candidates = {i: found for i, text in enumerate(documents) if (found := _candidates(text, everything))}
    wanted = len(candidates) if queries is None else queries
    if not 0 < wanted <= len(candidates):
        raise DataError(
            f"{wanted} held-out sentences were asked of {len(documents)} sections, "
            f"of which {len(candidates)} can give one "
            f"(a section needs {MIN_SENTENCES} sentences, one of them of {MIN_WORDS} to {MAX_WORDS} words)."
        )
    rng = random.Random(seed)
    relevant = sorted(rng.sample(sorted(candidates), wanted))
    taken = []
    for index in relevant:
        sentence = rng.choice(candidates[index])
        taken.append(sentence)
        documents[index] = _without(documents[index], sentence)
    return documents, taken, relevant


def _candidates(text: str, everything: str) -> list[str]:
    sentences = _SENTENCE.findall(text)
    if len(sentences) < MIN_SENTENCES:
        return []
    return [s for s in sentences if MIN_WORDS <= len(s.split()) <= MAX_WORDS and everything.count(s) == 1]


def _without(text: str, sentence: str) -> str:
    lines = (" ".join(line.split()) for line in text.replace(sentence, " ").splitlines())
    return "\n".join(line for line in lines if line)


def retrieval_metrics(
    query_embeddings: ArrayLike, document_embeddings: ArrayLike, relevant: ArrayLike
) -> dict[str, float]:
    """How high each query's document ranks by cosine similarity.

    A document as similar as the right one counts as ranked before it, so embeddings that are all alike score the worst.
    A zero vector has similarity 0 with everything.

    Args:
        query_embeddings: [Q, D].
        document_embeddings: [N, D].
        relevant: [Q], the index of each query's document.

    Returns:
        `mrr` (mean of 1 / rank), `recall_at_1` and `recall_at_10` (share of queries ranked that high), all in [0, 1].

    Raises:
        DataError: shapes that do not fit, an index without a document, no query, or a value that is not finite.
    """
    queries = _unit(query_embeddings, "query embeddings")
    documents = _unit(document_embeddings, "document embeddings")
    right = np.asarray(relevant)
    if queries.shape[1] != documents.shape[1] or right.shape != (len(queries),) or not len(queries):
        raise DataError(
            f"Queries [Q, D], documents [N, D] and relevant [Q] do not fit together or are empty: their shapes are "
            f"{queries.shape}, {documents.shape} and {right.shape}."
        )
    if not np.issubdtype(right.dtype, np.integer) or right.min() < 0 or right.max() >= len(documents):
        raise DataError(
            f"Every relevant index must be an integer from 0 to {len(documents) - 1}, one of the documents."
        )
    ranks = np.empty(len(queries))
    for start in range(0, len(queries), _CHUNK):
        rows = slice(start, start + _CHUNK)
        similarity = queries[rows] @ documents.T
        own = np.take_along_axis(similarity, right[rows, None], axis=1)
        ranks[rows] = (similarity >= own - _TIE).sum(axis=1)
    return {
        "mrr": float(np.mean(1 / ranks)),
        "recall_at_1": float(np.mean(ranks <= 1)),
        "recall_at_10": float(np.mean(ranks <= 10)),
    }


def agreement(a: ArrayLike, b: ArrayLike) -> dict[str, float]:
    """How alike two embeddings of the same texts are: `cosine`, the mean cosine similarity of row i of `a` and of `b`.

    Args:
        a: [N, D].
        b: [N, D].

    Raises:
        DataError: shapes that differ, no row, or a value that is not finite.
    """
    left, right = _unit(a, "first embeddings"), _unit(b, "second embeddings")
    if left.shape != right.shape or not len(left):
        raise DataError(
            f"Two embeddings of the same texts must have one shape [N, D]; these have {left.shape} and {right.shape}."
        )
    return {"cosine": float(np.mean(np.sum(left * right, axis=1)))}


def _unit(embeddings: ArrayLike, what: str) -> NDArray[np.float64]:
    """[N, D] scaled to length one, in float64 so that a tie is a tie."""
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2:
        raise DataError(f"The {what} must be a matrix, one row a text; the shape given is {rows.shape}.")
    if not np.isfinite(rows).all():
        raise DataError(
            f"The {what} hold a value that is not finite in row {int(np.argmin(np.isfinite(rows).all(axis=1)))}."
        )
    # Scaling by the largest entry first keeps the squares of very large and very small vectors inside the range.
    rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True, initial=0), np.finfo(np.float64).tiny)
    unit: NDArray[np.float64] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1.0)
    return unit
