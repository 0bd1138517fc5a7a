"""Labels that a model's head cannot be taught are named by their row, before anything is trained or asked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import thresher
from helpers import build, config_of, dataset, make, tokenizer
from thresher.errors import DataError
from thresher.policy import Stage
from thresher.targets import check_labels
from thresher.training.stages import run_stage

SEVERAL = {"num_labels": 3, "problem_type": "multi_label_classification"}


def model_of(head: str) -> Any:
    if head == "several":
        return build(config_of("bert", 3, **SEVERAL), "sequence")
    if head == "value":
        return build(config_of("bert", 3, num_labels=1), "sequence")
    return make("bert", head, 3)


def rows_with(head: str, bad: Any) -> Any:
    """Three rows of which the second has `bad` as its label."""
    rows = dataset(3, labels=None)
    sizes = [len(ids) for ids in rows["input_ids"]]
    good: dict[str, list[Any]] = {
        "sequence": [0, 1, 2],
        "value": [0.5, 1.0, -3.0],
        "several": [[1.0, 0.0, 1.0]] * 3,
        "token": [[-100, *[1] * (size - 1)] for size in sizes],
    }
    if head == "question-answering":
        starts = [1, bad, 2]
        return rows.add_column("end_positions", [2, 2, 2]).add_column("start_positions", starts)
    labels = good[head]
    labels[1] = bad
    return rows.add_column("labels", labels)


BAD = [
    ("sequence", None, "Row 2 has the label None, where a class, a whole number"),
    ("sequence", 3, "Row 2 has the label 3, and the model has the classes 0 to 2"),
    ("sequence", -1, "Row 2 has the label -1, and"),
    ("value", None, "Row 2 has the label None, where a number"),
    ("value", math.nan, "Row 2 has the label nan, where a number"),
    ("several", [1.0, 0.0], "Row 2 has the labels .*, where 3 numbers from 0 to 1"),
    ("several", [1.0, 0.0, 2.0], "Row 2 has the labels .*, where 3 numbers from 0 to 1"),
    ("several", None, "Row 2 has the labels None"),
    ("token", [1, 1], r"Row 2 has 2 labels and \d+ tokens"),
    ("token", None, "Row 2 has the label None and"),
    ("question-answering", None, "Row 2 has start_positions None, where the place of a token"),
    ("question-answering", -1, "Row 2 has start_positions -1"),
]


@pytest.mark.parametrize(("head", "bad", "says"), BAD)
def test_a_label_that_does_not_fit_is_named(head: str, bad: Any, says: str, tmp_path: Path) -> None:
    rows, model = rows_with(head, bad), model_of(head)
    with pytest.raises(DataError, match=says):
        check_labels(model, rows)
    with pytest.raises(DataError, match=says):
        thresher.saliency(model, rows)
    thresher.attach(model, "ltp")
    with pytest.raises(DataError, match=says):
        run_stage(model, Stage(name="soft", mode="soft", epochs=1.0), rows, tokenizer(), tmp_path, progress=False)


def test_whole_numbers_and_texts_are_no_classes() -> None:
    for labels in ([0.0, 1.0, 2.0], ["a", "b", "c"], [True, False, True], [[0], [1], [2]]):
        with pytest.raises(DataError, match="Row 1 has the label .*, where a class, a whole number, is expected"):
            check_labels(make("bert"), dataset(3, labels=None).add_column("labels", labels))


def test_labels_that_fit_pass_and_no_head_takes_any() -> None:
    for head in ("sequence", "value", "several", "token", "question-answering"):
        good = {"sequence": 1, "value": 2, "several": [0, 1, 1], "question-answering": 0}
        rows = rows_with(head, good.get(head))
        if head == "token":
            rows = rows.remove_columns("labels").add_column("labels", [[2] * len(ids) for ids in rows["input_ids"]])
        check_labels(model_of(head), rows)
        check_labels(make("bert", "base", 3), rows)
    check_labels(make("bert"), dataset(3, labels=None))


def test_a_batch_of_tensors_is_checked_as_rows_are() -> None:
    model = make("bert")
    ids = torch.randint(5, 60, (4, 6))
    for labels, says in (
        (torch.tensor([0, 1]), "labels of 2"),
        (torch.tensor([0.0, 1.0, 2.0, 0.0]), "Row 1 has the label 0.0"),
    ):
        with pytest.raises(DataError, match=says):
            thresher.saliency(model, {"input_ids": ids, "labels": labels})
    with pytest.raises(DataError, match="A batch needs input_ids"):
        thresher.saliency(model, {"labels": torch.tensor([0])})
    found = thresher.saliency(model, {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0])})
    assert [len(one) for one in found] == [6] * 4
    mask = torch.ones_like(ids)
    mask[1] = 0
    found = thresher.saliency(model, {"input_ids": ids, "attention_mask": mask})
    assert [len(one) for one in found] == [6, 0, 6, 6]


@pytest.mark.parametrize("bad", [[math.nan], [-0.5, 1.5], [2.0, 3.0], None, ["a"], [0.0]])
def test_a_saliency_that_is_no_distribution_is_refused(bad: Any, tmp_path: Path) -> None:
    rows = dataset(6)
    columns = [[1 / len(ids)] * len(ids) for ids in rows["input_ids"]]
    if isinstance(bad, list):
        bad = [*bad, *[0.0] * (len(columns[2]) - len(bad))] if bad != ["a"] else bad * len(columns[2])
    columns[2] = bad
    if bad and bad[0] == "a":
        columns = [[str(x) for x in one] for one in columns]
    with pytest.raises(DataError, match="Row 3 has a saliency that is not one number a token"):
        thresher.fit(
            make("bert"), "adapler", rows.add_column("saliency", columns), tokenizer(), tmp_path, progress=False
        )
    assert not (tmp_path / "thresher.json").exists()


def test_training_that_diverges_is_an_error(tmp_path: Path) -> None:
    model = thresher.attach(make("bert"), "ltp")
    with torch.no_grad():
        next(model.parameters()).fill_(np.nan)
    with pytest.raises(
        thresher.ThresherError, match="Training diverged in the stage 'soft': .* lower its learning_rate"
    ):
        run_stage(model, Stage(name="soft", mode="soft", epochs=1.0), dataset(4), tokenizer(), tmp_path, progress=False)


def test_labels_that_nobody_learns_from_are_not_looked_at(tmp_path: Path) -> None:
    """A stage that learns from the model alone takes rows labelled for another task."""
    model = thresher.attach(make("bert"), "random")
    stage = Stage(name="distil", mode="hard", epochs=1.0, label_weight=0.0, distil_weight=1.0)
    rows = dataset(4, labels=None).add_column("labels", [7, 8, 9, 10])
    assert "train_loss" in run_stage(model, stage, rows, tokenizer(), tmp_path, progress=False)
