"""Exits for tagging: rows that leave, tokens that freeze, against the stock layers one after the other."""

from __future__ import annotations

import copy
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import thresher
from helpers import (
    FAMILIES,
    HIDDEN,
    INTERMEDIATE,
    alone,
    batch,
    build,
    config_of,
    dataset,
    make,
    outputs_of,
    tokenizer,
    traced,
)
from helpers import worst as difference
from thresher.backbones.opened import OPENED, open_layers
from thresher.errors import OptionError, UnsupportedModelError
from thresher.exits import ExitConfig, TokEEExit
from thresher.exits.tags import TagBranch
from thresher.frozen import Asking, attend_some, attend_some_padded
from thresher.measure.flops import dense_flops, flops, speedup
from thresher.measure.run import run
from thresher.model import attachment_of, exit_of
from thresher.packed import PackedTokens
from thresher.policy import PolicyConfig, Trace
from thresher.training import run_stage
from thresher.training.learner import Learner

CLOSE = 1e-4
LAYERS, TAGS = 5, 3
ROWS = (9, 1, 14, 5, 12, 7)
NAMES = ("sentee", "tokee")
POLICIES: dict[str, PolicyConfig | None] = {
    "none": None,
    "ltp": thresher.LTP(threshold=0.2),
    "attention-mass": thresher.AttentionMass(),
}
every_name = pytest.mark.parametrize("name", NAMES)


def scattered(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in exit_of(model).parameters():
            parameter.normal_(0.0, 0.4, generator=generator)


def attached(family: str, config: ExitConfig, policy: PolicyConfig | None = None, layers: int = LAYERS) -> Any:
    """A tagging model whose rows leave at different layers, or whose tokens freeze at different layers."""
    model = thresher.attach(make(family, "token", layers), policy, exit=config)
    inputs = batch(family, ROWS)
    real = inputs["attention_mask"].bool()
    for seed in range(40):
        scattered(model, seed)
        exit = exit_of(model)
        exit.mode = "record"
        with thresher.tracing() as traces:
            outputs_of(model, inputs)
        exit.mode = "leave"
        found = torch.stack([exit.uncertainty(said) for said in traces[0].branches])
        if isinstance(exit, TokEEExit):
            thresher.set_exit(model, threshold=float(found[:, real].quantile(0.3)))
        else:
            least = found.amin(0).sort().values
            thresher.set_exit(model, threshold=float(least[2] + least[3]) / 2)
        _, trace = traced(model, inputs)
        fewer = any(sum(asking) < sum(reads) for asking, (reads, _) in zip(trace.asking, trace.reads, strict=False))
        varied = not isinstance(exit, TokEEExit) or (fewer and len(set(trace.frozen_at()[real].tolist())) >= 3)
        if varied and min(trace.exited_at) < max(trace.exited_at):
            return model
    raise AssertionError("all rows leave together whatever the branches say")


def row_of(outputs: dict[str, Tensor], row: int, rows: tuple[int, ...] = ROWS) -> dict[str, Tensor]:
    return {name: value[sum(rows[:row]) : sum(rows[: row + 1])] for name, value in outputs.items()}


def three_ways(model: Any, family: str) -> Trace:
    """Simulated, batched and alone are one; the trace of the batch."""
    inputs = batch(family, ROWS)
    batched, trace = traced(model, inputs)
    with thresher.simulated_drops():
        simulated, simulated_trace = traced(model, inputs)
    assert difference(batched, simulated) <= CLOSE
    for name in ("exited_at", "reads", "asking", "asked"):
        assert getattr(trace, name) == getattr(simulated_trace, name), name
    assert torch.equal(trace.frozen_at(), simulated_trace.frozen_at())
    assert torch.equal(trace.dropped_at(), simulated_trace.dropped_at())
    for row in (0, 1, 2):
        single, single_trace = traced(model, alone(inputs, row))
        assert difference(row_of(batched, row), single) <= CLOSE
        assert single_trace.exited_at == [trace.exited_at[row]]
        assert [[one[row]] for one in trace.asking] == single_trace.asking
        assert torch.equal(trace.frozen_at()[row, : ROWS[row]], single_trace.frozen_at()[0])
    order = [2, 0, 3, 1, 5, 4]
    shuffled, again = traced(model, {k: v[order] for k, v in inputs.items()})
    assert again.exited_at == [trace.exited_at[row] for row in order]
    for at, row in enumerate(order):
        assert difference(row_of(batched, row), row_of(shuffled, at, tuple(ROWS[r] for r in order))) <= CLOSE
    left, _ = traced(model, batch(family, ROWS, side="left"))
    if family in ("bert", "distilbert", "electra", "albert", "ernie"):  # the others count positions by the padding's id
        return trace
    assert difference(batched, left) <= CLOSE
    return trace


@pytest.mark.parametrize("family", sorted(OPENED))
def test_tokens_freeze_the_same_simulated_batched_and_alone(family: str) -> None:
    trace = three_ways(attached(family, thresher.TokEE(window=3)), family)
    assert len(set(trace.frozen_at()[trace.frozen_at() >= 0].tolist())) >= 3


WITH = [*((family, "attention-mass") for family in FAMILIES), ("bert", "none"), ("modernbert", "none"), ("bert", "ltp")]


@pytest.mark.parametrize(("family", "policy"), WITH)
def test_rows_leave_the_same_simulated_batched_and_alone(policy: str, family: str) -> None:
    trace = three_ways(attached(family, thresher.SENTEE(), POLICIES[policy]), family)
    assert not trace.frozen
    if policy != "none":
        assert (trace.dropped_at() > 0).any()


@every_name
def test_only_after_the_layers_named(name: str) -> None:
    model = attached("bert", thresher.SENTEE() if name == "sentee" else thresher.TokEE(window=3))
    thresher.set_exit(model, after=(1, 3))
    trace = three_ways(model, "bert")
    assert set(trace.exited_at) <= {1, 3, LAYERS}
    assert [any(asked) for asked in trace.asked][1::2] == [False, False]
    if name == "tokee":
        assert {layer for layer, _ in trace.frozen} == {1, 3}


# Against the stock layers, one row at a time and one token after the other.


def uncertainty(logits: list[float]) -> float:
    top = max(logits)
    powers = [math.exp(v - top) for v in logits]
    p = [v / sum(powers) for v in powers]
    return -sum(v * math.log(v) for v in p if v > 0) / math.log(len(p))


def stock_layers(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Any]]:
    """What enters the first layer, and the layers."""
    base = model.base_model
    ids = {k: v for k, v in inputs.items() if k != "attention_mask"}
    layers = base.transformer.layer if hasattr(base, "transformer") else base.encoder.layer
    return base.embeddings(**ids), list(layers)


@torch.no_grad()
def by_hand(model: Any, plain: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
    """TokEE on one row: the stock layer on everything, then the frozen tokens' states copied back."""
    exit = exit_of(model)
    bar, reach = exit.config.threshold * exit.config.strength, exit.config.window // 2
    hidden, layers = stock_layers(plain, inputs)
    n = hidden.shape[1]
    frozen_at, answers = [0] * n, [torch.empty(0)] * n
    for number, layer in enumerate(layers, start=1):
        new = layer(hidden)
        new = new[0] if isinstance(new, tuple) else new
        for token in range(n):
            if frozen_at[token]:
                new[0, token] = hidden[0, token]
        hidden = new
        if number == len(layers):
            break
        said = exit.branches[number - 1].tag(hidden[0])
        own = [0.0 if frozen_at[t] else uncertainty(said[t].tolist()) for t in range(n)]
        certain = [max(own[max(0, t - reach) : t + reach + 1]) <= bar for t in range(n)]
        for token in range(n):
            if certain[token] and not frozen_at[token]:
                frozen_at[token], answers[token] = number, said[token]
    last = plain.classifier(hidden[0])
    return torch.stack([answers[t] if frozen_at[t] else last[t] for t in range(n)]), frozen_at


@pytest.mark.parametrize(("family", "window"), [("bert", 1), ("bert", 5), ("distilbert", 3), ("roberta", 7)])
def test_tokens_freeze_as_the_paper_says(family: str, window: int) -> None:
    inputs = batch(family, ROWS)
    model, plain = attached(family, thresher.TokEE(window=window)), make(family, "token", LAYERS)
    got, trace = traced(model, inputs)
    seen = set()
    for row in range(len(ROWS)):
        wanted, frozen_at = by_hand(model, plain, alone(inputs, row))
        torch.testing.assert_close(row_of(got, row)["logits"], wanted, rtol=0, atol=CLOSE)
        assert trace.frozen_at()[row, : ROWS[row]].tolist() == frozen_at
        assert trace.exited_at[row] == (max(frozen_at) if all(frozen_at) else LAYERS)
        seen |= set(frozen_at)
    assert len(seen) >= 3


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_row_leaves_when_its_least_certain_token_is_certain(family: str) -> None:
    inputs = batch(family, ROWS)
    model = attached(family, thresher.SENTEE())
    exit = exit_of(model)
    got, trace = traced(model, inputs)
    with torch.no_grad(), thresher.stock():
        stock = [model(**alone(inputs, row), output_hidden_states=True) for row in range(len(ROWS))]
    for row, outputs in enumerate(stock):
        wanted, left_at = outputs.logits[0], LAYERS
        for layer in range(1, LAYERS):
            with torch.no_grad():
                said = exit.branches[layer - 1].tag(outputs.hidden_states[layer][0])
            if max(uncertainty(one) for one in said.tolist()) <= exit.config.threshold:
                wanted, left_at = said, layer
                break
        assert trace.exited_at[row] == left_at
        torch.testing.assert_close(row_of(got, row)["logits"], wanted, rtol=0, atol=CLOSE)


def test_a_dropped_token_is_answered_in_its_last_state() -> None:
    inputs, model = batch("bert", ROWS), attached("bert", thresher.SENTEE(), POLICIES["attention-mass"])
    states: list[Tensor] = []
    exit = exit_of(model)
    for branch in exit.branches:
        branch.tag.register_forward_hook(lambda m, args, out: states.append(args[0]))
    for row in range(len(ROWS)):
        states.clear()
        _, trace = traced(model, alone(inputs, row))
        assert all(len(one) == ROWS[row] for one in states)
        for layer, dropped in trace.dropped:
            for token in dropped.tolist():
                later = [one[token] for one in states[layer - 1 :]]
                assert all(torch.equal(one, later[0]) for one in later)
    assert exit.config.answers_dropped
    _, trace = traced(model, inputs)
    for layer, asked in enumerate(trace.asked, start=1):
        assert asked == [n if trace.exited_at[row] >= layer else 0 for row, n in enumerate(ROWS)]


def test_a_window_is_chosen_when_the_model_runs() -> None:
    inputs = batch("bert", ROWS)
    narrow = attached("bert", thresher.TokEE(window=1))
    thresher.set_exit(narrow, strength=0.9)
    _, before = traced(narrow, inputs)
    thresher.set_exit(narrow, window=5)
    assert exit_of(narrow).config.strength == 0.9  # which scales no window
    _, after = traced(narrow, inputs)
    assert sum(map(sum, after.asking)) > sum(map(sum, before.asking))  # neighbours hold tokens back
    with pytest.raises(OptionError, match="odd number"):
        thresher.set_exit(narrow, window=4)


@cache
def with_window(window: int) -> TokEEExit:
    exit = exit_of(thresher.attach(make("bert", "token"), exit=thresher.TokEE(window=window)))
    assert isinstance(exit, TokEEExit)
    return exit


@given(st.data())
def test_a_window_is_counted_in_original_positions(data: Any) -> None:
    width, window = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 3, 5, 21]))
    rows = data.draw(st.lists(st.sets(st.integers(0, width - 1), min_size=1), min_size=1, max_size=3))
    mask = torch.tensor([[int(c in row) for c in range(width)] for row in rows])
    layout = PackedTokens.pack(torch.zeros(len(rows), width, 2), mask).layout
    places = [(row, column) for row, columns in enumerate(rows) for column in sorted(columns)]
    active = sorted(data.draw(st.sets(st.integers(0, len(places) - 1), min_size=1)))
    values = data.draw(st.lists(st.floats(0, 1, width=32), min_size=len(active), max_size=len(active)))
    got = with_window(window).in_window(torch.tensor(values), layout, torch.tensor(active)).tolist()
    at = [places[token] for token in active]
    for (row, column), found in zip(at, got, strict=True):
        near = [v for v, (r, c) in zip(values, at, strict=True) if r == row and abs(c - column) <= window // 2]
        assert found == max(near)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4), st.integers(0, 99))
def test_padded_attention_of_some_is_that_of_row_after_row(rows: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes, asked = [max(pair) for pair in rows], [min(pair) for pair in rows]
    mask = (torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1)).long()
    layout = PackedTokens.pack(torch.zeros(len(rows), max(sizes), 2), mask).layout
    starts = [sum(sizes[:row]) for row in range(len(rows))]
    index = torch.tensor([start + token for start, n in zip(starts, asked, strict=True) for token in range(n)])
    query = torch.randn(2, len(index), 3, generator=generator)
    key, value = torch.randn(2, 2, sum(sizes), 3, generator=generator)
    asking = Asking(index, asked)
    expected = attend_some(query, key, value, layout, asking, 0.5)
    got = attend_some_padded(query, key, value, layout, asking, 0.5)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    first = ((query[0, :1] @ key[0, : sizes[0]].T) * 0.5).softmax(-1) @ value[0, : sizes[0]]
    torch.testing.assert_close(expected[0, 0], first[0], rtol=0, atol=1e-5)


# What is really computed, and what is counted.


def counting(counts: dict[str, list[int]], name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    counts.setdefault(name, []).append(args[0].numel() // args[0].shape[-1])


def counted(model: Any) -> dict[str, list[int]]:
    """For each part of the layers, how many tokens it computed, layer after layer."""
    counts: dict[str, list[int]] = {}
    for parts in open_layers(model):
        for name in ("query", "key", "value", "out", "up", "down"):
            getattr(parts, name).register_forward_hook(partial(counting, counts, name))
    return counts


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_frozen_tokens_cost_a_key_and_a_value(family: str) -> None:
    inputs, model = batch(family, ROWS), attached(family, thresher.TokEE())
    counts = counted(model)
    _, trace = traced(model, inputs)
    ran = [layer for layer in range(LAYERS) if sum(trace.reads[layer][0])]
    for name in ("query", "out", "up", "down"):
        assert counts[name] == [sum(trace.asking[layer]) for layer in ran]
        assert counts[name] == [sum(trace.reads[layer][1]) for layer in ran]
    for name in ("key", "value"):
        assert counts[name] == [sum(trace.reads[layer][0]) for layer in ran]
    assert sum(counts["query"]) < sum(counts["key"]) < LAYERS * sum(ROWS)
    exit, geometry = exit_of(model), exit_of(model).geometry
    costs = flops(trace, geometry, None, exit)
    d, products = (
        HIDDEN,
        {"query": square(HIDDEN), "key": square(HIDDEN), "value": square(HIDDEN), "out": square(HIDDEN)},
    )
    products |= {"up": 2 * d * INTERMEDIATE, "down": 2 * d * INTERMEDIATE}
    linear = sum(products[name] * sum(tokens) for name, tokens in counts.items())
    attention = sum(
        4 * q * n * d
        for asking, (reads, _) in zip(trace.asking, trace.reads, strict=True)
        for q, n in zip(asking, reads, strict=True)
    )
    said = 2 * d * TAGS * sum(sum(asked) for asked in trace.asked)
    assert sum(costs) == linear + attention + said
    frozen_at, still = trace.frozen_at(), [list(ROWS)]
    for layer in range(1, LAYERS):
        still.append([int(((row == 0) | (row > layer)).sum()) for row in frozen_at])
    assert trace.asking == still
    assert trace.asked == still[:-1]
    for row, layers in enumerate(trace.exited_at):
        assert [pair[0][row] for pair in trace.reads] == [ROWS[row]] * layers + [0] * (LAYERS - layers)


def square(size: int) -> int:
    return 2 * size * size


def test_a_batch_whose_tokens_are_all_frozen_runs_no_layer_more() -> None:
    for name, family in (("tokee", "bert"), ("tokee", "distilbert"), ("sentee", "modernbert")):
        model = attached(family, thresher.TokEE() if name == "tokee" else thresher.SENTEE())
        thresher.set_exit(model, strength=1e6)
        calls: list[int] = []
        for layer in attachment_of(model).engine.entrance.layers:
            inner = next(module for module in layer.modules() if isinstance(module, nn.Linear))
            inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        _, trace = traced(model, batch(family, ROWS))
        assert trace.exited_at == [1] * len(ROWS)
        assert len(calls) == 1
        assert [sum(reads) for reads, _ in trace.reads] == [sum(ROWS)] + [0] * (LAYERS - 1)


@every_name
def test_strength_zero_and_keep_everything_are_the_model_without_exits(name: str) -> None:
    inputs, stock = batch("bert", ROWS), make("bert", "token", LAYERS)
    expected = outputs_of(stock, inputs)
    model = attached("bert", thresher.TokEE() if name == "tokee" else thresher.SENTEE())
    with thresher.keep_everything():
        kept, trace = traced(model, inputs)
    assert difference(expected, kept) <= CLOSE
    assert trace.exited_at == [LAYERS] * len(ROWS)
    assert trace.asked == []
    thresher.set_exit(model, strength=0.0)
    assert difference(expected, outputs_of(model, inputs)) <= CLOSE
    thresher.detach(model)
    assert difference(expected, outputs_of(model, inputs)) == 0.0
    assert all("forward" not in module.__dict__ for module in model.modules())


@every_name
def test_more_strength_costs_less(name: str) -> None:
    inputs, model = batch("bert", ROWS), attached("bert", make_config(name))
    exit, before = exit_of(model), math.inf
    costs = []
    for strength in (0.0, 0.25, 0.5, 1.0, 2.0, 1e6):
        thresher.set_exit(model, strength=strength)
        _, trace = traced(model, inputs)
        cost = sum(flops(trace, exit.geometry, None, exit if strength else None))
        costs.append(cost)
        if name == "sentee" and strength:
            assert cost <= before
            before = cost
    assert costs[-1] < costs[3] < costs[0]
    assert costs[0] == sum(dense_flops(exit.geometry, n) for n in ROWS)


def make_config(name: str, **settings: Any) -> ExitConfig:
    return thresher.TokEE(**settings) if name == "tokee" else thresher.SENTEE(**settings)


@every_name
def test_labels_give_the_loss_of_the_logits_returned(name: str) -> None:
    inputs, model = batch("bert", ROWS), attached("bert", make_config(name))
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % TAGS, -100)
    with torch.no_grad():
        outputs = model(**inputs, labels=labels)
        tuples = model(**inputs, labels=labels, return_dict=False)
        bare = model(**inputs, return_dict=False)
    wanted = F.cross_entropy(outputs.logits[labels >= 0], labels[labels >= 0])
    torch.testing.assert_close(outputs.loss, wanted)
    torch.testing.assert_close(tuples[0], wanted)
    torch.testing.assert_close(tuples[1], outputs.logits)
    torch.testing.assert_close(bare[0], outputs.logits)
    with torch.no_grad(), thresher.keep_everything():
        kept = model(**inputs).logits
    padding = ~inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[padding], kept[padding])  # which the head alone has a say in
    assert (outputs.logits - kept)[~padding].abs().max() > 1e-3


@every_name
def test_calibration_turns_the_exit(name: str) -> None:
    model, rows = attached("bert", make_config(name)), dataset(12, labels="token")
    found = thresher.calibrate(model, rows, speedup=1.4)
    assert found.speedup >= 1.4
    result = run(model, rows)
    assert result.speedup == pytest.approx(found.speedup)
    assert result.speedup == speedup(result.traces, exit_of(model).geometry, None, exit_of(model))


@every_name
def test_it_is_saved_with_its_model(name: str, tmp_path: Path) -> None:
    inputs, model = batch("bert", ROWS), attached("bert", make_config(name))
    expected, trace = traced(model, inputs)
    model.save_pretrained(tmp_path)
    again = thresher.load(tmp_path)
    got, trace_again = traced(again, inputs)
    assert difference(expected, got) <= 1e-6
    assert trace.exited_at == trace_again.exited_at
    assert exit_of(again).config == exit_of(model).config


# Training.


def labelled() -> dict[str, Tensor]:
    inputs = batch("bert", ROWS)
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % TAGS, -100)
    labels[:, 3] = -100
    return {**inputs, "labels": labels}


@every_name
@pytest.mark.parametrize("learns", ["answers", "labels"])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_steps_of_every_stage_lower_its_loss(policy: str, learns: str, name: str) -> None:
    if name == "tokee" and policy != "none":
        return
    model = attached("bert", make_config(name, learns=learns), POLICIES[policy])
    exit = exit_of(model)
    samples = name == "tokee" and learns == "labels"
    assert [stage.name for stage in exit.stages()] == ["exit", "self-sampling"][: 1 + samples]
    for stage in exit.stages():
        assert (stage.learning_rate > 0) == (learns == "labels")
        exit.mode = "sample" if stage.exit_samples else "record"
        learner, rows = Learner(model, stage), labelled() if learns == "labels" else batch("bert", ROWS)
        parameters = [*exit.parameters(), *(model.parameters() if stage.learning_rate else ())]
        optimizer = torch.optim.SGD(parameters, lr=0.0005)
        losses = []
        for _ in range(3):
            torch.manual_seed(1)  # the same threshold is drawn
            loss = learner(**rows)["loss"]
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None for p in exit.parameters())
            if stage.learning_rate:
                assert all(p.grad is not None for p in model.classifier.parameters())
            optimizer.step()
        assert losses[0] > losses[1] > losses[2]


@every_name
def test_from_answers_every_real_token_is_learned_whatever_its_label(name: str) -> None:
    model, given_ = attached("bert", make_config(name)), batch("bert", ROWS)
    exit_of(model).mode = "record"
    with thresher.tracing() as traces, torch.no_grad():
        logits = model(**given_).logits
    real = given_["attention_mask"].bool()
    theirs = logits[real].softmax(-1)
    wanted = sum(
        float((theirs * (theirs.log() - said[real].softmax(-1).log())).sum(-1).mean()) for said in traces[0].branches
    )
    loss = exit_of(model).auxiliary_loss(traces[0], logits, given_)
    assert loss is not None
    assert float(loss) == pytest.approx(wanted, rel=1e-4)


def test_the_loss_weighs_layers_by_their_number() -> None:
    model, given_ = attached("bert", thresher.SENTEE(learns="labels")), labelled()
    exit_of(model).mode = "record"
    with thresher.tracing() as traces, torch.no_grad():
        logits = model(**given_).logits
    real = given_["labels"] >= 0
    every = [*traces[0].branches, logits]
    assert len(every) == LAYERS
    by_label = [float(F.cross_entropy(said[real], given_["labels"][real])) for said in every]
    wanted = sum(layer * loss for layer, loss in enumerate(by_label, 1)) / sum(range(1, LAYERS + 1))
    loss = exit_of(model).auxiliary_loss(traces[0], logits, given_)
    assert loss is not None
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_self_sampling_freezes_by_a_threshold_drawn_for_each_pass() -> None:
    model, plain, inputs = attached("bert", thresher.TokEE()), make("bert", "token", LAYERS), batch("bert", ROWS)
    exit = exit_of(model)
    threshold = exit.config.threshold
    reached = set()
    for seed in range(4):
        exit.mode = "sample"
        torch.manual_seed(seed)
        drawn = 2 * threshold * float(torch.rand(()))
        torch.manual_seed(seed)
        _, trace = traced(model, inputs)
        assert trace.exited_at == [LAYERS] * len(ROWS)
        assert len(trace.branches) == LAYERS - 1
        exit.mode = "leave"
        thresher.set_exit(model, threshold=min(drawn, 1.0))
        exit = exit_of(model)
        for row in range(len(ROWS)):
            _, frozen_at = by_hand(model, plain, alone(inputs, row))
            assert trace.frozen_at()[row, : ROWS[row]].tolist() == frozen_at
            reached |= set(frozen_at)
        thresher.set_exit(model, threshold=threshold)
        exit = exit_of(model)
    assert len(reached) >= 3


def test_gradients_pass_frozen_tokens_by() -> None:
    """Real freezing and copying back have the same gradients."""
    inputs, grads = batch("bert", ROWS), []
    for simulated in (False, True):
        model = attached("bert", thresher.TokEE())
        with thresher.simulated_drops() if simulated else thresher.tracing():
            model(**inputs).logits[inputs["attention_mask"].bool()].square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert any(grad is not None and grad.abs().max() > 1e-4 for grad in grads[0].values())
    for name, grad in grads[0].items():
        other = grads[1][name]
        assert (grad is None) == (other is None), name
        if grad is not None:
            torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_fit_trains_both_stages(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stages: list[str] = []
    model = make("bert", "token", LAYERS)
    rows = dataset(24, labels="token")
    thresher.fit(
        model,
        None,
        rows,
        tokenizer(),
        tmp_path / "out",
        exit=thresher.TokEE(learns="labels"),
        on_stage=lambda stage: stages.append(stage.name),
        use_cpu=True,
        progress=False,
        overrides={"epochs": 1.0, "batch_size": 8},
    )
    assert stages == ["exit", "self-sampling"]
    assert exit_of(model).mode == "leave"
    again = thresher.load(tmp_path / "out")
    assert difference(outputs_of(model, batch("bert", ROWS)), outputs_of(again, batch("bert", ROWS))) <= 1e-6


def test_a_stage_that_samples_ends_leaving(tmp_path: Path) -> None:
    model = attached("bert", thresher.TokEE(learns="labels"))
    before = copy.deepcopy(model.state_dict())
    stage = exit_of(model).stages()[1]
    rows = dataset(16, labels="token")
    run_stage(model, stage, rows, tokenizer(), tmp_path, max_steps=2, use_cpu=True, progress=False)
    assert exit_of(model).mode == "leave"
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(OptionError, match="labels"):
        run_stage(model, stage, dataset(8, labels=None), tokenizer(), tmp_path)


def test_branches_alone_learn_without_labels_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = attached("bert", thresher.TokEE())
    before, (stage,) = copy.deepcopy(model.state_dict()), exit_of(model).stages()
    branches = copy.deepcopy(exit_of(model).state_dict())
    run_stage(model, stage, dataset(16, labels=None), tokenizer(), tmp_path, max_steps=2, use_cpu=True, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not torch.equal(value, branches[name]) for name, value in exit_of(model).state_dict().items())


# What is refused.


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(OPENED)))
def test_families_whose_layers_cannot_be_opened_are_refused(family: str) -> None:
    model = make(family, "token")
    with pytest.raises(UnsupportedModelError, match=f"'tokee' freezes tokens inside layers.*'{family}'"):
        thresher.attach(model, exit="tokee")
    assert not hasattr(model, "thresher_attachment")


@pytest.mark.parametrize(
    ("config", "head", "policy", "extra", "reason"),
    [
        ("tokee", "token", "ltp", {}, "leave the method out"),
        ("tokee", "sequence", None, {}, "tagging heads"),
        ("sentee", "question-answering", None, {"num_labels": 2}, "tagging heads"),
        ("fastbert", "token", None, {}, "tagging heads"),
        ("sentee", "token", None, {"num_labels": 1}, "two or more"),
        ("sentee", "base", None, {}, "not encoders without a head"),
    ],
)
def test_what_does_not_fit_is_refused(
    config: str, head: str, policy: str | None, extra: dict[str, Any], reason: str
) -> None:
    model = build(config_of("bert", 3, **extra), head)
    with pytest.raises(OptionError, match=reason):
        thresher.attach(model, policy, exit=config)
    assert not hasattr(model, "thresher_attachment")


@pytest.mark.parametrize(
    "settings", [{"window": 4}, {"window": 0}, {"threshold": 1.5}, {"windw": 3}, {"learns": "tags"}], ids=str
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        thresher.TokEE.from_dict(settings)


def test_a_branchs_work_is_what_it_multiplies() -> None:
    assert exit_of(attached("bert", thresher.SENTEE())).overhead_flops(9) == TagBranch.flops(9, HIDDEN, TAGS)
    assert TagBranch.flops(9, HIDDEN, TAGS) == 2 * 9 * HIDDEN * TAGS


def test_a_copy_freezes_by_its_own_weights() -> None:
    inputs, model = batch("bert", ROWS), attached("bert", thresher.TokEE())
    expected, _ = traced(model, inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert difference(expected, outputs_of(model, inputs)) == 0.0
    got, trace = traced(other, inputs)
    assert difference(expected, got) > 1e-3
    plain = make("bert", "token", LAYERS)
    plain.load_state_dict(other.state_dict())
    wanted, frozen_at = by_hand(other, plain, alone(inputs, 0))
    torch.testing.assert_close(row_of(got, 0)["logits"], wanted, rtol=0, atol=CLOSE)
    assert trace.frozen_at()[0, : ROWS[0]].tolist() == frozen_at


@pytest.mark.slow
def test_the_command_line_fits_an_exit_for_tags(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from commands import fails, ok, write_rows

    named = {"id2label": {0: "O", 1: "B-x", 2: "I-x"}, "label2id": {"O": 0, "B-x": 1, "I-x": 2}}
    build(config_of("bert", 3, **named), "token").save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    tags = [{"tokens": [f"w{9 + i}", "w7", f"w{20 + i}"], "tags": ["B-x", "I-x", "O"]} for i in range(10)] * 4
    data = write_rows(tmp_path / "rows.jsonl", tags)
    quick = ("--task", "tagging", "--stage", "epochs=1", "--stage", "batch_size=16", "--precision", "float32")
    said = ok("fit", tmp_path / "plain", data, "--out", tmp_path / "out", "--exit", "tokee", *quick)
    assert said["exit"] == {"name": "tokee", **thresher.TokEE().to_dict()}
    slow = ok("evaluate", tmp_path / "out", data, "--tau", 0)
    fast = ok("evaluate", tmp_path / "out", data, "--tau", 1)
    assert fast["speedup"] > 1.3 > slow["speedup"]
    fails(
        "fit", tmp_path / "plain", data, "--out", tmp_path / "o", "--exit", "tokee", "--method", "ltp", match="sentee"
    )
