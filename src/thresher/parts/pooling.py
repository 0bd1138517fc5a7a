"""Neighbours averaged into one token: tokens in, tokens out."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.packed import PackedTokens


def pool_neighbours(tokens: PackedTokens, ratio: float) -> PackedTokens:
    """The k unprotected tokens of each row as max(1, round(ratio * k)) means of neighbours; protected ones stay as they are.

    Which tokens make a mean is torch.nn.functional.adaptive_avg_pool1d's choice: with m means, number i is that of the tokens
    from floor(i k / m) up to ceil((i + 1) k / m), counted among the row's unprotected ones, so that a token may be in two.
    A mean stands in the place of its first token, with that one's position and segment. The others drop: where every token is
    asked for at the end, each comes back with the state that it went in with.
    ratio: above 0 and at most 1.
    """
    layout = tokens.layout
    free = ~layout.protected if tokens.alive is None else ~layout.protected & tokens.alive
    index = free.nonzero().squeeze(1)
    rows, per_row = layout.rows[index], layout.count(free)
    means = (per_row * ratio).round().clamp(min=1).to(torch.int64)
    start, k, m = ((per_row.cumsum(0) - per_row)[rows], per_row[rows], means[rows])
    place = torch.arange(index.shape[0], device=index.device) - start
    # The means that a token is part of: one, or two that follow each other, since there are no more means than tokens.
    numbers = _quotient(place * m, k), _quotient((place + 1) * m + k - 1, k) - 1
    firsts = [_quotient(number * k, m) for number in numbers]
    twice = (firsts[0] != firsts[1]).to(torch.float32).unsqueeze(1)
    own = tokens.hidden[index]
    total, size = torch.zeros_like(own, dtype=torch.float32), torch.zeros_like(twice)
    for first, counts in zip(firsts, (torch.ones_like(twice), twice), strict=True):
        into = (start + first).unsqueeze(1)
        total = total.scatter_add(0, into.expand_as(total), own.float() * counts)
        size = size.scatter_add(0, into, counts)
    opens = firsts[1] == place
    new = torch.where(opens.unsqueeze(1), (total / size.clamp(min=1)).to(own.dtype), own)
    stays = torch.zeros_like(free).index_copy(0, index, opens)
    return tokens.with_hidden(tokens.hidden.index_copy(0, index, new)).keep(stays)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="floor")


__all__ = ["pool_neighbours"]
