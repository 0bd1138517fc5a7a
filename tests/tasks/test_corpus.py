"""The built-in corpus: its sections, their sizes and its split."""

from __future__ import annotations

from collections import Counter

import pytest

from thresher.errors import DataError
from thresher.tasks import corpus
from thresher.tasks.corpus import MIN_WORDS, python_docs
from thresher.tasks.data import load_rows


def test_sections_are_even_distinct_and_normalised() -> None:
    sections = python_docs()
    assert 300 <= len(sections) <= 600
    assert len({section.id for section in sections}) == len(sections)
    sizes = sorted(len(section.text) for section in sections)
    assert 650 <= sizes[len(sizes) // 2] <= 1100
    assert sizes[-1] < 3000
    for section in sections:
        assert len(section.text.split()) >= MIN_WORDS
        assert all(line and line == " ".join(line.split()) for line in section.text.split("\n"))
    paragraphs = Counter(line for section in sections for line in section.text.split("\n"))
    assert max(paragraphs.values()) == 1, "no paragraph stands twice"


def test_split_is_by_topic_and_about_even() -> None:
    train, test = python_docs("train"), python_docs("test")
    assert not {s.topic for s in train} & {s.topic for s in test}
    assert sorted(s.id for s in train + test) == sorted(s.id for s in python_docs())
    assert 0.4 <= len(train) / (len(train) + len(test)) <= 0.6
    with pytest.raises(DataError, match="no split 'validation'; it has train and test"):
        python_docs("validation")


def test_the_order_of_the_topics_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = python_docs("test")
    monkeypatch.setattr(corpus, "topics", dict(reversed(corpus.topics.items())))
    assert python_docs("test") == before


def test_load_rows_knows_it() -> None:
    rows = load_rows("python-docs", split="train", limit=5)
    section = python_docs("train")[0]
    assert rows[0] == {"id": section.id, "topic": section.topic, "text": section.text}
    assert len(load_rows("python-docs")) == len(python_docs())
    with pytest.raises(DataError, match="no split 'dev'"):
        load_rows("python-docs", split="dev")
