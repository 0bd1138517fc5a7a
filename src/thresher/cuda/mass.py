"""Attention received, from the log-sum-exp that flash attention leaves behind: A_h[i, j] = exp(q_i k_j scale - lse_i)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thresher.cuda.padded import Padding, join, summed
from thresher.packed import Layout, PackedTokens, on_cuda

_failed = False  # the kernel did not compile or start in this process


class Received(NamedTuple):
    """mass: [T]; diagonal: [T] or None; by_segment: [T, 2] or None; as in `attention.Evidence`, float32."""

    mass: Tensor
    diagonal: Tensor | None
    by_segment: Tensor | None


def query_weights(tokens: PackedTokens, by_segment: bool) -> Tensor:
    """[C, T] float32, whether a query counts: one line for all, or one for each segment."""
    alive = torch.ones_like(tokens.positions) if tokens.alive is None else tokens.alive.to(torch.int64)
    lines = [alive * (1 - tokens.segments), alive * tokens.segments] if by_segment else [alive]
    return torch.stack(lines).to(torch.float32)


def means(sums: Tensor, own: Tensor | None, weights: Tensor, layout: Layout, heads: int) -> Received:
    """What sums over heads and queries mean. sums, weights: [C, T]; own: [T], sums over heads."""
    if layout.single:
        counts = weights.sum(1, keepdim=True)  # [C, 1]
    else:
        rows = weights.new_zeros(len(weights), len(layout.lengths)).index_add(1, layout.rows, weights)
        counts = rows.index_select(1, layout.rows)
    return Received(
        mass=sums.sum(0) / (counts.sum(0) * heads),
        diagonal=None if own is None else own / heads,
        by_segment=(sums / (counts.clamp(min=1) * heads)).T if len(sums) == 2 else None,
    )


@torch.no_grad()
def received(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    tokens: PackedTokens,
    scale: float,
    *,
    window: int | None = None,
    diagonal: bool = False,
    by_segment: bool = False,
) -> Received:
    """Attention mass without its n x n, and without gradients.

    query, key: [H, T, d]. lse: [H, T], of the same attention (nothing soft or simulated, the same window in original
    positions).
    """
    weights = query_weights(tokens, by_segment)
    layout = tokens.layout
    sums, own = column_sums(query, key, lse, layout, weights if by_segment else None, scale, window, diagonal)
    return means(sums, own, weights, layout, len(query))


def column_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    layout: Layout,
    weights: Tensor | None,
    scale: float,
    window: int | None,
    own: bool,
) -> tuple[Tensor, Tensor | None]:
    """[C, T], sums over heads and queries i of the row of weights[c, i] * A_h[i, j]; if `own` also the sums over heads of
    A_h[j, j], [T]. weights: [2, T] float32, or None for one line of ones."""
    global _failed
    kernel = None if _failed or not on_cuda(query) else triton_kernel()
    if kernel is not None:
        try:
            return kernel(  # type: ignore[no-any-return]
                query, key, lse, layout.cu_seqlens, layout.positions, max(layout.sizes), weights, scale, window, own
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C compiler, or a GPU that this triton does not know
            _failed = True
            reason = str(error).partition("\n")[0]
            warnings.warn(f"The Triton kernel does not run here ({reason}); torch does its work.", stacklevel=2)
    return torch_column_sums(query, key, lse, layout, weights, scale, window, own)


@cache
def triton_kernel() -> Callable[..., Any] | None:
    """The kernel, None where triton cannot be imported."""
    try:
        from thresher.cuda.kernel import column_sums as kernel
    except Exception:  # a triton that does not fit its machine fails in many ways
        return None
    return kernel


def torch_column_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    layout: Layout,
    weights: Tensor | None,
    scale: float,
    window: int | None,
    own: bool,
) -> tuple[Tensor, Tensor | None]:
    """`column_sums` by torch alone, some rows' n x n at a time."""
    padding = Padding(layout)
    # In float32 whatever came in: a product rounded to bfloat16 would not belong to this log-sum-exp.
    q, k = padding.heads(query.float() * scale), padding.heads(key.float())
    normal = padding.spread(lse.T, fill=float("inf")).transpose(1, 2).unsqueeze(-1)
    counted = padding.spread(torch.ones_like(lse[:1]).T if weights is None else weights.T).transpose(1, 2)
    sums, diagonals = [], []
    for part in padding.parts(padding.longest**2 * len(query)):
        with torch.autocast(query.device.type, enabled=False):
            probabilities = torch.exp(q[part] @ k[part].transpose(-1, -2) - normal[part])
        if window is not None:  # a far key is no part of its query's log-sum-exp: no product, which may be infinite
            probabilities = probabilities.masked_fill(~padding.near(window, part), 0.0)
        sums.append(summed(probabilities, counted[part]))
        diagonals.append(probabilities.diagonal(dim1=-2, dim2=-1).sum(1))
    return padding.gather(join(sums).transpose(1, 2)).T, padding.gather(join(diagonals)) if own else None


__all__ = ["Received", "column_sums", "means", "query_weights", "received", "torch_column_sums", "triton_kernel"]
