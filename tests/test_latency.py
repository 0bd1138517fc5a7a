"""Paired timing with a clock of our own, and the comparison of one model with itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import thresher
from helpers import dataset, make
from thresher.errors import OptionError
from thresher.measure import latency
from thresher.measure.latency import Timing, compare, paired, ratio, spread


class Clock:
    """A clock that moves only when a variant says how long it takes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def variant(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.ran.append(name)
            self.now += seconds

        return run


def test_every_variant_runs_in_every_round_in_rotating_order() -> None:
    clock = Clock()
    timings = paired({name: clock.variant(name, 1.0) for name in "abc"}, rounds=4, warmup=1, clock=clock)
    assert "".join(clock.ran) == "cab" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(timing.rounds) for name, timing in timings.items()} == {"a": 4, "b": 4, "c": 4}


def test_warm_up_is_not_counted() -> None:
    clock = Clock()
    first = iter([100.0, 2.0, 2.0])

    def warms_up() -> None:
        clock.now += next(first)

    assert paired({"a": warms_up}, rounds=2, clock=clock)["a"].rounds == (2.0, 2.0)


def test_rounds_are_reported_as_they_are_done() -> None:
    done: list[int] = []
    paired({"a": lambda: None}, rounds=2, warmup=1, on_round=done.append)
    assert done == [1, 2, 3]


def test_the_ratio_is_taken_within_a_round() -> None:
    # The machine slows down tenfold in the middle; the ratio does not notice.
    found = ratio(Timing((2.0, 20.0, 2.0)), Timing((1.0, 10.0, 1.0)))
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)


def test_spread_is_median_and_quartiles() -> None:
    found = spread((4.0, 1.0, 3.0, 2.0, 5.0))
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, -1)])
def test_no_rounds(rounds: int, warmup: int) -> None:
    with pytest.raises(OptionError, match="at least 1 round"):
        paired({"a": lambda: None}, rounds=rounds, warmup=warmup)


def test_compare() -> None:
    rows = dataset(7)
    model = thresher.attach(make("bert"), thresher.AttentionMass(retention=(0.8, 0.5, 0.3)))
    found = compare(model, rows, batch_size=3, rounds=2)
    arrival = {"stock, padded", "packed, torch's kernels", "packed", "thresher"}
    assert set(found.timings) == arrival | {"stock, sorted", "thresher, sorted"}
    assert found.flops > 1.2
    assert found.tokens_per_row == sum(map(len, rows["input_ids"])) / 7
    assert found.padding_only == ratio(found.timings["stock, padded"], found.timings["packed, torch's kernels"])
    assert found.kernels == ratio(found.timings["packed, torch's kernels"], found.timings["packed"])
    assert found.measured == ratio(found.timings["packed"], found.timings["thresher"])
    assert found.over_sorted == ratio(found.timings["stock, sorted"], found.timings["thresher, sorted"])
    assert (found.rows, found.batch_size, found.device) == (7, 3, "cpu")
    assert found.threads >= 1


def test_every_ratio_is_of_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a gain would hold what sorting the rows gains."""
    ran: dict[str, list[list[int]]] = {}
    real = latency.collate

    def one_round(variants: dict[str, Callable[[], None]], **options: Any) -> dict[str, Timing]:
        for name, variant in variants.items():
            order = ran.setdefault(name, [])

            def watched(rows: Any, index: list[int], *rest: Any, order: list[list[int]] = order) -> Any:
                order.append(index)
                return real(rows, index, *rest)

            monkeypatch.setattr(latency, "collate", watched)
            variant()
        return {name: Timing((prime,)) for name, prime in zip(variants, (2.0, 3.0, 5.0, 7.0, 11.0, 13.0), strict=False)}

    monkeypatch.setattr(latency, "paired", one_round)
    rows = dataset(7)
    found = compare(thresher.attach(make("bert"), "attention-mass"), rows, batch_size=3)
    name_of = {timing.median: name for name, timing in found.timings.items()}
    for gain in (found.padding_only, found.kernels, found.measured, found.over_sorted):
        ((baseline, other),) = [(a, b) for a in name_of for b in name_of if a != b and a / b == gain.median]
        assert ran[name_of[baseline]] == ran[name_of[other]]
    assert ran["stock, padded"] == [[0, 1, 2], [3, 4, 5], [6]]
    lengths = [len(rows[i]["input_ids"]) for index in ran["stock, sorted"] for i in index]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("head", ["base", "token", "question-answering"])
def test_compare_any_head_without_a_policy(head: str) -> None:
    found = compare(thresher.attach(make("bert", head)), dataset(4, labels=None), batch_size=2, rounds=1)
    assert found.flops == 1.0


def test_compare_refuses() -> None:
    with pytest.raises(OptionError, match="nothing attached"):
        compare(make("bert"), dataset(2))
    with pytest.raises(OptionError, match="batch size"):
        compare(thresher.attach(make("bert")), dataset(2), batch_size=0)
