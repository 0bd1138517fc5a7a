"""Wall-clock as pairs: every variant runs in every round, in rotating order, so drift hits all of them alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch

from thresher.engine import keep_everything, stock
from thresher.errors import OptionError
from thresher.linears import plain_kernels
from thresher.measure.flops import kept_by_layer, skimming_speedup, speedup
from thresher.measure.run import answers, batches, collate
from thresher.model import attachment_of, evaluating, find_encoder
from thresher.policy import tracing

PADDED, PLAIN, PACKED, THRESHER = "stock, padded", "packed, torch's kernels", "packed", "thresher"
SORTED, THRESHER_SORTED = "stock, sorted", "thresher, sorted"


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of what the rounds gave."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """rounds: the seconds of one variant in each round; rounds of one `paired` call belong together."""

    rounds: tuple[float, ...]

    @property
    def seconds(self) -> Spread:
        return spread(self.rounds)

    @property
    def median(self) -> float:
        return self.seconds.median


def spread(values: tuple[float, ...]) -> Spread:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high))


def ratio(baseline: Timing, other: Timing) -> Spread:
    """How many times faster `other` is: the median over rounds of the ratio within a round."""
    return spread(tuple(b / o for b, o in zip(baseline.rounds, other.rounds, strict=True)))


def paired(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], object] | None = None,
) -> dict[str, Timing]:
    """Time each variant once a round; round r starts with variant r. `warmup` rounds go first and are not counted.

    on_round: called with the number of the round just done, warm-up included (progress bars).
    """
    if rounds < 1 or warmup < 0:
        raise OptionError(f"Timing needs at least 1 round and 0 warm-up rounds, not {rounds} and {warmup}.")
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            begun = clock()
            variants[name]()
            taken = clock() - begun
            if number >= 0:
                seconds[name].append(taken)
        if on_round:
            on_round(number + warmup + 1)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


@contextlib.contextmanager
def packed_plainly() -> Iterator[None]:
    """Inside this block attached models run packed, drop nothing, and take torch's own kernels."""
    with keep_everything(), plain_kernels():
        yield


@dataclass(frozen=True)
class Comparison:
    """One model over the same rows in six ways: stock padded, packed with torch's own kernels, packed, and as attached, on
    batches in arrival order; stock and as attached again on batches sorted by length (little padding). All include
    collating. Every gain is a ratio over the same batches and of one step, so that none holds what sorting, padding or faster
    kernels gain.

    flops: FLOPs of packed / FLOPs of thresher. on_paper: the same by equation 4 of Block-Skim, which knows only how many tokens
    each layer kept; None where rows or tokens leave by an exit. threads: torch's, on the CPU.
    """

    timings: Mapping[str, Timing]
    batch_size: int
    rows: int
    tokens_per_row: float
    flops: float
    on_paper: float | None
    threads: int
    device: str

    @property
    def padding_only(self) -> Spread:
        """What leaving padding out gains, without any method or other kernels, in arrival order."""
        return ratio(self.timings[PADDED], self.timings[PLAIN])

    @property
    def kernels(self) -> Spread:
        """What the kernels gain over torch's own, nothing dropped, in arrival order: oneDNN, and int8 where it is on."""
        return ratio(self.timings[PLAIN], self.timings[PACKED])

    @property
    def measured(self) -> Spread:
        """What the method gains, in arrival order: over the same model without padding."""
        return ratio(self.timings[PACKED], self.timings[THRESHER])

    @property
    def over_sorted(self) -> Spread:
        """The gain over the best that stock code does when it may sort its inputs, on the same sorted batches."""
        return ratio(self.timings[SORTED], self.timings[THRESHER_SORTED])


def compare(
    model: Any,
    rows: datasets.Dataset,
    batch_size: int = 32,
    rounds: int = 7,
    *,
    warmup: int = 1,
    on_round: Callable[[int], object] | None = None,
) -> Comparison:
    """Measure an attached model on encoded rows.

    Raises OptionError when there are no rows, nothing is attached, or a size is below 1.
    """
    attachment = attachment_of(model)
    if batch_size < 1 or not len(rows):
        raise OptionError(
            f"Timing needs at least 1 row and a batch size of at least 1, not {len(rows)} and {batch_size}."
        )
    encoder = find_encoder(model)
    pad_id, device = encoder.config.pad_token_id or 0, encoder.device
    arrival = [list(range(i, min(i + batch_size, len(rows)))) for i in range(0, len(rows), batch_size)]
    by_length = batches(rows, batch_size)

    def variant(
        order: list[list[int]], how: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> Callable[[], None]:
        def once() -> None:
            with how():
                for index in order:
                    _forward(model, collate(rows, index, pad_id, device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return once

    variants = {
        PADDED: variant(arrival, stock),
        PLAIN: variant(arrival, packed_plainly),
        PACKED: variant(arrival, keep_everything),
        THRESHER: variant(arrival, contextlib.nullcontext),
        SORTED: variant(by_length, stock),
        THRESHER_SORTED: variant(by_length, contextlib.nullcontext),
    }
    with evaluating(model), torch.inference_mode():
        with tracing() as traces:
            variants[THRESHER]()
        flops = speedup(traces, attachment.engine.entrance.geometry, attachment.policy, attachment.exit)
        on_paper = None if attachment.exit else skimming_speedup(kept_by_layer(traces))
        timings = paired(variants, rounds=rounds, warmup=warmup, on_round=on_round)
    tokens = sum(len(ids) for ids in rows["input_ids"])
    threads = torch.get_num_threads()
    return Comparison(timings, batch_size, len(rows), tokens / len(rows), flops, on_paper, threads, str(device))


def _forward(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """The whole model, whatever its head."""
    if find_encoder(model) is model:
        model(**batch)
    else:
        answers(model, batch)
