"""Rows of an encoder without a head that leave when their vector has settled, against the stock model's own hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import thresher
from helpers import (
    FAMILIES,
    HIDDEN,
    alone,
    batch,
    build,
    config_of,
    dataset,
    make,
    outputs_of,
    settings,
    tokenizer,
    worst,
)
from leaving import LAYERS, ROWS, scattered
from thresher.errors import OptionError
from thresher.measure.flops import dense_flops, flops
from thresher.measure.layer import layer_flops
from thresher.measure.run import run
from thresher.methods import CONFIGS
from thresher.model import exit_of, policy_of
from thresher.policy import PolicyConfig

CLOSE = 1e-4
POLICIES: dict[str, PolicyConfig | None] = {
    "none": None,
    "ltp": thresher.LTP(threshold=0.2),
    "attention-mass": thresher.AttentionMass(),
}


def turned(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[L - 2, B], 1 - cosine between what neighbouring branches say of each row."""
    exit_of(model).mode = "record"
    with thresher.tracing() as traces:
        outputs_of(model, inputs)
    exit_of(model).mode = "leave"
    said = torch.stack(traces[0].branches)
    return 1 - F.cosine_similarity(said[1:], said[:-1], dim=-1)


def attached(
    family: str, policy: PolicyConfig | None = None, *, layers: int = LAYERS, pooling: Any = "mean", seed: int = 0
) -> Any:
    """An encoder from which, of the rows `ROWS`, about half leave early."""
    model = thresher.attach(
        make(family, "base", layers), policy, exit=thresher.SettledStates(pooling=pooling, tolerance=0.5)
    )
    scattered(exit_of(model), seed)
    with torch.no_grad():
        for parameter in exit_of(model).parameters():
            parameter.mul_(0.25)
    least = turned(model, batch(family, ROWS)).amin(0).sort().values
    thresher.set_exit(model, tolerance=float(least[2] + least[3]) / 2)
    return model


def traced(model: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    with thresher.tracing(record=True) as traces:
        outputs = outputs_of(model, inputs)
    return outputs, traces[0]


def states_of(outputs: dict[str, Tensor], row: int) -> Tensor:
    start = sum(ROWS[:row])
    return outputs["last_hidden_state"][start : start + ROWS[row]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_simulated_batched_and_alone_are_one(policy: str, family: str) -> None:
    inputs = batch(family, ROWS)
    model = attached(family, POLICIES[policy])
    batched, trace = traced(model, inputs)
    assert min(trace.exited_at) < max(trace.exited_at)
    with thresher.simulated_drops():
        simulated, simulated_trace = traced(model, inputs)
    assert worst(batched, simulated) <= CLOSE
    assert (trace.exited_at, trace.reads, trace.asked) == (
        simulated_trace.exited_at, simulated_trace.reads, simulated_trace.asked
    )  # fmt: skip
    for row in range(len(ROWS)):
        single, single_trace = traced(model, alone(inputs, row))
        assert single_trace.exited_at == [trace.exited_at[row]]
        torch.testing.assert_close(single["last_hidden_state"], states_of(batched, row), rtol=0, atol=CLOSE)


def test_rows_leave_only_after_the_layers_named() -> None:
    """The vector after the first of them is what that after the next is compared with."""
    inputs, model = batch("bert", ROWS), attached("bert")
    for tolerance in (step / 50 for step in range(1, 100)):
        thresher.set_exit(model, after=(1, 3), tolerance=tolerance)
        batched, trace = traced(model, inputs)
        if set(trace.exited_at) == {3, LAYERS}:
            break
    assert set(trace.exited_at) == {3, LAYERS}
    assert not any(trace.asked[1])
    for row in range(len(ROWS)):
        single, single_trace = traced(model, alone(inputs, row))
        assert single_trace.exited_at == [trace.exited_at[row]]
        torch.testing.assert_close(single["last_hidden_state"], states_of(batched, row), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_it_goes_with_every_method(method: str) -> None:
    inputs = batch("bert", ROWS)
    model = attached("bert", settings(CONFIGS[method]), layers=3)
    batched, trace = traced(model, inputs)
    with thresher.simulated_drops():
        simulated, simulated_trace = traced(model, inputs)
    assert worst(batched, simulated) <= CLOSE
    assert (trace.exited_at, trace.reads) == (simulated_trace.exited_at, simulated_trace.reads)
    for row in range(len(ROWS)):
        single, single_trace = traced(model, alone(inputs, row))
        assert single_trace.exited_at == [trace.exited_at[row]]
        torch.testing.assert_close(single["last_hidden_state"], states_of(batched, row), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("patience", [1, 2])
@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_rows_leave_when_the_stock_models_states_have_settled(family: str, pooling: str, patience: int) -> None:
    inputs, layers = batch(family, ROWS), 5
    model = attached(family, layers=layers, pooling=pooling)
    thresher.set_exit(model, patience=patience, tolerance=2 * exit_of(model).config.tolerance)
    tolerance = exit_of(model).config.tolerance
    got, trace = traced(model, inputs)
    with torch.no_grad(), thresher.stock():
        stock = [model(**alone(inputs, row), output_hidden_states=True) for row in range(len(ROWS))]
    for row, outputs in enumerate(stock):
        wanted, held, last = outputs.last_hidden_state[0], 0, None
        leaves = layers
        for layer in range(1, layers):
            change = exit_of(model).branches[layer - 1].change
            states = outputs.hidden_states[layer][0]
            states = states + states @ change.weight.T + change.bias
            now = states.mean(0) if pooling == "mean" else states[0]
            if last is not None:
                cosine = ((now @ last) / (now.norm() * last.norm())).item()
                held = held + 1 if 1 - cosine <= tolerance else 0
            last = now
            if held >= patience:
                wanted, leaves = states, layer
                break
        assert trace.exited_at[row] == leaves
        torch.testing.assert_close(states_of(got, row), wanted, rtol=0, atol=CLOSE)


def test_what_was_dropped_before_a_row_left_is_the_mean_of_what_it_hands_out() -> None:
    inputs = batch("bert", ROWS)
    model = attached("bert", thresher.AttentionMass(retention=(0.5, 0.5, 0.5, 0.5)))
    with torch.no_grad(), thresher.tracing(record=True) as traces:
        states = model(**inputs).last_hidden_state
    dropped = traces[0].dropped_at()
    seen = 0
    for row, layer in enumerate(traces[0].exited_at):
        kept = dropped[row] == 0
        for column in (dropped[row] > 0).nonzero().flatten().tolist():
            torch.testing.assert_close(states[row, column], states[row][kept].mean(0), rtol=0, atol=CLOSE)
            seen += layer < LAYERS
        assert (states[row][dropped[row] < 0] == 0).all()
    assert seen


def test_flops_count_the_branches_and_the_map_of_a_row_that_leaves() -> None:
    inputs = batch("bert", ROWS)
    model = attached("bert")
    _, trace = traced(model, inputs)
    geometry = exit_of(model).geometry
    got = flops(trace, geometry, None, exit_of(model))
    for row, n in enumerate(ROWS):
        layer = trace.exited_at[row]
        branches = min(layer, LAYERS - 1) * 2 * HIDDEN**2
        parting = 2 * n * HIDDEN**2 if layer < LAYERS else 0
        assert got[row] == layer * layer_flops(geometry, n, n) + branches + parting
    assert dense_flops(geometry, 9) == LAYERS * layer_flops(geometry, 9, 9)


def test_a_fit_teaches_the_branches_alone_what_the_model_ends_with(tmp_path: Path) -> None:
    model, rows = make("bert", "base", 4), dataset(64).remove_columns("labels")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    thresher.attach(model, exit="settled-states")
    first = turned_from_the_end(model, rows)
    fitted = thresher.fit(
        thresher.detach(model), None, rows, tokenizer(), tmp_path / "out", exit=thresher.SettledStates(),
        overrides={"epochs": 20, "batch_size": 16, "exit_learning_rate": 5e-3, "label_weight": 0.0},
        use_cpu=True, precision="float32", progress=False,
    )  # fmt: skip
    assert turned_from_the_end(fitted, rows) < 0.7 * first
    for name, value in before.items():
        torch.testing.assert_close(fitted.state_dict()[name], value, rtol=0, atol=0)
    loaded = thresher.load(tmp_path / "out")
    assert exit_of(loaded).config == thresher.SettledStates()
    for mine, theirs in zip(exit_of(loaded).parameters(), exit_of(fitted).parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def turned_from_the_end(model: Any, rows: Any) -> float:
    """The mean of 1 - cosine between what branches say and what the model ends with."""
    found = []
    for row in rows.select(range(16)):
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
        exit_of(model).mode = "record"
        with thresher.tracing() as traces, torch.no_grad():
            wanted = model(**inputs).last_hidden_state.mean(1)
        exit_of(model).mode = "leave"
        found += [float(1 - F.cosine_similarity(said, wanted)) for said in traces[0].branches]
    return sum(found) / len(found)


def test_new_branches_change_nothing_of_a_state() -> None:
    model = thresher.attach(make("bert", "base", 4), exit=thresher.SettledStates(tolerance=2.0))
    inputs = batch("bert", ROWS)
    got, trace = traced(model, inputs)
    assert trace.exited_at == [2] * len(ROWS)
    with torch.no_grad(), thresher.stock():
        stock = model(**alone(inputs, 2), output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(states_of(got, 2), stock, rtol=0, atol=CLOSE)


def test_strength_runs_from_nobody_to_everybody() -> None:
    model, rows = attached("bert"), dataset(24)
    found = []
    for strength in (0.0, 0.5, 1.0, 4.0, 1e6):
        thresher.set_exit(model, strength=strength)
        found.append(run(model, rows).speedup)
        thresher.set_exit(model, tolerance=exit_of(model).config.tolerance)
    assert found[0] == 1.0
    assert found[1:] == sorted(found[1:])  # branches cost a little where nobody leaves
    assert found[-1] > 1.5


def test_a_sentence_transformer_says_what_the_branch_says(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    encoder = build(config_of("bert", 4), "base")
    encoder.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = st.SentenceTransformer(str(tmp_path), device="cpu")
    texts = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13"]
    plain = model.encode(texts)
    thresher.attach(model, exit=thresher.SettledStates(tolerance=2.0))
    scattered(exit_of(model), 1)
    early = model.encode(texts)
    assert abs(early - plain).max() > 1e-2
    exit_of(model).mode = "record"
    for text, vector in zip(texts, early, strict=True):
        with thresher.tracing() as traces:
            model.encode([text])
        torch.testing.assert_close(traces[0].branches[1][0], torch.tensor(vector), rtol=0, atol=CLOSE)
    with thresher.keep_everything():
        assert abs(model.encode(texts) - plain).max() < CLOSE


def test_with_a_pooler_the_early_states_are_what_it_reads() -> None:
    inputs = batch("bert", ROWS)
    model = attached("bert")
    with torch.no_grad():
        got = model(**inputs)
        wanted = torch.tanh(model.pooler.dense(got.last_hidden_state[:, 0]))
    torch.testing.assert_close(got.pooler_output, wanted, rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"tolerance": -0.1}, "between 0 and 2"),
        ({"tolerance": 2.1}, "between 0 and 2"),
        ({"pooling": "frist"}, "There is no pooling 'frist'; did you mean 'first'"),
        ({"patience": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        thresher.SettledStates(**values)


def test_what_it_does_not_serve_is_refused() -> None:
    with pytest.raises(OptionError, match="serves encoders without a head, not heads of two or more classes"):
        thresher.attach(make("bert"), exit="settled-states")
    with pytest.raises(OptionError, match="serves heads of two or more classes, not encoders without a head"):
        thresher.attach(make("bert", "base"), exit="fastbert")
    with pytest.raises(OptionError, match="nobody leaves before the last of 4 layers; give at most 2"):
        thresher.attach(make("bert", "base", 4), exit=thresher.SettledStates(patience=3))
    model = attached("bert", thresher.LTP())
    assert policy_of(model).config == thresher.LTP()
    with pytest.raises(OptionError, match="cannot be set to another 'pooling'"):
        thresher.set_exit(model, pooling="first")  # type: ignore[arg-type]


def test_the_strength_scales_the_tolerance_alone() -> None:
    model, inputs = attached("bert"), batch("bert", ROWS)
    tolerance = exit_of(model).config.tolerance
    thresher.set_exit(model, tolerance=2 * tolerance, strength=0.5)
    _, halved = traced(model, inputs)
    thresher.set_exit(model, tolerance=tolerance)
    _, given = traced(model, inputs)
    assert halved.exited_at == given.exited_at
    assert min(given.exited_at) == 2


def test_a_fit_says_which_method_it_takes_off(tmp_path: Path) -> None:
    model = thresher.attach(make("bert", "base", 4), "attention-mass")
    options: dict[str, Any] = {"overrides": {"epochs": 1, "batch_size": 16}, "use_cpu": True, "progress": False}
    rows = dataset(16).remove_columns("labels")
    with pytest.warns(UserWarning, match="'attention-mass' that the model has is taken off"):
        thresher.fit(model, None, rows, tokenizer(), tmp_path / "out", exit="settled-states", **options)


@pytest.mark.parametrize("target", [{"speedup": float("nan")}, {"speedup": "2"}, {"max_loss": float("nan")}])
def test_a_fit_refuses_a_target_that_is_no_number_before_it_trains(target: dict[str, Any], tmp_path: Path) -> None:
    rows = dataset(8).remove_columns("labels")
    with pytest.raises(OptionError, match="must be a number of at least"):
        thresher.fit(
            make("bert", "base", 4),
            None,
            rows,
            tokenizer(),
            tmp_path / "out",
            exit="settled-states",
            validation=rows,
            **target,
        )
    assert not (tmp_path / "out").exists()
