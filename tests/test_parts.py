"""Scores and selection rules against plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.evidence import Evidence
from thresher.packed import PackedTokens
from thresher.parts import rules, scores

NONE = Evidence()
score_values = st.sampled_from([-1.0, 0.0, 0.25, 0.25, 0.5, 3.0])  # few values, so that ties happen


def packed(
    lengths: Sequence[int], *, width: int | None = None, shift: int = 0, protected: Any = None, simulated: bool = False
) -> PackedTokens:
    width = width or max(lengths) + shift
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, shift : shift + n] = True
    safe = torch.zeros_like(mask)
    for row, column in protected or ():
        safe[row, column + shift] = True
    return PackedTokens.pack(torch.zeros(*mask.shape, 1), mask, protected=safe, simulated=simulated)


@st.composite
def scored(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]], list[list[bool]]]:
    """Scores, protected and alive flags, row by row; the first of a row is protected and alive."""
    values, safe, alive = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(1, 8))
        values.append(draw(st.lists(score_values, min_size=n, max_size=n)))
        safe.append([True, *draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))])
        alive.append([s or draw(st.booleans()) for s in safe[-1]])
    return values, safe, alive


def ranks_by_sorting(values: list[float], safe: list[bool], alive: list[bool]) -> list[int]:
    """Protected first, then by falling score, dead last; a tie goes to the earlier one."""

    def key(i: int) -> tuple[float, int]:
        return (-math.inf if safe[i] and alive[i] else math.inf if not alive[i] else -values[i], i)

    order = sorted(range(len(values)), key=key)
    return [order.index(i) for i in range(len(values))]


def as_tokens(case: tuple[list[list[float]], list[list[bool]], list[list[bool]]]) -> tuple[PackedTokens, torch.Tensor]:
    values, safe, alive = case
    protected = [(r, c) for r, flags in enumerate(safe) for c, flag in enumerate(flags) if flag]
    tokens = packed([len(v) for v in values], protected=protected, simulated=True)
    tokens = tokens.keep(torch.tensor([flag for flags in alive for flag in flags]))
    return tokens, torch.tensor([v for row in values for v in row])


@given(scored())
def test_ranks_are_places_after_sorting(case: Any) -> None:
    tokens, score = as_tokens(case)
    expected = [rank for row in zip(*case, strict=True) for rank in ranks_by_sorting(*row)]
    assert rules.ranks(score, tokens).tolist() == expected


@given(scored(), st.sampled_from([0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0]), st.integers(1, 3))
def test_keep_fraction_keeps_the_best_of_the_original_length(case: Any, fraction: float, minimum: int) -> None:
    tokens, score = as_tokens(case)
    got = rules.keep_fraction(score, tokens, fraction, minimum).split(tokens.layout.sizes)
    for mask, values, safe, alive in zip(got, *case, strict=True):
        count = max(minimum, round(len(values) * fraction))  # these fractions are exact, and so are their halves
        assert mask.tolist() == [r < count for r in ranks_by_sorting(values, safe, alive)]


@pytest.mark.parametrize(
    ("length", "fraction", "count"),
    [
        (10, 0.44, 4),
        (10, 0.46, 5),
        (3, 0.1, 1),
        (1, 0.01, 1),
        (7, 1.0, 7),
        (100, 0.333, 33),
        (2, 0.75, 2),
        (6, 0.25, 2),
    ],
)
def test_keep_fraction_rounds_and_keeps_at_least_one(length: int, fraction: float, count: int) -> None:
    tokens = packed([length])
    assert int(rules.keep_fraction(torch.arange(float(length)), tokens, fraction).sum()) == count


def test_the_fraction_is_of_the_original_length_not_of_what_is_left() -> None:
    tokens = packed([8, 4]).keep(torch.tensor([True, True, True, True, False, False, True, True] + [True] * 4))
    mask = rules.keep_fraction(torch.arange(10.0), tokens, 0.5)
    assert [int(m.sum()) for m in mask.split(tokens.layout.sizes)] == [4, 2]


@given(scored(), st.integers(1, 9))
def test_keep_count(case: Any, count: int) -> None:
    tokens, score = as_tokens(case)
    got = rules.keep_count(score, tokens, count).split(tokens.layout.sizes)
    for mask, values, safe, alive in zip(got, *case, strict=True):
        assert mask.tolist() == [r < count for r in ranks_by_sorting(values, safe, alive)]


def test_keep_above_includes_the_threshold() -> None:
    assert rules.keep_above(torch.tensor([0.1, 0.5, 0.9]), 0.5).tolist() == [False, True, True]
    assert rules.keep_above(torch.tensor([0.5]), torch.tensor(0.6)).tolist() == [False]


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), st.integers(1, 16))
def test_interpolate_is_piecewise_linear_in_depth(curve: list[float], layers: int) -> None:
    curve = sorted(curve, reverse=True)
    got = rules.interpolate(curve, layers)
    assert len(got) == layers
    assert got[-1] == pytest.approx(curve[-1])
    assert all(a >= b - 1e-12 for a, b in pairwise(got))
    for layer, value in enumerate(got, start=1):
        depth = layer / layers * len(curve)  # counted in layers of the curve, 1 is its first
        if depth <= 1:
            assert value == pytest.approx(curve[0])
        else:
            below = min(int(depth + 1e-9), len(curve))
            above = min(below + 1, len(curve))
            share = depth - below
            assert value == pytest.approx(curve[below - 1] + share * (curve[above - 1] - curve[below - 1]), abs=1e-9)


@pytest.mark.parametrize(
    ("curve", "layers", "expected"),
    [
        ((0.8, 0.4), 2, (0.8, 0.4)),
        ((0.8, 0.4), 4, (0.8, 0.8, 0.6, 0.4)),
        ((0.9, 0.6, 0.3), 1, (0.3,)),
        ((0.8, 0.6, 0.4, 0.2), 2, (0.6, 0.2)),
    ],
)
def test_interpolate_by_hand(curve: tuple[float, ...], layers: int, expected: tuple[float, ...]) -> None:
    assert rules.interpolate(curve, layers) == pytest.approx(expected)


def test_first_and_last_prefer_their_end() -> None:
    tokens = packed([4, 2], shift=1)
    assert rules.ranks(scores.first(tokens, NONE), tokens).tolist() == [0, 1, 2, 3, 0, 1]
    assert rules.ranks(scores.last(tokens, NONE), tokens).tolist() == [0, 3, 2, 1, 0, 1]


@given(scored())
def test_relative_divides_by_the_rows_best_living_score(case: Any) -> None:
    case = ([[abs(v) for v in row] for row in case[0]], case[1], case[2])
    tokens, score = as_tokens(case)
    got = scores.relative(score, tokens).split(tokens.layout.sizes)
    for found, values, alive in zip(got, case[0], case[2], strict=True):
        top = max(v for v, a in zip(values, alive, strict=True) if a)
        for value, raw, living in zip(found.tolist(), values, alive, strict=True):
            if living:
                assert value == pytest.approx(raw / top if top else 0.0)


def test_random_depends_on_seed_place_and_length_alone() -> None:
    lengths = (6, 9, 1, 6)
    everyone = scores.random(packed(lengths), NONE)
    at = 0
    for n in lengths:
        for shift in (0, 3):
            assert torch.equal(scores.random(packed([n], shift=shift, width=20), NONE), everyone[at : at + n])
        at += n
    assert not torch.equal(scores.random(packed([6]), NONE, seed=1), everyone[:6])
    assert not torch.equal(scores.random(packed([7]), NONE)[:6], everyone[:6])
    again = scores.random(packed(lengths), NONE)
    assert torch.equal(again, everyone)


def test_random_of_what_is_left_is_what_it_was() -> None:
    tokens = packed([8, 5], shift=2)
    before = scores.random(tokens, NONE)
    keep = torch.tensor([i % 3 != 1 for i in range(13)])
    left = tokens.keep(keep)
    assert torch.equal(scores.random(left, NONE), before[keep | tokens.layout.protected])


def test_random_is_spread_and_has_no_order() -> None:
    score = scores.random(packed([400]), NONE)
    assert len(set(score.tolist())) > 395
    order = torch.arange(400.0)
    assert abs(float(torch.corrcoef(torch.stack([score, order]))[0, 1])) < 0.15
    assert abs(float(torch.corrcoef(torch.stack([score[1:], score[:-1]]))[0, 1])) < 0.15
    other = scores.random(packed([400]), NONE, seed=1)
    assert abs(float(torch.corrcoef(torch.stack([score, other]))[0, 1])) < 0.15
    chosen = score.argsort(descending=True)[:200]
    assert 160 < float(chosen.float().mean()) < 240


def test_every_named_score_gives_one_number_a_token() -> None:
    tokens = packed([4, 3])
    evidence = Evidence(mass=torch.rand(7), diagonal=torch.rand(7))
    for name, (score, wanted) in scores.SCORES.items():
        value = score(tokens, evidence)
        assert (value.shape, value.dtype) == ((7,), torch.float32), name
        assert bool(wanted) == name.startswith("attention")
    assert torch.equal(scores.attention_mass(tokens, evidence), evidence.mass)  # type: ignore[arg-type]
    counts = torch.tensor([4.0] * 4 + [3.0] * 3)
    expected = evidence.mass - evidence.diagonal / counts  # type: ignore[operator]
    torch.testing.assert_close(scores.attention_mass_off_diagonal(tokens, evidence), expected)
