"""Analytic FLOPs from what a pass really read. A multiply-add is 2 FLOPs; embeddings and heads are left out on both sides.

One layer that attends over n tokens and feeds m forward: 8 n d^2 (four projections) + 4 n^2 d (scores and context) + 4
m d i (feed-forward of width i; 6 m d i when gated), plus the method's own work. Where only q of the n tokens ask, the others
being frozen: 4 (n + q) d^2 + 4 q n d. A layer whose tokens see a window counts as one that sees everything, on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from thresher.errors import OptionError
from thresher.exits import Exit
from thresher.measure.layer import layer_flops
from thresher.policy import Geometry, Policy, Trace


def dense_flops(geometry: Geometry, length: int) -> int:
    """The encoder on one row of `length` tokens, no padding, nothing dropped."""
    return geometry.layers * layer_flops(geometry, length, length)


def flops(
    trace: Trace, geometry: Geometry, policy: Policy[Any] | None = None, exit: Exit[Any] | None = None
) -> list[int]:
    """FLOPs of each row of a pass, the overhead of the policy and of the exit's branches included; nothing once it has left."""
    totals = [0] * len(trace.original)
    for asked in trace.asked:
        for row, n in enumerate(asked):
            totals[row] += exit.overhead_flops(n) if exit is not None and n else 0
    for row, layer in enumerate(trace.exited_at if exit is not None else ()):
        if layer < geometry.layers and trace.asked:
            assert exit is not None
            totals[row] += exit.leaving_flops(trace.asked[layer - 1][row])
    entering = trace.original
    for layer, (reads, feeds) in enumerate(trace.reads, start=1):
        asking = trace.asking[layer - 1] if trace.asking else None
        for row, (read, fed) in enumerate(zip(reads, feeds, strict=True)):
            totals[row] += layer_flops(geometry, read, fed, asking[row] if asking else None)
            left = bool(trace.exited_at) and trace.exited_at[row] < layer
            if policy is not None and policy.mode != "off" and not left:
                totals[row] += policy.overhead_flops(layer, read, entering[row])
        entering = feeds
    return totals


def skimming_speedup(kept: Sequence[float]) -> float:
    """What a row's cost falls by when layer j leaves the fraction kept[j] of what reached it: L / sum over layers i of the
    product of kept[j] over j <= i (equation 4 of Block-Skim).

    A model on paper: a layer's cost is linear in its tokens, and what a layer drops it does not compute itself. Twelve times
    .9 give 1.86. Raises OptionError for a fraction outside (0, 1], or none.
    """
    if not kept or not all(0.0 < fraction <= 1.0 for fraction in kept):
        raise OptionError(f"The kept fractions must be above 0 and at most 1, one a layer, not {tuple(kept)}.")
    return len(kept) / sum(math.prod(kept[: layer + 1]) for layer in range(len(kept)))


def kept_by_layer(traces: Sequence[Trace]) -> list[float]:
    """Of the tokens that reached each layer, the fraction that its feed-forward read: what equation 4 begins from."""
    before, kept = sum(sum(trace.original) for trace in traces), []
    for layer in range(len(traces[0].reads)):
        fed = sum(sum(trace.reads[layer][1]) for trace in traces)
        kept.append(fed / before)
        before = fed
    return kept


def speedup(
    traces: Iterable[Trace] | Sequence[Trace],
    geometry: Geometry,
    policy: Policy[Any] | None = None,
    exit: Exit[Any] | None = None,
) -> float:
    """FLOPs of the same rows run packed with nothing dropped / FLOPs of what was run. Padding is in neither."""
    spent = dense = 0
    for trace in traces:
        spent += sum(flops(trace, geometry, policy, exit))
        dense += sum(dense_flops(geometry, n) for n in trace.original)
    return dense / spent if spent else 1.0
