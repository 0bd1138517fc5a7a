"""The rows and the judging of benchmarks/peers.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

FILE = Path(__file__).parent.parent / "benchmarks" / "peers_data.py"


@pytest.fixture(scope="module")
def peers() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("peers_data", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers_data"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["peers_data"]


class Tokenizer(SimpleNamespace):
    def __len__(self) -> int:
        return 30_000


TOKENIZER = Tokenizer(cls_token_id=101, sep_token_id=102, model_input_names=["input_ids", "token_type_ids"])
PAIR = {"input_ids": [101, 7, 8, 102, 20, 21, 102], "token_type_ids": [0, 0, 0, 0, 1, 1, 1]}


def test_rows_are_padded_with_the_models_id_and_masked(peers: ModuleType) -> None:
    batch = peers.pad([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}], 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("load", ["imdb", "squad", "wikiqa"])
def test_drawn_rows_have_the_lengths_of_their_load(peers: ModuleType, load: str) -> None:
    about = peers.LOADS[load]
    rows = peers.drawn(load, TOKENIZER, test=300, calibration=5, max_tokens=about.max_tokens)
    lengths = [len(row["input_ids"]) for row in rows.test.rows]
    assert max(lengths) <= about.max_tokens
    assert abs(np.median(lengths) / min(about.median, about.max_tokens) - 1) < 0.1
    assert len(rows.calibration) == 5
    assert all(row["input_ids"].count(102) == 1 + about.pair for row in rows.test.rows)
    assert all(len(row["token_type_ids"]) == len(row["input_ids"]) for row in rows.test.rows)
    again = peers.drawn(load, TOKENIZER, test=300, calibration=5, max_tokens=about.max_tokens)
    assert again.test.rows == rows.test.rows


@pytest.mark.parametrize("tokens", [5, 7, 30])
def test_rows_of_a_length_keep_the_question_and_the_ends(peers: ModuleType, tokens: int) -> None:
    rows = peers.of_length([PAIR] * 3, tokens, 4)
    assert [len(row["input_ids"]) for row in rows] == [tokens] * 4
    assert [len(row["token_type_ids"]) for row in rows] == [tokens] * 4
    assert all(row["input_ids"][:4] == [101, 7, 8, 102] and row["input_ids"][-1] == 102 for row in rows)


def test_the_first_rows_end_with_a_whole_query(peers: ModuleType) -> None:
    examples = peers.Examples([PAIR] * 5, [0, 1, 0, 0, 1], [0, 0, 1, 1, 1])
    assert [len(examples.first(count).rows) for count in (1, 2, 3, 9)] == [2, 2, 5, 5]


def test_accuracy_and_agreement_are_told_apart(peers: ModuleType) -> None:
    stock = [np.array(v, np.float32) for v in ([0, 1], [1, 0], [2, 0], [0, 2])]
    other = [np.array(v, np.float32) for v in ([0, 1], [0, 1], [2, 0], [0, 2])]
    examples = peers.Examples([PAIR] * 4, [1, 1, 0, 0], [0, 1, 2, 3])
    found = peers.judge("imdb", other, stock, examples, tuned=True)
    assert (found.measure, found.value, found.agreement, found.largest) == ("accuracy", 0.75, 0.75, 1.0)
    assert peers.judge("imdb", stock, stock, examples, tuned=False).value is None


def test_one_score_is_judged_by_query(peers: ModuleType) -> None:
    stock = [np.array([v], np.float32) for v in (3, 2, 1, 0, 5)]
    other = [np.array([v], np.float32) for v in (3, 4, 1, 0, 5)]
    examples = peers.Examples([PAIR] * 5, [1, 0, 0, 0, 1], [0, 0, 0, 1, 1])
    found = peers.judge("wikiqa", other, stock, examples, tuned=True)
    assert (found.measure, found.value, found.agreement) == ("MRR", 0.75, 0.5)


def test_an_answer_is_the_best_span_of_the_context(peers: ModuleType) -> None:
    logits = np.zeros((7, 2), np.float32)
    logits[1] = 9  # in the question: no answer may lie there
    logits[4, 0], logits[5, 1] = 3, 3
    label = {"context": (4, 6), "answers": [{4}, {6}]}
    examples = peers.Examples([PAIR], [label], [0])
    found = peers.judge("squad", [logits], [logits], examples, tuned=True)
    assert found.measure == "token F1"
    assert found.value == pytest.approx(2 / 3)
