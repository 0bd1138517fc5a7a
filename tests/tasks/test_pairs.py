"""Queries and candidates of every form of row."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from thresher.errors import DataError
from thresher.tasks.pairs import pairs


def rows(*given: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(given))


@pytest.mark.parametrize(
    ("row", "query", "candidates", "labels"),
    [
        ({"context": ["a", "b"], "candidates": ["c", "d"], "label": 1}, ["a", "b"], ["c", "d"], [0, 1]),
        ({"context": ["a"], "positives": ["c"], "random": ["d", "e"]}, ["a"], ["c", "d", "e"], [1, 0, 0]),
        ({"query": "a", "candidates": ["c", None], "labels": [1, 1]}, "a", ["c", ""], [1, 1]),
        ({"query": "a", "candidates": ["c", "d"], "label": 0}, "a", ["c", "d"], [1, 0]),
        ({"query": "a", "positive": "c"}, "a", ["c"], [1]),
        ({"query": "a", "positive": "c", "negatives": ["d"]}, "a", ["c", "d"], [1, 0]),
        ({"sentence1": "a", "sentence2": "b", "label": 3.5}, "a", ["b"], [3.5]),
        ({"premise": "a", "hypothesis": None, "label": 2}, "a", [""], [2]),
    ],
)
def test_forms(row: dict[str, Any], query: Any, candidates: list[str], labels: list[float]) -> None:
    found = pairs(rows(row, row))
    assert len(found.rows) == 2
    one = found.rows[1]
    assert (found.query(one), one["candidates"], one["labels"]) == (query, candidates, labels)
    assert found.dialogues == ("context" in row)
    assert found.ranked == ("hypothesis" not in row and "sentence1" not in row)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a", "label": 1}, "no pairs .there are text, label"),
        ({"query": "a", "candidates": [], "labels": []}, "Row 1 has no candidates"),
        ({"query": "a", "candidates": ["b"], "label": 4}, "Row 1 has the label 4"),
        ({"query": 7, "candidates": ["b"], "label": 0}, "Row 1 holds a number"),
        ({"query": "a", "positive": 3}, "Row 1 holds a number where a text"),
        ({"sentence1": "a", "sentence2": "b", "label": "yes"}, "the label 'yes'"),
        ({"context": [], "candidates": ["b"], "label": 0}, "empty context"),
    ],
)
def test_rows_that_are_none(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        pairs(rows(row))


def test_no_rows() -> None:
    with pytest.raises(DataError, match="no rows"):
        pairs(datasets.Dataset.from_dict({"query": [], "positive": []}))
