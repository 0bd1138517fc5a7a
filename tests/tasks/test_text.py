"""Classification and regression: what is inferred, encoded and scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizerFast, PreTrainedTokenizerBase

from thresher.errors import DataError, OptionError
from thresher.tasks.text import TextTask, canonical

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "one", "two", "three"]
BINARY = TextTask("classification", 2)
VALUE = TextTask("regression", 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizerFast.from_pretrained(folder, model_max_length=16)


def rows_of(**columns: Sequence[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["text", "label"], ["text", "label"]),
        (["sentence", "score"], ["text", "label"]),
        (["id", "content", "stars"], ["id", "text", "label"]),
        (["sentence1", "sentence2", "labels"], ["text", "text_pair", "label"]),
        (["premise", "hypothesis"], ["text", "text_pair"]),
        (["question", "sentence", "target"], ["text", "text_pair", "label"]),
        (["query", "passage", "label", "score"], ["text", "text_pair", "label", "score"]),
        (["text", "text_pair", "sentence1", "sentence2"], ["text", "text_pair", "sentence1", "sentence2"]),
    ],
)
def test_aliases(columns: list[str], expected: list[str]) -> None:
    assert canonical(rows_of(**{name: ["x"] for name in columns})).column_names == expected


def test_no_text_column() -> None:
    with pytest.raises(DataError, match=r"no column known to be the text \(there are tokens, label\)"):
        TextTask.infer(rows_of(tokens=[["a"]], label=[1]))


# --- inference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 2, 1], TextTask("classification", 3)),
        ([0, 0], TextTask("classification", 2)),
        ([True, False], TextTask("classification", 2)),
        ([0.0, 1.0], TextTask("classification", 2)),
        (["pos", "neg", "pos"], TextTask("classification", 2, ("neg", "pos"))),
        ([0.0, 2.5], TextTask("regression", 1, metric="spearman")),
    ],
)
def test_infer_from_labels(labels: list[Any], expected: TextTask) -> None:
    assert TextTask.infer(rows_of(text=["x"] * len(labels), label=labels)) == expected


def test_infer_with_the_users_word() -> None:
    whole = rows_of(sentence1=["x", "y"], sentence2=["x", "y"], score=[5.0, 1.0])
    task = TextTask.infer(whole, kind="regression", metric="pearson")
    assert task == TextTask("regression", 1, None, True, "pearson")
    names = ["pos", "neg"]
    assert TextTask.infer(rows_of(text=["x"], label=["neg"]), label_names=names).label_names == ("pos", "neg")
    assert TextTask.infer(rows_of(text=["x"], label=[1]), label_names=names).num_labels == 2
    assert TextTask.infer(rows_of(text=["x"]), label_names=names).num_labels == 2
    assert TextTask.infer(rows_of(text=["x"]), kind="regression").num_labels == 1


def test_infer_takes_declared_names_and_ignores_a_format() -> None:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes", "maybe"]))
    rows = datasets.Dataset.from_dict({"text": ["x"], "label": [1]}, features=features).with_format("numpy")
    assert TextTask.infer(rows) == TextTask("classification", 3, ("no", "yes", "maybe"))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, None], {}, "Row 2 has no label: its value is null"),
        ([0.5, math.nan], {}, "Row 2 has no label: its value is NaN"),
        (["a", None], {}, "Row 2 has no label"),
        ([0, -1], {}, "Row 2 has the label -1, but class numbers are 0 or more"),
        ([0, 2], {"label_names": ["a", "b"]}, "Row 2 has the label 2, but class numbers are 0 to 1"),
        (["good", "god"], {"label_names": ["good", "bad"]}, "Row 2 has the label 'god'.* did you mean 'good'"),
        (["same", "same"], {}, "Every row has the label 'same'"),
        ([[1], [2]], {}, r"Row 1 has the label \[1\], which is not the number of a class"),
        ([0.5, 1.5], {"kind": "classification"}, "Row 1 has the label 0.5, which is not the number of a class"),
        (["a", "b"], {"kind": "regression"}, "Row 1 has the label 'a', which is not a finite number"),
        ([0.5, math.inf], {}, "Row 2 has the label inf, which is not a finite number"),
    ],
)
def test_labels_that_do_not_fit(labels: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TextTask.infer(rows_of(text=["x"] * len(labels), label=labels), **options)


def test_no_label_column(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"known to be the label \(there are text, stamp\): map one to 'label'"):
        TextTask.infer(rows_of(text=["x"], stamp=[1]))
    with pytest.raises(DataError, match="known to be the label"):
        BINARY.encode(rows_of(text=["x"]), tokenizer)
    encoded = BINARY.encode(rows_of(text=["x"]), tokenizer, require_labels=False)
    assert "labels" not in encoded.rows.column_names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classifcation", 2), "no text task 'classifcation'; did you mean 'classification'"),
        (
            ("classification", 2, None, False, "acuracy"),
            "no metric 'acuracy' for classification; did you mean 'accuracy'",
        ),
        (("regression", 1, None, False, "f1"), "no metric 'f1' for regression"),
        (("classification", 1), "classification got 1"),
        (("regression", 3), "regression got 3"),
        (("classification", 3, ("a", "b")), "2 label names do not fit 3 labels"),
    ],
)
def test_options(arguments: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TextTask(*arguments)


# --- features --------------------------------------------------------------------------------------------------------


def test_encode_cuts_counts_and_survives_empty_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["a good film", "", None, "one two three " * 9, "a bad film one two"]
    encoded = BINARY.encode(rows_of(text=texts, label=[1, 0, 0, 1, 1]), tokenizer, 7)
    ids = encoded.rows["input_ids"][:]
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["[CLS]", "a", "good", "film", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(ids[1]) == tokenizer.convert_ids_to_tokens(ids[2]) == ["[CLS]", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(ids[3]) == ["[CLS]", "one", "two", "three", "one", "two", "[SEP]"]
    assert len(ids[4]) == 7, "a text that just fits is not cut"
    assert encoded.rows["labels"][:] == [1, 0, 0, 1, 1]
    assert [len(mask) for mask in encoded.rows["attention_mask"]] == [len(row) for row in ids]
    assert (encoded.truncated, encoded.empty) == (1, 2)
    assert encoded.notice() == "1 of 5 texts was longer than 7 tokens and was cut; 2 texts are empty"
    assert BINARY.encode(rows_of(text=["a"], label=[0]), tokenizer).notice() is None


def test_encode_pairs_and_values(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = rows_of(query=["a good film", "one"], passage=["two", " "], score=[0.25, 5])
    encoded = TextTask("regression", 1, pair=True).encode(rows, tokenizer, 6)
    first = encoded.rows[0]
    assert tokenizer.convert_ids_to_tokens(first["input_ids"]) == ["[CLS]", "a", "good", "[SEP]", "two", "[SEP]"]
    assert first["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert encoded.rows["labels"][:] == [0.25, 5.0]
    assert encoded.notice() == "1 of 2 texts was longer than 6 tokens and was cut; 1 text is empty"


def test_encode_maps_names_and_default_length(tokenizer: PreTrainedTokenizerBase) -> None:
    task = TextTask("classification", 2, ("neg", "pos"))
    encoded = task.encode(rows_of(text=["a " * 40, "7"], label=["pos", "neg"]), tokenizer)
    assert encoded.rows["labels"][:] == [1, 0]
    assert encoded.max_length == 16 == len(encoded.rows["input_ids"][0])


def test_encode_in_batches(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [""] * 1000 + ["a good film"] * 500
    encoded = BINARY.encode(rows_of(text=texts), tokenizer, require_labels=False)
    assert [len(ids) for ids in encoded.rows["input_ids"]] == [2] * 1000 + [5] * 500


def test_encode_refuses(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="reads one text a row, but these rows have two"):
        BINARY.encode(rows_of(text=["x"], text_pair=["y"], label=[0]), tokenizer)
    with pytest.raises(DataError, match="reads two texts a row, but these rows have one"):
        TextTask("classification", 2, pair=True).encode(rows_of(text=["x"], label=[0]), tokenizer)
    with pytest.raises(DataError, match="Row 1 holds a list in the column 'text'"):
        BINARY.encode(rows_of(text=[["x"]], label=[0]), tokenizer)
    with pytest.raises(DataError, match="Row 2 has the label 7, but class numbers are 0 to 1"):
        BINARY.encode(rows_of(text=["x", "y"], label=[0, 7]), tokenizer)
    with pytest.raises(DataError, match="labels must be numbers"):
        BINARY.encode(rows_of(text=["x"], label=["pos"]), tokenizer)
    with pytest.raises(DataError, match="no rows to encode"):
        BINARY.encode(rows_of(text=["x"], label=[0]).select([]), tokenizer)
    with pytest.raises(OptionError, match="length of 2 leaves no room for text beside 2 special tokens"):
        BINARY.encode(rows_of(text=["x"], label=[0]), tokenizer, 2)


# --- metrics ---------------------------------------------------------------------------------------------------------


def naive_f1(predicted: list[int], true: list[int], label: int) -> float:
    hits = sum(p == t == label for p, t in zip(predicted, true, strict=True))
    named = predicted.count(label) + true.count(label)
    return 2 * hits / named if named else 0.0


labels_and_classes = st.integers(2, 4).flatmap(
    lambda c: st.tuples(
        st.just(c), st.lists(st.tuples(st.integers(0, c - 1), st.integers(0, c - 1)), min_size=1, max_size=30)
    )
)


@given(labels_and_classes)
def test_classification_against_counting(case: tuple[int, list[tuple[int, int]]]) -> None:
    classes, pairs = case
    predicted, true = [p for p, _ in pairs], [t for _, t in pairs]
    found = TextTask("classification", classes).metrics(np.eye(classes)[predicted], true)
    assert found["accuracy"] == pytest.approx(sum(p == t for p, t in pairs) / len(pairs))
    there = [1] if classes == 2 else sorted({*predicted, *true})
    assert found["f1"] == pytest.approx(np.mean([naive_f1(predicted, true, label) for label in there]))
    # Matthews correlation is the Pearson correlation of the one-hot matrices, each column centred.
    x, y = (np.eye(classes)[side] - np.eye(classes)[side].mean(0) for side in (predicted, true))
    scale = math.sqrt((x * x).sum() * (y * y).sum())
    assert found["matthews"] == pytest.approx((x * y).sum() / scale if scale > 1e-9 else 0.0, abs=1e-9)


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=1, max_size=30))
def test_regression_against_formulas(pairs: list[tuple[int, int]]) -> None:
    predicted, true = np.array(pairs, dtype=float).T

    def pearson(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x - x.mean(), y - y.mean()
        scale = math.sqrt((x @ x) * (y @ y))
        return float(x @ y) / scale if scale > 1e-9 else 0.0

    def ranks(x: np.ndarray) -> np.ndarray:
        return np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x])

    found = VALUE.metrics(predicted[:, None], true)
    assert found == VALUE.metrics(predicted, true)
    assert found["pearson"] == pytest.approx(pearson(predicted, true), abs=1e-9)
    assert found["spearman"] == pytest.approx(pearson(ranks(predicted), ranks(true)), abs=1e-9)
    assert found["mse"] == pytest.approx(np.mean((predicted - true) ** 2))


def test_undefined_correlations_are_zero() -> None:
    for predictions in ([1.0, 1.0, 1.0], [0.0, math.nan, 2.0]):
        found = VALUE.metrics(predictions, [1.0, 2.0, 3.0])
        assert found["pearson"] == found["spearman"] == 0.0
    assert VALUE.metrics([math.nan], [1.0])["mse"] == math.inf


def test_score_is_higher_when_better() -> None:
    logits = [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    assert BINARY.score(logits, [1, 0, 0]) == pytest.approx(2 / 3)
    assert VALUE.score([1.0, 2.0, 9.0], [0.0, 1.0, 2.0]) == pytest.approx(1.0)
    error = TextTask("regression", 1, metric="mse")
    assert error.score([1.0, 2.0], [1.0, 4.0]) == pytest.approx(-2.0)


@pytest.mark.parametrize(
    ("task", "predictions", "labels"),
    [
        (BINARY, np.zeros((3, 2)), [0, 1]),
        (BINARY, np.zeros((2, 3)), [0, 1]),
        (BINARY, np.zeros(2), [0, 1]),
        (BINARY, np.zeros((0, 2)), []),
        (VALUE, np.zeros((2, 2)), [0.0, 1.0]),
        (VALUE, 0.0, [0.0]),
    ],
)
def test_shapes_that_do_not_fit(task: TextTask, predictions: Any, labels: list[float]) -> None:
    with pytest.raises(DataError, match="Shapes do not fit"):
        task.metrics(predictions, labels)
