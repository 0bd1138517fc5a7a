"""The Triton kernel that sums attention over queries. Import it only where triton is there: `mass` does."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # keys that one program owns, and queries it looks at in one step


@triton.jit  # type: ignore[untyped-decorator]
def _sum_columns(  # type: ignore[no-untyped-def]
    query, key, lse, starts, positions, weights, sums, own,
    query_head, query_token, key_head, key_token, lse_head, total, scale, window,
    DIM: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, WEIGHTED: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """One program owns one block of keys of one row under one head, so no two write to the same place."""
    row = tl.program_id(0)
    head = tl.program_id(2)
    first = tl.load(starts + row).to(tl.int64)
    n = (tl.load(starts + row + 1) - first).to(tl.int32)
    start = tl.program_id(1) * BLOCK
    if start < n:
        lane = tl.arange(0, WIDE)
        j = start + tl.arange(0, BLOCK)
        at_j = first + j
        real_j = j < n
        k = tl.load(
            key + head * key_head + at_j[:, None] * key_token + lane[None, :],
            mask=real_j[:, None] & (lane[None, :] < DIM),
            other=0.0,
        )
        low = 0
        high = n
        if WINDOW:
            # Tokens are at least as far apart in the input as here: what is out of reach here is out of reach there.
            low = tl.maximum(start - window, 0)
            high = tl.minimum(start + BLOCK + window, n)
            place_j = tl.load(positions + at_j, mask=real_j, other=0)
        sum_first = tl.zeros([BLOCK], tl.float32)
        sum_second = tl.zeros([BLOCK], tl.float32)
        sum_own = tl.zeros([BLOCK], tl.float32)
        for begin in range(low, high, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            at_i = first + i
            real_i = i < n
            q = tl.load(
                query + head * query_head + at_i[:, None] * query_token + lane[None, :],
                mask=real_i[:, None] & (lane[None, :] < DIM),
                other=0.0,
            )
            # A query beyond the row's end has an infinite log-sum-exp, hence probabilities of 0.
            normal = tl.load(lse + head * lse_head + at_i, mask=real_i, other=float("inf"))
            p = tl.exp(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - normal[:, None])
            if WINDOW:
                place_i = tl.load(positions + at_i, mask=real_i, other=0)
                p = tl.where(tl.abs(place_i[:, None] - place_j[None, :]) <= window, p, 0.0)
            if WEIGHTED:
                w_first = tl.load(weights + at_i, mask=real_i, other=0.0)
                w_second = tl.load(weights + total + at_i, mask=real_i, other=0.0)
                sum_first += tl.sum(p * w_first[:, None], 0)
                sum_second += tl.sum(p * w_second[:, None], 0)
            else:
                sum_first += tl.sum(p, 0)
            if OWN:
                sum_own += tl.sum(tl.where(i[:, None] == j[None, :], p, 0.0), 0)
        at = head.to(tl.int64) * total + at_j
        tl.store(sums + at, sum_first, mask=real_j)
        if WEIGHTED:
            tl.store(sums + tl.num_programs(2).to(tl.int64) * total + at, sum_second, mask=real_j)
        if OWN:
            tl.store(own + at, sum_own, mask=real_j)


def column_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    starts: Tensor,
    positions: Tensor,
    longest: int,
    weights: Tensor | None,
    scale: float,
    window: int | None,
    own: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `mass.column_sums`. starts: [B + 1] int32, where rows begin; longest: tokens of the longest row."""
    query, key, lse = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, lse))
    heads, total, dim = query.shape
    sums = lse.new_empty((1 if weights is None else 2, heads, total))
    diagonal = lse.new_empty((heads, total)) if own else None
    grid = (len(starts) - 1, triton.cdiv(longest, BLOCK), heads)
    with torch.cuda.device_of(query):  # triton launches on the current device, whatever its arguments lie on
        _sum_columns[grid](
            query, key, lse, starts, positions, weights, sums, diagonal,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), lse.stride(0), total, scale, window or 0,
            DIM=dim, WIDE=max(triton.next_power_of_2(dim), 16), BLOCK=BLOCK,
            WINDOW=window is not None, WEIGHTED=weights is not None, OWN=own,
        )  # fmt: skip
    # Heads are added by torch, always in the same order: a sum that several programs add to would not be repeatable.
    return sums.sum(1), None if diagonal is None else diagonal.sum(0)


__all__ = ["column_sums"]
