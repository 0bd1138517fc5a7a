"""Attention within a window in bands, against one dense map of the whole batch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import thresher
from helpers import build, config_of
from helpers import settings as settings_of
from thresher import attention, bands
from thresher.attention import attend
from thresher.bands import attend_in_bands
from thresher.evidence import Wanted
from thresher.methods import CONFIGS
from thresher.packed import PackedTokens

HEADS, SIZE = 2, 8


def packed(lengths: list[int], gap: int = 1, *, simulated: bool = False) -> PackedTokens:
    width = max(lengths) * gap
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, : n * gap : gap] = True
    return PackedTokens.pack(torch.zeros(len(lengths), width, 1), mask, simulated=simulated)


def qkv(total: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(HEADS, total, SIZE, generator=generator) for _ in range(3)]


def dense(query: Tensor, key: Tensor, value: Tensor, tokens: PackedTokens, window: int, scale: float) -> Tensor:
    rows, at = tokens.layout.rows, tokens.positions
    sees = (rows[:, None] == rows) & ((at[:, None] - at).abs() <= window)
    logits = query.double() @ key.double().transpose(1, 2) * scale
    if tokens.log_weight is not None:
        logits = logits + tokens.log_weight.double()
    logits = logits.masked_fill(~sees, -math.inf)
    return (logits.softmax(-1).nan_to_num() @ value.double()).transpose(0, 1)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    window=st.integers(0, 70),
    gap=st.integers(1, 3),
    drops=st.sampled_from(["nothing", "physical", "simulated"]),
    weights=st.booleans(),
    seed=st.integers(0, 9),
)
def test_bands_are_dense_attention_within_the_window(
    lengths: list[int], window: int, gap: int, drops: str, weights: bool, seed: int
) -> None:
    tokens = packed(lengths, gap, simulated=drops == "simulated")
    generator = torch.Generator().manual_seed(seed)
    if drops != "nothing":
        keep = torch.rand(len(tokens.positions), generator=generator) < 0.4
        tokens = tokens.keep(keep | tokens.layout.protected)
    if weights and drops != "simulated":
        weight = torch.randn(len(tokens.positions), generator=generator)
        tokens = PackedTokens(tokens.hidden, tokens.layout, log_weight=weight)
    q, k, v = qkv(len(tokens.positions), seed)
    got, *_ = attend_in_bands(q, k, v, tokens, window, 0.3)
    assert not got.isnan().any()
    there = slice(None) if tokens.alive is None else tokens.alive  # what a dropped token computes nobody reads
    torch.testing.assert_close(
        got[there].double(), dense(q, k, v, tokens, window, 0.3)[there], rtol=0, atol=1e-5, check_dtype=False
    )


def test_gradients_are_those_of_dense_attention_and_reach_soft_weights() -> None:
    tokens, window = packed([70, 3, 41]), 5
    weight = torch.randn(len(tokens.positions), generator=torch.Generator().manual_seed(4))
    pull = torch.randn(len(weight), HEADS, SIZE, generator=torch.Generator().manual_seed(5))
    found = []
    for way in (attend_in_bands, dense):
        given_ = [x.requires_grad_() for x in (*qkv(len(weight)), weight.clone())]
        softly = PackedTokens(tokens.hidden, tokens.layout, log_weight=given_[3])
        out = way(given_[0], given_[1], given_[2], softly, window, 0.3)
        ((out if way is dense else out[0]) * pull).sum().backward()
        found.append([x.grad for x in given_])
    for got, expected in zip(*found, strict=True):
        assert got is not None
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5, check_dtype=False)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(40, 90), min_size=1, max_size=3),
    window=st.integers(0, 9),
    drops=st.sampled_from(["nothing", "physical", "simulated"]),
    wanted=st.sampled_from(
        [Wanted(mass=True), Wanted(diagonal=True), Wanted(mass=True, by_segment=True, diagonal=True)]
    ),
    together=st.sampled_from([1, bands.TOGETHER]),
    seed=st.integers(0, 9),
)
def test_evidence_is_that_of_whole_maps(
    lengths: list[int], window: int, drops: str, wanted: Wanted, together: int, seed: int
) -> None:
    """The way that reads each row's n x n has the same evidence, and the same gradients of it."""
    tokens = packed(lengths, simulated=drops == "simulated")
    generator = torch.Generator().manual_seed(seed)
    if drops != "nothing":
        keep = torch.rand(len(tokens.positions), generator=generator) < 0.6
        tokens = tokens.keep(keep | tokens.layout.protected)
    found = []
    for pays in (lambda *_, **__: True, lambda *_, **__: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bands, "pays", pays)
            patch.setattr(bands, "TOGETHER", together)
            q, k, v = (x.requires_grad_() for x in qkv(len(tokens.positions), seed))
            context, evidence = attend(q, k, v, tokens, window=window, wanted=wanted)
            parts = [context, *(x for x in (evidence.mass, evidence.diagonal, evidence.by_segment) if x is not None)]
            assert len(parts) == 1 + wanted.mass + wanted.diagonal + wanted.by_segment
            if tokens.alive is not None:
                parts = [x[tokens.alive] for x in parts]
            sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in parts).backward()  # type: ignore[union-attr]
            found.append([*parts, q.grad, k.grad, v.grad])
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=0, atol=2e-5)


def test_a_row_gets_in_a_batch_what_it_gets_alone() -> None:
    lengths, window = [33, 64, 1, 90], 4
    together = packed(lengths)
    q, k, v = qkv(sum(lengths))
    whole, *_ = attend_in_bands(q, k, v, together, window, 0.3)
    start = 0
    for n in lengths:
        at = slice(start, start + n)
        alone, *_ = attend_in_bands(q[:, at], k[:, at], v[:, at], packed([n]), window, 0.3)
        torch.testing.assert_close(alone, whole[at], rtol=0, atol=1e-6)
        start += n


@pytest.mark.parametrize(
    ("lengths", "window", "wanted", "taken"),
    [
        ([100, 20], 16, Wanted(mass=True), False),  # would be slower, as probabilities are read in smaller products
        ([300, 20], 16, Wanted(), True),
        ([300, 20], 16, Wanted(mass=True), True),
        ([300, 20], 16, Wanted(block=32), False),  # blocks are counted from a row's start
        ([20] * 9, 16, Wanted(), False),  # a band would be wider than the rows
        ([300, 20], None, Wanted(), False),
        ([300, 20], 400, Wanted(), False),
    ],
)
def test_long_rows_go_through_bands(
    lengths: list[int], window: int | None, wanted: Wanted, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(attention.bands, "attend_in_bands", lambda *a, **b: calls.append(a) or attend_in_bands(*a, **b))
    tokens = packed(lengths)
    q, k, v = qkv(sum(lengths))
    context, _ = attend(q, k, v, tokens, window=window, wanted=wanted)
    assert bool(calls) is taken
    expected = dense(q, k, v, tokens, 10**6 if window is None else window, SIZE**-0.5)
    torch.testing.assert_close(context.double(), expected, rtol=0, atol=1e-5)


def test_evidence_is_not_rounded_under_autocast() -> None:
    tokens = packed([300, 200])
    q, k, v = qkv(500)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mass = attend(q, k, v, tokens, window=8, wanted=Wanted(mass=True))[1].mass
    exact = attend(q, k, v, tokens, window=8, wanted=Wanted(mass=True))[1].mass
    assert mass is not None
    assert mass.dtype is torch.float32
    torch.testing.assert_close(mass[:300].sum(), torch.tensor(1.0), rtol=0, atol=1e-5)  # as sums of float32 do
    torch.testing.assert_close(mass, exact, rtol=0.02, atol=1e-5)


def test_bfloat16_learns_from_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = packed([300, 200])
    exact = qkv(500)
    expected = dense(*exact, tokens, 8, SIZE**-0.5)
    rounded = [x.to(torch.bfloat16).requires_grad_() for x in exact]
    flash = torch.nn.functional.scaled_dot_product_attention
    called: list[object] = []
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **b: called.append(a) or flash(*a, **b)
    )
    context, _ = attend(*rounded, tokens, window=8)
    assert not called
    context.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in rounded)
    torch.testing.assert_close(context.double(), expected, rtol=0, atol=0.05)
    with torch.no_grad():
        attend(*rounded, tokens, window=8)
    assert called


@pytest.mark.parametrize("method", ["attention-mass", "ltp", "random", "adapler"])
def test_a_long_text_through_modernbert_is_simulated_batched_and_alone_the_same(method: str) -> None:
    config = config_of("modernbert", max_position_embeddings=400)
    model = thresher.attach(build(config), settings_of(CONFIGS[method]))
    ids = torch.randint(5, 40, (2, 300), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 260:] = 0
    with torch.no_grad():
        batched = model(input_ids=ids, attention_mask=mask).logits
        with thresher.simulated_drops():
            simulated = model(input_ids=ids, attention_mask=mask).logits
        alone = torch.cat([model(input_ids=ids[i : i + 1, :n]).logits for i, n in enumerate((300, 260))])
    torch.testing.assert_close(simulated, batched, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, batched, rtol=0, atol=1e-5)


def test_bands_pay_where_rows_are_longer_than_they() -> None:
    assert bands.pays([400], 64)
    assert not bands.pays([190] * 8, 64)
    assert not bands.pays([96], 32)
    assert bands.pays([97], 32)
