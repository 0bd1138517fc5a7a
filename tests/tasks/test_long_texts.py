"""Windows over long texts against a plain loop, their weighted means, and a model that reads 2,048 tokens as they are."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import helpers
import thresher
from commands import call, fails, ok, write_rows
from helpers import build, config_of, outputs_of, worst
from thresher.errors import DataError, OptionError
from thresher.tasks.features import encode_texts
from thresher.tasks.long_texts import encode_windows, window_readings
from thresher.tasks.text import TextTask

QUICK = ("--stage", "epochs=1", "--stage", "batch_size=16", "--precision", "float32")


@cache
def words() -> Any:
    return helpers.tokenizer()


def rows_of(texts: list[Any], **columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts, **columns})


def text(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(5, 64)}" for _ in range(count))


# --- windows ---------------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(3, 20), st.data())
def test_windows_are_those_of_a_plain_loop(sizes: list[int], limit: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(0, limit - 3))
    texts = [text(size, seed) for seed, size in enumerate(sizes)]
    found = encode_windows(rows_of(texts), words(), limit, list(range(len(texts))), stride=stride)
    ids, labels, firsts, weights = [], [], [], []
    for label, one in enumerate(texts):
        tokens = words()(one, add_special_tokens=False)["input_ids"]
        firsts.append(len(ids))
        start = 0
        while True:
            part = tokens[start : start + limit - 2]
            ids.append([2, *part, 3])
            labels.append(label)
            weights.append(max(1, len(part)))
            if start + limit - 2 >= len(tokens):
                break
            start += limit - 2 - stride
    assert found.rows["input_ids"][:] == ids
    assert found.rows["attention_mask"][:] == [[1] * len(row) for row in ids]
    assert found.rows["token_type_ids"][:] == [[0] * len(row) for row in ids]
    assert found.rows["labels"][:] == labels
    assert found.firsts.tolist() == firsts and found.weights.tolist() == weights
    assert found.empty == sizes.count(0) and found.truncated == 0
    shown = window_readings(texts, words(), limit, stride=stride)
    assert [one.sides[0] for one in shown] == [words().decode(row[1:-1]) for row in ids]
    assert [one.inputs["input_ids"] for one in shown] == ids


def test_texts_that_fit_are_read_as_without_windows() -> None:
    rows = rows_of([text(8), "", None, "w5 [SEP] w6"])
    plain, windows = encode_texts(rows, ["text"], words(), 12), encode_windows(rows, words(), 12, stride=4)
    assert windows.rows.to_list() == plain.rows.to_list()
    assert windows.notice() == plain.notice() == "2 texts are empty"


def test_what_is_said_of_long_texts() -> None:
    rows = rows_of([text(8), text(30), text(25), ""])
    found = encode_windows(rows, words(), 12, stride=2)
    assert found.notice() == "2 of 4 texts are longer than 12 tokens and read in 7 windows; 1 text is empty"
    assert found.labels is None


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_an_answer_is_the_mean_over_tokens(sizes: list[int]) -> None:
    found = encode_windows(rows_of([text(size) for size in sizes]), words(), 10, stride=3)
    logits = np.random.default_rng(0).normal(size=(len(found.rows), 3)).astype(np.float32)
    ends = [*found.firsts[1:], len(logits)]
    wanted = []
    for first, end in zip(found.firsts, ends, strict=True):
        tokens = [max(1, len(ids) - 2) for ids in found.rows["input_ids"][first:end]]
        wanted.append(sum(n * row for n, row in zip(tokens, logits[first:end], strict=True)) / sum(tokens))
    averaged = found.averaged(logits)
    assert averaged.dtype == np.float32
    np.testing.assert_allclose(averaged, np.stack(wanted), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.averaged(logits[:, 0]), averaged[:, 0])
    with pytest.raises(DataError, match="do not fit"):
        found.averaged(logits[1:])


def test_bad_windows() -> None:
    rows = rows_of([text(30)])
    for stride in (10, 11, -1):
        with pytest.raises(OptionError, match=rf"room for 10 of a text.*share 0 to 9 of them, not {stride}"):
            encode_windows(rows, words(), 12, stride=stride)
    with pytest.raises(OptionError, match="no room for text"):
        encode_windows(rows, words(), 2, stride=0)
    with pytest.raises(DataError, match="Row 1 holds a list"):
        encode_windows(rows_of([["w5"]]), words(), 12, stride=4)
    with pytest.raises(DataError, match="no rows"):
        encode_windows(rows.select([]), words(), 12, stride=4)

    class Slow:
        is_fast = False

    with pytest.raises(OptionError, match="fast tokenizer"):
        encode_windows(rows, Slow())  # type: ignore[arg-type]


# --- the text task ---------------------------------------------------------------------------------------------------


def test_the_text_task_reads_windows() -> None:
    rows = rows_of([text(30), text(5)], label=[1, 0])
    task = TextTask.infer(rows, windows=True)
    assert task.windows == 64
    task = TextTask.infer(rows, windows=4)
    encoded = task.encode(rows, words(), 12)
    assert encoded.rows["labels"][:] == [1] * (len(encoded.rows) - 1) + [0]
    named = TextTask("classification", 2, ("bad", "good"), windows=4)
    assert named.encode(rows_of([text(30)], label=["good"]), words(), 12).rows["labels"][0] == 1
    values = TextTask("regression", 1, windows=0).encode(rows_of([text(30)], label=[0.5]), words(), 12)
    assert values.rows["labels"][:] == [0.5] * 3
    with pytest.raises(OptionError, match="Windows are of single texts"):
        TextTask("classification", 2, pair=True, windows=4)


# --- the command line ------------------------------------------------------------------------------------------------


def long_rows(count: int) -> list[dict[str, Any]]:
    return [{"text": text(20 + 7 * (i % 12), i), "label": i % 2} for i in range(count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("windows")
    build(config_of("bert", 2, num_labels=2), "sequence").save_pretrained(root / "plain")
    words().save_pretrained(root / "plain")
    write_rows(root / "train.jsonl", long_rows(24))
    write_rows(root / "valid.jsonl", long_rows(12))
    data = (root / "train.jsonl", "--validation", root / "valid.jsonl", "--out", root / "fitted")
    more = ("--method", "attention-mass", "--speedup", 1.2, "--windows", 8)
    (root / "found.json").write_text(str(ok("fit", root / "plain", *data, *more, *QUICK)["task"]["windows"]))
    return root


def test_a_model_that_was_fitted_in_windows_reads_windows(place: Path) -> None:
    assert (place / "found.json").read_text() == "8"
    rows = long_rows(12)
    said = call("predict", place / "fitted", place / "valid.jsonl", "--json")
    assert said.exit_code == 0 and "longer than 48 tokens and read in" in said.stderr
    found = ok("predict", place / "fitted", place / "valid.jsonl")["predictions"]
    assert len(found) == 12
    model, task = thresher.load(place / "fitted"), TextTask("classification", 2, windows=8)
    encoded = task.encode(rows_of([row["text"] for row in rows]), words(), 48, require_labels=False)
    with torch.no_grad():
        logits = [
            model(**{name: torch.tensor([value]) for name, value in part.inputs.items()}).logits[0].numpy()
            for part in window_readings([row["text"] for row in rows], words(), 48, stride=8)
        ]
    wanted = torch.tensor(encoded.averaged(np.stack(logits))).softmax(-1)  # type: ignore[attr-defined]
    assert [one["probability"] for one in found] == pytest.approx(wanted.max(-1).values.tolist(), abs=1e-5)
    scores = ok("evaluate", place / "fitted", place / "valid.jsonl")
    right = [one["label"] == row["label"] for one, row in zip(found, rows, strict=True)]
    assert scores["thresher"]["accuracy"] == pytest.approx(np.mean(right))
    assert scores["rows"] == len(encoded.rows) > 12
    shown = " ".join(call("evaluate", place / "fitted", place / "valid.jsonl").stdout.split())
    assert f"{scores['rows']} windows" in shown and " rows" not in shown


def test_windows_of_any_classifier(place: Path, tmp_path: Path) -> None:
    plain = place / "plain"
    cut, whole = (ok("predict", plain, place / "valid.jsonl", *more)["predictions"] for more in ((), ("--windows", 8)))
    short = [len(row["text"].split()) <= 46 for row in long_rows(12)]
    for one, other, fits in zip(cut, whole, short, strict=True):
        assert (one == pytest.approx(other, abs=1e-5)) == fits
    more = ("--method", "attention-mass", "--speedup", 1.2, "--windows", 4, "--out", tmp_path / "c")
    assert ok("calibrate", plain, place / "valid.jsonl", *more)["speedup"] >= 1.2
    maps = ok("explain", tmp_path / "c", "--text", text(100))["maps"]
    assert len(maps) == 3 and all(len(one["tokens"]) <= 48 for one in maps)
    found = ok("bench", tmp_path / "c", place / "valid.jsonl", "--rounds", 1, "--batch-size", 4)
    assert found["flops"] > 1.0
    bare = write_rows(tmp_path / "bare.jsonl", [{"text": row["text"]} for row in long_rows(6)])
    assert set(ok("evaluate", tmp_path / "c", bare)["thresher"]) == {"agreement"}
    fails("evaluate", plain, place / "valid.jsonl", "--windows", 46, match="share 0 to 45 of them, not 46")
    fails("predict", plain, "--text", "w5", "--pair", "w6", "--windows", 4, match="Windows are of single texts")


# --- read as they are ------------------------------------------------------------------------------------------------


def test_modernbert_reads_2048_tokens_as_they_are() -> None:
    model = build(config_of("modernbert", 3, max_position_embeddings=2048, local_attention=128))
    inputs = helpers.batch("modernbert", (2048, 700, 1))
    expected = outputs_of(model, inputs)
    thresher.attach(model)
    assert worst(expected, outputs_of(model, inputs)) < 1e-4
    thresher.attach(model, "attention-mass")
    assert worst(expected, outputs_of(model, inputs)) > 1e-4
