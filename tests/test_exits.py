"""Early exits: three ways to run and one meaning, against the stock model layer by layer; training, saving, refusing."""

from __future__ import annotations

import json
import math
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import leaving
import thresher
from helpers import (
    FAMILIES,
    HIDDEN,
    LENGTHS,
    alone,
    batch,
    build,
    config_of,
    dataset,
    make,
    outputs_of,
    settings,
    tokenizer,
    traced,
    worst,
)
from leaving import LAYERS, ROWS, attached, scattered
from thresher.errors import CheckpointError, DataError, OptionError, TargetError
from thresher.exits import EXIT_CONFIGS, NO_ANSWER, ExitConfig
from thresher.exits.base import TAKE
from thresher.measure.flops import dense_flops, flops, speedup
from thresher.measure.run import run
from thresher.methods import CONFIGS as CONFIGS_OF_METHODS
from thresher.model import attachment_of, exit_of, policy_of
from thresher.policy import PolicyConfig, Stage
from thresher.training import run_stage
from thresher.training.learner import Learner

CLOSE = 1e-4
POLICIES: dict[str, PolicyConfig | None] = {
    "none": None,
    "ltp": thresher.LTP(threshold=0.2),
    "attention-mass": thresher.AttentionMass(),
}
CONFIGS = {name: config for name, config in leaving.CONFIGS.items() if name != "sentee"}  # which has tests of its own
every_exit = pytest.mark.parametrize("name", sorted(CONFIGS))
every_family = pytest.mark.parametrize("family", FAMILIES)
every_policy = pytest.mark.parametrize("policy", sorted(POLICIES))


def row_of(outputs: dict[str, Tensor], row: int, rows: tuple[int, ...] = ROWS) -> dict[str, Tensor]:
    starts = [sum(rows[:i]) for i in range(len(rows) + 1)]
    return {
        name: value[starts[row] : starts[row + 1]] if len(value) == starts[-1] else value[row : row + 1]
        for name, value in outputs.items()
    }


@every_exit
@every_family
@every_policy
def test_simulated_batched_and_alone_are_one(policy: str, family: str, name: str) -> None:
    inputs = batch(family, ROWS)
    model = attached(family, name, POLICIES[policy])
    batched, trace = traced(model, inputs)
    assert min(trace.exited_at) < max(trace.exited_at)
    with thresher.simulated_drops():
        simulated, simulated_trace = traced(model, inputs)
    assert worst(batched, simulated) <= CLOSE
    assert trace.exited_at == simulated_trace.exited_at
    assert trace.reads == simulated_trace.reads
    assert trace.asked == simulated_trace.asked
    assert torch.equal(trace.dropped_at(), simulated_trace.dropped_at())
    for row in (0, 1, 2):
        single, single_trace = traced(model, alone(inputs, row))
        assert worst(row_of(batched, row), single) <= CLOSE
        assert single_trace.exited_at == [trace.exited_at[row]]
    order = [2, 0, 3, 1, 5, 4]
    shuffled, again = traced(model, {k: v[order] for k, v in inputs.items()})
    assert again.exited_at == [trace.exited_at[row] for row in order]
    shuffled_rows = tuple(ROWS[row] for row in order)
    for at, row in enumerate(order):
        assert worst(row_of(batched, row), row_of(shuffled, at, shuffled_rows)) <= CLOSE


@pytest.mark.parametrize("name", ["fastbert", "settled-span"])
@pytest.mark.parametrize("method", sorted(CONFIGS_OF_METHODS))
def test_an_exit_goes_with_every_method(method: str, name: str) -> None:
    inputs = batch("bert", ROWS)
    model = attached("bert", name, settings(CONFIGS_OF_METHODS[method]), layers=3)
    batched, trace = traced(model, inputs)
    with thresher.simulated_drops():
        simulated, simulated_trace = traced(model, inputs)
    assert worst(batched, simulated) <= CLOSE
    assert (trace.exited_at, trace.reads) == (simulated_trace.exited_at, simulated_trace.reads)
    for row in range(len(ROWS)):
        single, single_trace = traced(model, alone(inputs, row))
        assert worst(row_of(batched, row), single) <= CLOSE
        assert single_trace.exited_at == [trace.exited_at[row]]


@every_exit
@every_policy
def test_rows_leave_only_after_the_layers_named(policy: str, name: str) -> None:
    inputs = batch("bert", ROWS)
    model = attached("bert", name, POLICIES[policy])
    thresher.set_exit(model, after=(1, 3))
    batched, trace = traced(model, inputs)
    assert set(trace.exited_at) <= {1, 3, LAYERS}
    assert [any(asked) for asked in trace.asked] == [True, False, any(e > 1 for e in trace.exited_at)]
    with thresher.simulated_drops():
        simulated, simulated_trace = traced(model, inputs)
    assert worst(batched, simulated) <= CLOSE
    assert (trace.exited_at, trace.asked) == (simulated_trace.exited_at, simulated_trace.asked)
    for row in range(len(ROWS)):
        single, single_trace = traced(model, alone(inputs, row))
        assert worst(row_of(batched, row), single) <= CLOSE
        assert single_trace.exited_at == [trace.exited_at[row]]
    geometry, policy_or_none = exit_of(model).geometry, policy_of(model) if policy != "none" else None
    for row, spent in enumerate(flops(trace, geometry, policy_or_none, exit_of(model))):
        asked = sum(layer <= trace.exited_at[row] for layer in (1, 3))
        branches = sum(exit_of(model).overhead_flops(n[row]) for n in trace.asked if n[row])
        assert sum(n[row] > 0 for n in trace.asked) == asked
        assert spent == flops(trace, geometry, policy_or_none, None)[row] + branches


# What every exit says and decides, by its paper's formula, on the stock model's own hidden states.


def linear(layer: nn.Linear, x: list[float]) -> list[float]:
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + b
        for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def tanh(x: list[float]) -> list[float]:
    return [math.tanh(v) for v in x]


def softmax(x: list[float]) -> list[float]:
    top = max(x)
    powers = [math.exp(v - top) for v in x]
    return [p / sum(powers) for p in powers]


def entropy_of(p: list[float]) -> float:
    return -sum(v * math.log(v) for v in p if v > 0)


def fastbert(branch: Any, states: list[list[float]]) -> list[float]:
    """All queries attend, then the first token's result is taken."""
    narrow = [tanh(linear(branch.narrow, state)) for state in states]
    q, k, v = ([linear(part, x) for x in narrow] for part in (branch.query, branch.key, branch.value))
    size = len(q[0]) // 2
    attended = []
    for i in range(len(q)):
        mixed: list[float] = []
        for h in (0, 1):
            span = slice(h * size, (h + 1) * size)
            scores = [sum(a * b for a, b in zip(q[i][span], key[span], strict=True)) / math.sqrt(size) for key in k]
            weights = softmax(scores)
            mixed += [sum(w * value[span][d] for w, value in zip(weights, v, strict=True)) for d in range(size)]
        attended.append(linear(branch.out, mixed))
    return linear(branch.classify, tanh(linear(branch.pool, attended[0])))


def said_by(name: str, branch: Any, states: list[list[float]]) -> list[float]:
    if name == "fastbert":
        return fastbert(branch, states)
    if name == "pabee":
        return linear(branch.classify, states[0])
    return linear(branch.classify, tanh(linear(branch.pool, states[0])))


@pytest.mark.parametrize("after", [None, (1, 3)])
@pytest.mark.parametrize("name", ["fastbert", "deebert", "confidence", "pabee"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_rows_leave_as_the_papers_say(family: str, name: str, after: tuple[int, ...] | None) -> None:
    inputs = batch(family, ROWS)
    model = attached(family, name)
    if after is not None:
        thresher.set_exit(model, after=after)
    exit = exit_of(model)
    got, trace = traced(model, inputs)
    with torch.no_grad(), thresher.stock():
        stock = [model(**alone(inputs, row), output_hidden_states=True) for row in range(len(ROWS))]
    for row, outputs in enumerate(stock):
        wanted, layer_of_exit = outputs.logits[0].tolist(), LAYERS
        last, held = None, 0
        for layer in after or range(1, LAYERS):
            logits = said_by(name, exit.branches[layer - 1], outputs.hidden_states[layer][0].tolist())
            p = softmax(logits)
            if name == "pabee":
                now = p.index(max(p))
                held = held + 1 if now == last else 0
                last, leaves = now, held >= 1
            elif name == "confidence":
                leaves = max(p) >= exit.config.threshold
            else:
                leaves = entropy_of(p) / (math.log(3) if name == "fastbert" else 1) <= exit.config.threshold
            if leaves:
                wanted, layer_of_exit = logits, layer
                break
        assert trace.exited_at[row] == layer_of_exit
        torch.testing.assert_close(got["logits"][row], torch.tensor(wanted), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("patience", [1, 2])
def test_a_span_leaves_when_it_has_settled(patience: int) -> None:
    inputs = batch("bert", ROWS)
    model = attached("bert", "settled-span", layers=5, config=thresher.SettledSpan(patience=patience))
    with torch.no_grad():
        for branch in exit_of(model).branches:  # alike, so that answers settle
            branch.load_state_dict(exit_of(model).branches[0].state_dict())
    with torch.no_grad():
        got = model(**inputs)
    with thresher.tracing() as traces:
        outputs_of(model, inputs)
    with torch.no_grad(), thresher.stock():
        stock = [model(**alone(inputs, row), output_hidden_states=True) for row in range(len(ROWS))]
    seen = set()
    for row, outputs in enumerate(stock):
        wanted, answers = (outputs.start_logits[0], outputs.end_logits[0]), []
        for layer in range(1, 5):
            with torch.no_grad():
                logits = exit_of(model).branches[layer - 1].point(outputs.hidden_states[layer][0])
            answers.append(tuple(logits.argmax(0).tolist()))
            if len(answers) > patience and len(set(answers[-patience - 1 :])) == 1:
                wanted = logits.unbind(1)
                break
        else:
            layer = 5
        assert traces[0].exited_at[row] == layer
        seen.add(layer)
        for mine, theirs in zip((got.start_logits, got.end_logits), wanted, strict=True):
            torch.testing.assert_close(mine[row, : ROWS[row]], theirs, rtol=0, atol=CLOSE)
            assert layer == 5 or (mine[row, ROWS[row] :] == NO_ANSWER).all()
    assert min(seen) == patience + 1 < max(seen)


def test_a_dropped_token_is_no_answer_of_an_exit() -> None:
    inputs = batch("bert", ROWS)
    model = attached("bert", "settled-span", POLICIES["attention-mass"])
    for seed in range(40):
        scattered(exit_of(model), seed)
        with torch.no_grad(), thresher.tracing(record=True) as traces:
            got = model(**inputs)
        left = [row for row, layer in enumerate(traces[0].exited_at) if layer < LAYERS]
        dropped = traces[0].dropped_at()[left] > 0
        if dropped.any():
            break
    assert dropped.any()
    assert (got.start_logits[left][dropped] == NO_ANSWER).all()
    assert (got.start_logits[left].amax(1) > NO_ANSWER / 2).all()


def test_patience_is_counted_for_each_row() -> None:
    """Two rows whose predictions settle at different layers: said one after the other to the rule itself."""
    exit = exit_of(thresher.attach(make("bert", layers=6), exit=thresher.PABEE(patience=2)))
    predictions = [[0, 0], [0, 1], [0, 1], [1, 1], [1, 0]]
    memory, left = None, []
    for layer, classes in enumerate(predictions, start=1):
        said = F.one_hot(torch.tensor(classes), 3).float()
        leaving, memory = exit.decide(layer, said, memory)
        left.append([False, False] if leaving is None else leaving.tolist())
    assert left == [[False, False], [False, False], [True, False], [False, True], [False, False]]


def test_a_value_settles_within_the_tolerance() -> None:
    model = thresher.attach(build(config_of("bert", 4, num_labels=1)), exit=thresher.PABEE(patience=1, tolerance=0.1))
    exit = exit_of(model)
    _, memory = exit.decide(1, torch.tensor([[1.0], [2.0]]), None)
    leaving, _ = exit.decide(2, torch.tensor([[1.09], [2.2]]), memory)
    assert leaving is not None
    assert leaving.tolist() == [True, False]
    thresher.set_exit(model, strength=3.0)
    leaving, _ = exit_of(model).decide(2, torch.tensor([[1.09], [2.2]]), memory)
    assert leaving is not None
    assert leaving.tolist() == [True, True]  # calibration has to have a way to let values leave
    scattered(exit, 0)
    thresher.set_exit(model, tolerance=100.0)
    _, trace = traced(model, batch("bert"))
    assert trace.exited_at == [2] * len(LENGTHS)


def counting(calls: list[int], *_: Any) -> None:
    calls.append(1)


@pytest.mark.parametrize("name", ["fastbert", "pabee"])
def test_a_batch_that_has_left_does_not_run_the_layers_above(name: str) -> None:
    for family in FAMILIES:
        model = attached(family, name, layers=6)
        thresher.set_exit(model, strength=1e6)
        calls: list[int] = []
        for layer in dict.fromkeys(attachment_of(model).engine.entrance.layers):
            linear = next(module for module in layer.modules() if isinstance(module, nn.Linear))
            linear.register_forward_hook(partial(counting, calls))
        _, trace = traced(model, batch(family, (7,)))
        (at,) = trace.exited_at
        assert at < 6 or name == "pabee"
        assert len(calls) == at
        assert [read[0][0] for read in trace.reads] == [7] * at + [0] * (6 - at)


@every_family
def test_strength_zero_and_keep_everything_are_the_model_without_exits(family: str) -> None:
    inputs, stock = batch(family, ROWS), make(family, layers=LAYERS)
    expected = outputs_of(stock, inputs)
    model = attached(family, "fastbert")
    with thresher.keep_everything():
        kept, trace = traced(model, inputs)
    assert worst(expected, kept) <= CLOSE
    assert trace.exited_at == [LAYERS] * len(ROWS)
    assert trace.asked == []
    thresher.set_exit(model, strength=0.0)
    assert worst(expected, outputs_of(model, inputs)) <= CLOSE
    thresher.detach(model)
    assert worst(expected, outputs_of(model, inputs)) == 0.0
    assert all("forward" not in module.__dict__ for module in model.modules())


@every_exit
def test_more_strength_leaves_earlier(name: str) -> None:
    inputs, model = batch("bert", ROWS), attached("bert", name, layers=6)
    previous = [6] * len(ROWS)
    for strength in (0.0, 0.25, 0.5, 1.0, 2.0, 1e6):
        thresher.set_exit(model, strength=strength)
        _, trace = traced(model, inputs)
        assert all(now <= before for now, before in zip(trace.exited_at, previous, strict=True))
        previous = trace.exited_at
    assert min(previous) < 6


@every_exit
def test_labels_give_the_loss_of_the_logits_returned(name: str) -> None:
    inputs, model = batch("bert", ROWS), attached("bert", name)
    if name == "settled-span":
        places = {
            "start_positions": torch.tensor([1, 0, 3, 2, 99, 0]),
            "end_positions": torch.tensor([2, 0, 5, 2, 3, 1]),
        }
        with torch.no_grad():
            outputs = model(**inputs, **places)
        parts = zip((outputs.start_logits, outputs.end_logits), places.values(), strict=True)
        wanted = sum(F.cross_entropy(logits[p < 14], p[p < 14]) for logits, p in parts) / 2
        tuples = model(**inputs, **places, return_dict=False)
        torch.testing.assert_close(tuples[1], outputs.start_logits)
    else:
        labels = torch.tensor([0, 1, 2, 2, 1, 0])
        with torch.no_grad():
            outputs = model(**inputs, labels=labels)
        wanted = F.cross_entropy(outputs.logits, labels)
        tuples = model(**inputs, labels=labels, return_dict=False)
        torch.testing.assert_close(tuples[1], outputs.logits)
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], outputs.logits)
    torch.testing.assert_close(outputs.loss, wanted)
    torch.testing.assert_close(tuples[0], outputs.loss)


def test_labels_of_several_and_of_one_value() -> None:
    inputs = batch("bert", ROWS)
    several = build(config_of("bert", 4, problem_type="multi_label_classification"))
    thresher.attach(several, exit=thresher.PABEE(patience=1))
    labels = torch.tensor([[1.0, 0, 1]] * len(ROWS))
    with torch.no_grad():
        outputs = several(**inputs, labels=labels)
    torch.testing.assert_close(outputs.loss, F.binary_cross_entropy_with_logits(outputs.logits, labels))
    value = thresher.attach(build(config_of("bert", 4, num_labels=1)), exit=thresher.PABEE(patience=1, tolerance=99.0))
    targets = torch.arange(6.0)
    with torch.no_grad():
        outputs = value(**inputs, labels=targets)
    torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits.squeeze(1), targets))


def test_an_encoder_called_without_its_head_has_no_exits() -> None:
    inputs, model = batch("bert", ROWS), attached("bert", "fastbert")
    expected = outputs_of(make("bert", layers=LAYERS).base_model, inputs)
    assert worst(expected, outputs_of(model.base_model, inputs)) <= CLOSE


def test_threads_share_one_model() -> None:
    model = attached("bert", "pabee", POLICIES["ltp"])
    batches = [batch("bert", ROWS, seed=seed) for seed in range(4)]
    expected = [traced(model, inputs) for inputs in batches]
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        for _ in range(3):
            found[number] = traced(model, batches[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (outputs, trace) in enumerate(expected):
        assert worst(outputs, found[number][0]) <= CLOSE
        assert trace.exited_at == found[number][1].exited_at


def test_a_batch_without_rows_is_refused() -> None:
    empty = {name: value[:0] for name, value in batch("bert").items()}
    for model in (attached("bert", "fastbert"), thresher.attach(make("bert"))):
        with pytest.raises(DataError, match="no rows"):
            model(**empty)


# What it costs.


@every_exit
def test_branches_are_counted_and_gone_rows_cost_nothing(name: str) -> None:
    inputs, model = batch("bert", ROWS), attached("bert", name)
    exit, geometry = exit_of(model), exit_of(model).geometry
    _, trace = traced(model, inputs)
    got = flops(trace, geometry, None, exit)
    for row, n in enumerate(ROWS):
        layers = trace.exited_at[row]
        asked = min(layers, LAYERS - 1)
        assert got[row] == layers * dense_flops(geometry, n) // LAYERS + asked * exit.overhead_flops(n)
    with_policy = attached("bert", name, POLICIES["ltp"])
    _, trace = traced(with_policy, inputs)
    costs = flops(trace, geometry, policy_of(with_policy), exit_of(with_policy))
    policy = policy_of(with_policy)
    for row, layers in enumerate(trace.exited_at):
        own = sum(policy.overhead_flops(layer, trace.reads[layer - 1][0][row]) for layer in range(1, layers + 1))
        assert costs[row] > own > 0
        assert all(reads[row] == 0 for pair in trace.reads[layers:] for reads in pair)


def test_a_branchs_work_is_what_it_multiplies() -> None:
    d, w, h, n = HIDDEN, 16, 2, 9
    model = attached("bert", "fastbert")
    narrowed, dots, of_the_first = n * d * w, 2 * n * h * w, 5 * w * w + 3 * w
    assert exit_of(model).overhead_flops(n) == 2 * (narrowed + dots + of_the_first)
    assert exit_of(attached("bert", "deebert")).overhead_flops(n) == 2 * (d * d + 3 * d)
    assert exit_of(attached("bert", "pabee")).overhead_flops(n) == 2 * 3 * d
    assert exit_of(attached("bert", "settled-span")).overhead_flops(n) == 2 * 2 * n * d


# Calibration.


def test_calibration_turns_the_exit() -> None:
    model, rows = attached("bert", "deebert", layers=6), dataset(24)
    found = thresher.calibrate(model, rows, speedup=1.5)
    assert found.speedup >= 1.5
    assert exit_of(model).config.strength == found.strength
    assert run(model, rows).speedup == pytest.approx(found.speedup)
    assert attachment_of(model).notes["calibration"]["knob"] == "exit"
    found = thresher.calibrate(model, rows, max_loss=0.6)
    assert found.quality is not None
    assert found.quality >= 0.4 - 1e-9
    assert found.speedup > 1.0
    before = exit_of(model).config
    with pytest.raises(TargetError):
        thresher.calibrate(model, rows, speedup=50.0)
    assert exit_of(model).config == before


def test_calibration_turns_the_policy_unless_told_otherwise() -> None:
    model, rows = attached("bert", "fastbert", thresher.AttentionMass()), dataset(24)
    policy, exit = policy_of(model).config, exit_of(model).config
    thresher.set_exit(model, strength=0.0)
    already = run(model, rows).speedup
    assert thresher.calibrate(model, rows, speedup=already - 0.01, knob="exit").strength == 0.0
    thresher.calibrate(model, rows, speedup=already * 1.2, knob="exit")
    assert policy_of(model).config == policy
    strength = exit_of(model).config.strength
    thresher.calibrate(model, rows, speedup=already * 1.5)
    assert policy_of(model).config != policy
    assert exit_of(model).config == exit.replace(strength=strength)
    with pytest.raises(OptionError, match="knob"):
        thresher.calibrate(model, rows, speedup=2.0, knob="policies")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no exit"):
        thresher.calibrate(thresher.attach(make("bert"), "ltp"), rows, speedup=2.0, knob="exit")


def test_where_the_exit_does_not_get_there_the_policy_does_the_rest() -> None:
    # On a patience of 1 nobody leaves before the second of four layers.
    model, rows = attached("bert", "pabee", thresher.AttentionMass(), layers=4), dataset(24)
    policy, exit = policy_of(model).config, exit_of(model).config
    with pytest.raises(TargetError):
        thresher.calibrate(model, rows, speedup=4.0, knob="exit")
    assert (policy_of(model).config, exit_of(model).config) == (policy, exit)
    found = thresher.calibrate(model, rows, speedup=4.0, knob="both")
    assert found.speedup >= 4.0
    assert run(model, rows).speedup == pytest.approx(found.speedup)
    assert policy_of(model).config.strength == found.strength
    assert attachment_of(model).notes["calibration"]["knob"] == "policy"
    policy, exit = policy_of(model).config, exit_of(model).config
    with pytest.raises(TargetError):
        thresher.calibrate(model, rows, speedup=1e6, knob="both")
    assert (policy_of(model).config, exit_of(model).config) == (policy, exit)


@pytest.mark.parametrize("target", [{"speedup": 1.5}, {"max_loss": 0.3}], ids=str)
def test_a_policy_that_goes_beyond_the_target_leaves_the_exit_its_share(target: dict[str, float]) -> None:
    model, rows = attached("bert", "fastbert", thresher.AttentionMass(strength=6.0), layers=4), dataset(24)
    thresher.set_exit(model, strength=0.0)
    alone_ = run(model, rows)
    found = thresher.calibrate(model, rows, **target, knob="both")
    after = run(model, rows)
    assert found.strength == exit_of(model).config.strength > 0
    assert 0 < policy_of(model).config.strength < 6.0
    assert any(row < 4 for trace in after.traces for row in trace.exited_at)
    if "speedup" in target:
        assert alone_.speedup > 1.6
        assert 1.5 <= after.speedup <= 1.7
    else:
        assert found.quality is not None
        assert found.quality >= 0.7


# Training.


def labelled(name: str) -> dict[str, Tensor]:
    inputs = batch("bert", ROWS)
    if name == "settled-span":
        return {**inputs, "start_positions": torch.zeros(6).long(), "end_positions": torch.ones(6).long()}
    return {**inputs, "labels": torch.tensor([0, 1, 2, 2, 1, 0])}


@every_exit
@every_policy
def test_steps_of_the_exits_stage_lower_its_loss(policy: str, name: str) -> None:
    model = attached("bert", name, POLICIES[policy])
    exit = exit_of(model)
    (stage,) = exit.stages()
    exit.mode = "record"
    learner, given = Learner(model, stage), labelled(name)
    optimizer = torch.optim.SGD(exit.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = learner(**given)["loss"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        # A key's bias adds the same to every score of a query, which a softmax does not see.
        assert all(p.grad is not None for key, p in exit.named_parameters() if not key.endswith(".key.bias"))
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    assert (next(model.parameters()).grad is not None) or name != "pabee"


def test_the_losses_are_the_papers() -> None:
    given = labelled("pabee")
    for name in ("fastbert", "deebert", "confidence", "pabee"):
        model = attached("bert", name)
        exit_of(model).mode = "record"
        with thresher.tracing() as traces, torch.no_grad():
            logits = model(**given).logits
        branches = traces[0].branches
        assert len(branches) == LAYERS - 1
        assert traces[0].exited_at == [LAYERS] * len(ROWS)
        by_label = [
            -sum(math.log(softmax(row)[y]) for row, y in zip(said.tolist(), given["labels"].tolist(), strict=True)) / 6
            for said in [*branches, logits]
        ]
        by_answer = [
            sum(
                t * math.log(t / s)
                for student, teacher in zip(said.tolist(), logits.tolist(), strict=True)
                for s, t in zip(softmax(student), softmax(teacher), strict=True)
            )
            / 6
            for said in branches
        ]
        wanted = {
            "deebert": sum(by_label[:-1]),
            "pabee": sum(layer * ce for layer, ce in enumerate(by_label, 1)) / sum(range(1, LAYERS + 1)),
        }.get(name, sum(by_answer))
        loss = exit_of(model).auxiliary_loss(traces[0], logits, given)
        assert loss is not None
        assert float(loss) == pytest.approx(wanted, rel=1e-3)
        exit_of(model).mode = "leave"
        assert exit_of(model).auxiliary_loss(traces[0], logits, given) is None
    reverse = attached("bert", "fastbert", config=thresher.FastBERT(width=16, reverse=True))
    forward = exit_of(reverse).configured(thresher.FastBERT(width=16))
    assert float(exit_of(reverse).loss(branches, logits, given)) != pytest.approx(
        float(forward.loss(branches, logits, given))
    )


def test_a_stage_with_the_model_frozen_leaves_it_as_it_was(tmp_path: Path) -> None:
    model = attached("bert", "fastbert", POLICIES["ltp"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    branches = {name: value.clone() for name, value in exit_of(model).state_dict().items()}
    (stage,) = exit_of(model).stages()
    run_stage(model, stage, dataset(16), tokenizer(), tmp_path, max_steps=2, use_cpu=True, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, branches[name]) for name, value in exit_of(model).state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert exit_of(model).mode == "leave"
    with pytest.raises(OptionError, match="has none"):
        run_stage(thresher.attach(make("bert")), stage, dataset(16), tokenizer(), tmp_path)


def test_a_stage_without_exits_leaves_them_out(tmp_path: Path) -> None:
    model = attached("bert", "fastbert", POLICIES["ltp"])
    branches = {name: value.clone() for name, value in exit_of(model).state_dict().items()}
    stage = Stage(name="hard", mode="hard")
    run_stage(model, stage, dataset(16), tokenizer(), tmp_path, max_steps=1, use_cpu=True, progress=False)
    assert all(torch.equal(value, branches[name]) for name, value in exit_of(model).state_dict().items())
    assert exit_of(model).mode == "leave"
    assert all(p.requires_grad for p in exit_of(model).parameters())


@pytest.mark.parametrize("name", ["deebert", "pabee"])
def test_exits_that_learn_from_labels_want_them(name: str, tmp_path: Path) -> None:
    model = attached("bert", name)
    (stage,) = exit_of(model).stages()
    with pytest.raises(OptionError, match="labels"):
        run_stage(model, stage, dataset(8, labels=None), tokenizer(), tmp_path)
    exit_of(model).mode = "record"
    with pytest.raises(DataError, match="labels"):
        Learner(model, stage)(**batch("bert"))


def fitted(directory: Path, policy: PolicyConfig | None, exit: ExitConfig, **options: Any) -> Any:
    torch.manual_seed(0)
    model, stages = make("bert", layers=LAYERS), []
    options = {"use_cpu": True, "progress": False, "overrides": {"epochs": 1.0, "batch_size": 8}, **options}
    thresher.fit(model, policy, dataset(24), tokenizer(), directory, exit=exit, on_stage=stages.append, **options)
    return model, [stage.name for stage in stages]


@pytest.mark.slow
def test_fit_trains_the_policy_and_then_the_exit(tmp_path: Path) -> None:
    """Magic Pyramid: fine-tuned, LTP soft, LTP hard, exits on the model that drops tokens."""
    checked = dataset(16, seed=1)
    exit = thresher.FastBERT(width=16)
    model, stages = fitted(
        tmp_path / "mp", thresher.LTP(threshold=0.1), exit, fine_tune=True, validation=checked, speedup=1.6
    )
    assert stages == ["fine-tune", "soft", "hard", "exit"]
    assert run(model, checked).speedup >= 1.6
    thresher.set_exit(model, strength=0.0)
    alone_speedup = run(model, checked).speedup
    assert 1.2 < alone_speedup < 1.6  # the policy's share, the root of the target
    again = thresher.load(tmp_path / "mp")
    assert exit_of(again).config.strength > 0
    assert run(again, checked).speedup >= 1.6


@pytest.mark.slow
def test_fit_trains_an_exit_alone_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, stages = fitted(tmp_path / "one", None, thresher.PABEE(patience=1))
    assert stages == ["exit"]
    assert attachment_of(model).policy is None
    assert exit_of(model).mode == "leave"

    class Stop(Exception):
        pass

    def stop(stage: Stage) -> None:
        if stage.name == "exit":
            raise Stop

    torch.manual_seed(0)
    options = {"use_cpu": True, "progress": False, "overrides": {"epochs": 1.0, "batch_size": 8}}
    with pytest.raises(Stop):
        thresher.fit(
            make("bert", layers=LAYERS),
            thresher.LTP(threshold=0.1),
            dataset(24),
            tokenizer(),
            tmp_path / "two",
            exit="confidence",
            on_stage=stop,
            **options,  # type: ignore[arg-type]
        )
    _, stages = fitted(tmp_path / "two", thresher.LTP(threshold=0.1), thresher.Confidence())
    assert stages == ["exit"]
    with pytest.raises(OptionError, match="nothing to train"):
        thresher.fit(make("bert"), None, dataset(4), tokenizer(), tmp_path / "three")


# Saved and loaded.


@every_exit
@every_policy
def test_an_exit_is_saved_with_its_model(policy: str, name: str, tmp_path: Path) -> None:
    inputs = batch("bert", ROWS)
    model = attached("bert", name, POLICIES[policy])
    expected, trace = traced(model, inputs)
    model.save_pretrained(tmp_path)
    again = thresher.load(tmp_path)
    got, trace_again = traced(again, inputs)
    assert worst(expected, got) <= 1e-6
    assert trace.exited_at == trace_again.exited_at
    assert exit_of(again).config == exit_of(model).config


def test_a_directory_from_before_exits_still_loads(tmp_path: Path) -> None:
    thresher.attach(make("bert"), "ltp").save_pretrained(tmp_path)
    file = tmp_path / "thresher.json"
    settings = json.loads(file.read_text())
    del settings["exit"]
    file.write_text(json.dumps(settings))
    assert attachment_of(thresher.load(tmp_path)).exit is None


@pytest.mark.parametrize("change", [{"layers": 9}, {"outputs": 5}, {"hidden": 64}])
def test_exits_of_another_model_are_refused(change: dict[str, int], tmp_path: Path) -> None:
    attached("bert", "fastbert").save_pretrained(tmp_path)
    file = tmp_path / "thresher.json"
    settings = json.loads(file.read_text())
    settings["exit"].update(change)
    file.write_text(json.dumps(settings))
    with pytest.raises(
        CheckpointError, match=f"trained for.*{next(iter(change.values()))}.*model beside them has 4 layers"
    ):
        thresher.load(tmp_path)


@pytest.mark.parametrize("exit", [None, "fastbert"])
def test_what_a_method_learned_on_another_model_is_refused(exit: str | None, tmp_path: Path) -> None:
    thresher.attach(make("bert", layers=4), "ltp", exit=exit).save_pretrained(tmp_path)
    plain = make("bert", layers=3)
    plain.config.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model.safetensors")
    own = r"method 'ltp' in .* of other sizes than the model beside it.*thresher fit"
    of_exits = r"exits in .* were trained for 4 layers .* the model beside them has 3 layers.*thresher fit"
    with pytest.raises(CheckpointError, match=of_exits if exit else own):
        thresher.load(tmp_path)


def test_branches_of_another_width_are_refused(tmp_path: Path) -> None:
    attached("bert", "fastbert").save_pretrained(tmp_path)
    file = tmp_path / "thresher.json"
    settings = json.loads(file.read_text())
    settings["exit"]["config"]["width"] = 8
    file.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="exit 'fastbert' in .* of other sizes"):
        thresher.load(tmp_path)


def test_an_exit_is_no_method() -> None:
    with pytest.raises(OptionError, match=r"'fastbert' is an early exit: attach\(model, exit='fastbert'\)"):
        thresher.attach(make("bert"), "fastbert")


@pytest.mark.parametrize(
    "broken", [[], {"method": "fastbrt", "config": {}}, {"method": "pabee", "config": {"patience": 0}}, {}]
)
def test_broken_settings_of_an_exit_are_refused(broken: Any, tmp_path: Path) -> None:
    attached("bert", "fastbert").save_pretrained(tmp_path)
    file = tmp_path / "thresher.json"
    settings = json.loads(file.read_text())
    settings["exit"] = broken
    file.write_text(json.dumps(settings))
    if broken == {}:
        assert attachment_of(thresher.load(tmp_path)).exit is None
        return
    with pytest.raises(CheckpointError, match="corrupted"):
        thresher.load(tmp_path)


# What is refused.


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("fastbert", {"threshold": 1.1}),
        ("fastbert", {"threshold": -0.1}),
        ("fastbert", {"threshold": math.nan}),
        ("fastbert", {"width": 15}),
        ("fastbert", {"heads": 0}),
        ("deebert", {"threshold": -1.0}),
        ("confidence", {"threshold": 2.0}),
        ("pabee", {"patience": 0}),
        ("pabee", {"patience": 1.5}),
        ("pabee", {"tolerance": -1.0}),
        ("settled-span", {"patience": -1}),
        ("pabee", {"strength": -1.0}),
        ("fastbert", {"thresold": 0.1}),
        ("pabee", {"patience": math.inf}),
        ("pabee", {"patience": math.nan}),
        ("pabee", {"patience": "2"}),
        ("fastbert", {"threshold": "a"}),
        ("fastbert", {"threshold": None}),
        ("fastbert", {"strength": True}),
        ("fastbert", {"reverse": 1}),
        ("fastbert", {"after": ()}),
        ("fastbert", {"after": (0, 1)}),
        ("pabee", {"after": (2, 1)}),
        ("deebert", {"after": (1, 1)}),
        ("deebert", {"after": 1}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(kind: str, values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(values)) if "heads" not in values else "width"):
        EXIT_CONFIGS[kind].from_dict(values)


@pytest.mark.parametrize(
    ("exit", "head", "extra", "reason"),
    [
        ("fastbert", "token", {}, "tagging heads; take 'sentee' or 'tokee'"),
        ("fastbert", "base", {}, "not encoders without a head"),
        ("fastbert", "question-answering", {"num_labels": 2}, "question-answering"),
        ("settled-span", "sequence", {}, "classes"),
        ("fastbert", "sequence", {"num_labels": 1}, "one label .*take 'pabee'"),
        ("deebert", "sequence", {"num_labels": 1}, "one label"),
        ("confidence", "sequence", {"problem_type": "multi_label_classification"}, "go together"),
        ("pabee", "sequence", {"problem_type": "regression"}, "one value"),
        (thresher.DeeBERT(threshold=1.2), "sequence", {}, "log 3"),
        (thresher.PABEE(patience=2), "sequence", {}, "at most 1"),
        (thresher.PABEE(after=(1,)), "sequence", {}, "after two at least"),
        (thresher.FastBERT(after=(1, 3)), "sequence", {}, "after layers 1 to 2"),
        ("fastbrt", "sequence", {}, "fastbert"),
        (thresher.LTP(), "sequence", {}, "not the configuration of an exit"),
    ],
)
def test_what_an_exit_does_not_serve_is_refused_and_leaves_the_model_as_it_was(
    exit: Any, head: str, extra: dict[str, Any], reason: str
) -> None:
    model = build(config_of("bert", 3, **extra), head)
    with pytest.raises(OptionError, match=reason):
        thresher.attach(model, exit=exit)
    assert not hasattr(model, "thresher_attachment")


def test_what_is_told_to_take_instead_is_what_serves() -> None:
    for kind, told in TAKE.items():
        serving = {name for name, config in EXIT_CONFIGS.items() if kind in config.serves}
        assert {name for name in EXIT_CONFIGS if f"'{name}'" in told} == serving
    assert {kind for config in EXIT_CONFIGS.values() for kind in config.serves} == set(TAKE)


def test_a_model_of_one_layer_has_nothing_to_leave_out() -> None:
    with pytest.raises(OptionError, match="one layer"):
        thresher.attach(make("bert", layers=1), exit="fastbert")
    with pytest.raises(OptionError, match="3 layers"):
        thresher.attach(make("bert", layers=2), exit=thresher.PABEE(patience=1))


def test_settings_that_an_exit_cannot_change_are_refused() -> None:
    model = attached("bert", "pabee")
    with pytest.raises(OptionError, match="patience"):
        thresher.set_exit(model, threshold=0.1)
    with pytest.raises(OptionError, match="at most 2"):
        thresher.set_exit(model, patience=3)
    with pytest.raises(OptionError, match="log 3"):
        thresher.set_exit(attached("bert", "deebert"), threshold=1.2)
    with pytest.raises(OptionError, match="something to set"):
        thresher.set_exit(model)
    thresher.set_exit(model, patience=2)
    assert exit_of(model).config == thresher.PABEE(patience=2)
    thresher.set_exit(model, strength=0.5)
    assert exit_of(model).config == thresher.PABEE(patience=2, strength=0.5)
    thresher.set_exit(model, after=(1, 2, 3))  # where rows may leave, and not how early
    assert exit_of(model).config == thresher.PABEE(patience=2, strength=0.5, after=(1, 2, 3))
    with pytest.raises(OptionError, match="at most 1"):
        thresher.set_exit(model, after=(1, 3))
    thresher.set_exit(model, patience=1, after=None)  # a value given is the value used
    assert exit_of(model).config == thresher.PABEE(patience=1)
    with pytest.raises(OptionError, match="no exit"):
        thresher.set_exit(thresher.attach(make("bert")), strength=1.0)


def test_the_patience_that_nobody_gave_fits_the_layers_named() -> None:
    model = thresher.attach(make("bert", layers=6), exit="pabee")
    assert exit_of(model).patience() == 3
    thresher.set_exit(model, after=(1, 2))
    assert exit_of(model).patience() == 1


def test_a_cross_encoder_leaves_early(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = build(config_of("bert", LAYERS, num_labels=1))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    cross = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    thresher.attach(cross, exit=thresher.PABEE(patience=1, tolerance=100.0))
    scattered(exit_of(cross), 0)
    with thresher.tracing() as traces:
        early = cross.predict([("w5 w6", "w7"), ("w8", "w9 w10 w11")])
    assert traces[0].exited_at == [2, 2]
    with thresher.keep_everything():
        assert abs(cross.predict([("w5 w6", "w7"), ("w8", "w9 w10 w11")]) - early).max() > 1e-3


def test_the_speedup_of_a_run_counts_exits() -> None:
    model, rows = attached("bert", "fastbert"), dataset(12)
    result = run(model, rows)
    geometry = exit_of(model).geometry
    assert result.speedup == speedup(result.traces, geometry, None, exit_of(model))
    assert result.speedup != 1.0


# The command line.


@pytest.mark.slow
def test_the_command_line_fits_and_uses_an_exit(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from commands import fails, ok, synthetic, write_rows

    plain, out, data = tmp_path / "plain", tmp_path / "out", write_rows(tmp_path / "rows.jsonl", synthetic())
    build(config_of("bert", LAYERS, num_labels=2)).save_pretrained(plain)
    tokenizer().save_pretrained(plain)
    quick = ("--stage", "epochs=1", "--stage", "batch_size=32", "--precision", "float32")
    said = ok("fit", plain, data, "--out", out, "--exit", "fastbert", "--set-exit", "width=16", *quick)
    assert said["method"] is None
    assert said["exit"] == {"name": "fastbert", **thresher.FastBERT(width=16).to_dict()}
    slow = ok("evaluate", out, data, "--tau", 0)
    fast = ok("evaluate", out, data, "--tau", 1)
    assert fast["speedup"] > slow["speedup"]
    assert fast["left_after"] == {"1": 1.0, **{str(layer): 0.0 for layer in range(2, LAYERS + 1)}}
    assert sum(slow["left_after"].values()) == pytest.approx(1.0)
    assert fast["speedup"] == pytest.approx(ok("predict", out, data, "--tau", 1)["speedup"])
    both = ok("fit", plain, data, "--out", tmp_path / "both", "--method", "first", "--exit", "deebert", *quick)
    assert (both["method"], both["exit"]["name"]) == ("first", "deebert")
    assert {one["name"] for one in ok("methods")["exits"]} == set(EXIT_CONFIGS)
    fails("evaluate", plain, data, "--tau", 1, match="no exit")
    fails("evaluate", out, data, "--tau", 2, match="threshold .tau. must lie between 0 and 1")
    fails("fit", plain, data, "--out", out, "--exit", "fastbrt", match="did you mean 'fastbert'")
    fails("fit", plain, data, "--out", out, "--method", "fastbert", match="early exit.*--exit fastbert")
    fails("fit", plain, data, "--out", out, "--exit", "ltp", match="a method.*--method ltp")
    fails("fit", plain, data, "--out", out, "--set-exit", "width=16", match="--set-exit needs --exit")
    fails("fit", plain, data, "--out", out, "--exit", "pabee", "--set", "threshold=.1", match="--set needs --method")
    alone = ("fit", plain, data, "--out", tmp_path / "o")
    fails(*alone, "--exit", "pabee", "--no-labels", *quick, match="labels.*; take confidence or fastbert")
    tokee = ("--exit", "tokee", "--set-exit", "learns=labels")
    fails(*alone, *tokee, "--no-labels", *quick, match="labels.*; leave out --set-exit learns")
    fails(*alone, "--method", "block-skim", *quick, match="'block-skim' needs rows that say where the answer")
    assert not (tmp_path / "o").exists()


def test_tau_is_for_exits_with_a_threshold(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from commands import fails, synthetic, write_rows

    model = thresher.attach(build(config_of("bert", LAYERS, num_labels=2)), exit="pabee")
    model.save_pretrained(tmp_path / "patient")
    tokenizer().save_pretrained(tmp_path / "patient")
    data = write_rows(tmp_path / "rows.jsonl", synthetic(4))
    fails("evaluate", tmp_path / "patient", data, "--tau", 2, match="--tau is a threshold.*'pabee' has none")


@pytest.mark.parametrize(("exit", "head"), [("pabee", "sequence"), ("settled-span", "question-answering")])
def test_patience_needs_a_layer_to_leave_from(exit: str, head: str) -> None:
    with pytest.raises(OptionError, match="needs a model of at least 3 layers, and this one has 2"):
        thresher.attach(make("bert", head, 2), exit=exit)
