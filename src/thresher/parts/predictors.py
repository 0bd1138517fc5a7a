"""A small network's opinion of how much each token contributes, as a distribution over the tokens of its row."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from thresher.packed import Layout, PackedTokens


def contribution_predictor(size: int, width: int) -> nn.Sequential:
    """[T, size] → [T, 1], AdapLeR's: one hidden layer of `width` with GELU."""
    return nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, 1))


def row_sums(values: Tensor, layout: Layout) -> Tensor:
    """[B], the sum of each row's `values` ([T])."""
    if layout.single:
        return values.sum(0, keepdim=True)
    return values.new_zeros(len(layout.lengths)).index_add(0, layout.rows, values)


def row_log_softmax(logits: Tensor, tokens: PackedTokens) -> Tensor:
    """[T], the log-softmax of `logits` ([T]) over each row's living tokens; -inf for dead ones."""
    if tokens.alive is not None:
        logits = logits.masked_fill(~tokens.alive, -math.inf)
    layout = tokens.layout
    if layout.single:
        return logits.log_softmax(0)
    most = logits.new_full((len(layout.lengths),), -math.inf)
    most = most.scatter_reduce(0, layout.rows, logits.detach(), "amax")  # of a living token: the first never drops
    shifted = logits - layout.spread(most)
    return shifted - layout.spread(row_sums(shifted.exp(), layout).log())


def soft_removal(contribution: Tensor, threshold: Tensor, steepness: float, beta: float) -> Tensor:
    """[T] at most 0: what AdapLeR adds to the attention logits on a token of this contribution.

    Steeply falling below the threshold, to no less than -1e4; from there to contribution 1 nearly flat, from -beta / steepness
    up to 0. The steeper, the nearer to dropping whatever is below.
    """
    falling = steepness / threshold * (contribution - threshold) - beta / steepness
    flat = (contribution - 1.0) * (beta / steepness) / (1.0 - threshold).clamp(min=1e-7)
    return torch.minimum(falling, flat).clamp(min=-1e4, max=0.0)


__all__ = ["contribution_predictor", "row_log_softmax", "row_sums", "soft_removal"]
