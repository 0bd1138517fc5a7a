"""Paragraphs among their neighbours: what stands around a passage, and where its answer then is."""

from __future__ import annotations

import random
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import tokenizer
from thresher.errors import DataError, OptionError
from thresher.tasks.answering import QuestionTask
from thresher.tasks.long_contexts import long_contexts
from thresher.tasks.question_files import NOWHERE

WORDS = [f"w{i}" for i in range(5, 60)]
LIMIT = 40


def article(title: str, sizes: list[int], seed: int = 0) -> list[dict[str, Any]]:
    """Two questions about each paragraph of so many words."""
    draw = random.Random(f"{title} {seed}")
    rows = []
    for number, size in enumerate(sizes):
        words = draw.choices(WORDS, k=size)
        context = " ".join(words)
        for which in range(2):
            place = draw.randrange(size)
            start = len(" ".join(words[:place])) + (place > 0)
            answers = {"text": [words[place], "elsewhere"], "answer_start": [start, NOWHERE]}
            evidence = [[start, start + len(words[place])]]
            row = {"id": f"{title}-{number}-{which}", "title": title, "question": "w6 w7", "context": context}
            rows.append({**row, "answers": answers, "evidence": evidence})
    return rows


ROWS = datasets.Dataset.from_list(article("one", [10, 8, 12, 9, 11, 7]) + article("two", [6, 30, 6]))


def length(row: dict[str, Any]) -> int:
    return len(row["question"].split()) + len(row["context"].split()) + 3


def test_answers_and_evidence_stand_where_they_did() -> None:
    found = long_contexts(ROWS, tokenizer(), max_length=LIMIT)
    assert found.column_names == ROWS.column_names
    for before, after in zip(ROWS, found, strict=True):
        assert before["context"] in after["context"]
        assert {k: after[k] for k in ("id", "title", "question")} == {k: before[k] for k in ("id", "title", "question")}
        (text, _), (start, nowhere) = after["answers"]["text"], after["answers"]["answer_start"]
        assert after["context"][start : start + len(text)] == text
        assert nowhere == NOWHERE
        ((begin, end),) = after["evidence"]
        assert (begin, end) == (start, start + len(text))


def test_neighbours_are_whole_in_their_order_and_as_many_as_fit() -> None:
    paragraphs = {
        title: list(dict.fromkeys(r["context"] for r in ROWS if r["title"] == title)) for title in ("one", "two")
    }
    grown = 0
    for before, after in zip(ROWS, long_contexts(ROWS, tokenizer(), max_length=LIMIT), strict=True):
        parts, whole = after["context"].split("\n"), paragraphs[after["title"]]
        first = whole.index(parts[0])
        assert parts == whole[first : first + len(parts)]
        assert before["context"] in parts
        assert length(after) <= LIMIT
        beside = [whole[i] for i in (first - 1, first + len(parts)) if 0 <= i < len(whole)]
        assert all(length(after) + len(one.split()) > LIMIT for one in beside)
        grown += len(parts) > 1
    assert grown > len(ROWS) / 2


def test_what_is_drawn_depends_on_the_seed_and_the_question_alone() -> None:
    words = tokenizer()
    found = long_contexts(ROWS, words, max_length=LIMIT)
    assert found.to_list() == long_contexts(ROWS, words, max_length=LIMIT).to_list()
    others = [long_contexts(ROWS, words, max_length=LIMIT, seed=seed) for seed in range(1, 5)]
    assert any(other["context"][:] != found["context"][:] for other in others)
    few = ROWS.select([7, 2])
    assert long_contexts(few, words, max_length=LIMIT, among=ROWS).to_list() == found.select([7, 2]).to_list()
    places = {row["context"].index(one["context"]) > 0 for row, one in zip(found, ROWS, strict=True)}
    assert places == {True, False}


def test_a_paragraph_stays_by_itself_where_nothing_fits() -> None:
    short = long_contexts(ROWS, tokenizer(), max_length=16)
    alone = [row["context"] for row, one in zip(short, ROWS, strict=True) if length(one) + 6 > 16]
    assert alone and all("\n" not in context for context in alone)
    single = datasets.Dataset.from_list(article("lone", [5]))
    assert long_contexts(single, tokenizer(), max_length=LIMIT).to_list() == single.to_list()


@given(st.lists(st.integers(1, 14), min_size=1, max_size=8), st.integers(6, 40), st.integers(0, 9))
def test_whatever_the_paragraphs_are(sizes: list[int], limit: int, seed: int) -> None:
    rows = article("any", sizes, seed)[::2]
    found = long_contexts(datasets.Dataset.from_list(rows), tokenizer(), max_length=limit, seed=seed)
    for before, after in zip(rows, found, strict=True):
        start, text = after["answers"]["answer_start"][0], after["answers"]["text"][0]
        assert after["context"].startswith(text, start)
        assert length(after) <= limit or after["context"] == before["context"]


def test_the_task_reads_them_in_one_window() -> None:
    rows = long_contexts(ROWS.remove_columns("evidence"), tokenizer(), max_length=LIMIT)
    encoded = QuestionTask(max_length=LIMIT, stride=4).encode(rows, tokenizer())
    assert len(encoded.rows) == len(ROWS)
    assert max(map(len, encoded.rows["input_ids"])) <= LIMIT
    for row, window in zip(rows, encoded.rows, strict=True):
        ids = window["input_ids"][window["start_positions"] : window["end_positions"] + 1]
        assert tokenizer().decode(ids) == row["answers"]["text"][0]


def test_bad_input() -> None:
    words = tokenizer()
    with pytest.raises(DataError, match="no title"):
        long_contexts(ROWS.remove_columns("title"), words)
    with pytest.raises(DataError, match="'one-0-0' is no paragraph of the article 'one'"):
        long_contexts(ROWS, words, among=ROWS.select(range(2, len(ROWS))))
    with pytest.raises(OptionError, match="no room"):
        long_contexts(ROWS, words, max_length=4)
