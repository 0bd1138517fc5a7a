"""Which tokens a score keeps: pure tensor rules, of which one row is the simplest case."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.packed import PackedTokens, being_exported


def ranks(score: Tensor, tokens: PackedTokens) -> Tensor:
    """[T] int64: the place of each token in its row by falling score, from 0. Protected tokens come first, dead ones last; ties
    go to the earlier token."""
    score = score.masked_fill(tokens.layout.protected, float("inf"))
    if tokens.alive is not None:
        score = score.masked_fill(~tokens.alive, float("-inf"))
    order = _falling(score)
    place = torch.arange(order.shape[0], device=order.device)
    if not tokens.layout.single:
        rows = tokens.layout.rows
        order = order[rows[order].argsort(stable=True)]
        place = place - tokens.layout.cu_seqlens[:-1].to(torch.int64)[rows]
    return torch.empty_like(place).scatter(0, order, place)


def _falling(score: Tensor) -> Tensor:
    """[T] int64, the indices that sort by falling score, ties by index."""
    if (
        being_exported()
    ):  # ONNX's TopK keeps ties in order by definition, torch's does not; a stable sort has no operator
        return score.topk(score.shape[0]).indices
    return score.argsort(stable=True, descending=True)


def keep_fraction(score: Tensor, tokens: PackedTokens, fraction: float, minimum: int = 1) -> Tensor:
    """[T] bool: the best max(minimum, round(fraction x original length)) tokens of each row."""
    count = (tokens.layout.original * fraction).round().clamp(min=minimum).to(torch.int64)
    return ranks(score, tokens) < tokens.layout.spread(count)


def keep_share_of_segments(score: Tensor, tokens: PackedTokens, share: float, minimum: int = 1) -> Tensor:
    """[T] bool: the best max(minimum, round(share x tokens now)) of each row's segment 0, and of its segment 1, apart."""
    layout = tokens.layout
    living = torch.ones_like(layout.protected) if tokens.alive is None else tokens.alive
    kept = torch.zeros_like(layout.protected)
    for side in (layout.segments == 0, layout.segments > 0):
        size = layout.count(living & side)
        count = (size * share).round().clamp(min=minimum).to(torch.int64)
        # Protected tokens rank first whatever their segment: those of the other one take no places of this one's.
        count = count + layout.count(living & ~side & layout.protected)
        place = ranks(score.masked_fill(~side, float("-inf")), tokens)
        kept = kept | (side & (place < layout.spread(count)))
    return kept


def keep_count(score: Tensor, tokens: PackedTokens, count: int) -> Tensor:
    """[T] bool: the best `count` tokens of each row (an absolute retention configuration)."""
    return ranks(score, tokens) < count


def keep_above(score: Tensor, threshold: Tensor | float) -> Tensor:
    """[T] bool: score >= threshold."""
    return score >= threshold


def margin(strength: float, log_odds: float = 0.0) -> float:
    """From what a classifier's log-odds of "keep" must reach at strength 1 to what they must reach at `strength`.

    log_odds + 4 log(strength): the odds asked for grow as its fourth power, so that 0 keeps everything, 1 asks what is
    written, and the strongest setting that calibration tries (64) asks e^16.6 times as much, which few classifiers give.
    """
    return log_odds + 4.0 * math.log(strength) if strength > 0 else -math.inf


def interpolate(curve: Sequence[float], layers: int) -> tuple[float, ...]:
    """A retention curve drawn for len(curve) layers, for `layers` layers: layer l of L takes the value at depth l / L."""
    if len(curve) == layers:
        return tuple(curve)
    out = []
    for layer in range(1, layers + 1):
        at = layer / layers * len(curve) - 1
        low = min(max(math.floor(at), 0), len(curve) - 1)
        high = min(low + 1, len(curve) - 1)
        weight = min(max(at - low, 0.0), 1.0)
        out.append(curve[low] * (1 - weight) + curve[high] * weight)
    return tuple(out)
