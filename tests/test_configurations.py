"""Retention configurations that are learned, drawn or searched: PoWER-BERT, Length-Adaptive Transformer and ASE."""

from __future__ import annotations

import copy
import json
import math
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import thresher
from helpers import LENGTHS, batch, config_of, make, outputs_of, segments_of, worst
from thresher.errors import OptionError
from thresher.evidence import Evidence
from thresher.measure.flops import flops
from thresher.model import policy_of
from thresher.packed import PackedTokens
from thresher.parts import rules, scores
from thresher.policy import Stage, Trace
from thresher.training.learner import Learner, distillation_loss, stock_copy

CLOSE = 1e-4


def traced(model: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Trace]:
    with thresher.tracing(record=True) as traces:
        outputs = outputs_of(model, inputs)
    return outputs, traces[-1]


# Dual attention.


@st.composite
def dialogues(draw: st.DrawFn) -> list[list[tuple[int, bool]]]:
    """Rows of (segment, alive), context first; the first token lives."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        context, response = draw(st.integers(1, 5)), draw(st.integers(0, 4))
        alive = [True, *draw(st.lists(st.booleans(), min_size=context + response - 1, max_size=context + response - 1))]
        rows.append(list(zip([0] * context + [1] * response, alive, strict=True)))
    return rows


def as_tokens(rows: list[list[tuple[int, bool]]], protect: Any = ()) -> PackedTokens:
    width = max(map(len, rows))
    grid = lambda at: torch.tensor([[t[at] for t in row] + [0] * (width - len(row)) for row in rows])  # noqa: E731
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    safe = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, column in protect:
        safe[row, column] = True
    tokens = PackedTokens.pack(torch.zeros(*mask.shape, 1), mask, segments=grid(0), protected=safe, simulated=True)
    return tokens.keep(grid(1).bool()[mask.bool()])


@given(dialogues(), st.sampled_from([0.0, 0.2, 0.7, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))
def test_dual_attention_is_the_papers_sum_over_queries(
    rows: list[list[tuple[int, bool]]], alpha_context: float, alpha_response: float
) -> None:
    heads = 2
    tokens, maps = as_tokens(rows), []
    for row in rows:
        a = torch.rand(heads, len(row), len(row))
        a[:, :, [not alive for _, alive in row]] = 0.0
        maps.append(a / a.sum(-1, keepdim=True))
    expected, by_segment, diagonal = [], [], []
    for row, a in zip(rows, maps, strict=True):
        sides = [[i for i, (segment, alive) in enumerate(row) if alive and segment == s] for s in (0, 1)]
        for j, (segment, _) in enumerate(row):
            received = [[float(a[h, i, j]) for h in range(heads) for i in side] for side in sides]
            by_segment.append([sum(r) / max(len(r), 1) for r in received])
            diagonal.append(sum(float(a[h, j, j]) for h in range(heads)) / heads)
            own, other = sides[segment], sides[1 - segment]
            self_importance = sum(float(a[h, i, j]) for h in range(heads) for i in own if i != j) / (
                heads * max(len(own), 1)
            )
            mutual = sum(float(a[h, i, j]) for h in range(heads) for i in other) / (heads * max(len(other), 1))
            alpha = (alpha_context, alpha_response)[segment] if sides[0] and sides[1] else 1.0
            expected.append(alpha * self_importance + (1 - alpha) * mutual)
    got = scores.dual_attention(
        tokens,
        Evidence(by_segment=torch.tensor(by_segment), diagonal=torch.tensor(diagonal)),
        alpha_context=alpha_context,
        alpha_response=alpha_response,
    )
    living = [alive for row in rows for _, alive in row]
    for value, wanted, alive in zip(got.tolist(), expected, living, strict=True):
        if alive:
            assert value == pytest.approx(wanted, abs=1e-5)


@given(dialogues(), st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.data())
def test_a_share_of_each_segment_is_kept_apart(
    rows: list[list[tuple[int, bool]]], share: float, data: st.DataObject
) -> None:
    values = [data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(r), max_size=len(r))) for r in rows]
    tokens = as_tokens(rows)
    got = rules.keep_share_of_segments(torch.tensor([v for row in values for v in row]), tokens, share)
    for mask, row, score in zip(got.split(tokens.layout.sizes), rows, values, strict=True):
        for segment in (0, 1):
            side = [i for i, (s, alive) in enumerate(row) if s == segment and alive]
            count = max(
                1, round(len(side) * share + 1e-9) if (len(side) * share) % 1 != 0.5 else round(len(side) * share)
            )
            order = sorted(side, key=lambda i: (i != 0, -score[i], i))
            assert [i for i in side if mask[i]] == sorted(order[:count])


def test_protected_tokens_of_one_segment_take_no_places_of_the_other() -> None:
    tokens = as_tokens([[(0, True)] * 6 + [(1, True)] * 4], protect=[(0, 1), (0, 2)])
    mask = rules.keep_share_of_segments(torch.arange(10.0), tokens, 0.5)
    assert mask.tolist() == [True, True, True, False, False, False, False, False, True, True]


def test_the_response_decides_what_of_the_context_stays() -> None:
    inputs = batch("bert", (24, 30))
    segments = segments_of("bert", inputs)
    assert (segments[inputs["attention_mask"].bool()] == 1).any()
    _, selfish = traced(thresher.attach(make("bert"), thresher.ASE(alpha_context=1.0, alpha_response=1.0)), inputs)
    _, mutual = traced(thresher.attach(make("bert"), thresher.ASE(alpha_context=0.0, alpha_response=0.0)), inputs)
    assert not torch.equal(selfish.dropped_at(), mutual.dropped_at())


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("settings", [{"budget": "apart"}, {"place": "after feed-forward"}], ids=str)
def test_ase_options_run_three_ways_to_one_answer(family: str, settings: dict[str, Any]) -> None:
    inputs = batch(family)
    model = thresher.attach(make(family, "token"), thresher.ASE(**settings))
    batched, trace = traced(model, inputs)
    assert (trace.dropped_at() > 0).any()
    with thresher.simulated_drops():
        simulated, simulated_trace = traced(model, inputs)
    assert worst(batched, simulated) <= CLOSE
    assert torch.equal(trace.dropped_at(), simulated_trace.dropped_at())
    if settings.get("place"):
        assert all(read == fed for read, fed in trace.reads)


def test_distilbert_can_be_told_what_closes_the_context() -> None:
    inputs = batch("distilbert", (24, 30))
    separator = int(inputs["input_ids"][0, 12])
    plain = traced(thresher.attach(make("distilbert"), thresher.ASE()), inputs)[1].dropped_at()
    told = traced(thresher.attach(make("distilbert"), thresher.ASE(segment_end=separator)), inputs)[1].dropped_at()
    assert not torch.equal(plain[0], told[0])


@pytest.mark.parametrize(
    "settings",
    [{"alpha_context": 1.2}, {"alpha_response": -0.1}, {"budget": "mine"}, {"place": "inside"}],
    ids=str,
)
def test_ase_refuses_what_it_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        thresher.ASE(**settings)


# Configurations chosen pass by pass.


@pytest.mark.parametrize("method", [thresher.AttentionMass, thresher.ASE, thresher.LengthAdaptive, thresher.PowerBert])
def test_a_block_reads_by_its_own_configuration(method: Any) -> None:
    inputs = batch("bert", (20, 10))
    curve = (0.8, 0.5, 0.2)
    model = thresher.attach(make("bert"), method())
    fixed, trace = traced(thresher.attach(make("bert"), method(retention=curve)), inputs)
    with thresher.retaining(curve):
        got, now = traced(model, inputs)
    assert worst(fixed, got) == 0.0
    assert now.reads == trace.reads
    assert [fed for _, fed in now.reads] == [[16, 8], [10, 5], [4, 2]]
    _, after = traced(model, inputs)
    assert after.reads != now.reads


def test_a_configuration_must_fit_the_model() -> None:
    model = thresher.attach(make("bert"), "attention-mass")
    with thresher.retaining((0.5, 0.4)), pytest.raises(OptionError, match=r"2 fractions.*3 layers"):
        model(**batch("bert"))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_layer_that_is_left_out_changes_nothing(family: str) -> None:
    inputs = batch(family)
    model, shallow = make(family, "base"), make(family, "base")
    layers = shallow.layers if family == "modernbert" else shallow.encoder.layer
    del layers[1]
    expected = outputs_of(shallow, inputs)
    thresher.attach(model, "attention-mass")
    with thresher.retaining((1.0, 1.0, 1.0), skip={2}):
        got, trace = traced(model, inputs)
    assert worst(expected, got) <= 1e-5
    assert trace.reads[1] == ([0] * len(LENGTHS), [0] * len(LENGTHS))
    geometry = policy_of(model).geometry
    assert 3 * sum(flops(trace, geometry)) == 2 * sum(flops(traced(model_off(family), inputs)[1], geometry))
    with thresher.retaining((0.5, 0.5, 0.5), skip={1}):  # what the first would have dropped, the second does
        _, later = traced(model, inputs)
    assert set(later.dropped_at()[inputs["attention_mask"].bool()].tolist()) == {0, 2}


def model_off(family: str) -> Any:
    return thresher.attach(make(family, "base"))


# Length-Adaptive Transformer.


def test_the_sandwich_is_whole_shortest_and_random() -> None:
    policy = policy_of(
        thresher.attach(make("bert"), thresher.LengthAdaptive(layer_drop=0.5, length_drop=0.3, sandwich=3))
    )
    (stage,) = policy.stages()
    torch.manual_seed(1)
    skipped = set()
    for _ in range(20):
        whole, shortest, *others = policy.draws(stage)
        assert whole.reads.retention == (1.0, 1.0, 1.0)
        assert (whole.label_weight, whole.distil_weight) == (0.2, 0.0)
        assert shortest.reads.retention == pytest.approx((0.7, 0.49, 0.343))
        assert not shortest.reads.skip
        assert len(others) == 3
        for draw in (shortest, *others):
            assert draw.from_first
            assert (draw.label_weight, draw.distil_weight) == (0.0, 0.2)
        for draw in others:
            curve = (1.0, *draw.reads.retention)
            for layer, (before, after) in enumerate(pairwise(curve), start=1):
                assert after == before if layer in draw.reads.skip else 0.7 * before <= after <= before
            skipped |= draw.reads.skip
    assert skipped == {1, 2, 3}


def test_a_step_of_the_sandwich_learns_in_place() -> None:
    inputs, labels = batch("bert"), torch.tensor([0, 1, 2, 0])
    model = thresher.attach(make("bert"), thresher.LengthAdaptive(sandwich=0))
    (stage,) = policy_of(model).stages()
    out = Learner(model, stage, stock_copy(make("bert", seed=1)))(**inputs, labels=labels)
    with thresher.keep_everything():
        whole = model(**inputs, labels=labels)
    with thresher.retaining((0.8, 0.64, 0.512)):
        short = model(**inputs)
    expected = (whole.loss + distillation_loss(short, whole)) / 2
    assert float(out["loss"].detach()) == pytest.approx(float(expected), rel=1e-5)
    reverse = (whole.loss + distillation_loss(whole, short)) / 2
    thresher.attach(model, thresher.LengthAdaptive(sandwich=0, reverse_kl=True))
    other = Learner(model, stage, stock_copy(make("bert", seed=1)))(**inputs, labels=labels)
    assert float(other["loss"].detach()) == pytest.approx(float(reverse), rel=1e-5)
    assert float(reverse) != pytest.approx(float(expected), rel=5e-5)


@pytest.mark.parametrize(
    "settings", [{"length_drop": 1.0}, {"layer_drop": -0.1}, {"sandwich": -1}, {"retention": (0.3, 0.5)}], ids=str
)
def test_length_adaptive_refuses_what_it_cannot_draw(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        thresher.LengthAdaptive(**settings)


# Once for all.


def test_a_stage_draws_among_its_configurations() -> None:
    policy = policy_of(thresher.attach(make("bert"), "ase"))
    found = ((0.9, 0.8, 0.7), (0.5, 0.4, 0.3))
    stage = Stage(name="x", mode="hard", configurations=found, label_weight=0.5, distil_weight=2.0)
    draws = [policy.draws(stage) for _ in range(30)]
    assert all(len(draw) == 1 for draw in draws)
    assert {draw[0].reads.retention for draw in draws} == set(found)
    assert {(draw[0].label_weight, draw[0].distil_weight) for draw in draws} == {(0.5, 2.0)}


def test_a_step_learns_under_the_configuration_it_drew() -> None:
    inputs, labels = batch("bert"), torch.tensor([0, 1, 2, 0])
    model = thresher.attach(make("bert"), "ase")
    stage = Stage(name="x", mode="hard", configurations=((0.6, 0.4, 0.2),), distil_weight=1.0)
    teacher = stock_copy(make("bert", seed=1))
    out = Learner(model, stage, teacher)(**inputs, labels=labels)
    with thresher.retaining((0.6, 0.4, 0.2)):
        said = model(**inputs, labels=labels)
    assert float(out["loss"].detach()) == pytest.approx(
        float(said.loss + distillation_loss(said, teacher(**inputs))), rel=1e-5
    )


# PoWER-BERT.


def test_power_bert_keeps_everything_until_it_has_learned() -> None:
    inputs = batch("bert")
    model = make("bert")
    stock = outputs_of(model, inputs)
    outputs, trace = traced(thresher.attach(model, "power-bert"), inputs)
    assert worst(stock, outputs) <= 1e-5
    assert not (trace.dropped_at() > 0).any()


@pytest.mark.parametrize("absolute", [False, True])
def test_soft_extraction_weighs_tokens_by_rank(absolute: bool) -> None:
    slots = 6
    model = make("bert", "base", layers=1)
    inputs = batch("bert", (9,), seed=2)
    thresher.attach(model, thresher.PowerBert(slots=slots, absolute=absolute))
    policy = policy_of(model)
    policy.retain.data.copy_(torch.tensor([[1.0, 0.9, 0.7, 0.4, 0.2, 0.1]]))
    policy.mode = "soft"
    got = outputs_of(model, inputs)["last_hidden_state"]
    plain = make("bert", "base", layers=1)
    with torch.no_grad():
        state = plain.embeddings(input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"])
        layer = plain.encoder.layer[0]
        own = layer.attention.self
        n, heads, size = 9, own.num_attention_heads, own.attention_head_size
        q, k = (part(state)[0].view(n, heads, size).transpose(0, 1) for part in (own.query, own.key))
        a = (q @ k.transpose(1, 2) / size**0.5).softmax(-1)
        received = [sum(float(a[h, i, j]) for h in range(heads) for i in range(n) if i != j) for j in range(n)]
        order = sorted(range(n), key=lambda j: (j != 0, -received[j], j))
        attended = layer.attention(state)[0][0].clone()
        for rank, j in enumerate(order):
            slot = min(rank, slots - 1) if absolute else rank * slots // n
            if j != 0:
                attended[j] *= [1.0, 0.9, 0.7, 0.4, 0.2, 0.1][slot]
        expected = layer.output(layer.intermediate(attended), attended)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_penalty_weighs_deep_layers_more_and_training_pulls_down() -> None:
    model = thresher.attach(make("bert"), thresher.PowerBert(slots=8, penalty=0.5))
    policy, inputs = policy_of(model), batch("bert")
    policy.mode = "soft"
    with thresher.tracing() as traces:
        loss = model(**inputs, labels=torch.tensor([0, 1, 2, 0])).loss
    auxiliary = policy.auxiliary_loss(traces[0], {})
    assert float(auxiliary) == pytest.approx(0.5 * 8 * (1 + 2 + 3))
    (loss + auxiliary).backward()
    assert policy.retain.grad.abs().sum() > 0
    assert float(policy.retain.grad[2].mean()) > float(policy.retain.grad[0].mean())
    with torch.no_grad():
        policy.retain += torch.tensor([[2.0], [-3.0], [-0.25]])
    policy.after_step()
    assert policy.retain.min() == 0.0
    assert policy.retain.max() == 1.0
    policy.mode = "hard"
    assert policy.auxiliary_loss(traces[0], {}) is None


@pytest.mark.parametrize("absolute", [False, True])
def test_the_sums_become_a_configuration_that_never_rises(absolute: bool) -> None:
    model = thresher.attach(make("bert", "token"), thresher.PowerBert(slots=10, absolute=absolute))
    policy, inputs = policy_of(model), batch("bert", (20, 8))
    policy.retain.data.copy_(torch.tensor([[0.71], [0.9], [0.02]]).expand(3, 10))
    policy.after_step()
    _, trace = traced(model, inputs)
    fed = [fed for _, fed in trace.reads]
    assert fed == ([[7, 7], [7, 7], [1, 1]] if absolute else [[14, 6], [14, 6], [2, 1]])
    again = copy.deepcopy(model)
    assert [f for _, f in traced(again, inputs)[1].reads] == fed
    with thresher.simulated_drops():
        _, simulated = traced(model, inputs)
    assert simulated.reads == trace.reads


def test_what_power_bert_learned_is_saved(tmp_path: Any) -> None:
    model = thresher.attach(make("bert"), thresher.PowerBert(slots=10))
    policy_of(model).retain.data.mul_(0.4)
    thresher.save(model, tmp_path / "model")
    loaded = thresher.load(tmp_path / "model")
    assert traced(loaded, batch("bert"))[1].reads == traced(model, batch("bert"))[1].reads
    assert policy_of(loaded).curve() == pytest.approx((0.4,) * 3)


@pytest.mark.parametrize("settings", [{"slots": 0}, {"penalty": -1.0}], ids=str)
def test_power_bert_refuses_what_it_cannot_learn(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        thresher.PowerBert(**settings)


def test_one_logit_of_a_probability_learns_by_cross_entropy_and_from_both_outcomes() -> None:
    inputs, labels = batch("bert"), torch.tensor([1.0, 0.0, 1.0, 0.0])
    model, teacher = (
        transformers.BertForSequenceClassification(
            config_of("bert", num_labels=1, problem_type="multi_label_classification")
        ).eval()
        for _ in range(2)
    )
    stage = Stage(name="x", mode="hard", distil_weight=1.0)
    out = Learner(thresher.attach(model, "ase"), stage, teacher)(**inputs, labels=labels)
    p, q = (torch.sigmoid(m(**inputs).logits[:, 0]).tolist() for m in (teacher, model))
    learned = -sum(math.log(b if y else 1 - b) for b, y in zip(q, labels.tolist(), strict=True)) / 4
    distance = sum(a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in zip(p, q, strict=True)) / 4
    assert float(out["loss"].detach()) == pytest.approx(learned + distance, rel=1e-4)


@pytest.mark.parametrize(
    ("make_settings", "says"),
    [
        (lambda: thresher.TRBert(points="2"), "points must be a list of whole numbers or none, not '2'"),
        (lambda: thresher.TRBert(points=2), "points must be a list of whole numbers or none, not 2"),
        (lambda: thresher.TRBert(points=(2.5,)), "points must be a list of whole numbers"),
        (lambda: thresher.TRBert(points=(2, None)), "points must be a list of whole numbers"),
        (lambda: thresher.AttentionMass(retention=("a", 0.5)), "retention must be a list of numbers or none"),
        (lambda: thresher.AdapLeR(protect_segments="0"), "protect_segments must be a list of whole numbers"),
        (lambda: thresher.AdapLeR(protect_ids=5), "protect_ids must be a list of whole numbers"),
        (lambda: thresher.AdapLeR(strength=10**400), "strength must be a number"),
        (lambda: thresher.TRBert(bias=1e39), "bias must be a number"),
        (lambda: thresher.AdapLeR(width=2**70), "width must be a whole number"),
    ],
)
def test_settings_of_another_kind_are_refused(make_settings: Any, says: str) -> None:
    with pytest.raises(OptionError, match=re.escape(says)):
        make_settings()


def test_numpys_numbers_are_settings_like_any_other() -> None:
    made = thresher.TRBert(points=[np.int64(2), 3.0], penalty=np.float32(0.25), samples=np.int32(4))
    assert made == thresher.TRBert(points=(2, 3), penalty=0.25, samples=4)
    assert json.loads(json.dumps(made.to_dict()))["points"] == [2, 3]
    assert type(made)(**{**made.to_dict()}) == made
