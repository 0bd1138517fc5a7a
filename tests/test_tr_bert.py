"""TR-BERT against loops: decisions and their probabilities, reward and baseline, the guide, and what is learned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import thresher
from helpers import CLS, FIRST_WORD, SEP, alone, batch, build, config_of, make, outputs_of, worst
from thresher.errors import OptionError
from thresher.measure.flops import speedup
from thresher.methods.tr_bert import BACK, KEPT, LOG_PROBABILITY, TRBertPolicy, best
from thresher.model import policy_of
from thresher.policy import Trace
from thresher.training.learner import Learner
from thresher.training.row_losses import row_losses

CLOSE = 1e-4
HEADS = ["sequence", "token", "question-answering"]


def attached(family: str = "bert", head: str = "sequence", layers: int = 3, **settings: Any) -> Any:
    return thresher.attach(make(family, head, layers), thresher.TRBert(**{"bias": 0.0, **settings}))


def labelled(family: str, head: str, lengths: tuple[int, ...] = (12, 9, 14, 5)) -> dict[str, Tensor]:
    inputs = batch(family, lengths)
    n = inputs["input_ids"].shape[1]
    words = torch.arange(4 * n).view(4, n) % 3
    labels: dict[str, dict[str, Tensor]] = {
        "sequence": {"labels": torch.tensor([0, 1, 2, 0])},
        "token": {"labels": words.masked_fill(inputs["attention_mask"] == 0, -100)},
        "question-answering": {
            "start_positions": torch.tensor([7, 5, 8, 3]),
            "end_positions": torch.tensor([8, 5, n + 3, 4]),
        },
    }
    return {**inputs, **labels[head]}


def stage_of(model: Any, number: int) -> Any:
    """A stage of the attached method, the policy put in its mode."""
    policy = policy_of(model)
    stage = policy.stages()[number]
    policy.mode = stage.mode
    return stage


def passes(model: Any, stage: Any, inputs: dict[str, Tensor]) -> list[tuple[Any, Trace]]:
    """The passes that a step makes, with what was drawn recorded."""
    made = []
    for draw in policy_of(model).draws(stage):
        with thresher.tracing(record=True) as traces, draw.applied():
            outputs = model(**inputs)
        made.append((outputs, traces[-1]))
    return made


def states(model: Any, inputs: dict[str, Tensor], dropped: list[int]) -> tuple[list[Tensor], list[list[int]]]:
    """Of one row what enters each layer and what leaves the last one, and the places that it is of, when tokens drop before
    layers as `dropped` says; through the plain layers of a post-norm BERT."""
    state = model.bert.embeddings(input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"])[0]
    places, entered, of = list(range(len(state))), [], []
    for number, layer in enumerate(model.bert.encoder.layer, start=1):
        entered.append(state)
        of.append(places)
        stays = [i for i, place in enumerate(places) if dropped[place] != number]
        places, state = [places[i] for i in stays], state[stays]
        state = layer(state.unsqueeze(0))
        state = (state[0] if isinstance(state, tuple) else state).reshape(len(places), -1)
    return [*entered, state], [*of, places]


def probability(policy: Any, point: int, state: Tensor) -> float:
    """sigmoid(W2 gelu(W1 h + b1) + b2) of one state."""
    first, _, second = policy.networks[point]
    inner = torch.nn.functional.gelu(first.weight @ state + first.bias)
    return 1 / (1 + math.exp(-float((second.weight[0] @ inner + second.bias[0]).detach())))


@pytest.mark.parametrize(
    ("layers", "points", "back"),
    [(12, (2, 7), 9), (6, (2, 4), 5), (4, (2, 3), 3), (3, (2, 3), 3), (2, (2,), 2), (1, (1,), 1)],
)
def test_the_places_in_models_of_all_depths(layers: int, points: tuple[int, ...], back: int) -> None:
    assert thresher.TRBert().places(layers) == (points, back)
    policy = policy_of(attached(layers=layers))
    assert policy.points == points
    assert len(policy.networks) == len(points)


def test_it_starts_by_keeping() -> None:
    policy = policy_of(thresher.attach(make("bert"), "tr-bert"))
    first, act, last = policy.networks[0]
    assert (first.out_features, type(act).__name__, last.out_features) == (32, "GELU", 1)
    assert last.bias.tolist() == [2.0]


@pytest.mark.parametrize("strength", [0.9, 1.0, 1.1])
def test_a_replay_decides_the_same(strength: float) -> None:
    torch.manual_seed(2)  # of networks that drop some tokens at both points
    inputs = batch("bert", (17,), seed=3)
    model, plain = attached(head="token", layers=4, strength=strength), make("bert", "token", layers=4)
    dropped, final = [0] * 17, {}
    odds = strength**4
    with torch.no_grad():
        for network in policy_of(model).networks:
            network[-1].weight *= 3  # away from even odds
        for point, layer in enumerate((2, 3)):
            entered, places = states(plain, inputs, dropped)
            for place, state in zip(places[layer - 1], entered[layer - 1], strict=True):
                p = probability(policy_of(model), point, state)
                if place and p / (1 - p) < odds:
                    dropped[place], final[place] = layer, state
        entered, places = states(plain, inputs, dropped)
        final |= dict(zip(places[-1], entered[-1], strict=True))
        expected = plain.classifier(torch.stack([final[i] for i in range(17)]))
    assert {0, 2, 3} == set(dropped)
    with thresher.tracing(record=True) as traces:
        outputs = outputs_of(model, inputs)
    assert traces[0].dropped_at()[0].tolist() == dropped
    torch.testing.assert_close(outputs["logits"], expected, rtol=0, atol=CLOSE)


def test_a_trace_holds_the_log_probability_of_what_was_drawn_and_the_share_kept() -> None:
    inputs = batch("bert", (9, 1, 14, 5), width=16)
    model, plain = attached(layers=4, imitation=0.0, samples=3), make("bert", layers=4)
    policy = policy_of(model)
    stage = stage_of(model, 0)
    made = passes(model, stage, inputs)
    assert len(made) == 3
    seen = set()
    for _, trace in made:
        dropped = trace.dropped_at()
        seen.add(tuple(dropped.flatten().tolist()))
        assert (dropped[:, 0] == 0).all()
        logs = torch.stack(trace.auxiliary[LOG_PROBABILITY]).sum(0)
        kept = torch.stack(trace.auxiliary[KEPT]).mean(0)
        for row, n in enumerate((9, 1, 14, 5)):
            where = dropped[row][:n].tolist()
            entered, places = states(plain, alone(inputs, row), where)
            expected, shares = 0.0, []
            for point, layer in enumerate((2, 3)):
                for place, state in zip(places[layer - 1], entered[layer - 1], strict=True):
                    p = probability(policy, point, state)
                    if place:
                        expected += math.log(1 - p if where[place] == layer else p)
                shares.append(sum(d == 0 or d > layer for d in where) / n)
            assert float(logs[row].detach()) == pytest.approx(expected, abs=1e-3)
            assert float(kept[row]) == pytest.approx(sum(shares) / 2)
    assert len(seen) == 3


def test_draws_are_the_networks_probabilities() -> None:
    model = attached(layers=2, imitation=0.0, samples=150)
    inputs = batch("bert", (6,))
    stage = stage_of(model, 0)
    with torch.no_grad():
        entered, _ = states(make("bert", layers=2), inputs, [0] * 6)
        expected = [probability(policy_of(model), 0, state) for state in entered[1]]
    kept = torch.stack([trace.dropped_at()[0] == 0 for _, trace in passes(model, stage, inputs)]).float().mean(0)
    assert kept[0] == 1
    for got, p in zip(kept[1:].tolist(), expected[1:], strict=True):
        assert got == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 150))


@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 99))
def test_the_loss_is_reinforce_with_the_mean_as_baseline(samples: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy = policy_of(_MODEL)
    policy.mode = "soft"
    draw = lambda: torch.rand(rows, generator=generator)  # noqa: E731
    logs = [[(-draw()).requires_grad_() for _ in range(2)] for _ in range(samples)]
    kept, losses = [[draw(), draw()] for _ in range(samples)], [draw() for _ in range(samples)]
    traces = [Trace(auxiliary={LOG_PROBABILITY: log, KEPT: k}) for log, k in zip(logs, kept, strict=True)]
    loss = policy.step_loss(traces, losses, {})
    expected = 0.0
    for row in range(rows):
        rewards = [
            -float(losses[k][row]) - 0.7 * (float(kept[k][0][row]) + float(kept[k][1][row])) / 2 for k in range(samples)
        ]
        baseline = sum(rewards) / samples
        for k in range(samples):
            expected -= (rewards[k] - baseline) * float((logs[k][0][row] + logs[k][1][row]).detach())
    assert float(loss.detach()) == pytest.approx(expected / (samples * rows), abs=1e-5)
    pulls = torch.autograd.grad(loss, [log[0] for log in logs])
    assert float(torch.stack(pulls).sum(0).abs().max()) == pytest.approx(0.0, abs=1e-6)  # advantages sum to nothing


_MODEL = attached(penalty=0.7)


def test_the_guide_and_its_imitation_by_loops() -> None:
    """Before layers 2 and 4 of 6, looking back after 5: |<dloss / dh_5, h_5 - h_l>|, in the plain model."""
    labels = {"labels": torch.tensor([2, 0, 1])}
    inputs = batch("bert", (11, 7, 1), seed=2)
    model, plain = attached(layers=6, imitation=1.0), make("bert", layers=6)
    policy, expected, decisions = policy_of(model), 0.0, 0
    for row in range(3):
        one = alone(inputs, row)
        output = plain(**one, output_hidden_states=True)
        hidden = output.hidden_states  # the embeddings, then what each layer gave
        loss = torch.nn.functional.cross_entropy(output.logits, labels["labels"][row : row + 1])
        (pull,) = torch.autograd.grad(loss, hidden[5])
        left = list(range(1, hidden[0].shape[1]))
        for point, layer in enumerate((2, 4)):
            before = hidden[layer - 1][0].detach()
            score = {i: abs(float(pull[0, i] @ (hidden[5][0, i].detach() - before[i]))) for i in left}
            p = {i: probability(policy, point, before[i]) for i in left}
            chosen = sorted(left, key=lambda i: -score[i])[: round(sum(p.values()))]
            expected -= sum(math.log(p[i] if i in chosen else 1 - p[i]) for i in left)
            decisions += len(left)
            left = sorted(chosen)
    learner = Learner(model, stage_of(model, 0)).train()
    loss = learner(**inputs, **labels)["loss"]
    assert float(loss.detach()) == pytest.approx(expected / decisions, rel=1e-3)
    assert 8 < decisions < 32


@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(0, 99))
def test_the_best_of_each_row(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([row for row, n in enumerate(lengths) for _ in range(n)], dtype=torch.int64)
    score = torch.rand(len(rows), generator=generator)
    among = torch.rand(len(rows), generator=generator) > 0.3
    count = torch.randint(0, 5, (len(lengths),), generator=generator)
    got = best(score, among, rows, count)
    for row in range(len(lengths)):
        there = [i for i in range(len(rows)) if rows[i] == row and among[i]]
        expected = set(sorted(there, key=lambda i: -float(score[i]))[: int(count[row])])
        assert {i for i in range(len(rows)) if rows[i] == row and got[i]} == expected


@pytest.mark.parametrize("imitation", [0.0, 1.0])
@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet"])
@pytest.mark.parametrize("head", HEADS)
def test_the_first_stage_moves_the_networks_alone(head: str, family: str, imitation: float) -> None:
    inputs = labelled(family, head)
    model = attached(family, head, imitation=imitation)
    learner = Learner(model, stage_of(model, 0)).train()
    learner(**inputs)["loss"].backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    for network in policy_of(model).networks:
        for parameter in network.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
        assert network[-1].weight.grad.abs().sum() > 0


def test_a_step_of_the_guide_drops_nothing_and_half_of_the_steps_are_such() -> None:
    model = attached()
    stage = stage_of(model, 0)
    policy = policy_of(model)
    kinds = [len(policy.draws(stage)) for _ in range(200)]
    assert set(kinds) == {1, 8}
    assert 70 <= kinds.count(1) <= 130
    ((outputs, trace),) = passes(attached_whole := attached(imitation=1.0), stage_of(attached_whole, 0), batch("bert"))
    assert not (trace.dropped_at() > 0).any()
    assert BACK in trace.auxiliary
    with torch.no_grad():
        torch.testing.assert_close(outputs.logits, make("bert")(**batch("bert")).logits, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("head", HEADS)
def test_in_the_joint_stage_the_model_learns_from_the_first_draw_only(head: str) -> None:
    inputs = labelled("bert", head)
    model = attached(head=head, samples=3)
    stage = stage_of(model, 1)
    torch.manual_seed(5)
    learner = Learner(model, stage, make("bert", head, seed=1)).train()
    learner(**inputs)["loss"].backward()
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    again = attached(head=head, samples=3)
    policy_of(again).load_state_dict(policy_of(model).state_dict())
    stage_of(again, 1)
    first = policy_of(again).draws(stage)[0]
    torch.manual_seed(5)
    with first.applied():
        alone_ = Learner(again, stage, make("bert", head, seed=1)).train()
        outputs = again(**inputs)
    alone_._loss(first, outputs, outputs, dict(inputs)).backward()
    theirs = {name: p.grad for name, p in again.named_parameters() if p.grad is not None}
    assert set(mine) == set(theirs)
    for name, pull in theirs.items():
        torch.testing.assert_close(mine[name], pull)
    assert all(n[-1].weight.grad.abs().sum() > 0 for n in policy_of(model).networks)


@pytest.mark.parametrize("head", HEADS)
def test_losses_of_rows_have_the_models_own_loss_as_their_mean(head: str) -> None:
    model = make("bert", head)
    inputs = labelled("bert", head)
    with torch.no_grad():
        outputs, losses = model(**inputs), []
        for row in range(4):
            real = int(inputs["attention_mask"][row].sum())
            one = {k: v[row : row + 1, :real] if v.dim() > 1 else v[row : row + 1] for k, v in inputs.items()}
            if head != "question-answering":
                losses.append(float(model(**one).loss))
    found = row_losses(outputs, inputs)
    if losses:
        assert found.tolist() == pytest.approx(losses, abs=1e-5)
    else:  # its mean is over the rows that have the end, of which the third has none
        starts = torch.nn.functional.cross_entropy(outputs.start_logits, inputs["start_positions"], reduction="none")
        inside = torch.tensor([0, 1, 3])
        ends = torch.nn.functional.cross_entropy(
            outputs.end_logits[inside], inputs["end_positions"][inside], reduction="none"
        )
        assert found[inside].tolist() == pytest.approx(((starts[inside] + ends) / 2).tolist())
        assert float(found[2]) == pytest.approx(float(starts[2]) / 2)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_losses_of_rows_of_one_value(kind: str) -> None:
    model = build(config_of("bert", num_labels=1, problem_type=kind))
    inputs, labels = batch("bert"), torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    with torch.no_grad():
        outputs = model(**inputs, labels=labels)
    found = row_losses(outputs, {"labels": labels.flatten()}, sigmoid=kind != "regression")
    assert found.shape == (4,)
    assert float(found.mean()) == pytest.approx(float(outputs.loss), abs=1e-6)


def test_a_stage_without_labels_is_refused() -> None:
    model = attached(imitation=0.0)
    with pytest.raises(OptionError, match="labels"):
        Learner(model, stage_of(model, 0))(**batch("bert"))


def test_outside_of_a_step_nothing_is_drawn() -> None:
    inputs = batch("bert")
    model = attached()
    hard = outputs_of(model, inputs)
    policy_of(model).mode = "soft"
    model.train()
    assert worst(hard, outputs_of(model, inputs)) <= 1e-6


def test_a_policy_keeps_nothing_of_a_step() -> None:
    model = attached(imitation=0.0)
    learner = Learner(model, stage_of(model, 0)).train()
    policy: TRBertPolicy = policy_of(model)  # type: ignore[assignment]
    before = set(policy.__dict__)
    learner(**labelled("bert", "sequence"))["loss"].backward()
    assert set(policy.__dict__) == before
    assert not any(isinstance(value, Tensor | Trace) for value in policy.__dict__.values())


def test_the_work_is_over_the_tokens_that_come_to_a_point() -> None:
    policy = policy_of(attached(layers=4))
    d = policy.geometry.hidden
    assert [policy.overhead_flops(layer, 3, 10) for layer in (1, 2, 3, 4)] == [0, *[10 * (64 * d + 64)] * 2, 0]
    assert policy.overhead_flops(2, 3) == 3 * (64 * d + 64)
    assert policy_of(attached(strength=0.0)).overhead_flops(2, 3, 10) == 0


def test_an_export_counts_as_the_engine_does(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    model = attached(layers=4)
    thresher.export(model, tmp_path)
    inputs = batch("bert", (20, 9, 33))
    rows = [
        {name: alone(inputs, row)[name][0].tolist() for name in ("input_ids", "token_type_ids")} for row in range(3)
    ]
    with thresher.tracing(record=True) as traces:
        outputs_of(model, inputs)
    runner = thresher.Runner(tmp_path, workers=1)
    expected = speedup(traces, policy_of(model).geometry, policy_of(model))
    assert runner.speedup(runner.run(rows)) == pytest.approx(expected)
    assert expected > 1.05


def telling(count: int, seed: int) -> dict[str, Tensor]:
    """Rows of ten words, one of which, anywhere, tells the class; the others are of no use."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_WORD + 10, 40, (count, 12), generator=generator)
    ids[:, 0], ids[:, -1] = CLS, SEP
    labels = torch.randint(0, 3, (count,), generator=generator)
    place = torch.randint(1, 11, (count,), generator=generator)
    ids[torch.arange(count), place] = FIRST_WORD + labels
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.slow
def test_it_learns_to_keep_the_token_that_tells() -> None:
    torch.manual_seed(0)
    model = build(config_of("bert", 2, initializer_range=0.1)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(120):
        optimizer.zero_grad()
        model(**telling(32, step)).loss.backward()
        optimizer.step()
    thresher.attach(
        model, thresher.TRBert(points=(1,), penalty=1.0, bias=1.0, samples=4)
    )  # later [CLS] has read it already
    policy = policy_of(model)
    for number, steps in ((0, 80), (1, 10)):
        stage = stage_of(model, number)
        learner = Learner(model, stage).train()
        groups = [(policy, 1e-2), (model, 1e-3 if number else 0.0)]
        optimizer = torch.optim.Adam([{"params": list(of.parameters()), "lr": rate} for of, rate in groups])
        for step in range(steps):
            optimizer.zero_grad()
            learner(**telling(16, 1000 * number + 500 + step))["loss"].backward()
            optimizer.step()
    policy.mode = "hard"
    model.eval()
    test = telling(200, 9999)
    labels = test.pop("labels")
    with torch.no_grad(), thresher.tracing(record=True) as traces:
        right = (model(**test).logits.argmax(1) == labels).float().mean()
    kept = traces[0].dropped_at() == 0
    tells = (test["input_ids"] >= FIRST_WORD) & (test["input_ids"] < FIRST_WORD + 3)
    assert float(right) > 0.95
    assert float(kept[tells].float().mean()) > 0.6  # one of three classes can be told by its absence
    assert float(kept[~tells].float().mean()) < 0.3  # [CLS] is a twelfth
    assert speedup(traces, policy.geometry, policy) > 1.2


@pytest.mark.parametrize(
    "settings",
    [
        {"points": ()},
        {"points": (3, 2)},
        {"points": (0, 2)},
        {"points": (2, 2)},
        {"penalty": -1.0},
        {"penalty": math.inf},
        {"samples": 1},
        {"imitation": 1.5},
        {"bias": math.nan},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        thresher.TRBert(**settings)


@pytest.mark.parametrize("settings", [{"points": (2, 4)}, {"back": 1}, {"back": 4}], ids=str)
def test_layers_that_a_model_does_not_have_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        attached(**settings)
