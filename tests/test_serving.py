"""Timing exported models: whose seconds are counted, and what is made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from thresher.errors import OptionError
from thresher.exported.runner import Output
from thresher.measure.serving import gain, serve

ROWS = [{"input_ids": [1] * n} for n in (3, 5, 4)]


class Pretend:
    """A runner of which only the calls matter."""

    workers = 2

    def __init__(self, calls: list[tuple[str, int]], name: str) -> None:
        self.calls, self.name = calls, name

    def run(self, rows: Any) -> list[Output]:
        self.calls.append((self.name, len(rows)))
        return [Output(np.zeros(2, np.float32), np.zeros(len(row["input_ids"]), np.int64), 6) for row in rows]

    def speedup(self, outputs: list[Output]) -> float:
        assert len(outputs) == 3
        return 2.0


def test_rounds_are_interleaved_and_the_warm_up_is_not_counted() -> None:
    calls: list[tuple[str, int]] = []
    rounds: list[int] = []
    models: Any = {name: (Pretend(calls, name), ROWS) for name in "ab"}
    served = serve(models, rounds=2, on_round=rounds.append)
    assert len(rounds) == 2 * 3
    # Once for the answers, once to warm up, and two rounds.
    assert "".join(name for name, rows in calls if rows == 3) == "ab" + "ba" + "ab" + "ba"
    assert [rows for _, rows in calls].count(1) == 2 * 3 * 3
    one = served["a"]
    assert (len(one.requests), len(one.many.rounds), len(one.single.rounds)) == (6, 2, 2)
    assert (one.rows, one.tokens_per_row, one.workers, one.flops) == (3, 4.0, 2, 2.0)
    assert one.rows_per_second.median == pytest.approx(np.median([3 / s for s in one.many.rounds]))
    assert min(one.requests) <= one.latency(0.5) <= one.latency(0.95) <= max(one.requests)
    found = gain(served["b"], one)
    assert found.many.median == pytest.approx(
        np.median([b / a for a, b in zip(one.many.rounds, served["b"].many.rounds, strict=True)])
    )


def test_no_rows() -> None:
    with pytest.raises(OptionError, match="at least 1 row"):
        serve({"a": (Pretend([], "a"), [])})  # type: ignore[dict-item]
    with pytest.raises(OptionError, match="at least 1 row"):
        serve({})
