"""The data and the models of benchmarks/long_range.py. Reducing policies on ModernBERT's windows: tests/test_methods.py."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.errors import DataError, OptionError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def data() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield import_module("long_range_data")


@pytest.fixture(scope="module")
def models(data: ModuleType) -> ModuleType:
    return import_module("long_range_models")


def parsed(tokens: list[str]) -> list | int:
    """The expression as nested lists, made by json: ["[SM", 1, ["[MIN", 2, 3]]."""
    return json.loads(
        " ".join(f'["{t}",' if t.startswith("[") else f"{t}," for t in tokens)
        .replace(", ]", " ]")
        .rstrip(",")
    )  # fmt: skip


def naive(tree: list | int) -> int:
    if isinstance(tree, int):
        return tree
    values = sorted(naive(argument) for argument in tree[1:])
    if tree[0] == "[MIN":
        return values[0]
    if tree[0] == "[MAX":
        return values[-1]
    if tree[0] == "[SM":
        return int(str(sum(values))[-1])
    assert tree[0] == "[MED"
    while len(values) > 2:
        values = values[1:-1]
    return int(sum(values) / len(values))


def depth_of(tree: list | int) -> int:
    return 1 if isinstance(tree, int) else 1 + max(depth_of(argument) for argument in tree[1:])


def widths_of(tree: list | int) -> set[int]:
    return set() if isinstance(tree, int) else {len(tree) - 1}.union(*(widths_of(a) for a in tree[1:]))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MIN 4 2 9 ]", 2),
        ("[MAX 4 2 9 ]", 9),
        ("[MED 9 1 4 ]", 4),
        ("[MED 9 2 5 0 ]", 3),  # 3.5, rounded down
        ("[SM 9 8 7 ]", 4),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[SM [SM [SM 9 9 ] 9 ] [MED 1 [MAX 0 8 ] ] ]", 1),
    ],
)
def test_values_worked_out_by_hand(data: ModuleType, text: str, value: int) -> None:
    assert data.evaluate(text.split()) == value


@pytest.mark.parametrize("text", ["", "]", "[MIN ]", "[MIN 1", "1 2", "[MIN 1 ] ]", "[ADD 1 2 ]", "12", "[MAX 1 x ]"])
def test_what_is_not_one_expression_is_refused(data: ModuleType, text: str) -> None:
    with pytest.raises(DataError):
        data.evaluate(text.split())


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.integers(2, 7), st.integers(2, 10))
def test_an_expression_is_worth_what_its_tree_is_and_keeps_its_limits(
    data: ModuleType, seed: int, depth: int, most: int
) -> None:
    tokens = data.expression(random.Random(seed), depth=depth, most=most)
    tree = parsed(tokens)
    assert data.evaluate(tokens) == naive(tree)
    assert 2 <= depth_of(tree) <= depth
    assert min(widths_of(tree)) >= 2 and max(widths_of(tree)) <= most


def test_depth_and_width_are_used_to_the_full(data: ModuleType) -> None:
    trees = [parsed(tokens) for tokens, _ in data.expressions(120, seed=1, lengths=(40, 200), depth=6, most=10)]
    assert max(depth_of(tree) for tree in trees) == 6
    assert set().union(*(widths_of(tree) for tree in trees)) == set(range(2, 11))


def test_a_quarter_of_the_nodes_below_the_root_are_operators(data: ModuleType) -> None:
    draw = random.Random(0)
    inner = [data.expression(draw, depth=3, most=10)[1:] for _ in range(600)]
    # Of the root's arguments: those with an operator around them are counted once, by its first token.
    operators = digits = 0
    for tokens in inner:
        level = 0
        for token in tokens[:-1]:
            operators += level == 0 and token in data.OPERATORS
            digits += level == 0 and token.isdigit()
            level += (token in data.OPERATORS) - (token == "]")
    assert abs(operators / (operators + digits) - 0.25) < 0.03  # four standard deviations of some 3600 nodes


def test_rows_have_lengths_in_range_and_every_operator_and_differ(data: ModuleType) -> None:
    rows = data.expressions(150, seed=0, lengths=(30, 60))
    assert all(30 <= len(tokens) <= 60 for tokens, _ in rows)
    assert len({tuple(tokens) for tokens, _ in rows}) == 150
    assert {token for tokens, _ in rows for token in tokens} == set(data.SYMBOLS)
    assert {value for _, value in rows} == set(range(10))
    assert all(value == naive(parsed(tokens)) for tokens, value in rows)


def test_a_bound_on_length_changes_no_expression_within_it(data: ModuleType) -> None:
    for seed in range(200):
        free = data.expression(random.Random(seed), depth=5)
        bound = data.expression(random.Random(seed), depth=5, longest=40)
        assert bound == (free if len(free) <= 40 else None)


def test_a_seed_gives_the_same_rows_again_and_another_gives_others(data: ModuleType) -> None:
    first = data.expressions(20, seed=5, lengths=(20, 50))
    assert data.expressions(20, seed=5, lengths=(20, 50)) == first
    assert data.expressions(8, seed=5, lengths=(20, 50)) == first[:8]
    assert not {tuple(t) for t, _ in data.expressions(20, seed=6, lengths=(20, 50))} & {tuple(t) for t, _ in first}


@pytest.mark.parametrize(
    "limits",
    [
        {"lengths": (3, 9)},
        {"lengths": (20, 19)},
        {"lengths": (9, 20), "depth": 1},
        {"lengths": (9, 20), "most": 1},
        {"lengths": (100, 120), "depth": 2},
    ],
)
def test_limits_that_nothing_meets_are_refused(data: ModuleType, limits: dict) -> None:
    with pytest.raises(OptionError):
        data.expressions(2, seed=0, **limits)


def test_encoded_expressions_say_what_they_said(data: ModuleType) -> None:
    rows = data.listops(30, seed=3, tokens=64)
    for ids, mask, label in zip(rows["input_ids"], rows["attention_mask"], rows["labels"], strict=True):
        assert ids[0] == data.CLS and 32 <= len(ids) <= 64 and mask == [1] * len(ids)
        assert max(ids) < data.LISTOPS_VOCABULARY
        assert data.evaluate([data.SYMBOLS[i - data.FIRST] for i in ids[1:]]) == label


@given(st.text(max_size=40), st.integers(1, 50))
def test_bytes_are_those_of_the_text_cut(data: ModuleType, text: str, tokens: int) -> None:
    ids = data.byte_ids(text, tokens)
    assert ids[0] == data.CLS and len(ids) <= tokens and max(ids) < data.BYTES_VOCABULARY
    assert bytes(i - data.FIRST for i in ids[1:]) == text.encode()[: tokens - 1]


def test_reviews_are_read_from_the_folder_of_the_data(data: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "imdb").mkdir()
    lines = "\n".join(json.dumps({"text": f"é{n}" * 5, "label": n % 2}) for n in range(6))
    (tmp_path / "imdb" / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    rows = data.byte_reviews(tmp_path, "train", 4, seed=0, tokens=9)
    assert len(rows) == 4 and all(len(ids) == 9 for ids in rows["input_ids"])
    for ids, label in zip(rows["input_ids"], rows["labels"], strict=True):
        assert label == int(chr(ids[3] - data.FIRST)) % 2
    assert data.byte_reviews(tmp_path, "train", 4, seed=0, tokens=9).to_dict() == rows.to_dict()


MODELS = ("bert", "modernbert", "longformer", "big-bird", "nystromformer", "perceiver", "fnet")


def test_all_models_are_tried(models: ModuleType) -> None:
    assert tuple(models.CONFIGS) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_a_model_reads_padded_rows_and_learns_from_them(data: ModuleType, models: ModuleType, name: str) -> None:
    shape = models.Shape(
        tokens=96, vocabulary=data.LISTOPS_VOCABULARY, classes=10, layers=2, hidden=32, heads=2, window=16
    )
    model = models.build(name, shape)
    rows = models.padded(data.listops(4, seed=0, tokens=96, depth=6), 96)
    assert rows["input_ids"].shape == (4, 96) and not rows["attention_mask"].all()
    logits = models.forward(model, rows)
    assert logits.shape == (4, 10) and not logits.isnan().any()
    torch.nn.functional.cross_entropy(logits, rows["labels"]).backward()
    used = [p for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert len(used) > 10
    # What stands in the padding is not read; Nystromformer's landmarks and FNet's transforms mix all places.
    other = {**rows, "input_ids": rows["input_ids"].masked_fill(rows["attention_mask"] == 0, data.FIRST)}
    same = torch.allclose(models.forward(model, other), logits, atol=1e-5)
    assert same == (name not in ("nystromformer", "fnet"))
