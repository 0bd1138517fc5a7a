"""Attention within a window, for which the keys that nobody in sight reads are never multiplied."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from thresher.packed import PackedTokens

NARROWEST = 32  # queries that share a band of keys; fewer would make many small products


def pays(sizes: list[int], window: int) -> bool:
    """Whether bands multiply fewer pairs of tokens than rows of these lengths hold."""
    block = _block(window)
    return sum(n * n for n in sizes) > sum(sizes) * (block + 2 * window)


def attend_in_bands(
    query: Tensor, key: Tensor, value: Tensor, tokens: PackedTokens, window: int, scale: float, dropout: float = 0.0
) -> Tensor:
    """Each token attends to those of its row at most `window` original positions away: [T, H, d] from [H, T, d].

    The batch is cut into blocks of queries; a block reads itself and `window` tokens to either side, since dropping only
    brings tokens nearer to each other. All rows are done at once: T (block + 2 window) products for each head, and no row's
    n^2. A token that sees nobody, as all around it are dropped in a simulation, sees itself.
    """
    heads, total, _ = query.shape
    block = _block(window)
    count = -(-total // block)
    after = count * block - total
    q = F.pad(query, (0, 0, 0, after)).unflatten(1, (count, block)).transpose(0, 1)
    k, v = (_bands(F.pad(x, (0, 0, window, window + after)), block, window) for x in (key, value))
    mask = _mask(tokens, window, block, after, query.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.permute(0, 2, 1, 3).reshape(count * block, heads, -1)[:total]


def _block(window: int) -> int:
    return max(NARROWEST, window)


def _bands(padded: Tensor, block: int, window: int) -> Tensor:
    """[blocks, H, block + 2 window, d], overlapping views of [H, T', d]."""
    return padded.unfold(1, block + 2 * window, block).permute(1, 0, 3, 2)


def _mask(tokens: PackedTokens, window: int, block: int, after: int, dtype: torch.dtype) -> Tensor:
    """[blocks, 1, block, block + 2 window], whom each token sees; as numbers to add to the logits where keys have weights."""
    layout = tokens.layout
    # One line of positions for the whole batch, on which rows lie farther apart than any token sees.
    apart = layout.width + window
    at = (layout.rows * apart + layout.positions).to(torch.int32)
    beyond = len(layout.lengths) * apart + window
    line = F.pad(F.pad(at, (window, 0), value=-beyond), (0, window + after), value=beyond)
    asking = line[window : len(line) - window].unflatten(0, (-1, block))
    reading = line.unfold(0, block + 2 * window, block)
    seen: Tensor = (asking.unsqueeze(2) - reading.unsqueeze(1)).abs() <= window
    if tokens.log_weight is None:
        return seen.unsqueeze(1)
    weights = F.pad(tokens.log_weight.to(dtype), (window, window + after)).unfold(0, block + 2 * window, block)
    bias: Tensor = weights.unsqueeze(1).masked_fill(~seen, float("-inf"))
    lonely = torch.isinf(bias).all(-1, keepdim=True)
    itself = torch.zeros_like(seen[0]).diagonal_scatter(torch.ones(block, dtype=torch.bool, device=at.device), window)
    bias.masked_fill_(lonely & itself, 0.0)
    return bias.unsqueeze(1)


__all__ = ["attend_in_bands", "pays"]
