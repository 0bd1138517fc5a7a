"""Attention over packed tokens in a few large operations: rows side by side as [B, L], L the longest now.

A loop over rows keeps a GPU waiting for its host. This is what runs there wherever flash attention does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.cuda.blocks import blocks_of_maps, gather_blocks
from thresher.packed import Layout, PackedTokens

LARGEST = 2**26  # logits that may exist at a time; 256 MB in float32


@dataclass(frozen=True)
class Padding:
    """Where packed tokens lie when rows are padded to the longest of them."""

    layout: Layout

    @cached_property
    def longest(self) -> int:
        return max(self.layout.sizes)

    @cached_property
    def slots(self) -> Tensor:
        """[T] int64, the place of each token in B * L."""
        layout = self.layout
        place = torch.arange(len(layout.positions), device=layout.positions.device)
        if layout.single:
            return place
        shift = torch.arange(len(layout.lengths), device=place.device) * self.longest - layout.cu_seqlens[:-1]
        return place + shift.index_select(0, layout.rows)

    def spread(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """[T, ...] → [B, L, ...]."""
        batch = len(self.layout.lengths)
        out = packed.new_full((batch * self.longest, *packed.shape[1:]), fill)
        return out.index_copy(0, self.slots, packed).view(batch, self.longest, *packed.shape[1:])

    def gather(self, padded: Tensor) -> Tensor:
        """[B, L, ...] → [T, ...]."""
        return padded.flatten(0, 1).index_select(0, self.slots)

    def heads(self, packed: Tensor) -> Tensor:
        """[H, T, d] → [B, H, L, d]."""
        return self.spread(packed.transpose(0, 1)).transpose(1, 2)

    def parts(self, elements: int) -> list[slice]:
        """Ranges of rows of which together at most LARGEST elements exist, when one row has so many."""
        step, batch = max(LARGEST // max(elements, 1), 1), len(self.layout.lengths)
        return [slice(i, min(i + step, batch)) for i in range(0, batch, step)]

    @cached_property
    def positions(self) -> Tensor:
        """[B, L] int32, original positions."""
        return self.spread(self.layout.positions.to(torch.int32))

    def near(self, window: int, part: slice) -> Tensor:
        """[b, 1, L, L] bool for some rows, whether two places are at most `window` apart in the input."""
        at = self.positions[part].unsqueeze(1)
        return (at.unsqueeze(2) - at.unsqueeze(3)).abs() <= window


def attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: PackedTokens,
    scale: float,
    dropout: float,
    window: int | None,
    weights: Tensor | None,
    own: bool = False,
    position_bias: Callable[[Tensor], Tensor] | None = None,
    block: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Each row attends to itself; gradients flow through all that is returned.

    query, key, value: [H, T, d]. window: in original positions. weights: [C, T] float32, what each query counts for in each
    of C sums, or None when nobody asks for sums. position_bias: what is added to the logits of rows with the original
    positions [b, L], as [b, H, L, L]. block: size of the diagonal blocks to return, 0 for none.
    Returns the context [T, H, d], sums over heads and queries i of weights[c, i] * A_h[i, j] as [C, T], if `own` the
    sums over heads of A_h[j, j] as [T], and the diagonal blocks [K, H, block, block] as in `attention.Evidence`.
    """
    padding = Padding(tokens.layout)
    q, k, v = (padding.heads(x) for x in (query, key, value))
    weight = tokens.log_weight
    weight = query.new_zeros(query.shape[1]) if weight is None else weight.to(query.dtype)
    hidden_keys = padding.spread(weight, fill=float("-inf"))[:, None, None, :]
    counted = None if weights is None else padding.spread(weights.T).transpose(1, 2)
    watched = counted is not None or own or block > 0
    real = padding.spread(torch.ones_like(tokens.positions, dtype=torch.bool)) if block else None
    contexts, sums, diagonals, tiles = [], [], [], []
    by_head = watched or position_bias is not None
    for part in padding.parts(padding.longest**2 * (q.shape[1] if by_head else 1)):
        bias = hidden_keys[part] if window is None else _windowed(hidden_keys[part], padding.near(window, part))
        if position_bias is not None:
            bias = bias + position_bias(padding.positions[part]).to(bias.dtype)
        if not watched:
            out = F.scaled_dot_product_attention(
                q[part], k[part], v[part], attn_mask=bias, dropout_p=dropout, scale=scale
            )
            contexts.append(out)
            continue
        logits = (q[part] * scale) @ k[part].transpose(-1, -2) + bias
        probabilities = logits.softmax(-1, dtype=torch.float32)
        used = F.dropout(probabilities, dropout) if dropout else probabilities
        contexts.append(used.to(v.dtype) @ v[part])
        if counted is not None:
            sums.append(summed(probabilities, counted[part]))
        if own:
            diagonals.append(probabilities.diagonal(dim1=-2, dim2=-1).sum(1))
        if real is not None:
            tiles.append(blocks_of_maps(probabilities, real[part], block))
    return (
        padding.gather(join(contexts).transpose(1, 2)),
        padding.gather(join(sums).transpose(1, 2)).T if sums else None,
        padding.gather(join(diagonals)) if diagonals else None,
        gather_blocks(join(tiles), tokens.layout, block) if tiles else None,
    )


def join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def summed(probabilities: Tensor, weights: Tensor) -> Tensor:
    """[B, C, L]: sums over heads and queries of [B, H, L, L], each query weighted by [B, C, L]."""
    with torch.autocast(probabilities.device.type, enabled=False):  # it would add them up in half precision
        return (weights.unsqueeze(1) @ probabilities).sum(1)


def _windowed(bias: Tensor, near: Tensor) -> Tensor:
    """[b, 1, L, L] from what hides keys, [b, 1, 1, L], and what is near, [b, 1, L, L]."""
    bias = bias.masked_fill(~near, float("-inf"))
    # Padding far from every token, and a simulated-dropped token whose whole window is dropped, have nobody to look at;
    # they may see themselves, and nobody reads what they then compute. Without a window a row's first token is seen.
    lonely = torch.isinf(bias).all(-1, keepdim=True)
    itself = torch.eye(bias.shape[-1], dtype=torch.bool, device=bias.device)
    return torch.where(lonely & itself, 0.0, bias)


__all__ = ["LARGEST", "Padding", "attend_padded", "join", "summed"]
