"""Rows that are handed over as a list of dicts do what a data set does, and what is neither is refused at every door."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

import thresher
from helpers import dataset, make, tokenizer
from pairs.scoring import scorer, toy
from thresher import pairs
from thresher.errors import DataError
from thresher.tasks.given import as_rows
from thresher.tasks.questions import questions
from thresher.tasks.rationales import encode_rationales
from thresher.tasks.tagging import TaggingTask
from thresher.tasks.text import TextTask
from thresher.tasks.windows import read_dialogues

MASS = thresher.AttentionMass(retention=(1.0, 0.7, 0.5))
HELD = {"use_cpu": True, "progress": False, "max_steps": 1}


def plain() -> Any:
    return make("bert", "sequence", 3)


def attached() -> Any:
    model = plain()
    thresher.attach(model, MASS)
    return model


def fit(rows: Any, validation: Any, place: Path) -> Any:
    return thresher.fit(plain(), MASS, rows, tokenizer(), place, validation=validation, speedup=1.2, progress=False)


def compare(rows: Any, validation: Any, place: Path) -> Any:
    return thresher.compare(plain(), rows, tokenizer(), place, validation=validation, methods=["random"], passes=8)


DOORS: dict[str, Callable[[Any, Path], Any]] = {
    "fit": lambda rows, place: fit(rows, dataset(9), place),
    "fit's validation": lambda rows, place: fit(dataset(9), rows, place),
    "compare": lambda rows, place: compare(rows, dataset(9), place),
    "compare's validation": lambda rows, place: compare(dataset(9), rows, place),
    "calibrate": lambda rows, _: thresher.calibrate(attached(), rows, speedup=1.2),
    "search": lambda rows, _: thresher.search(attached(), rows, quality=lambda said: said.mean(), evaluations=4),
    "saliency": lambda rows, _: thresher.saliency(plain(), rows),
    "prune_heads": lambda rows, _: thresher.prune_heads(plain(), rows),
    "distil": lambda rows, place: thresher.distil(plain(), plain(), rows, tokenizer(), place, **HELD),
    "pairs.train": lambda rows, place: pairs.train(scorer("dual"), rows, place, **HELD),
    "pairs.evaluate": lambda rows, _: pairs.evaluate(scorer("dual"), rows),
    "pairs.evaluate_corpus": lambda rows, _: pairs.evaluate_corpus(
        scorer("dual"), rows, scorer("dual").encode_candidates(["w5", "w6"])
    ),
    "text": lambda rows, _: TextTask.infer(rows),
    "tagging": lambda rows, _: TaggingTask.infer(rows),
    "questions": lambda rows, _: questions(rows),
    "rationales": lambda rows, _: encode_rationales(rows, tokenizer()),
    "dialogues": lambda rows, _: read_dialogues(rows),
}

ANSWER = {"text": ["w6"], "answer_start": [0]}
ROWS: dict[str, datasets.Dataset] = {
    **dict.fromkeys(("pairs.train", "pairs.evaluate"), toy(4)),
    "pairs.evaluate_corpus": datasets.Dataset.from_list([{"query": "w5 w7", "relevant": ["0"]}]),
    "text": datasets.Dataset.from_list([{"text": "good", "label": 1}, {"text": "bad", "label": 0}]),
    "tagging": datasets.Dataset.from_list([{"tokens": ["Mill"], "tags": ["B-place"]}]),
    "questions": datasets.Dataset.from_list([{"question": "w5?", "context": "w6", "answers": ANSWER}]),
    "rationales": datasets.Dataset.from_list([{"tokens": ["w5", "w6"], "label": 1, "rationales": [[0, 1]]}]),
    "dialogues": datasets.Dataset.from_list([{"turns": ["w5", "w6"]}]),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_takes_dicts(door: str, tmp_path: Path) -> None:
    DOORS[door](ROWS.get(door, dataset(9)).to_list(), tmp_path)


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_what_is_no_rows(door: str, tmp_path: Path) -> None:
    for wrong in ({"text": ["a"]}, "rows.jsonl", [("a", 1)], 7):
        with pytest.raises(DataError, match=r"datasets\.Dataset or a list of dicts, not"):
            DOORS[door](wrong, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(DataError, match=r"the splits train, test; give the rows of one, such as rows\['train'\]"):
        DOORS[door](datasets.DatasetDict(train=dataset(3), test=dataset(3)), tmp_path / "new")


def test_dicts_become_the_same_rows() -> None:
    rows = dataset(5)
    assert as_rows(rows) is rows
    assert as_rows(rows.to_list()).to_list() == as_rows(tuple(rows.to_list())).to_list() == rows.to_list()
    for wrong, says in (
        ([], "There are no rows"),
        ([{"a": 1}, {"b": 1}], r"Row 2 has other keys than the first \(a\)"),
        ([{"a": 1}, {"a": "x"}], "cannot be made rows"),
        ([{"a": "\ud800"}], "cannot be made rows"),
        ([{"a": 1 << 80}], "cannot be made rows"),
    ):
        with pytest.raises(DataError, match=says):
            as_rows(wrong)
