"""Paired timing with a clock of our own, and the comparison of one model with itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import thresher
from helpers import dataset, make
from thresher.errors import OptionError
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
    assert set(found.timings) == {"stock, padded", "stock, sorted", "packed", "thresher"}
    assert found.flops > 1.2
    assert found.tokens_per_row == sum(map(len, rows["input_ids"])) / 7
    assert found.padding_only == ratio(found.timings["stock, padded"], found.timings["packed"])
    assert found.measured == ratio(found.timings["packed"], found.timings["thresher"])
    assert found.over_sorted == ratio(found.timings["stock, sorted"], found.timings["thresher"])
    assert (found.rows, found.batch_size, found.device) == (7, 3, "cpu")
    assert found.threads >= 1


@pytest.mark.parametrize("head", ["base", "token", "question-answering"])
def test_compare_any_head_without_a_policy(head: str) -> None:
    found = compare(thresher.attach(make("bert", head)), dataset(4, labels=None), batch_size=2, rounds=1)
    assert found.flops == 1.0


def test_compare_refuses() -> None:
    with pytest.raises(OptionError, match="nothing attached"):
        compare(make("bert"), dataset(2))
    with pytest.raises(OptionError, match="batch size"):
        compare(thresher.attach(make("bert")), dataset(2), batch_size=0)
