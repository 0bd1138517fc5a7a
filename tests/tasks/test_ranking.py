"""Metrics of ranked candidates against counting by hand."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import DataError, OptionError, ThresherError
from thresher.tasks.ranking import ranking_metrics

GROUPS = st.lists(
    st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf")]), st.integers(0, 1)), min_size=1, max_size=8
    ),
    min_size=1,
    max_size=6,
)


def naive(groups: list[list[tuple[float, int]]], cutoffs: tuple[int, ...]) -> dict[str, float]:
    """By the definitions, one group and one right candidate at a time."""
    kept = [group for group in groups if any(label for _, label in group)]
    sums: dict[str, list[float]] = {}
    for group in kept:
        right = sorted((score for score, label in group if label), reverse=True)
        wrong = [score for score, label in group if not label]
        # The i-th right candidate stands behind i right ones and every wrong one that scores as much or more.
        ranks = [i + sum(other >= score for other in wrong) + 1 for i, score in enumerate(right)]
        for k in cutoffs:
            sums.setdefault(f"@{k}", []).append(sum(rank <= k for rank in ranks) / len(right))
        sums.setdefault("MAP", []).append(sum((i + 1) / rank for i, rank in enumerate(ranks)) / len(right))
        sums.setdefault("MRR", []).append(1 / ranks[0])
        sums.setdefault("P@1", []).append(float(ranks[0] == 1))
    sizes = {len(group) for group in kept}
    prefix = f"R{sizes.pop()}" if len(sizes) == 1 else "R"
    return {(prefix + name if name[0] == "@" else name): sum(all_) / len(kept) for name, all_ in sums.items()}


def flat(groups: list[list[tuple[float, int]]]) -> tuple[list[float], list[int], list[int]]:
    rows = [(score, label, 10 * number) for number, group in enumerate(groups) for score, label in group]
    scores, labels, numbers = zip(*rows, strict=True)
    return list(scores), list(labels), list(numbers)


@given(groups=GROUPS, seed=st.integers(0, 99), cutoffs=st.sampled_from([(1, 2, 5), (3,), (1, 10)]))
def test_as_counted_by_hand_whatever_the_order_of_the_rows(
    groups: list[list[tuple[float, int]]], seed: int, cutoffs: tuple[int, ...]
) -> None:
    scores, labels, numbers = flat(groups)
    order = np.random.default_rng(seed).permutation(len(scores))
    arguments = [np.array(column)[order] for column in (scores, labels, numbers)]
    if not any(labels):
        with pytest.raises(DataError, match="No group has a right candidate"):
            ranking_metrics(*arguments, cutoffs)
        return
    assert ranking_metrics(*arguments, cutoffs) == pytest.approx(naive(groups, cutoffs))


def test_ten_candidates_with_one_right_at_rank_three() -> None:
    scores = [[0.9], [0.8], [0.7], *[[0.1]] * 7]
    found = ranking_metrics(scores, [0.0, 0.0, 1.0, *[0.0] * 7], [3] * 10)
    expected = {"R10@1": 0, "R10@2": 0, "R10@5": 1, "MAP": 1 / 3, "MRR": 1 / 3, "P@1": 0}
    assert list(found) == list(expected)
    assert found == pytest.approx(expected)


def test_groups_of_different_sizes_and_one_without_a_right_candidate() -> None:
    groups = [[(1.0, 1), (0.0, 0)], [(1.0, 0), (0.0, 1), (-1.0, 0)], [(5.0, 0)]]
    found = ranking_metrics(*flat(groups), (1,))
    assert found == pytest.approx({"R@1": 0.5, "MAP": 0.75, "MRR": 0.75, "P@1": 0.5})
    assert set(ranking_metrics(*flat(groups[:1] + groups[2:]), (1,))) == {"R2@1", "MAP", "MRR", "P@1"}


def test_scores_that_are_all_alike_score_the_worst() -> None:
    found = ranking_metrics([0.0] * 10, [1, 1, *[0] * 8], [0] * 10)
    assert found["MRR"] == pytest.approx(1 / 9)
    assert found["R10@5"] == found["P@1"] == 0


@pytest.mark.parametrize(("high", "low"), [(1 + 1e-12, 1.0), (2e-60, 1e-60), (-1e-60, -2e-60), (1e300, 1e299)])
def test_scores_that_float32_would_not_tell_apart(high: float, low: float) -> None:
    assert ranking_metrics([low, high], [0, 1], [0, 0], (1,))["P@1"] == 1
    assert ranking_metrics([low, high], [1, 0], [0, 0], (1,))["P@1"] == 0


def test_a_group_of_many_candidates_is_ranked_by_number_and_not_by_name() -> None:
    scores = list(range(250, 0, -1))
    labels = [int(i == 9) for i in range(250)]
    assert ranking_metrics(scores, labels, [0] * 250, (9, 10)) == pytest.approx(
        {"R250@9": 0, "R250@10": 1, "MAP": 0.1, "MRR": 0.1, "P@1": 0}
    )


@pytest.mark.parametrize(
    ("scores", "labels", "groups", "message"),
    [
        ([0.1, float("nan")], [1, 0], [0, 0], "The score of row 2 is NaN"),
        ([], [], [], "or are empty"),
        ([0.1], [1, 0], [0, 0], r"shapes are \(1,\), \(2,\) and \(2,\)"),
        ([0.1, 0.2], [1, 0], [0], "do not fit together"),
        ([[0.1, 0.2], [0.1, 0.2]], [1, 0], [0, 0], "do not fit together"),
        ([0.1, 0.2], [1, 2], [0, 0], "Row 2 has the label 2, where 0 or 1"),
        ([0.1, 0.2], [1, float("nan")], [0, 0], "Row 2 has the label nan"),
        ([0.1, 0.2], [0, 0], [0, 1], "No group has a right candidate"),
    ],
)
def test_what_cannot_be_scored(scores: Any, labels: Any, groups: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ranking_metrics(scores, labels, groups)


def test_cutoffs() -> None:
    with pytest.raises(OptionError, match="not at 0"):
        ranking_metrics([1.0], [1], [0], (1, 0))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(ThresherError, match=r'need ir_measures; run pip install "thresher\[train\]"'):
        ranking_metrics([1.0], [1], [0])
