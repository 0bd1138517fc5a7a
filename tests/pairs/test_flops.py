"""FLOPs of scoring, against sums written out by hand for two candidates and a query of five tokens."""

from __future__ import annotations

from typing import Any

import pytest

import thresher
from pairs.scoring import KINDS, scorer
from thresher.pairs import pair_flops

D, WIDE, LAYERS, N = 32, 48, 3, 5  # hidden, feed-forward, layers, tokens of the query with [CLS] and [SEP]
SIZES = (4, 6)  # tokens of the candidates, special ones included
QUERY, TEXTS = [20, 21, 22], [[30, 31], [40, 41, 42, 43]]


def layer(n: int) -> int:
    projections = 4 * 2 * n * D * D  # query, key, value and output
    attention = 2 * 2 * n * n * D  # logits and context, all heads together
    return projections + attention + 2 * 2 * n * D * WIDE


def mix(k: int, use_h: bool = True, use_e: bool = True, attended: bool = True) -> int:
    """One candidate at one interaction layer, product by product."""
    total = 2 * k * D * (3 * D if use_e else D)  # Q' (K' and V')
    total += 2 * k * D * N  # logits over the query's keys
    if use_e:
        total += 2 * k * k * D + 2 * k * k * D + 2 * k * N * D  # own logits, own values, the query's values
    if use_h:
        total += 2 * N * D + (2 * N * D if attended else 0)  # values, and states under the same attention
        total += 2 * 3 * D * D  # gate
    rows = k * use_e + use_h
    return total + rows * (2 * D * D + 2 * D * WIDE + 2 * WIDE * D)


KEYS_AND_VALUES = 2 * 2 * N * D * D
EXPECTED: dict[str, tuple[dict[str, Any], int, int]] = {
    "dual": ({}, LAYERS * layer(N), 2 * 2 * D),
    "poly": ({"m": 6}, LAYERS * layer(N) + 2 * 2 * 6 * N * D, 2 * (2 * 2 * 6 * D + 2 * D)),
    "colbert": ({"size": 8}, LAYERS * layer(N) + 2 * N * D * 8, 2 * sum(SIZES) * N * 8),
    "virt": ({}, LAYERS * layer(N), 2 * sum(SIZES) * N * D + 2 * sum(SIZES) * D + 2 * (2 * N * D + 2 * D)),
    # Nine words and [CLS], [SEP], [SEP]: the query's three and each candidate's; a candidate brings its own [SEP].
    "deformer": ({"lower": 2}, 2 * layer(N), layer(N + 3) + layer(N + 5)),
    "cross": ({}, 0, LAYERS * (layer(3 + 2 + 3) + layer(3 + 4 + 3))),
    "mixencoder-a": ({"k": 1, "layers": (-1,)}, 2 * layer(N) + KEYS_AND_VALUES, 2 * (mix(1) + 2 * D)),
    "mixencoder-b": (
        {"k": 1, "layers": (-3, -2, -1)},
        2 * layer(N) + 3 * KEYS_AND_VALUES,
        2 * (3 * mix(1) + 2 * D),
    ),
    "mixencoder-c": (
        {"k": 2, "layers": (-3, -2, -1)},
        2 * layer(N) + 3 * KEYS_AND_VALUES,
        2 * (3 * mix(2) + 2 * D),
    ),
    "mixencoder-without-h": (
        {"k": 2, "layers": (-1,), "use_h": False},
        3 * layer(N) + KEYS_AND_VALUES,
        2 * (mix(2, use_h=False) + 2 * D),
    ),
    "mixencoder-without-e": (
        {"k": 2, "layers": (-2,), "use_e": False, "residual": "previous"},
        layer(N) + KEYS_AND_VALUES,
        2 * (mix(2, use_e=False, attended=False) + 2 * D),
    ),
    "mixencoder-dual": (
        {"k": 1, "layers": (-1,), "strategy": "M", "start": "dual"},
        3 * layer(N) + KEYS_AND_VALUES,
        2 * (mix(1) + 2 * D),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_by_hand(name: str) -> None:
    settings, reading, matching = EXPECTED[name]
    made = scorer(name.partition("-")[0], **settings)
    found = pair_flops(made, QUERY, TEXTS)
    assert (found.reading, found.matching) == (reading, matching)
    assert found.total == reading + matching
    assert pair_flops(made, QUERY, made.encode_candidates(TEXTS)) == found


def test_every_scorer_is_counted() -> None:
    assert {name.partition("-")[0] for name in EXPECTED} == set(KINDS)


def test_terms_are_counted() -> None:
    plain, made = scorer("dual"), scorer("dual", lexical=4)
    assert pair_flops(made, QUERY, TEXTS).total - pair_flops(plain, QUERY, TEXTS).total == 2 * len(TEXTS) * 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_costs_less_and_its_own_work_is_counted(kind: str) -> None:
    made = scorer(kind)
    before = pair_flops(made, QUERY, TEXTS)
    thresher.attach(made, thresher.AttentionMass(retention=(0.5, 0.4, 0.3)))
    after = pair_flops(made, QUERY, TEXTS)
    assert after.total < before.total
    thresher.attach(made, thresher.LTP(threshold=1e-9))
    assert pair_flops(made, QUERY, TEXTS).total > before.total  # scores, and nothing dropped
