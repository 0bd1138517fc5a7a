"""Diagonal blocks of the attention maps: from the log-sum-exp that flash attention leaves behind, or from padded maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.packed import Layout


def blocks_of(layout: Layout, size: int) -> tuple[Tensor, int]:
    """[B] int64, how many blocks of `size` each row has, and how many there are."""
    per_row = (layout.lengths + size - 1).div(size, rounding_mode="floor")
    return per_row, sum(-(-n // size) for n in layout.sizes)


@torch.no_grad()
def diagonal_blocks(
    query: Tensor, key: Tensor, lse: Tensor, layout: Layout, size: int, scale: float, window: int | None = None
) -> Tensor:
    """[K, H, b, b] float32, row after row, zero beyond a row's end: exp(q_i k_j scale - lse_i), O(T b) of it, no n x n.

    query, key: [H, T, d]. lse: [H, T] float32, of the same attention (nothing soft or simulated, the same window, in original
    positions).
    """
    per_row, number = blocks_of(layout, size)
    place = torch.arange(query.shape[1], device=query.device)
    if not layout.single:  # a row's first token starts a block
        first = (per_row.cumsum(0) - per_row) * size - layout.cu_seqlens[:-1]
        place = place + first.index_select(0, layout.rows)

    def cut(packed: Tensor, fill: float = 0.0) -> Tensor:
        """[T, ...] → [K, b, ...]"""
        out = packed.new_full((number * size, *packed.shape[1:]), fill)
        return out.index_copy(0, place, packed).view(number, size, *packed.shape[1:])

    # In float32 whatever came in: a product rounded to bfloat16 would not belong to this log-sum-exp.
    q, k = (cut(x.transpose(0, 1).float()).transpose(1, 2) for x in (query, key))
    normal = cut(lse.T.float(), fill=float("inf")).transpose(1, 2).unsqueeze(-1)
    with torch.autocast(query.device.type, enabled=False):
        logits = (q * scale) @ k.transpose(-1, -2)
    seen = cut(torch.ones_like(layout.positions, dtype=torch.bool))[:, None, None, :]
    if window is not None:
        at = cut(layout.positions).unsqueeze(1)
        seen = seen & ((at.unsqueeze(2) - at.unsqueeze(3)).abs() <= window)
    # What nobody sees is no part of a log-sum-exp, so that its exponential may be infinite.
    return torch.exp((logits - normal).masked_fill(~seen, float("-inf")))


def blocks_of_maps(probabilities: Tensor, real: Tensor, size: int) -> Tensor:
    """[b, ceil(L / size), H, size, size] of padded maps [b, H, L, L], zero for queries that are not `real` ([b, L])."""
    short = -probabilities.shape[-1] % size
    padded = F.pad(probabilities * real[:, None, :, None].to(probabilities.dtype), (0, short, 0, short))
    tiles: Tensor = padded.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return tiles.diagonal(dim1=2, dim2=4).permute(0, 4, 1, 2, 3)


def gather_blocks(tiles: Tensor, layout: Layout, size: int) -> Tensor:
    """[B, ceil(L / size), ...] → [K, ...], the blocks that rows have."""
    per_row, number = blocks_of(layout, size)
    index = torch.arange(len(per_row), device=per_row.device)
    rows = torch.repeat_interleave(index, per_row, output_size=number)
    within = torch.arange(number, device=per_row.device) - (per_row.cumsum(0) - per_row).index_select(0, rows)
    return tiles.flatten(0, 1).index_select(0, rows * tiles.shape[1] + within)


__all__ = ["blocks_of_maps", "diagonal_blocks", "gather_blocks"]
