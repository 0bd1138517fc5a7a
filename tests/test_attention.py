"""Attention over a ragged batch, and its evidence, against loops over rows, heads, queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import thresher.attention as attention
from thresher import cpu
from thresher.attention import attend
from thresher.evidence import Wanted
from thresher.packed import PackedTokens

HEADS, SIZE = 3, 8
RAGGED, EQUAL, ONES = (5, 1, 9, 3), (6, 6, 6), (1, 1)
LENGTHS = [RAGGED, EQUAL, ONES, (7,)]


def packed(lengths: Sequence[int], *, simulated: bool = False, gaps: int = 1) -> PackedTokens:
    """Tokens whose positions are `gaps` apart, the second half of every row in segment 1."""
    width = max(lengths) * gaps
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    segments = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, n in enumerate(lengths):
        mask[row, : n * gaps : gaps] = True
        segments[row, (n // 2) * gaps :] = 1
    return PackedTokens.pack(torch.zeros(len(lengths), width, 1), mask, segments=segments, simulated=simulated)


def qkv(tokens: PackedTokens, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = len(tokens.positions)
    return tuple(torch.randn(HEADS, total, SIZE, generator=generator).to(dtype) for _ in range(3))  # type: ignore[return-value]


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: PackedTokens,
    *,
    scale: float | None = None,
    window: int | None = None,
    learned: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The context [T, H, d] and each row's probabilities [H, n, n], in float64, one scalar at a time where it matters.

    learned: [H, 2 * REACH + 1], added to a logit by how far the key stands behind the query.
    """
    query, key, value = query.double(), key.double(), value.double()
    scale = scale if scale is not None else SIZE**-0.5
    positions = tokens.positions.tolist()
    out, maps, start = [], [], 0
    for n in tokens.layout.sizes:
        rows = []
        context = torch.zeros(n, HEADS, SIZE, dtype=torch.float64)
        for h in range(HEADS):
            lines = []
            for i in range(start, start + n):
                logits = []
                for j in range(start, start + n):
                    logit = (query[h, i] * key[h, j]).sum() * scale
                    if tokens.log_weight is not None:
                        logit = logit + tokens.log_weight[j]
                    if learned is not None:
                        logit = logit + learned[h, REACH + positions[j] - positions[i]]
                    if window is not None and abs(positions[i] - positions[j]) > window:
                        logit = logit * 0 - math.inf
                    logits.append(logit)
                line = torch.stack(logits)
                top = line.max()
                line = torch.zeros_like(line) if top == -math.inf else (line - top).exp() / (line - top).exp().sum()
                lines.append(line)
                context[i - start, h] = line @ value[h, start : start + n]
            rows.append(torch.stack(lines))
        maps.append(torch.stack(rows))
        out.append(context)
        start += n
    return torch.cat(out), maps


REACH = 500


def learned_bias(seed: int = 0) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A table for `naive`, and the function for `attend` that reads it."""
    table = torch.randn(HEADS, 2 * REACH + 1, generator=torch.Generator().manual_seed(seed)) * 2

    def bias(positions: Tensor) -> Tensor:
        apart = (positions[..., None, :] - positions[..., :, None]).long()
        return torch.stack([row[REACH + apart] for row in table], -3)

    return table, bias


def close(got: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got is not None
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=tolerance)


def weighted(tokens: PackedTokens) -> PackedTokens:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(len(tokens.positions), generator=generator)
    return PackedTokens(tokens.hidden, tokens.layout, log_weight=weight)


def halved(tokens: PackedTokens) -> PackedTokens:
    """Every third token but the rows' first dropped."""
    return tokens.keep(torch.arange(len(tokens.positions)) % 3 != 1)


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(mass=True), Wanted(block=4)], ids=["nothing", "mass", "blocks"])
@pytest.mark.parametrize("window", [None, 2], ids=["global", "window"])
@pytest.mark.parametrize("weights", [False, True], ids=["plain", "log_weight"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_context_is_dense_attention_row_by_row(
    lengths: Sequence[int], weights: bool, window: int | None, wanted: Wanted
) -> None:
    tokens = packed(lengths)
    tokens = weighted(tokens) if weights else tokens
    q, k, v = qkv(tokens)
    context, _ = attend(q, k, v, tokens, window=window, wanted=wanted)
    expected, _ = naive(q, k, v, tokens, window=window)
    close(context, expected)


def test_every_branch_of_the_kernel_choice_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the parametrisations: they cover rows of equal length, rows one by one, and short rows at once."""
    seen: list[str] = []
    for name in ("_equal_lengths", "_row_by_row", "_at_once"):
        original = getattr(attention, name)

        def spy(*args: Any, original: Any = original, name: str = name) -> Any:
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(attention, name, spy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def ways(slow: bool) -> list[str]:
        seen.clear()
        monkeypatch.setattr(cpu, "mkl_is_slow", lambda: slow)
        for tokens, wanted in (
            (packed(EQUAL), Wanted()),
            (packed(RAGGED), Wanted()),
            (packed(RAGGED), Wanted(block=4)),
            (weighted(packed(RAGGED)), Wanted(mass=True)),
        ):
            attend(*qkv(tokens), tokens, wanted=wanted)
        return seen

    assert ways(slow=True) == ["_equal_lengths", "_row_by_row", "_at_once", "_row_by_row"]
    assert ways(slow=False) == ["_at_once", "_at_once", "_at_once", "_row_by_row"]


@pytest.mark.parametrize("simulated", [False, True], ids=["packed", "simulated"])
@pytest.mark.parametrize(
    "wanted",
    [Wanted(), Wanted(mass=True), Wanted(mass=True, diagonal=True, by_segment=True, block=4), Wanted(block=4)],
    ids=["nothing", "mass", "everything", "blocks"],
)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_short_rows_at_once_are_dense_attention(
    lengths: Sequence[int], wanted: Wanted, simulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = packed(lengths, simulated=simulated)
    q, k, v = qkv(tokens, seed=2)
    context, evidence = attention._at_once(q, k, v, tokens, 0.3, wanted)
    expected, maps = naive(q, k, v, tokens, scale=0.3)
    close(context, expected)
    by_loops = evidence_by_loops(maps, tokens, 4)
    for name in ("mass", "diagonal", "by_segment", "blocks"):
        found, asked = getattr(evidence, name), getattr(wanted, "block" if name == "blocks" else name)
        assert (found is not None) == bool(asked)
        if asked:
            close(found, by_loops[name])


@pytest.mark.parametrize("weights", [False, True], ids=["plain", "log_weight"])
@pytest.mark.parametrize("window", [None, 300], ids=["global", "window"])  # too wide for bands
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
@pytest.mark.parametrize("slow", [False, True], ids=["mkl", "slow mkl"])
def test_a_few_heads_at_a_time_is_the_same(
    slow: bool, threads: int, window: int | None, weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long rows on the CPU take a way of their own, with gaps, weights and dead tokens; without evidence where torch's own
    products are slow."""
    tokens = packed((230, 7, 460), gaps=2)
    tokens = weighted(tokens) if weights else tokens
    q, k, v = qkv(tokens)
    everything = Wanted(mass=True, diagonal=True, by_segment=True, block=32)
    heads: list[int] = []
    original = cpu.attend_by_head
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu, "mkl_is_slow", lambda: slow)
    bare_too = ({1: [460], 2: [230, 460]} if slow else {1: [7], 2: [230, 7]}).get(threads, [])
    monkeypatch.setattr(attention, "all_at_once", lambda *_, **__: False)
    monkeypatch.setattr(
        attention,
        "attend_by_head",
        lambda q, *rest: [heads.append(q.shape[1]), original(q, *rest)][1],
    )
    context, evidence = attend(q, k, v, tokens, window=window, wanted=everything)
    assert heads == [230, 7, 460]
    bare, _ = attend(q, k, v, tokens, window=window)
    assert heads == [230, 7, 460, *bare_too]
    monkeypatch.setattr(attention, "heads_apart", lambda *_, **__: False)
    slow, expected = attend(q, k, v, tokens, window=window, wanted=everything)
    assert heads == [230, 7, 460, *bare_too]
    close(context, slow)
    close(bare, slow)
    for name in ("mass", "diagonal", "by_segment", "blocks"):
        close(getattr(evidence, name), getattr(expected, name))


@pytest.mark.parametrize("weights", ["plain", "log_weight", "simulated"])
@pytest.mark.parametrize("window", [None, 300], ids=["global", "window"])
@pytest.mark.parametrize("some", [1, 64, 100, 230])
@pytest.mark.parametrize("alone", [False, True], ids=["some heads", "one head"])
def test_some_queries_at_a_time_is_the_same(
    alone: bool, some: int, window: int | None, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows twice as long as that; no diagonal block is divided."""
    from thresher import evidence

    tokens = packed((230, 7, 460), gaps=2, simulated=weights == "simulated")
    tokens = weighted(tokens) if weights == "log_weight" else halved(tokens) if weights == "simulated" else tokens
    q, k, v = qkv(tokens)
    sums = Wanted(mass=True, diagonal=True, by_segment=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(cpu, "_alone", lambda n: alone and n > 7)
    monkeypatch.setattr(cpu, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(cpu, "LONG_FROM", {})
    found = attend(q, k, v, tokens, window=window, wanted=sums)[1]
    context, _ = attend(q, k, v, tokens, window=window, wanted=Wanted(mass=True, block=32))
    seen: list[tuple[int, ...]] = []
    original = evidence._RowEvidence.heads
    monkeypatch.setattr(
        evidence._RowEvidence,
        "heads",
        lambda self, p, asking=None: [seen.append(p.shape), original(self, p, asking)][1],
    )
    monkeypatch.setattr(cpu, "LONG_FROM", {1: 2 * some})
    monkeypatch.setattr(cpu, "QUERIES", {1: some})
    parts, now = attend(q, k, v, tokens, window=window, wanted=sums)
    assert {shape[1] for shape in seen if shape[2] == 460} == {x for x in (some, 460 % some) if x}
    assert sum(map(len, cpu.memory_for(q, [460]))) == 2 * some * 460  # one head's, of so long a row
    close(parts, context)
    for name in ("mass", "diagonal", "by_segment"):
        close(getattr(now, name), getattr(found, name))
    for block in (1, 8, 32, 48, 128):
        seen.clear()
        _, again = attend(q, k, v, tokens, window=window, wanted=Wanted(mass=True, block=block))
        step = max(some // block, 1) * block
        assert {shape[1] for shape in seen if shape[2] == 460} == {x for x in (min(step, 460), 460 % step) if x}
        monkeypatch.setattr(cpu, "LONG_FROM", {})
        _, whole = attend(q, k, v, tokens, window=window, wanted=Wanted(mass=True, block=block))
        monkeypatch.setattr(cpu, "LONG_FROM", {1: 2 * some})
        close(again.mass, whole.mass)
        close(again.blocks, whole.blocks)
    if tokens.log_weight is None:  # without evidence such rows go the same way
        close(attend(q, k, v, tokens, window=window)[0], context)


def by_matrices(query: Tensor, key: Tensor, value: Tensor, tokens: PackedTokens) -> Tensor:
    """[T, H, d]; row by row, but no slower to differentiate than rows are long."""
    rows = zip(*(x.split(tokens.layout.sizes, 1) for x in (query, key, value)), strict=True)
    contexts = [(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in rows]
    return torch.cat(contexts, 1).transpose(0, 1)


@pytest.mark.parametrize("learns", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("wanted", [Wanted(), Wanted(mass=True)], ids=["bare", "mass"])
def test_a_gradient_reaches_whichever_of_them_learns(learns: int, wanted: Wanted) -> None:
    tokens = packed((5, 470))
    qkv_ = qkv(tokens)
    one = qkv_[learns].requires_grad_()
    attend(*qkv_, tokens, wanted=wanted)[0].square().sum().backward()
    assert one.grad is not None
    got, one.grad = one.grad, None
    by_matrices(*qkv_, tokens).square().sum().backward()
    close(got, one.grad)


@pytest.mark.parametrize("lengths", [(30, 30), (30, 400)], ids=str)
def test_learning_in_bfloat16_is_learning(lengths: Sequence[int]) -> None:
    tokens = packed(lengths)
    exact = [x.requires_grad_() for x in qkv(tokens)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    by_matrices(*exact, tokens).square().sum().backward()
    context, _ = attend(*rounded, tokens)
    assert context.dtype is torch.bfloat16
    context.float().square().sum().backward()
    for wanted, got in zip(exact, rounded, strict=True):
        assert wanted.grad is not None
        assert got.grad is not None
        assert float((got.grad - wanted.grad).norm() / wanted.grad.norm()) < 0.02


def test_the_window_counts_original_positions() -> None:
    tokens = packed((6, 3), gaps=3)
    q, k, v = qkv(tokens)
    for window in (2, 3, 7):
        context, _ = attend(q, k, v, tokens, window=window)
        close(context, naive(q, k, v, tokens, window=window)[0])
    alone, _ = attend(q, k, v, tokens, window=2)  # nobody within reach but oneself
    close(alone, v.transpose(0, 1))


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_the_scale_is_the_callers(scale: float) -> None:
    for lengths in (EQUAL, RAGGED):
        tokens = packed(lengths)
        q, k, v = qkv(tokens)
        for wanted in (Wanted(), Wanted(mass=True), Wanted(block=4)):
            close(attend(q, k, v, tokens, scale=scale, wanted=wanted)[0], naive(q, k, v, tokens, scale=scale)[0])


@pytest.mark.parametrize("window", [None, 2], ids=["global", "window"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_simulated_drop_computes_what_a_physical_one_does(lengths: Sequence[int], window: int | None) -> None:
    hidden, gone = halved(packed(lengths, simulated=True)), halved(packed(lengths))
    q, k, v = qkv(hidden)
    assert hidden.alive is not None
    alive = hidden.alive
    wanted = Wanted(mass=True, diagonal=True, by_segment=True)
    got, evidence = attend(q, k, v, hidden, window=window, wanted=wanted)
    expected, there = attend(q[:, alive], k[:, alive], v[:, alive], gone, window=window, wanted=wanted)
    close(got[alive], expected)
    assert not got.isnan().any()
    for name in ("mass", "diagonal", "by_segment"):
        close(getattr(evidence, name)[alive], getattr(there, name))
    close(evidence.mass_off_diagonal(hidden)[alive], there.mass_off_diagonal(gone))
    assert evidence.mass is not None
    if window is None:
        assert evidence.mass[~alive].abs().sum() == 0
    close(attend(q, k, v, hidden, window=window)[0][alive], expected)


def test_a_simulated_drop_of_a_whole_window_gives_no_nan_to_anyone() -> None:
    tokens = packed((9,), simulated=True)
    keep = torch.tensor([True, False, False, False, False, False, False, False, True])
    tokens = tokens.keep(keep)
    q, k, v = (x.requires_grad_() for x in qkv(tokens))
    context, _ = attend(q, k, v, tokens, window=1)
    assert not context.isnan().any()
    context[keep].sum().backward()
    assert q.grad is not None
    assert not q.grad.isnan().any()


def evidence_by_loops(maps: list[Tensor], tokens: PackedTokens, block: int) -> dict[str, Tensor]:
    alive = [True] * len(tokens.positions) if tokens.alive is None else tokens.alive.tolist()
    segments = tokens.segments.tolist()
    mass, diagonal, off, by_segment, blocks, start = [], [], [], [], [], 0
    for probabilities in maps:
        n = probabilities.shape[1]
        queries = [i for i in range(n) if alive[start + i]]
        for j in range(n):
            mean = lambda who, j=j, a=probabilities: (  # noqa: E731
                sum(float(a[h, i, j]) for h in range(HEADS) for i in who) / (HEADS * max(len(who), 1))
            )
            mass.append(mean(queries))
            diagonal.append(mean([j]))
            off.append(sum(float(probabilities[h, i, j]) for h in range(HEADS) for i in queries if i != j))
            off[-1] /= HEADS * len(queries)
            by_segment.append([mean([i for i in queries if segments[start + i] == s]) for s in (0, 1)])
        for first in range(0, n, block):
            tile = torch.zeros(HEADS, block, block, dtype=torch.float64)
            size = min(block, n - first)
            tile[:, :size, :size] = probabilities[:, first : first + size, first : first + size]
            blocks.append(tile)
        start += n
    return {
        "mass": torch.tensor(mass),
        "diagonal": torch.tensor(diagonal),
        "off": torch.tensor(off),
        "by_segment": torch.tensor(by_segment),
        "blocks": torch.stack(blocks),
    }


@pytest.mark.parametrize("window", [None, 2], ids=["global", "window"])
@pytest.mark.parametrize("weights", [False, True], ids=["plain", "log_weight"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_evidence_is_what_loops_count(lengths: Sequence[int], weights: bool, window: int | None) -> None:
    tokens = packed(lengths)
    tokens = weighted(tokens) if weights else tokens
    q, k, v = qkv(tokens, seed=1)
    everything = Wanted(mass=True, diagonal=True, by_segment=True, block=4, full=True)
    _, evidence = attend(q, k, v, tokens, window=window, wanted=everything)
    _, maps = naive(q, k, v, tokens, window=window)
    expected = evidence_by_loops(maps, tokens, 4)
    for name in ("mass", "diagonal", "by_segment", "blocks"):
        close(getattr(evidence, name), expected[name])
        assert getattr(evidence, name).dtype == torch.float32
    close(evidence.mass_off_diagonal(tokens), expected["off"])
    assert evidence.full is not None
    assert len(evidence.full) == len(lengths)
    for got, probabilities in zip(evidence.full, maps, strict=True):
        close(got, probabilities)
    assert evidence.mass is not None
    for row in evidence.mass.split(tokens.layout.sizes):
        assert float(row.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("block", [1, 2, 4, 32])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_blocks_from_the_log_sum_exp_are_the_blocks_of_the_map(lengths: Sequence[int], block: int) -> None:
    tokens = packed(lengths)
    q, k, v = qkv(tokens, seed=2)
    q = q * 4  # far from uniform
    _, maps = naive(q, k, v, tokens)
    expected = evidence_by_loops(maps, tokens, block)["blocks"]
    _, flash = attend(q, k, v, tokens, wanted=Wanted(block=block))
    _, plain = attend(q, k, v, tokens, wanted=Wanted(block=block, mass=True))
    _, learning = attend(q.requires_grad_(), k, v, tokens, wanted=Wanted(block=block))
    for evidence in (flash, plain, learning):
        close(evidence.blocks, expected)
    assert flash.mass is None
    assert plain.mass is not None


EVERYTHING = Wanted(mass=True, diagonal=True, by_segment=True, block=4, full=True)


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(mass=True), EVERYTHING], ids=["nothing", "mass", "everything"])
@pytest.mark.parametrize("window", [None, 4], ids=["global", "window"])
@pytest.mark.parametrize("weights", [False, True], ids=["plain", "log_weight"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_position_bias_is_added_to_the_logits_by_original_positions(
    lengths: Sequence[int], weights: bool, window: int | None, wanted: Wanted
) -> None:
    tokens = halved(packed(lengths, gaps=2))
    tokens = weighted(tokens) if weights else tokens
    q, k, v = qkv(tokens)
    table, bias = learned_bias()
    context, evidence = attend(q, k, v, tokens, window=window, wanted=wanted, position_bias=bias)
    expected, maps = naive(q, k, v, tokens, window=window, learned=table)
    close(context, expected)
    loops = evidence_by_loops(maps, tokens, 4)
    for name in ("mass", "diagonal", "by_segment", "blocks"):
        if getattr(evidence, name) is not None:
            close(getattr(evidence, name), loops[name])
    if wanted.full:
        assert evidence.full is not None
        for got, probabilities in zip(evidence.full, maps, strict=True):
            close(got, probabilities)
    if max(lengths) > 1 and window is None:
        assert float((attend(q, k, v, tokens)[0] - context).abs().max()) > 0.05


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(mass=True)], ids=["nothing", "mass"])
@pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=str)
def test_a_position_bias_learns(lengths: Sequence[int], wanted: Wanted) -> None:
    tokens = packed(lengths)
    q, k, v = (x.requires_grad_() for x in qkv(tokens))
    pull = torch.randn(len(tokens.positions), HEADS, SIZE, generator=torch.Generator().manual_seed(9))
    table, bias = learned_bias()
    table.requires_grad_()
    context, evidence = attend(q, k, v, tokens, wanted=wanted, position_bias=bias)
    expected, maps = naive(q, k, v, tokens, learned=table)
    loss, reference = (context * pull).sum(), (expected * pull).sum()
    if wanted.mass:
        assert evidence.mass is not None
        loss = loss + (evidence.mass * pull[:, 0, 0]).sum()
        reference = reference + (torch.cat([a.mean((0, 1)) for a in maps]) * pull[:, 0, 0]).sum()
    for mine, other in zip(
        torch.autograd.grad(loss, (table, q, k, v)), torch.autograd.grad(reference, (table, q, k, v)), strict=True
    ):
        assert other.abs().sum() > 0
        close(mine, other, tolerance=2e-5)


def test_a_simulated_drop_under_a_position_bias() -> None:
    hidden, gone = halved(packed(RAGGED, simulated=True)), halved(packed(RAGGED))
    q, k, v = qkv(hidden)
    assert hidden.alive is not None
    alive = hidden.alive
    _, bias = learned_bias()
    for wanted in (Wanted(), Wanted(mass=True, diagonal=True, by_segment=True)):
        got, evidence = attend(q, k, v, hidden, wanted=wanted, position_bias=bias)
        expected, there = attend(q[:, alive], k[:, alive], v[:, alive], gone, wanted=wanted, position_bias=bias)
        close(got[alive], expected)
        for name in ("mass", "diagonal", "by_segment"):
            if getattr(there, name) is not None:
                close(getattr(evidence, name)[alive], getattr(there, name))


@pytest.mark.parametrize("threads", [1, 3])
def test_long_rows_under_a_position_bias(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = packed((230, 7, 460))
    q, k, v = qkv(tokens)
    _, bias = learned_bias()
    wanted = Wanted(mass=True, diagonal=True, by_segment=True, block=32)
    learning = q.clone().requires_grad_()  # takes the way on which all heads of a row stand in memory at once
    expected, there = attend(learning, k, v, tokens, wanted=wanted, position_bias=bias)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    context, evidence = attend(q, k, v, tokens, wanted=wanted, position_bias=bias)
    close(context, expected)
    close(attend(q, k, v, tokens, position_bias=bias)[0], expected)
    for name in ("mass", "diagonal", "by_segment", "blocks"):
        close(getattr(evidence, name), getattr(there, name))


def test_nothing_wanted_nothing_given() -> None:
    tokens = packed(RAGGED)
    _, evidence = attend(*qkv(tokens), tokens)
    assert evidence.mass is evidence.diagonal is evidence.by_segment is evidence.blocks is evidence.full is None
    _, evidence = attend(*qkv(tokens), tokens, wanted=Wanted(diagonal=True))
    assert evidence.diagonal is not None
    assert evidence.mass is None
    assert evidence.full is None
    assert not Wanted()
    assert Wanted(block=2)
    assert Wanted(full=True)


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(mass=True), Wanted(block=4)], ids=["nothing", "mass", "blocks"])
@pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=str)
def test_bfloat16_stays_near(lengths: Sequence[int], wanted: Wanted) -> None:
    tokens = packed(lengths)
    q, k, v = qkv(tokens, dtype=torch.bfloat16)
    context, evidence = attend(q, k, v, tokens, wanted=wanted)
    expected, maps = naive(q, k, v, tokens)
    assert context.dtype == torch.bfloat16
    close(context, expected, tolerance=0.03)
    if wanted.mass:
        assert evidence.mass is not None
        assert evidence.mass.dtype == torch.float32
        close(evidence.mass, evidence_by_loops(maps, tokens, 4)["mass"], tolerance=0.01)
    if wanted.block:
        close(evidence.blocks, evidence_by_loops(maps, tokens, 4)["blocks"], tolerance=0.02)


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(mass=True), Wanted(block=4)], ids=["nothing", "mass", "blocks"])
@pytest.mark.parametrize("window", [None, 2], ids=["global", "window"])
@pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=str)
def test_gradients_are_those_of_dense_attention(lengths: Sequence[int], window: int | None, wanted: Wanted) -> None:
    tokens = weighted(packed(lengths)) if window else packed(lengths)
    ours = [x.requires_grad_() for x in qkv(tokens)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    pull = torch.randn(len(tokens.positions), HEADS, SIZE, generator=torch.Generator().manual_seed(9))
    context, evidence = attend(*ours, tokens, window=window, wanted=wanted)
    expected, maps = naive(*theirs, tokens, window=window)
    loss, reference = (context * pull).sum(), (expected * pull).sum()
    if wanted.mass:  # evidence teaches too
        assert evidence.mass is not None
        loss = loss + (evidence.mass * pull[:, 0, 0]).sum()
        reference = reference + (torch.cat([a.mean((0, 1)) for a in maps]) * pull[:, 0, 0]).sum()
    loss.backward()
    reference.backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        close(mine.grad, other.grad, tolerance=2e-5)


def test_dropout_is_applied_and_spares_the_evidence() -> None:
    tokens = packed(RAGGED)
    q, k, v = qkv(tokens)
    sure, before = attend(q, k, v, tokens, wanted=Wanted(mass=True))
    for wanted in (Wanted(), Wanted(mass=True), Wanted(block=4)):
        torch.manual_seed(3)
        context, evidence = attend(q, k, v, tokens, dropout=0.5, wanted=wanted)
        assert float((context - sure).abs().max()) > 0.1
        if wanted.mass:
            close(evidence.mass, before.mass)  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(mass=True, diagonal=True), Wanted(block=4)], ids=str)
@pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=str)
def test_a_row_does_not_know_its_batch_mates(lengths: Sequence[int], wanted: Wanted) -> None:
    tokens = packed(lengths)
    q, k, v = qkv(tokens)
    context, evidence = attend(q, k, v, tokens, wanted=wanted)
    at, block_at = 0, 0
    for n in lengths:
        own = packed((n,))
        here = slice(at, at + n)
        alone, said = attend(q[:, here], k[:, here], v[:, here], own, wanted=wanted)
        close(context[here], alone, tolerance=1e-6)
        for name in ("mass", "diagonal"):
            if getattr(said, name) is not None:
                close(getattr(evidence, name)[here], getattr(said, name), tolerance=1e-6)
        if said.blocks is not None and evidence.blocks is not None:
            close(evidence.blocks[block_at : block_at + len(said.blocks)], said.blocks, tolerance=1e-6)
            block_at += len(said.blocks)
        at += n
