"""Training: what is learned from which rows, that it reaches every weight, helps, and goes on after an interruption."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

import thresher
from pairs.scoring import FAMILIES, KINDS, mean_rank, scorer, toy
from thresher.errors import DataError, OptionError, ThresherError
from thresher.pairs import PairLearner, PairLoss, train
from thresher.pairs.learning import collate, examples

QUIET = {"use_cpu": True, "progress": False, "precision": "float32"}


class Stop(TrainerCallback):
    """Ends a run after its fourth step, as if it had been interrupted."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 4


def step(made: Any, rows: datasets.Dataset, loss: PairLoss | None = None, teacher: Any = None) -> torch.Tensor:
    learner = PairLearner(made, loss or PairLoss(), teacher)
    return learner(**collate(examples(made, rows).made))["loss"]


@pytest.mark.parametrize(("kind", "family"), [(k, f) for k in KINDS for f in FAMILIES])
def test_a_gradient_reaches_every_trainable_weight(kind: str, family: str) -> None:
    made = scorer(kind, family)
    step(made, toy(3, candidates=2)).backward()
    for name, parameter in made.named_parameters():
        if not parameter.requires_grad:
            assert "pooler" in name
        elif "key.bias" not in name and "k_lin.bias" not in name:  # a softmax does not see what all keys share
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_which_response_repeats_a_word(kind: str, tmp_path: Path) -> None:
    rows, made = toy(24, low=40), scorer(kind, depth=2, **({"layers": (-1,)} if kind == "mixencoder" else {}))
    before = mean_rank(made, rows), float(step(made, rows, PairLoss(negatives=0)).detach())
    train(
        made,
        rows,
        tmp_path,
        loss=PairLoss(negatives=0),
        epochs=8,
        batch_size=8,
        learning_rate=2e-3,
        warmup=0.0,
        **QUIET,
    )
    after = mean_rank(made, rows), float(step(made, rows, PairLoss(negatives=0)).detach())
    assert after[1] < 0.8 * before[1] and after[0] > before[0] + 0.1, (before, after)
    assert not made.training


@pytest.mark.parametrize("kind", KINDS)
def test_a_scorer_that_reads_less_learns(kind: str, tmp_path: Path) -> None:
    """The policy acts as it is set while the scorer around it is trained, and is still there afterwards."""
    made, rows = scorer(kind, depth=2, **({"layers": (-1,)} if kind == "mixencoder" else {})), toy(12, low=40)
    thresher.attach(made, thresher.AttentionMass(retention=(0.8, 0.7)))
    before = float(step(made, rows, PairLoss(negatives=0)).detach())
    with thresher.keep_everything():
        assert float(step(made, rows, PairLoss(negatives=0)).detach()) != before
    train(made, rows, tmp_path, loss=PairLoss(negatives=0), epochs=6, batch_size=6, learning_rate=2e-3, **QUIET)
    assert float(step(made, rows, PairLoss(negatives=0)).detach()) < before
    assert thresher.policy_of(made).config == thresher.AttentionMass(retention=(0.8, 0.7))


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    *((kind, {"classes": 3}) for kind in KINDS if kind != "colbert"),
    *((kind, {"lexical": 4}) for kind in KINDS if kind != "cross"),
    ("mixencoder", {"start": "dual", "strategy": "M", "k": 1}),
    ("mixencoder", {"residual": "previous"}),
    ("mixencoder", {"use_h": False}),
    ("mixencoder", {"use_e": False, "start": "dual"}),
]


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_queries_of_a_batch_are_matched_together_as_alone(kind: str, settings: dict[str, Any]) -> None:
    """Each with candidates of its own, also of unlike number: the scores and every weight's gradient are those of a loop."""
    made = scorer(kind, **settings)
    queries, offers = ["w20 w21", "w22 w23 w24 w25", "w26"], [["w30"], ["w31 w20", "w32 w33 w34"], ["w40", "w41 w42"]]
    if made.lexical is not None:
        made.lexical.count(made.candidate_rows([text for texts in offers for text in texts])[0])
    found = []
    for together in (True, False):
        made.zero_grad()
        asked = made.ask(made.query_rows(queries)[0])
        blocks = [made.offer(made.candidate_rows(texts)[0]) for texts in offers]
        said = made.compare_each(asked, blocks) if together else list(map(made.compare, asked, blocks))
        torch.cat(said).square().sum().backward()
        found.append((said, {name: p.grad for name, p in made.named_parameters() if p.grad is not None}))
    (one, slopes), (other, expected) = found
    assert [len(scores) for scores in one] == [1, 2, 2]
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert slopes.keys() == expected.keys() and len(slopes) > 10
    for name, slope in slopes.items():
        if not name.endswith("key.bias"):  # a softmax does not see it: what is left is rounding
            assert (slope - expected[name]).abs().max() <= 1e-4 * (1 + expected[name].abs().max()), name


def test_in_batch_negatives_written_out() -> None:
    made = scorer("dual")
    rows = datasets.Dataset.from_list([{"query": f"w{20 + i}", "positive": f"w{30 + i} w9"} for i in range(4)])
    scores = torch.stack([made.score(row["query"], made.encode_candidates(rows["positive"])) for row in rows])
    expected = F.cross_entropy(scores / 2.0, torch.arange(4))
    torch.testing.assert_close(step(made, rows, PairLoss(temperature=2.0)).detach(), expected)
    two = torch.stack([scores.diagonal(), scores[range(4), [1, 2, 3, 0]]], 1) / 2.0  # one other's, the next one's
    expected = F.cross_entropy(two, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(step(made, rows, PairLoss(temperature=2.0, negatives=1)).detach(), expected)


def test_both_sides_learn_apart_and_interaction_learns_the_rest() -> None:
    """The encoder's gradient is that of a dual-encoder on the same candidates, that of all else that of the whole score."""
    settings = {"start": "dual", "strategy": "M", "similarity": "cosine", "k": 1}
    made, dual = scorer("mixencoder", **settings), scorer("dual", pooling="mean", similarity="cosine")
    dual.encoder.load_state_dict(made.encoder.state_dict())
    rows, loss = toy(3, candidates=2), PairLoss(temperature=0.1)

    def learned(one: Any, loss: PairLoss) -> tuple[float, dict[str, torch.Tensor]]:
        one.zero_grad()
        value = step(one, rows, loss)
        value.backward()
        return float(value.detach()), {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}

    (whole, slopes), (alone, expected) = learned(made, loss), learned(dual, loss)
    both, found = learned(made, PairLoss(temperature=0.1, apart=True))
    assert both == pytest.approx(whole + alone, rel=1e-5)
    own = [name for name in slopes if not name.startswith("encoder.")]
    assert len(own) > 3
    for name in own:
        torch.testing.assert_close(found[name], slopes[name])
    assert set(found) == {*own, *expected}
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-4, atol=1e-6)
    assert any(float((slopes[name] - slope).abs().max()) > 1e-3 for name, slope in expected.items())
    for other in (scorer("dual"), scorer("mixencoder"), scorer("mixencoder", classes=2, **settings)):
        with pytest.raises(OptionError, match="apart is for a MixEncoder that ranks and starts as a dual-encoder"):
            PairLearner(other, PairLoss(apart=True))


def test_what_the_encoder_did_not_bring_learns_at_a_rate_of_its_own(tmp_path: Path) -> None:
    moved = {}
    for own in (None, 1e-3):
        made = scorer("mixencoder", start="dual", strategy="M")
        before = {name: p.detach().clone() for name, p in made.named_parameters()}
        options = {"max_steps": 1, "learning_rate": 1e-5, "own_learning_rate": own, "warmup": 0.0, "weight_decay": 0.0}
        train(made, toy(8), tmp_path / str(own), **options, **QUIET)
        moved[own] = {name: float((p.detach() - before[name]).abs().max()) for name, p in made.named_parameters()}
    for name, distance in moved[1e-3].items():
        expected = moved[None][name] * (1.0 if name.startswith("encoder.") else 100.0)
        assert distance == pytest.approx(expected, rel=0.02, abs=1e-6), name
    assert max(moved[1e-3].values()) > 5e-4  # Adam's first step is about the rate


def test_what_is_right_as_well_is_no_negative() -> None:
    made = scorer("dual")
    rows = datasets.Dataset.from_list(
        [
            {"query": "w20", "candidates": ["w30", "w31", "w32"], "labels": [1, 1, 0]},
            {"query": "w21", "candidates": ["w31", "w30"], "labels": [1, 0]},
        ]
    )
    found = examples(made, rows)
    assert [len(e.candidates) for e in found.made] == [2, 2, 2]  # one example for each right one, with the wrong ones
    batch = collate(found.made)
    assert batch["targets"].tolist() == [0, 2, 4]
    assert batch["hidden"].tolist() == [
        [False, False, True, False, True, True],
        [True, False, False, False, True, True],
        [False, False, True, False, False, False],
    ]


def test_hard_negatives_are_drawn_the_same_again() -> None:
    made, rows = scorer("dual"), toy(6, candidates=5)
    first, again, other = (examples(made, rows, hard=2, seed=seed).made for seed in (1, 1, 2))
    assert first == again != other
    assert all(len(example.candidates) == 3 for example in first)


@pytest.mark.parametrize("kind", ["mixencoder", "dual", "deformer", "cross"])
def test_labels(kind: str) -> None:
    rows = datasets.Dataset.from_list(
        [{"sentence1": f"w{20 + i}", "sentence2": f"w{30 + i}", "label": i % 3} for i in range(5)]
    )
    made = scorer(kind, classes=3)
    logits = torch.as_tensor(made.predict(list(zip(rows["sentence1"], rows["sentence2"], strict=True))))
    torch.testing.assert_close(step(made, rows).detach(), F.cross_entropy(logits, torch.tensor(rows["label"])))
    one = scorer(kind, classes=1)
    said = torch.as_tensor(one.predict(list(zip(rows["sentence1"], rows["sentence2"], strict=True))))
    numbers = step(one, rows, PairLoss(numbers=True)).detach()
    torch.testing.assert_close(numbers, F.mse_loss(said, torch.tensor(rows["label"]).float()))
    halves = rows.map(lambda row: {"label": row["label"] / 2})
    wanted = F.binary_cross_entropy_with_logits(said, torch.tensor(halves["label"]).float())
    torch.testing.assert_close(step(one, halves).detach(), wanted)


@pytest.mark.parametrize(("high", "numbers"), [(5.0, True), (1.0, False)])
def test_a_batch_of_small_numbers_is_no_batch_of_probabilities(
    high: float, numbers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kind of labels they are is a matter of all rows, not of those of a step."""
    labels = [0.0, 1.0, 0.0, 1.0, 0.5, high]
    rows = [{"sentence1": f"w{20 + i}", "sentence2": f"w{30 + i}", "label": label} for i, label in enumerate(labels)]
    seen: list[bool | None] = []
    before = PairLearner._from_labels

    def watched(self: PairLearner, *args: Any) -> torch.Tensor:
        seen.append(self.loss.numbers)
        return before(self, *args)

    monkeypatch.setattr(PairLearner, "_from_labels", watched)
    train(scorer("dual", classes=1), datasets.Dataset.from_list(rows), tmp_path, batch_size=1, **QUIET)
    assert set(seen) == {numbers}


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "cross"])
def test_distillation(kind: str) -> None:
    teacher, made, rows = scorer("cross", seed=5), scorer(kind), toy(3, candidates=3)
    loss = PairLoss(label_weight=0.0, distil_weight=1.0)
    found = step(made, rows, loss, teacher)
    assert found > 0 and found.isfinite()
    found.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in made.encoder.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "cross"])
def test_a_scorer_that_reads_less_is_distilled(kind: str) -> None:
    teacher, made, rows = scorer("cross", seed=5), scorer(kind), toy(3, candidates=3)
    thresher.attach(made.encoder, thresher.AttentionMass(retention=(0.6, 0.5, 0.4)))
    found = step(made, rows, PairLoss(label_weight=0.0, distil_weight=1.0), teacher)
    assert found > 0 and found.isfinite()


def test_distilled_scores_written_out() -> None:
    teacher, made, rows = scorer("cross", seed=5), scorer("dual"), toy(2, candidates=3)
    wanted = []
    for row in rows:
        order = [row["label"], *(i for i in range(3) if i != row["label"])]
        texts = [row["candidates"][i] for i in order]
        ours, theirs = (m.score(row["query"], m.encode_candidates(texts)) for m in (made, teacher))
        p, q = (theirs / 2).softmax(0), (ours / 2).softmax(0)
        wanted.append(4 * (p * (p / q).log()).sum())
    found = step(made, rows, PairLoss(label_weight=0.0, distil_weight=1.0), teacher)
    torch.testing.assert_close(found.detach(), torch.stack(wanted).mean())


def test_what_a_teacher_hands_out_is_what_its_encoder_computes() -> None:
    teacher = scorer("cross", seed=5)
    pairs = [([20, 21], [30, 31, 32])]
    states = teacher.layer_states(pairs, [2, 3], like=teacher.encoder)
    entering = teacher.layer_inputs(pairs, [2, 3], like=teacher.encoder)
    torch.testing.assert_close(states[0][0], entering[3][0])
    assert [len(layer[0]) for layer in states] == [8, 8]
    ids = torch.tensor([[2, 20, 21, 3, 30, 31, 32, 3]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        last = teacher.encoder(input_ids=ids, token_type_ids=types).last_hidden_state[0]
    torch.testing.assert_close(states[-1][0], last)
    assert ids[0][teacher.query_place([20, 21])].tolist() == [20, 21]
    assert ids[0][teacher.candidate_place([20, 21], [30, 31, 32])].tolist() == [30, 31, 32]


@pytest.mark.parametrize("kind", ["deformer", "virt"])
def test_a_teacher_of_another_shape_is_refused(kind: str) -> None:
    loss = PairLoss(distil_weight=1.0)
    with pytest.raises(OptionError, match="4 layers of 32"):
        step(scorer(kind), toy(2), loss, scorer("cross", depth=4))
    with pytest.raises(OptionError, match="needs a teacher"):
        step(scorer(kind), toy(2), loss)
    with pytest.raises(OptionError, match="2 classes and the scorer 0"):
        step(scorer(kind), toy(2), loss, scorer("cross", classes=2))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: str) -> None:
    made, rows = scorer(kind), toy(3, candidates=2)
    exact = step(made, rows)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = step(made, rows)
    assert (exact - rounded).detach().abs() < 0.1 * exact.detach().clamp(min=1.0)
    rounded.backward()


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    rows = toy(12)
    options = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "seed": 3, **QUIET}
    whole, again = scorer("mixencoder"), scorer("mixencoder")
    train(whole, rows, tmp_path / "whole", **options)
    train(again, rows, tmp_path / "parts", save_steps=2, callbacks=[Stop()], **options)
    fresh = scorer("mixencoder")
    with pytest.raises(OptionError, match="unfinished run with other settings"):
        train(fresh, rows, tmp_path / "parts", **{**options, "learning_rate": 2e-3})
    train(fresh, rows, tmp_path / "parts", save_steps=2, **options)
    for (name, a), b in zip(whole.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_counts_come_with_the_metrics(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(
        [
            {"query": "w9 " * 40, "candidates": ["w10", "w11"], "label": 0, "labels": [1, 0]},
            {"query": "w9", "candidates": ["w10", "w11 " * 40], "label": 0, "labels": [0, 0]},
        ]
    )
    found = train(scorer("dual"), rows, tmp_path, max_steps=1, batch_size=2, **QUIET)
    assert (found["cut"], found["left_out"]) == (2, 1) and math.isfinite(found["train_loss"])


def test_rows_and_settings_that_do_not_fit(tmp_path: Path) -> None:
    labelled = datasets.Dataset.from_list([{"sentence1": "w9", "sentence2": "w10", "label": 7}])
    for made, rows, says in (
        (scorer("dual"), labelled, "set classes"),
        (scorer("dual", classes=3), labelled, "Row 1 has the label 7.0, where a class from 0 to 2"),
        (
            scorer("dual"),
            datasets.Dataset.from_list([{"query": "w9", "candidates": ["w10"], "labels": [0]}]),
            "nothing to learn",
        ),
        *(
            (
                scorer("dual", classes=classes),
                datasets.Dataset.from_list([{"sentence1": "w9", "sentence2": "w10", "label": label}]),
                f"Row 1 has the label {label}, where a number is expected",
            )
            for classes in (1, 3)
            for label in (math.nan, math.inf)
        ),
    ):
        with pytest.raises(DataError, match=says):
            train(made, rows, tmp_path, **QUIET)
    for bad in (
        {"temperature": 0.0},
        {"temperature": math.inf},
        {"temperature": "a"},
        {"negatives": -1},
        {"negatives": 1.5},
        {"label_weight": -1.0},
        {"label_weight": 0.0, "apart": True, "distil_weight": 1.0},
        {"distil_weight": math.inf},
        {"distil_temperature": 0.0},
        {"label_weight": 0.0},
    ):
        with pytest.raises(OptionError, match=next(iter(bad))):
            PairLoss(**bad)
    for hard in (-1, 1.5, "2"):
        with pytest.raises(OptionError, match="hard, the wrong candidates"):
            train(scorer("dual"), toy(2), tmp_path, hard=hard, **QUIET)
    for batch_size in (0, 1.5, "8"):
        with pytest.raises(OptionError, match="whole number of queries, at least 1"):
            train(scorer("dual"), toy(2), tmp_path, batch_size=batch_size, **QUIET)
    for name in ("epochs", "learning_rate", "own_learning_rate"):
        for value in (0.0, math.nan, "3"):
            with pytest.raises(OptionError, match=f"{name} must be a number above 0"):
                train(scorer("dual"), toy(2), tmp_path, **{**QUIET, name: value})


def test_a_teacher_must_reach_as_far_as_its_student(tmp_path: Path) -> None:
    loss = PairLoss(distil_weight=1.0)
    for limits in ({"max_query": 40, "max_candidate": 40}, {"max_query": 30, "max_candidate": 19}):
        with pytest.raises(OptionError, match="for 48 of a pair; lower the scorer's limits"):
            train(scorer("dual", **limits), toy(2), tmp_path, loss=loss, teacher=scorer("cross"), **QUIET)
    train(scorer("dual", max_query=30, max_candidate=18), toy(2), tmp_path, loss=loss, teacher=scorer("cross"), **QUIET)


def test_training_that_diverges_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ThresherError, match=r"Training diverged: .* lower learning_rate=1e\+38"):
        train(scorer("dual"), toy(4), tmp_path, epochs=4, batch_size=4, learning_rate=1e38, warmup=0.0, **QUIET)
