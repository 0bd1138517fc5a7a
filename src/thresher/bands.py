"""Attention within a window, for which the keys that nobody in sight reads are never multiplied."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.cuda.padded import summed
from thresher.timing import mark

if TYPE_CHECKING:
    from thresher.packed import PackedTokens

NARROWEST = 32  # queries that share a band of keys; fewer would make many small products
TOGETHER = 2**18  # probabilities that are read at a time, so that they are still in the processor's caches
# What a pair of tokens costs in a band, over one in a whole map: where probabilities are read, and where bfloat16 learns from
# them. Measured with rows of 200 to 1,024 tokens.
READ, LEARNED = 1.5, 2.5


def pays(sizes: list[int], window: int, *, cost: float = 1.0) -> bool:
    """Whether bands are the faster way for rows of these lengths. cost: READ, LEARNED, or 1 where nobody asks for more."""
    block = _block(window)
    return sum(n * n for n in sizes) > cost * sum(sizes) * (block + 2 * window)


def attend_in_bands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: PackedTokens,
    window: int,
    scale: float,
    dropout: float = 0.0,
    weights: Tensor | None = None,
    own: bool = False,
    *,
    by_probabilities: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Each token attends to those of its row at most `window` original positions away; gradients flow through all returned.

    The batch is cut into blocks of queries; a block reads itself and `window` tokens to either side, since dropping only
    brings tokens nearer to each other. All rows are done at once: T (block + 2 window) products for each head, and no row's
    n^2. A token that sees nobody, as all around it are dropped in a simulation, sees itself. What is not finite in one row
    reaches its neighbours in the batch, since 0 times infinity is not 0.

    query, key, value: [H, T, d]. weights: [C, T] float32, what each query counts for in each of C sums, or None.
    by_probabilities: whether to compute them where nobody asks for them.
    Returns the context [T, H, d], sums over heads and queries i of weights[c, i] * A_h[i, j] as [C, T], and if `own` the sums
    over heads of A_h[j, j] as [T].
    """
    heads, total, _ = query.shape
    block = _block(window)
    count = -(-total // block)
    after = count * block - total
    q = F.pad(query, (0, 0, 0, after)).unflatten(1, (count, block)).transpose(0, 1)
    k, v = (_bands(F.pad(x, (0, 0, window, window + after)), block, window) for x in (key, value))
    mask = _mask(tokens, window, block, after, query.dtype)
    if weights is None and not own and not by_probabilities:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        return _packed(out, total), None, None
    counted = None if weights is None else F.pad(weights, (0, after)).unflatten(1, (count, block)).transpose(0, 1)
    outs, sums, diagonals = [], [], []
    step = max(TOGETHER // (heads * block * k.shape[2]), 1)
    for part in (slice(start, start + step) for start in range(0, count, step)):
        probabilities = _probabilities(q[part] * scale, k[part], mask[part])
        used = F.dropout(probabilities, dropout) if dropout else probabilities
        outs.append(used.to(v.dtype) @ v[part])
        mark("attention")
        if counted is not None:
            sums.append(summed(probabilities, counted[part]))
        if own:
            diagonals.append(probabilities.diagonal(window, dim1=-2, dim2=-1).sum(1))
        mark("evidence")
    return (
        _packed(torch.cat(outs), total),
        _folded(torch.cat(sums), block, window)[:, :total] if sums else None,
        torch.cat(diagonals).flatten()[:total] if diagonals else None,
    )


def _probabilities(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """[blocks, H, block, band] float32; mask: whom each query sees, or what is added to its logits."""
    logits = query @ key.transpose(-1, -2)
    seen = mask.dtype is torch.bool
    logits = logits.masked_fill_(~mask, float("-inf")) if seen else logits + mask
    return logits.softmax(-1, dtype=torch.float32)


def _packed(blocks: Tensor, total: int) -> Tensor:
    """[T, H, d] from [blocks, H, block, d]."""
    return blocks.transpose(1, 2).flatten(0, 1)[:total]


def _folded(bands: Tensor, block: int, window: int) -> Tensor:
    """[C, blocks * block], each token's sum over the bands that hold it, [blocks, C, band]."""
    count, lines, width = bands.shape
    place = torch.arange(width, device=bands.device) + block * torch.arange(count, device=bands.device).unsqueeze(1)
    whole = bands.new_zeros(lines, count * block + 2 * window)
    return whole.index_add(1, place.flatten(), bands.transpose(0, 1).flatten(1))[:, window:]


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
