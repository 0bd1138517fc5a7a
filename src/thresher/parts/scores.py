"""Importance of each token: higher means read on. Every score is [T] float32 and looks at one row at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thresher.evidence import Evidence, Wanted
from thresher.packed import PackedTokens

Score = Callable[[PackedTokens, Evidence], Tensor]


def attention_mass(tokens: PackedTokens, evidence: Evidence) -> Tensor:
    """AM (PoWER-BERT, LAT, LTP): mean over heads and real queries of the attention a token receives."""
    assert evidence.mass is not None
    return evidence.mass


def attention_mass_off_diagonal(tokens: PackedTokens, evidence: Evidence) -> Tensor:
    """AM without what a token gives itself, as PoWER-BERT writes it."""
    return evidence.mass_off_diagonal(tokens)


def dual_attention(tokens: PackedTokens, evidence: Evidence, *, alpha_context: float, alpha_response: float) -> Tensor:
    """DualA (ASE, equations 1-4): alpha * self + (1 - alpha) * mutual.

    self: what a token receives from the other tokens of its own segment, divided by the number of all of them; mutual: the
    mean of what it receives from those of the other one. Heads are averaged. Segment 0 is the context, 1 the response, each
    with its own alpha. Of a row with one segment, self alone counts: attention mass without the diagonal.
    """
    assert evidence.by_segment is not None
    assert evidence.diagonal is not None
    layout = tokens.layout
    in_response = layout.segments > 0
    living = torch.ones_like(in_response) if tokens.alive is None else tokens.alive
    sizes = [layout.spread(layout.count(living & side)) for side in (~in_response, in_response)]
    context, response = evidence.by_segment.unbind(1)
    size = torch.where(in_response, sizes[1], sizes[0]).clamp(min=1)
    own = torch.where(in_response, response, context) - evidence.diagonal / size
    mutual = torch.where(in_response, context, response)
    alpha = torch.where(in_response, alpha_response, alpha_context).to(own.dtype)
    alpha = alpha.masked_fill((sizes[0] == 0) | (sizes[1] == 0), 1.0)
    return alpha * own + (1.0 - alpha) * mutual


def first(tokens: PackedTokens, evidence: Evidence) -> Tensor:
    """Earlier tokens are worth more."""
    return -tokens.positions.to(torch.float32)


def last(tokens: PackedTokens, evidence: Evidence) -> Tensor:
    """Later tokens are worth more."""
    return tokens.positions.to(torch.float32)


def random(tokens: PackedTokens, evidence: Evidence, *, seed: int = 0) -> Tensor:
    """A fixed random number for each place in the row: a hash of seed, place and row length.

    Not a generator, so that an answer does not depend on the batch, and a later layer keeps a subset of what an earlier
    one kept.
    """
    layout = tokens.layout
    starts = layout.width - layout.largest(layout.width - tokens.positions)
    place = tokens.positions - layout.spread(starts)
    mixed = place * 2654435761 + layout.spread(layout.original) * 40503 + (seed + 1) * 2246822519
    for multiplier in (2146121005, 2221713035):  # two rounds of xor-shift-multiply on 31 bits
        mixed = mixed & 0x7FFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * multiplier
    return ((mixed & 0x7FFFFFFF) >> 8).to(torch.float32)


def relative(score: Tensor, tokens: PackedTokens) -> Tensor:
    """score / its maximum over the row's living tokens."""
    if tokens.alive is not None:
        score = score.masked_fill(~tokens.alive, 0.0)
    return score / tokens.layout.spread(tokens.layout.largest(score)).clamp(min=1e-12)


SCORES: dict[str, tuple[Score, Wanted]] = {
    "attention-mass": (attention_mass, Wanted(mass=True, detached=True)),
    "attention-mass-off-diagonal": (attention_mass_off_diagonal, Wanted(mass=True, diagonal=True, detached=True)),
    "first": (first, Wanted()),
    "last": (last, Wanted()),
    "random": (random, Wanted()),
}
