"""Held-out sentences, and ranking metrics against a plain loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from thresher.errors import DataError
from thresher.tasks.corpus import python_docs
from thresher.tasks.retrieval import agreement, inverse_cloze, retrieval_metrics

LONG = "This sentence number {} has quite enough words to be a query."
SECTION = "Heading\n" + " ".join(["Short one.", "Is it short?", LONG.format("one"), "“Short!”"]) + "\nx = f(1)"


def test_a_sentence_is_taken_out() -> None:
    documents, queries, relevant = inverse_cloze(["Only one sentence is here.", SECTION], seed=0)
    assert queries == [LONG.format("one")]
    assert relevant == [1]
    assert documents == ["Only one sentence is here.", "Heading\nShort one. Is it short? “Short!”\nx = f(1)"]


def test_a_sentence_that_two_sections_share_is_never_a_query() -> None:
    with pytest.raises(DataError, match="2 sections, of which 0 can give one"):
        inverse_cloze([SECTION, SECTION], seed=0)


def test_the_built_in_corpus_gives_queries() -> None:
    sections = python_docs("test")
    documents, queries, relevant = inverse_cloze(sections, seed=7)
    assert len(documents) == len(sections)
    assert len(queries) == len(relevant) == len(set(relevant)) > 80
    changed = dict(zip(relevant, queries, strict=True))
    for i, (document, section) in enumerate(zip(documents, sections, strict=True)):
        if i in changed:
            assert changed[i] in section.text and 8 <= len(changed[i].split()) <= 40
            words = " ".join(section.text.replace(changed[i], " ").split())
            assert " ".join(document.split()) == words
        else:
            assert document == section.text
    assert not any(query in document for query in queries for document in documents)


def test_seed_and_number_of_queries() -> None:
    sections = python_docs("test")
    assert inverse_cloze(sections, seed=1, queries=20) == inverse_cloze(sections, seed=1, queries=20)
    assert inverse_cloze(sections, seed=1, queries=20) != inverse_cloze(sections, seed=2, queries=20)
    documents, queries, relevant = inverse_cloze(sections, seed=1, queries=20)
    assert len(queries) == 20 and relevant == sorted(relevant)
    assert sum(d != s.text for d, s in zip(documents, sections, strict=True)) == 20
    with pytest.raises(DataError, match="99999 held-out sentences were asked"):
        inverse_cloze(sections, seed=1, queries=99999)


def loop_metrics(queries: np.ndarray, documents: np.ndarray, relevant: list[int]) -> dict[str, float]:
    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        scale = float(np.linalg.norm(x) * np.linalg.norm(y))
        return round(float(x @ y) / scale, 9) if scale else 0.0

    ranks = []
    for query, right in zip(queries, relevant, strict=True):
        own = cosine(query, documents[right])
        ranks.append(sum(cosine(query, document) >= own for document in documents))
    return {
        "mrr": sum(1 / rank for rank in ranks) / len(ranks),
        "recall_at_1": sum(rank == 1 for rank in ranks) / len(ranks),
        "recall_at_10": sum(rank <= 10 for rank in ranks) / len(ranks),
    }


@st.composite
def embedded(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int]]:
    q, n, d = draw(st.integers(1, 5)), draw(st.integers(1, 15)), draw(st.integers(1, 4))
    # Small whole numbers make ties and zero vectors common.
    values = st.integers(-2, 2).map(float)
    queries, documents = (
        draw(arrays(np.float64, (q, d), elements=values)),
        draw(arrays(np.float64, (n, d), elements=values)),
    )
    return queries, documents, draw(st.lists(st.integers(0, n - 1), min_size=q, max_size=q))


@given(embedded())
def test_metrics_against_a_loop(case: tuple[np.ndarray, np.ndarray, list[int]]) -> None:
    assert retrieval_metrics(*case) == pytest.approx(loop_metrics(*case))


def test_metrics_over_many_chunks() -> None:
    documents = np.eye(40)[:, :39]  # the last document is a zero vector
    relevant = np.arange(3000) % 39
    found = retrieval_metrics(documents[relevant] * 1e-200, documents * 1e200, relevant)
    assert found == {"mrr": 1.0, "recall_at_1": 1.0, "recall_at_10": 1.0}


def test_embeddings_that_are_all_alike_score_worst() -> None:
    found = retrieval_metrics(np.ones((3, 8)), np.ones((20, 8)), [0, 5, 19])
    assert found == {"mrr": pytest.approx(1 / 20), "recall_at_1": 0.0, "recall_at_10": 0.0}


@pytest.mark.parametrize(
    ("queries", "documents", "relevant", "message"),
    [
        (np.ones((2, 3)), np.ones((4, 2)), [0, 1], "do not fit together"),
        (np.ones((2, 3)), np.ones((4, 3)), [0], "do not fit together"),
        (np.ones((0, 3)), np.ones((4, 3)), [], "are empty"),
        (np.ones((1, 3)), np.ones((4, 3)), [4], "an integer from 0 to 3"),
        (np.ones((1, 3)), np.ones((4, 3)), [-1], "an integer from 0 to 3"),
        (np.ones((1, 3)), np.ones((4, 3)), [0.5], "an integer from 0 to 3"),
        (np.ones(3), np.ones((4, 3)), [0], "query embeddings must be a matrix"),
        (
            np.ones((1, 3)),
            np.array([[1, 1, 1], [1, np.nan, 1]]),
            [0],
            "document embeddings hold .* not finite in row 1",
        ),
    ],
)
def test_inputs_that_do_not_fit(queries: Any, documents: Any, relevant: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        retrieval_metrics(queries, documents, relevant)


def test_agreement() -> None:
    a = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert agreement(a, a * 3) == {"cosine": pytest.approx(1.0)}
    assert agreement(a, [[0.0, 1.0], [0.0, 1.0]]) == {"cosine": pytest.approx(0.5)}
    assert agreement(a, -a) == {"cosine": pytest.approx(-1.0)}
    with pytest.raises(DataError, match="must have one shape"):
        agreement(a, a[:1])
