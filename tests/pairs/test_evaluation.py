"""Rankings scored: by the same rules whether queries bring their candidates or share a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairs.scoring import KINDS, QUERY, scorer, toy
from thresher.errors import DataError, OptionError
from thresher.pairs import Index
from thresher.pairs.evaluation import _of_ranks, _ranks, evaluate, evaluate_corpus
from thresher.tasks.ranking import ranking_metrics

WORDS = [f"w{20 + i} w{(7 * i) % 40 + 10}" for i in range(12)]


@pytest.mark.parametrize("kind", KINDS)
def test_own_candidates_by_hand(kind: str) -> None:
    made, rows = scorer(kind), toy(5, candidates=4)
    rows = rows.add_column("labels", [[int(i == row["label"]) for i in range(4)] for row in rows])
    rows = datasets.concatenate_datasets([rows, rows.select([0]).map(lambda _: {"labels": [0, 0, 0, 0]})])
    places = []
    for row in rows.select(range(5)):
        order = [name for name, _ in made.rank(row["query"], row["candidates"])]
        places.append(1 + order.index(row["label"]))
    done: list[int] = []
    found = evaluate(made, rows.remove_columns("label"), cutoffs=(1, 2, 9), on_done=done.append)
    assert (found.queries, found.left_out, found.cut, sum(done)) == (5, 1, 0, 6)
    assert found.candidates == len({text for row in rows.select(range(5)) for text in row["candidates"]})
    assert set(found.metrics) == {"R4@1", "R4@2", "MAP", "MRR", "P@1"}
    assert found.metrics["MRR"] == pytest.approx(np.mean([1 / p for p in places]))
    assert found.metrics["R4@2"] == pytest.approx(np.mean([p <= 2 for p in places]))


def test_dialogues_and_texts_that_are_cut() -> None:
    made = scorer("dual")
    rows = datasets.Dataset.from_list(
        [{"context": ["w9 " * 30, "w10"], "candidates": ["w9", "w11 " * 30, "w9"], "label": 1}]
    )
    found = evaluate(made, rows)
    assert (found.cut, found.candidates, found.queries) == (2, 2, 1)


@given(st.data())
def test_ranks_say_what_the_ranking_metrics_say(data: Any) -> None:
    count = data.draw(st.integers(2, 9))
    queries = data.draw(st.integers(1, 4))
    scores = [data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)) for _ in range(queries)]
    right = [data.draw(st.sets(st.integers(0, count - 1), min_size=1)) for _ in range(queries)]
    labels = [int(i in mine) for mine in right for i in range(count)]
    expected = ranking_metrics(np.concatenate(scores), labels, np.repeat(range(queries), count), (1, 2))
    found = _of_ranks([_ranks(np.array(s, float), sorted(r)) for s, r in zip(scores, right, strict=True)], (1, 2))
    assert list(found.values()) == pytest.approx(list(expected.values()))


@pytest.mark.parametrize("kind", ["mixencoder", "colbert", "cross"])
def test_a_corpus_is_one_set_of_candidates_for_all(kind: str, tmp_path: Path) -> None:
    made = scorer(kind)
    rows = datasets.Dataset.from_list([{"query": f"w{20 + i}", "relevant": [i, i + 1]} for i in range(5)])
    rows = datasets.concatenate_datasets([rows, rows.select([0]).map(lambda _: {"relevant": []})])
    labels = [[int(i in row["relevant"]) for i in range(12)] for row in rows]
    offered = [
        {"query": row["query"], "candidates": WORDS, "labels": mine} for row, mine in zip(rows, labels, strict=True)
    ]
    expected = evaluate(made, datasets.Dataset.from_list(offered), cutoffs=(1, 5))
    found = evaluate_corpus(made, rows, made.encode_candidates(WORDS), cutoffs=(1, 5, 99))
    assert (found.queries, found.left_out, found.candidates) == (5, 1, 12)
    assert list(found.metrics) == ["R@1", "R@5", "MAP", "MRR", "P@1"]
    assert list(found.metrics.values()) == pytest.approx(list(expected.metrics.values()))
    if kind != "cross":
        with Index.create(made, tmp_path, dtype="float32") as index:
            index.add([(str(i), text) for i, text in enumerate(WORDS)], batch=5)
            assert evaluate_corpus(made, rows, index, cutoffs=(1, 5)) == found


def test_candidates_of_another_scorer_are_refused() -> None:
    rows = datasets.Dataset.from_list([{"query": QUERY, "relevant": ["0"]}])
    other = scorer("dual").encode_candidates(["w5", "w6"])
    with pytest.raises(DataError, match="The cache was made by dual"):
        evaluate_corpus(scorer("mixencoder"), rows, other)


def test_what_cannot_be_ranked() -> None:
    made, cache = scorer("dual"), scorer("dual").encode_candidates(WORDS)
    pair = datasets.Dataset.from_list([{"sentence1": "w9", "sentence2": "w10", "label": 1}])
    none = datasets.Dataset.from_list([{"query": "w9", "candidates": ["w10"], "labels": [0]}])
    with pytest.raises(DataError, match="are not ranked"):
        evaluate(made, pair)
    with pytest.raises(DataError, match="no ranking to score"):
        evaluate(made, none)
    with pytest.raises(OptionError, match="3 classes does not rank"):
        evaluate(scorer("dual", classes=3), none)
    with pytest.raises(DataError, match="'relevant' is not there"):
        evaluate_corpus(made, none, cache)
    for relevant, says in (([99], "Row 1 names the relevant id 99"), ([], "no ranking to score")):
        rows = datasets.Dataset.from_dict({"query": ["w9"], "relevant": [relevant]})
        with pytest.raises(DataError, match=says):
            evaluate_corpus(made, rows, cache)
