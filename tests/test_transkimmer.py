"""Transkimmer against loops: who is skimmed, that it is no key, what it leaves behind, and what the predictors learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import thresher
from helpers import LENGTHS, alone, batch, make, outputs_of, worst
from thresher.attention import attend
from thresher.errors import OptionError
from thresher.measure.flops import speedup
from thresher.methods.transkimmer import ENTERED, KEPT, skim_predictor
from thresher.model import policy_of
from thresher.packed import PackedTokens
from thresher.policy import Trace
from thresher.training.learner import Learner

CLOSE = 1e-4
FAMILIES = ["bert", "roberta", "modernbert", "distilbert", "albert", "mpnet"]


def attached(family: str = "bert", head: str = "token", **settings: Any) -> Any:
    return thresher.attach(make(family, head), thresher.Transkimmer(**{"bias": 0.0, **settings}))


def traced(model: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Trace]:
    with thresher.tracing(record=True) as traces:
        outputs = outputs_of(model, inputs)
    return outputs, traces[-1]


def test_the_predictor_starts_by_keeping() -> None:
    predictor = skim_predictor(6, 5.0)
    kinds = [type(module).__name__ for module in predictor]
    assert kinds == ["LayerNorm", "Linear", "LayerNorm", "GELU", "Linear"]
    assert predictor[-1].bias.tolist() == [-5.0, 5.0]
    inputs = batch("bert")
    model = make("bert", "token")
    stock = outputs_of(model, inputs)
    outputs, trace = traced(thresher.attach(model, "transkimmer"), inputs)
    assert worst(stock, outputs) <= 1e-5
    assert not (trace.dropped_at() > 0).any()


@pytest.mark.parametrize("strength", [0.9, 1.0, 1.1])
def test_a_replay_layer_by_layer(strength: float) -> None:
    """Before each layer the larger logit decides; a skimmed token is gone, and its vector is what it entered with."""
    inputs = batch("bert", (17,), seed=3)
    model = make("bert", "token", layers=3)
    policy = policy_of(thresher.attach(model, thresher.Transkimmer(bias=0.0, strength=strength)))
    plain = make("bert", "token", layers=3)
    final, dropped = {}, [0] * 17
    with torch.no_grad():
        state = plain.bert.embeddings(input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"])[0]
        places = list(range(17))
        for number, layer in enumerate(plain.bert.encoder.layer, start=1):
            stays = []
            for at, place in enumerate(places):
                skim, keep = policy.predictors[number - 1](state[at]).tolist()
                if place == 0 or keep - skim >= 4 * math.log(strength):
                    stays.append(at)
                else:
                    final[place], dropped[place] = state[at], number
            places, state = [places[at] for at in stays], state[stays]
            state = layer(state.unsqueeze(0))
            state = (state[0] if isinstance(state, tuple) else state).squeeze(0)
        final |= dict(zip(places, state, strict=True))
        expected = plain.classifier(torch.stack([final[i] for i in range(17)]))
    outputs, trace = traced(model, inputs)
    assert 0 < sum(d > 0 for d in dropped) < 17
    assert trace.dropped_at()[0].tolist() == dropped
    torch.testing.assert_close(outputs["logits"], expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("head", ["sequence", "token", "question-answering", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hiding_softly_without_noise_is_dropping(family: str, head: str) -> None:
    """Eval mode: the mask that learns hides the same tokens, and nobody's answer differs from that of a real drop."""
    inputs = batch(family)
    model = attached(family, head)
    hard, trace = traced(model, inputs)
    policy_of(model).mode = "soft"
    soft, soft_trace = traced(model, inputs)
    assert (trace.dropped_at() > 0).any()
    assert torch.equal(trace.dropped_at(), soft_trace.dropped_at())
    assert worst(hard, soft) <= CLOSE
    assert ENTERED not in soft_trace.auxiliary


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(0, 9))
def test_a_hidden_token_is_no_key_and_a_kept_ones_weight_has_a_gradient(lengths: list[int], seed: int) -> None:
    """A_ij = m_j exp(l_ij) / sum_k m_k exp(l_ik), differentiated for tokens that are keys, by loops."""
    generator = torch.Generator().manual_seed(seed)
    width, total = max(lengths), sum(lengths)
    mask = torch.tensor([[int(i < n) for i in range(width)] for n in lengths])
    tokens = PackedTokens.pack(torch.zeros(len(lengths), width, 1), mask)
    q, k, v = (torch.randn(2, total, 4, generator=generator) for _ in range(3))
    kept = (torch.rand(total, generator=generator) > 0.4) | tokens.layout.protected
    m = kept.float().requires_grad_()
    weight = torch.where(kept, m - 1.0, -math.inf)
    context, _ = attend(q, k, v, PackedTokens(tokens.hidden, tokens.layout, log_weight=weight))
    pull = torch.randn(context.shape, generator=generator)
    (context * pull).sum().backward()
    mine, m_again, at = m.grad, kept.float().requires_grad_(), 0
    assert mine is not None
    value = torch.zeros(())
    for n in lengths:
        for i in range(at, at + n):
            for h in range(2):
                parts = [m_again[j] * torch.exp(q[h, i] @ k[h, j] / 2) for j in range(at, at + n)]
                out = sum(p * v[h, j] for p, j in zip(parts, range(at, at + n), strict=True)) / sum(parts)
                torch.testing.assert_close(context[i, h], out, rtol=1e-4, atol=1e-5)
                value = value + (out * pull[i, h]).sum()
        at += n
    value.backward()
    assert m_again.grad is not None
    torch.testing.assert_close(mine[kept], m_again.grad[kept], rtol=1e-3, atol=1e-4)
    assert (mine[~kept] == 0).all()


def test_the_loss_is_the_mean_kept_fraction_and_padding_is_not_counted() -> None:
    inputs = batch("bert", width=25)
    model = attached(penalty=0.7).train()
    policy = policy_of(model)
    policy.mode = "soft"
    torch.manual_seed(3)
    with thresher.tracing(record=True) as traces:
        model(**inputs)
    dropped, total = traces[0].dropped_at(), sum(LENGTHS)
    fractions = [sum(int(d == 0 or d > layer) for d in dropped[dropped >= 0].tolist()) / total for layer in (1, 2, 3)]
    assert [float(kept.detach()) for kept in traces[0].auxiliary[KEPT]] == pytest.approx(fractions)
    assert fractions[-1] < 1
    loss = policy.auxiliary_loss(traces[0], {})
    assert float(loss.detach()) == pytest.approx(0.7 * sum(fractions) / 3)
    pulls = torch.autograd.grad(loss, [p[-1].bias for p in policy.predictors])
    assert all(pull[0] < 0 < pull[1] for pull in pulls)  # down the loss is: skim more
    policy.mode = "hard"
    assert policy.auxiliary_loss(traces[0], {}) is None


def test_draws_are_random_in_training_only() -> None:
    inputs = batch("bert", (30,))
    model = attached()
    policy_of(model).mode = "soft"
    model.train()
    drawn = []
    for seed in range(6):
        torch.manual_seed(seed)
        drawn.append(traced(model, inputs)[1].dropped_at()[0].tolist())
    assert len({tuple(d) for d in drawn}) > 1
    assert all(d[0] == 0 for d in drawn)
    model.eval()
    assert traced(model, inputs)[1].dropped_at().equal(traced(model, inputs)[1].dropped_at())


@pytest.mark.parametrize("head", ["sequence", "token", "question-answering"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_predictor_learns_from_the_task(family: str, head: str) -> None:
    inputs = batch(family, (12, 9, 14, 5))
    model = attached(family, head).train()
    policy = policy_of(model)
    policy.mode = "soft"
    n = inputs["input_ids"].shape[1]
    labels: dict[str, Any] = {
        "sequence": {"labels": torch.tensor([0, 1, 2, 0])},
        "token": {"labels": torch.ones(4, n, dtype=torch.long)},
        "question-answering": {
            "start_positions": torch.tensor([7, 5, 8, 3]),
            "end_positions": torch.tensor([8, 5, 9, 4]),
        },
    }[head]
    torch.manual_seed(1)
    model(**inputs, **labels).loss.backward()
    for predictor in policy.predictors:
        for parameter in predictor.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
        assert predictor[-1].weight.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_a_tokens_own_vector_teaches_whether_a_layer_is_worth_it() -> None:
    """One layer, and a skimmed token whose own answer is asked for: its mask has a gradient, that of the others none."""
    inputs = batch("bert", (1, 9))
    for seed in range(20):
        model = thresher.attach(make("bert", "token", layers=1), thresher.Transkimmer(bias=0.0)).train()
        policy, masks = policy_of(model), []
        policy.mode = "soft"
        original = policy._draw

        def spied(logits: Tensor, original: Any = original, masks: Any = masks) -> Tensor:
            masks.append(original(logits))
            masks[-1].retain_grad()
            return masks[-1]

        policy._draw = spied
        torch.manual_seed(seed)
        with thresher.tracing(record=True) as traces:
            logits = model(**inputs).logits
        if int(traces[0].dropped_at()[1, 8]) != 1:
            continue
        logits[1, 8].sum().backward()
        pull = masks[0].grad
        assert pull is not None
        assert (pull[:-1] == 0).all()
        assert float(pull[-1].abs()) > 0
        return
    raise AssertionError("no draw skimmed the last token")


def test_learning_to_skim_really_skims() -> None:
    torch.manual_seed(0)
    inputs, labels = batch("bert", (20, 24, 18, 22)), torch.tensor([0, 1, 2, 0])
    model = attached(head="sequence", bias=2.0, penalty=1.0)
    policy = policy_of(model)
    (stage,) = policy.stages()
    policy.mode = stage.mode
    learner = Learner(model, stage).train()
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    before = None
    for _ in range(40):
        optimizer.zero_grad()
        loss = learner(**inputs, labels=labels)["loss"]
        before = float(loss.detach()) if before is None else before
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < before
    policy.mode = "hard"
    model.eval()
    outputs, trace = traced(model, inputs)
    assert speedup([trace], policy.geometry, policy) > 1.2
    for row in range(4):
        single, _ = traced(model, alone(inputs, row))
        assert worst({"logits": outputs["logits"][row : row + 1]}, single) <= CLOSE


def test_the_work_is_over_the_tokens_that_come_to_a_layer() -> None:
    policy = policy_of(attached())
    d = policy.geometry.hidden
    assert policy.overhead_flops(1, 3, 10) == 10 * (2 * d * d + 4 * d)
    assert policy.overhead_flops(1, 3) == 3 * (2 * d * d + 4 * d)
    assert policy_of(attached(strength=0.0)).overhead_flops(1, 3, 10) == 0


def test_an_export_counts_as_the_engine_does(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    model = attached(head="sequence", strength=1.02)
    thresher.export(model, tmp_path)
    inputs = batch("bert", (20, 9, 33))
    rows = [
        {name: alone(inputs, row)[name][0].tolist() for name in ("input_ids", "token_type_ids")} for row in range(3)
    ]
    _, trace = traced(model, inputs)
    runner = thresher.Runner(tmp_path, workers=1)
    expected = speedup([trace], policy_of(model).geometry, policy_of(model))
    assert runner.speedup(runner.run(rows)) == pytest.approx(expected)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"penalty": -1.0}, {"bias": math.inf}], ids=str)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        thresher.Transkimmer(**settings)
