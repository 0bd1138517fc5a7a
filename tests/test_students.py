"""Smaller models under a policy: students of fewer layers, models with fewer heads, and how they train, save and load."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

import thresher
from helpers import (
    FAMILIES,
    HIDDEN,
    INTERMEDIATE,
    batch,
    dataset,
    decided,
    make,
    outputs_of,
    settings,
    tokenizer,
    worst,
)
from thresher.backbones.heads import remove_heads
from thresher.backbones.opened import OPENED, open_layers
from thresher.errors import OptionError, UnsupportedModelError
from thresher.measure.flops import dense_flops, flops
from thresher.methods import METHODS
from thresher.model import attachment_of, policy_of
from thresher.policy import Geometry
from thresher.training.students import DISTIL, head_importance

CLOSE = 1e-4
QA = "question-answering"
OPEN = sorted(OPENED)


def spans(count: int = 24) -> Any:
    rows = dataset(count, labels=None, low=16)
    types = [[0] * 6 + [1] * (len(ids) - 6) for ids in rows["input_ids"]]
    rows = rows.remove_columns("token_type_ids").add_column("token_type_ids", types)
    starts = [8 + number % 5 for number in range(count)]
    return rows.add_column("start_positions", starts).add_column("end_positions", [start + 1 for start in starts])


# Students.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_has_some_of_the_layers_and_all_of_the_rest(family: str, tmp_path: Path) -> None:
    teacher = make(family, layers=4)
    before = copy.deepcopy(teacher.state_dict())
    small = thresher.student(teacher, 2)
    assert type(small) is type(teacher) and not small.training
    assert small.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers == 4
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    thresher.attach(small)
    inputs = batch(family)
    assert attachment_of(small).engine.entrance.calls == 2
    thresher.validate(small, inputs)
    small.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert worst(outputs_of(small, inputs), outputs_of(plain, inputs)) <= CLOSE
    with torch.no_grad():
        next(small.parameters()).zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        (1, [0]),
        (2, [0, 11]),
        (6, [0, 2, 4, 7, 9, 11]),
        (11, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]),
        (12, list(range(12))),
    ],
)
def test_layers_are_spread_as_distilberts(layers: int, kept: list[int]) -> None:
    teacher = make("bert", "base", layers=12)
    small = thresher.student(teacher, layers)
    wanted = [teacher.encoder.layer[number].output.dense.weight for number in kept]
    got = [layer.output.dense.weight for layer in small.encoder.layer]
    assert all(torch.equal(one, other) for one, other in zip(wanted, got, strict=True))


def test_a_student_of_what_is_attached_or_has_lost_heads() -> None:
    teacher = make("bert", QA, layers=4)
    remove_heads(teacher, [[0, 1], [1, 2], [2, 3], [0, 3]])
    thresher.attach(teacher, "ltp")
    small = thresher.student(teacher, 2)
    assert small.config.removed_heads == [[0, 1], [0, 3]]
    with pytest.raises(OptionError, match="nothing attached"):
        policy_of(small)
    thresher.validate(thresher.attach(small, "block-skim"), batch("bert"))
    for layers in (0, 5):
        with pytest.raises(OptionError, match=f"from 1 to the 4 layers of its teacher, not {layers}"):
            thresher.student(teacher, layers)


def test_distillation_brings_a_student_nearer_to_its_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, rows, inputs = make("bert", QA, layers=4), spans(), batch("bert")
    small = thresher.student(teacher, 2)
    before = worst(outputs_of(small, inputs), outputs_of(teacher, inputs))
    frozen = copy.deepcopy(teacher.state_dict())
    stage = replace(
        DISTIL, epochs=20, learning_rate=2e-3, batch_size=8, label_weight=0.0, distil_weight=1.0, dropout=False
    )
    options = {"progress": False, "use_cpu": True, "precision": "float32", "max_steps": 40}
    back = thresher.distil(small, teacher, rows, tokenizer(), tmp_path / "out", stage=stage, **options)
    assert back is small and not small.training and attachment_of(small).policy is None
    assert worst(outputs_of(small, inputs), outputs_of(teacher, inputs)) < 0.8 * before
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())
    assert not (tmp_path / "out" / "training").exists()
    assert worst(outputs_of(thresher.load(tmp_path / "out"), inputs), outputs_of(small, inputs)) == 0.0
    plain = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    assert worst(outputs_of(plain, inputs), outputs_of(small, inputs)) <= CLOSE


def test_an_interrupted_distillation_goes_on_and_another_one_is_refused(tmp_path: Path) -> None:
    teacher, rows = make("bert", QA, layers=4), spans()
    options: dict[str, Any] = {"progress": False, "use_cpu": True, "precision": "float32"}
    stage = replace(DISTIL, epochs=2.0, batch_size=8)
    whole = thresher.distil(
        thresher.student(teacher, 2), teacher, rows, tokenizer(), tmp_path / "a", stage=stage, **options
    )

    class Stop(Exception):
        pass

    from transformers import TrainerCallback

    class Stopping(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == 4:
                raise Stop

    def again(seed: int = 0, **more: Any) -> Any:
        small = thresher.student(teacher, 2)
        return thresher.distil(
            small, teacher, rows, tokenizer(), tmp_path / "b", stage=stage, seed=seed, save_steps=3, **more, **options
        )

    with pytest.raises(Stop):
        again(callbacks=[Stopping()])
    with pytest.raises(OptionError, match=r"other settings \(seed\)"):
        again(seed=1)
    inputs = batch("bert")
    assert worst(outputs_of(again(), inputs), outputs_of(whole, inputs)) <= CLOSE
    bare = rows.remove_columns(["start_positions", "end_positions"])
    with pytest.raises(OptionError, match="labels"):
        thresher.distil(thresher.student(teacher, 2), teacher, bare, tokenizer(), tmp_path / "c", **options)


# Heads.


def without(model: Any, heads: list[list[int]]) -> Any:
    """The stock model, in which what comes out of these heads counts for nothing: their columns of the output are zero."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for layer, some in zip(open_layers(found), heads, strict=True):
            width = layer.out.in_features // layer.heads
            for head in some:
                layer.out.weight[:, head * width : (head + 1) * width] = 0.0
    return found


HEADS = [[0, 2], [1, 3], [2, 3], [0, 1]]


@pytest.mark.parametrize("family", OPEN)
def test_removed_heads_are_really_gone_and_the_rest_says_what_it_said(family: str, tmp_path: Path) -> None:
    model, inputs = make(family, layers=4), batch(family)
    wanted = outputs_of(without(model, HEADS), inputs)
    size = sum(p.numel() for p in model.parameters())
    remove_heads(model, HEADS)
    assert worst(outputs_of(model, inputs), wanted) <= CLOSE
    assert size - sum(p.numel() for p in model.parameters()) == 4 * (4 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN // 2)
    for layer in open_layers(model):
        assert (layer.heads, layer.query.out_features, layer.out.in_features) == (2, HIDDEN // 2, HIDDEN // 2)
    thresher.attach(model)
    thresher.validate(model, inputs)
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert worst(outputs_of(plain, inputs), wanted) <= CLOSE
    assert open_layers(plain)[0].heads == 4
    for again in (thresher.load(tmp_path), thresher.attach(plain)):
        assert [layer.heads for layer in open_layers(again)] == [2] * 4
        assert worst(outputs_of(again, inputs), wanted) <= CLOSE


@pytest.mark.parametrize("config", sorted(METHODS, key=lambda c: c.method), ids=lambda c: c.method)
@pytest.mark.parametrize("kind", ["student", "pruned"])
def test_every_policy_sits_on_a_smaller_model(kind: str, config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = make("bert", QA, layers=4), batch("bert", (24, 9, 17))
    if kind == "student":
        model = thresher.student(model, 2)
    else:
        remove_heads(model, HEADS)
    stock = outputs_of(model, inputs)
    chosen = settings(config)
    if hasattr(chosen, "retention"):
        chosen = chosen.replace(retention=tuple(0.8**layer for layer in range(1, 2 * (kind == "pruned") + 3)))
    decided(thresher.attach(model, chosen))
    with thresher.stock():
        assert worst(stock, outputs_of(model, inputs)) <= CLOSE
    thresher.validate(model, inputs)
    with thresher.tracing(record=True) as traces:
        found = outputs_of(model, inputs)
    with thresher.simulated_drops():
        assert worst(found, outputs_of(model, inputs)) <= CLOSE
    policy = policy_of(model)
    assert sum(flops(traces[0], policy.geometry, policy)) > 0
    thresher.save(model, tmp_path)
    assert worst(found, outputs_of(thresher.load(tmp_path), inputs)) == 0.0


def test_the_flops_are_those_of_the_heads_that_are_left() -> None:
    model = make("bert", layers=4)
    remove_heads(model, HEADS)
    geometry = policy_of(thresher.attach(model, thresher.BlockSkim())).geometry
    assert geometry == Geometry(layers=4, hidden=HIDDEN, heads=2, intermediate=INTERMEDIATE, head=8)
    n, width = 20, HIDDEN // 2
    of_a_layer = 4 * 2 * n * HIDDEN * width + 2 * 2 * n * n * width + 2 * 2 * n * HIDDEN * INTERMEDIATE
    assert dense_flops(geometry, n) == 4 * of_a_layer


@pytest.mark.parametrize("head", ["sequence", QA])
def test_importance_is_what_small_changes_do_to_the_loss(head: str) -> None:
    model = make("bert", head, layers=2).double()
    rows = spans(5) if head == QA else dataset(5)
    found = head_importance(model, rows)

    def loss(row: dict[str, Any]) -> float:
        given = {name: torch.tensor([value]) for name, value in row.items()}
        with torch.no_grad():
            return float(model(**given).loss)

    for number, layer in enumerate(open_layers(model)):
        for one in range(4):
            columns = layer.out.weight.data[:, one * 8 : (one + 1) * 8]
            slopes = []
            for row in rows:
                kept = columns.clone()
                ends = []
                for factor in (1 + 1e-4, 1 - 1e-4):
                    columns.copy_(kept * factor)
                    ends.append(loss(row))
                columns.copy_(kept)
                slopes.append(abs(ends[0] - ends[1]) / 2e-4)
            assert float(found[number, one]) == pytest.approx(sum(slopes) / len(rows), rel=1e-3, abs=1e-6)


def test_the_least_important_heads_go(tmp_path: Path) -> None:
    model, rows = make("bert", QA, layers=3), spans(10)
    importance = head_importance(model, rows)
    whole = copy.deepcopy(model)
    assert thresher.prune_heads(model, rows) is model
    least = [sorted(range(4), key=lambda head: float(of[head]))[:2] for of in importance]
    assert model.config.removed_heads == [sorted(some) for some in least]
    inputs = batch("bert")
    assert worst(outputs_of(model, inputs), outputs_of(without(whole, least), inputs)) <= CLOSE
    assert thresher.prune_heads(copy.deepcopy(whole), rows, share=0.0).config.removed_heads == [[]] * 3
    one_left = thresher.prune_heads(copy.deepcopy(whole), rows, share=0.99)
    assert [layer.heads for layer in open_layers(one_left)] == [1] * 3
    again = thresher.prune_heads(copy.deepcopy(model), rows)
    assert [layer.heads for layer in open_layers(again)] == [1] * 3
    assert all(
        set(before) < set(after)
        for before, after in zip(model.config.removed_heads, again.config.removed_heads, strict=True)
    )


def test_heads_go_twice_and_copies_and_weights_follow() -> None:
    model, inputs = make("bert", layers=2), batch("bert")
    once, both = copy.deepcopy(model), without(model, [[0, 2], [1, 3]])
    remove_heads(once, [[0], [3]])
    remove_heads(once, [[1], [1]])  # of heads 1, 2, 3 the second; of 0, 1, 2 as well
    assert once.config.removed_heads == [[0, 2], [1, 3]]
    assert worst(outputs_of(once, inputs), outputs_of(both, inputs)) <= CLOSE
    copied = copy.deepcopy(once)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    copied.load_state_dict(once.state_dict())
    assert worst(outputs_of(copied, inputs), outputs_of(once, inputs)) == 0.0
    model.load_state_dict(once.state_dict())
    assert worst(outputs_of(model, inputs), outputs_of(once, inputs)) <= CLOSE
    itself = once.state_dict(keep_vars=True)["bert.encoder.layer.0.attention.self.query.weight"]
    assert itself is open_layers(once)[0].query.weight


def test_a_method_trains_on_a_pruned_model(tmp_path: Path) -> None:
    model, rows = make("bert", QA, layers=2), spans()
    thresher.prune_heads(model, rows)
    options: dict[str, Any] = {
        "progress": False,
        "use_cpu": True,
        "precision": "float32",
        "max_steps": 3,
        "save_steps": 2,
    }
    thresher.fit(model, thresher.BlockSkim(block=4), rows, tokenizer(), tmp_path / "out", **options)
    back, inputs = thresher.load(tmp_path / "out"), batch("bert")
    assert [layer.heads for layer in open_layers(back)] == [2, 2]
    assert worst(outputs_of(model, inputs), outputs_of(back, inputs)) == 0.0


def test_an_exported_graph_has_the_small_layers(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = make("bert", layers=2)
    remove_heads(model, HEADS[:2])
    thresher.export(thresher.attach(model), tmp_path)  # compares answers by itself
    shapes = [tuple(one.dims) for one in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert (HIDDEN, HIDDEN // 2) in shapes


def test_heads_that_cannot_go() -> None:
    model, rows = make("bert", QA, layers=2), spans(4)
    with pytest.raises(OptionError, match="2 layers, and heads to remove are given for 1"):
        remove_heads(model, [[0]])
    with pytest.raises(OptionError, match=r"as many heads, not \[1, 0\]"):
        remove_heads(model, [[0], []])
    for heads in ([[4], [0]], [[-1], [0]], [[0, 1, 2, 3]] * 2):
        with pytest.raises(OptionError, match="must keep at least one"):
            remove_heads(model, heads)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(OptionError, match=r"at least 0 and below 1"):
            thresher.prune_heads(model, rows, share=share)
    with pytest.raises(OptionError, match="encoded first: they need input_ids, and have text"):
        head_importance(make("bert", "sequence"), [{"text": "a", "label": 0}])
    with pytest.raises(OptionError, match="there are none"):
        thresher.prune_heads(model, rows.select([]))
    with pytest.raises(OptionError, match="task's loss|labels"):
        thresher.prune_heads(model, rows.remove_columns(["start_positions"]))
    with pytest.raises(OptionError, match="before anything is attached"):
        thresher.prune_heads(thresher.attach(model), rows)
    with pytest.raises(UnsupportedModelError, match="cannot be opened"):
        remove_heads(make("modernbert", QA), [[0]] * 3)
    assert [layer.heads for layer in open_layers(model)] == [4, 4]
