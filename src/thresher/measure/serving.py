"""Wall-clock of exported models: many rows with one worker a core, and one request at a time on all cores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thresher.errors import OptionError
from thresher.exported.runner import Row, Runner
from thresher.measure.latency import Spread, Timing, paired, ratio, spread


@dataclass(frozen=True)
class Served:
    """One exported model over its rows. many: all of them at once, one worker a core. single: one after the other, each on
    all cores. requests: seconds of each of those, of all counted rounds. flops: packed with nothing dropped / spent."""

    many: Timing
    single: Timing
    requests: tuple[float, ...]
    rows: int
    tokens_per_row: float
    workers: int
    flops: float

    @property
    def rows_per_second(self) -> Spread:
        return spread(tuple(self.rows / seconds for seconds in self.many.rounds))

    def latency(self, quantile: float) -> float:
        """Seconds of one request."""
        return float(np.quantile(self.requests, quantile))


@dataclass(frozen=True)
class Gain:
    """How many times faster one exported model is than another, many rows at once and one request at a time."""

    many: Spread
    single: Spread


def gain(baseline: Served, other: Served) -> Gain:
    """Both from one call of `serve`."""
    return Gain(ratio(baseline.many, other.many), ratio(baseline.single, other.single))


def serve(
    models: Mapping[str, tuple[Runner, Sequence[Row]]],
    *,
    rounds: int = 7,
    on_round: Callable[[int], object] | None = None,
) -> dict[str, Served]:
    """Time every runner on its rows (token ids), both ways; rounds of several runners are interleaved.

    on_round: called after each round of either way, warm-up included (progress bars): 2 * (rounds + 1) times.
    Raises OptionError when there are no rows.
    """
    if not models or not all(len(rows) for _, rows in models.values()):
        raise OptionError("Timing needs at least 1 row.")
    outputs = {name: runner.run(rows) for name, (runner, rows) in models.items()}
    requests: dict[str, list[float]] = {name: [] for name in models}

    def at_once(name: str) -> Callable[[], object]:
        runner, rows = models[name]
        return lambda: runner.run(rows)

    def one_by_one(name: str) -> Callable[[], None]:
        runner, rows = models[name]

        def once() -> None:
            for row in rows:
                begun = time.perf_counter()
                runner.run([row])
                requests[name].append(time.perf_counter() - begun)

        return once

    many = paired({name: at_once(name) for name in models}, rounds=rounds, on_round=on_round)
    single = paired({name: one_by_one(name) for name in models}, rounds=rounds, on_round=on_round)
    return {
        name: Served(
            many[name],
            single[name],
            tuple(requests[name][len(rows) :]),  # without the warm-up
            len(rows),
            sum(len(output.dropped_at) for output in outputs[name]) / len(rows),
            runner.workers,
            runner.speedup(outputs[name]),
        )
        for name, (runner, rows) in models.items()
    }


__all__ = ["Gain", "Served", "gain", "serve"]
