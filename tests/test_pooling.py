"""Pooling against torch's own on single rows; what becomes of protected tokens, positions, gradients and dropped states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import thresher
from helpers import alone, batch, dataset, make, outputs_of
from thresher.calibration import calibrate
from thresher.errors import OptionError
from thresher.measure.flops import speedup
from thresher.measure.run import run
from thresher.model import policy_of
from thresher.packed import PackedTokens
from thresher.parts.pooling import pool_neighbours

ROWS = st.lists(st.integers(1, 13), min_size=1, max_size=4)
RATIO = st.floats(0.01, 1.0)


def packed(lengths: list[int], seed: int, *, simulated: bool = False, carry: bool = False) -> PackedTokens:
    """Rows whose tokens are protected now and then, as well as the first."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + 1
    mask = torch.tensor([[int(i < n) for i in range(width)] for n in lengths])
    hidden = torch.randn(len(lengths), width, 6, generator=generator)
    protected = torch.rand(len(lengths), width, generator=generator) < 0.2
    segments = torch.arange(width).expand(len(lengths), width) > width // 2
    return PackedTokens.pack(hidden, mask, segments=segments, protected=protected, simulated=simulated, carry=carry)


def naive(tokens: PackedTokens, ratio: float) -> list[list[tuple[int, list[float]]]]:
    """Of each row the positions that are left and their states, from adaptive_avg_pool1d of the unprotected ones."""
    found, at = [], 0
    for n in tokens.layout.sizes:
        row = slice(at, at + n)
        at += n
        states, protected = tokens.hidden[row], tokens.layout.protected[row].tolist()
        positions = tokens.positions[row].tolist()
        left = {p: states[i].tolist() for i, p in enumerate(positions) if protected[i]}
        free = [i for i in range(n) if not protected[i]]
        if free:
            k = len(free)
            m = max(1, int(torch.tensor(k * ratio, dtype=torch.float32).round()))
            means = F.adaptive_avg_pool1d(states[free].T.unsqueeze(0), m)[0].T
            for number in range(m):
                left[positions[free[number * k // m]]] = means[number].tolist()
        found.append(sorted(left.items()))
    return found


def rows_of(tokens: PackedTokens) -> list[list[tuple[int, list[float]]]]:
    rows: list[list[tuple[int, list[float]]]] = [[] for _ in tokens.layout.lengths]
    alive = torch.ones_like(tokens.layout.protected) if tokens.alive is None else tokens.alive
    for row, position, state, here in zip(
        tokens.layout.rows.tolist(), tokens.positions.tolist(), tokens.hidden.tolist(), alive.tolist(), strict=True
    ):
        if here:
            rows[row].append((position, state))
    return rows


def same(expected: list[list[tuple[int, list[float]]]], got: list[list[tuple[int, list[float]]]]) -> None:
    assert [[p for p, _ in row] for row in expected] == [[p for p, _ in row] for row in got]
    for mine, other in zip(expected, got, strict=True):
        for (_, state), (_, found) in zip(mine, other, strict=True):
            assert found == pytest.approx(state, abs=1e-5)


@given(ROWS, RATIO, st.integers(0, 99), st.booleans())
def test_a_row_is_pooled_as_torch_pools_it(lengths: list[int], ratio: float, seed: int, simulated: bool) -> None:
    tokens = packed(lengths, seed, simulated=simulated)
    got = pool_neighbours(tokens, ratio)
    same(naive(tokens, ratio), rows_of(got))
    if not simulated:
        segment = dict(zip(tokens.layout.flat.tolist(), tokens.segments.tolist(), strict=True))
        assert got.segments.tolist() == [segment[i] for i in got.layout.flat.tolist()]
        assert got.lengths.tolist() == [len(row) for row in naive(tokens, ratio)]


@given(ROWS, RATIO, RATIO, st.integers(0, 99))
def test_pooling_what_was_pooled(lengths: list[int], first: float, second: float, seed: int) -> None:
    """Physically and simulated: the second time, tokens that are gone are no neighbours."""
    once = pool_neighbours(packed(lengths, seed), first)
    twice = pool_neighbours(once, second)
    same(naive(once, second), rows_of(twice))
    simulated = pool_neighbours(pool_neighbours(packed(lengths, seed, simulated=True), first), second)
    same(rows_of(twice), rows_of(simulated))


def test_every_number_of_tokens_and_of_means() -> None:
    for n in range(2, 20):
        for m in range(1, n):
            tokens = PackedTokens.pack(torch.randn(1, n, 3))
            got = pool_neighbours(tokens, m / (n - 1))
            expected = F.adaptive_avg_pool1d(tokens.hidden[1:].T.unsqueeze(0), m)[0].T
            torch.testing.assert_close(got.hidden, torch.cat([tokens.hidden[:1], expected]))


def test_all_of_a_row_is_all_of_it() -> None:
    tokens = packed([9, 4], 1)
    assert torch.equal(pool_neighbours(tokens, 1.0).hidden, tokens.hidden)
    assert len(pool_neighbours(tokens, 1.0).positions) == 13


def test_dropped_tokens_come_back_as_they_were() -> None:
    tokens = packed([9, 5], 3, carry=True)
    pooled = pool_neighbours(tokens, 0.4)
    back = pooled.gather()
    assert back.positions.tolist() == tokens.positions.tolist()
    kept = set(pooled.layout.flat.tolist())
    for i, flat in enumerate(tokens.layout.flat.tolist()):
        if flat not in kept:
            assert torch.equal(back.hidden[i], tokens.hidden[i])
    assert not torch.equal(back.hidden, tokens.hidden)


def test_gradients_are_those_of_torchs_pooling() -> None:
    hidden = torch.randn(1, 11, 4)
    pull = torch.randn(5, 4)
    pulls = []
    for pool in (
        lambda x: pool_neighbours(PackedTokens.pack(x), 0.4).hidden,
        lambda x: torch.cat([x[0, :1], F.adaptive_avg_pool1d(x[:, 1:].transpose(1, 2), 4)[0].T]),
    ):
        leaf = hidden.clone().requires_grad_()
        (pool(leaf) * pull).sum().backward()
        pulls.append(leaf.grad)
    torch.testing.assert_close(pulls[0], pulls[1])


def test_half_precision_is_kept_and_summed_in_full() -> None:
    hidden = torch.full((1, 401, 2), 1.01, dtype=torch.bfloat16)
    pooled = pool_neighbours(PackedTokens.pack(hidden), 0.001)
    assert pooled.hidden.dtype == torch.bfloat16
    assert torch.equal(pooled.hidden[1], hidden[0, 0])


@pytest.mark.parametrize("layer", [None, 1, 3])
def test_a_replay_through_the_plain_layers(layer: int | None) -> None:
    inputs = batch("bert", (14,), seed=4)
    model, plain = make("bert", layers=4), make("bert", layers=4)
    thresher.attach(model, thresher.Pooling(ratio=0.3, layer=layer))
    with torch.no_grad():
        state = plain.bert.embeddings(input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"])
        for number, one in enumerate(plain.bert.encoder.layer, start=1):
            if number == (layer or 3):
                means = F.adaptive_avg_pool1d(state[:, 1:].transpose(1, 2), 4).transpose(1, 2)
                state = torch.cat([state[:, :1], means], 1)
            out = one(state)
            state = out[0] if isinstance(out, tuple) else out
        expected = plain.classifier(plain.bert.pooler(state.reshape(1, -1, state.shape[-1])))
    with thresher.tracing(record=True) as traces:
        outputs = outputs_of(model, inputs)
    torch.testing.assert_close(outputs["logits"], expected, rtol=0, atol=1e-4)
    assert [read for read, _ in traces[0].reads] == [[14 if n < (layer or 3) else 5] for n in (1, 2, 3, 4)]
    gone = [place for place, at in enumerate(traces[0].dropped_at()[0].tolist()) if at]
    assert gone == [i for i in range(1, 14) if i - 1 not in {number * 13 // 4 for number in range(4)}]


def test_calibration_finds_the_share_for_a_speedup() -> None:
    rows = dataset(30, low=15, high=30)
    model = thresher.attach(make("bert", layers=4), thresher.Pooling(layer=2))
    found = calibrate(model, rows, speedup=1.8)
    assert found.speedup == pytest.approx(1.8, rel=0.06)
    assert run(model, rows).speedup == pytest.approx(found.speedup)
    assert policy_of(model).ratio == pytest.approx(0.5**found.strength)


def test_an_export_counts_and_answers_as_the_engine_does(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    model = thresher.attach(make("bert", "token", layers=4), thresher.Pooling(ratio=0.37, protect_ids=(3,)))
    thresher.export(model, tmp_path)
    inputs = batch("bert", (20, 9, 33, 1, 2, 3))
    rows = [
        {name: alone(inputs, row)[name][0].tolist() for name in ("input_ids", "token_type_ids")} for row in range(6)
    ]
    with thresher.tracing(record=True) as traces:
        outputs = outputs_of(model, inputs)
    runner = thresher.Runner(tmp_path, workers=1)
    answers: list[Tensor] = [torch.from_numpy(output.answer) for output in runner.run(rows)]
    torch.testing.assert_close(torch.cat(answers), outputs["logits"], rtol=0, atol=1e-4)
    assert runner.speedup(runner.run(rows)) == pytest.approx(
        speedup(traces, policy_of(model).geometry, policy_of(model))
    )


@pytest.mark.parametrize("settings", [{"ratio": 0.0}, {"ratio": 1.1}, {"layer": 0}], ids=str)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        thresher.Pooling(**settings)


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(OptionError, match="3 layers"):
        thresher.attach(make("bert"), thresher.Pooling(layer=4))
