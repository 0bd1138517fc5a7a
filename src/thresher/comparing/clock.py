"""Wall-clock of what a comparison found: each model against itself with nothing dropped, in paired rounds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thresher.measure.latency import Spread, compare

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Clock:
    """How wall-clock is taken: of the first `rows` judged rows, in batches, over so many rounds."""

    rows: int = 128
    batch_size: int = 32
    rounds: int = 7


def wall_clock(model: Any, rows: datasets.Dataset, clock: Clock) -> dict[str, Any]:
    """The model as it is set against itself packed with nothing dropped, in paired rounds; and apart from that what leaving
    out padding gains, and what faster kernels do. Each a median with its quartiles."""
    few = rows.select(range(min(clock.rows, len(rows))))
    found = compare(model, few, clock.batch_size, clock.rounds)
    spreads: dict[str, Spread] = {
        "measured": found.measured,
        "padding_only": found.padding_only,
        "kernels": found.kernels,
        "over_sorted": found.over_sorted,
    }
    about = {"rows": found.rows, "threads": found.threads, "device": found.device, "flops": found.flops}
    about |= {"batch_size": clock.batch_size, "rounds": clock.rounds, "tokens_per_row": found.tokens_per_row}
    return {**{name: dataclasses.asdict(spread) for name, spread in spreads.items()}, **about}


__all__ = ["Clock", "wall_clock"]
