"""Attention over a ragged batch, and the evidence that policies read from it. The one place that picks a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher import bands, cuda
from thresher.cpu import all_at_once, attend_at_once, attend_by_head, heads_apart, learns_from_probabilities, memory_for
from thresher.evidence import NO_EVIDENCE, NOTHING, Evidence, Gathered, Row, Wanted, join_rows, rows_of
from thresher.packed import Layout, PackedTokens, being_exported, on_cuda

PositionBias = Callable[[Tensor], Tensor]  # original positions [..., n] → [..., H, n, n]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: PackedTokens,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    wanted: Wanted = NOTHING,
    position_bias: PositionBias | None = None,
) -> tuple[Tensor, Evidence]:
    """Each row attends to itself.

    query, key, value: [H, T, d]. window: tokens farther apart than this in *original* positions do not see each other.
    position_bias: what is added to a row's logits, from its tokens' original positions; called for some rows at a time.
    Returns the context [T, H, d] and the evidence wanted (float32).
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    layout = tokens.layout
    if window is not None and layout.width - 1 <= window and not being_exported():
        window = None  # it reaches every token of the widest row
    if on_cuda(query) and not wanted.full:
        return _on_cuda(query, key, value, tokens, scale, dropout, window, wanted, position_bias)
    if window is not None and not (wanted.squares or position_bias or being_exported()):
        # In bfloat16 the flash kernel's backward is slow.
        rounded = _learn(query, key, value) and query.dtype is torch.bfloat16
        if bands.pays(layout.sizes, window, cost=bands.LEARNED if rounded else bands.READ if wanted else 1.0):
            return _in_bands(query, key, value, tokens, scale, dropout, window, wanted, rounded)
    plain = tokens.log_weight is None and window is None and position_bias is None
    kept = wanted.full or dropout or being_exported() or _learn(query, key, value)
    if plain and not kept and all_at_once(query, max(layout.sizes), probabilities=bool(wanted)):
        return _at_once(query, key, value, tokens, scale, wanted)
    alike = len(set(layout.sizes)) == 1
    if plain and not wanted and alike and not _by_probabilities(query, key, value, layout.sizes[0]):
        return _equal_lengths(query, key, value, layout, scale, dropout), NO_EVIDENCE
    return _row_by_row(query, key, value, tokens, scale, dropout, window, wanted, position_bias)


def _learn(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _by_probabilities(query: Tensor, key: Tensor, value: Tensor, n: int) -> bool:
    """Whether rows of n tokens are faster one by one through their probabilities, which nobody wants to read."""
    if _learn(query, key, value):
        return learns_from_probabilities(query, n)
    return heads_apart(query, n, probabilities=False)


def _in_bands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: PackedTokens,
    scale: float,
    dropout: float,
    window: int,
    wanted: Wanted,
    by_probabilities: bool,
) -> tuple[Tensor, Evidence]:
    weights = cuda.query_weights(tokens, wanted.by_segment) if wanted.received else None
    context, sums, own = bands.attend_in_bands(
        query, key, value, tokens, window, scale, dropout, weights, wanted.diagonal, by_probabilities=by_probabilities
    )
    return context, _means(wanted, sums, own, None, weights, query, tokens.layout)


def _on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: PackedTokens,
    scale: float,
    dropout: float,
    window: int | None,
    wanted: Wanted,
    position_bias: PositionBias | None,
) -> tuple[Tensor, Evidence]:
    """Flash attention, and evidence from its log-sum-exp, wherever both are exact; else padded, in a few large operations."""
    layout = tokens.layout
    unbiased = tokens.log_weight is None and position_bias is None
    teaches = not wanted.detached and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    flash = unbiased and dropout == 0.0 and not (wanted and teaches) and cuda.fits(query, scale, window)
    if flash and (window is None or layout.unbroken):  # the kernel counts a window in places of the batch
        context, lse = cuda.flash(query, key, value, layout, scale, window)
        found = blocks = None
        if wanted.received:
            found = cuda.received(
                query, key, lse, tokens, scale, window=window, diagonal=wanted.diagonal, by_segment=wanted.by_segment
            )
        if wanted.block:
            blocks = cuda.diagonal_blocks(query, key, lse, layout, wanted.block, scale, window)
        return context, _only(wanted, found, blocks)
    if not wanted and window is None and unbiased and len(set(layout.sizes)) == 1:
        return _equal_lengths(query, key, value, layout, scale, dropout), NO_EVIDENCE
    weights = cuda.query_weights(tokens, wanted.by_segment) if wanted.received else None
    context, sums, own, blocks = cuda.attend_padded(
        query, key, value, tokens, scale, dropout, window, weights, wanted.diagonal, position_bias, wanted.block
    )
    return context, _means(wanted, sums, own, blocks, weights, query, layout)


def _means(
    wanted: Wanted,
    sums: Tensor | None,
    own: Tensor | None,
    blocks: Tensor | None,
    weights: Tensor | None,
    query: Tensor,
    layout: Layout,
) -> Evidence:
    if weights is None or sums is None:
        return _only(wanted, None, blocks)
    return _only(wanted, cuda.means(sums, own, weights, layout, len(query)), blocks)


def _only(wanted: Wanted, found: cuda.Received | None, blocks: Tensor | None) -> Evidence:
    if found is None:
        return NO_EVIDENCE if blocks is None else Evidence(blocks=blocks)
    mass = found.mass if wanted.mass else None
    return Evidence(mass=mass, diagonal=found.diagonal, by_segment=found.by_segment, blocks=blocks)


def _equal_lengths(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float) -> Tensor:
    if layout.single:
        out = F.scaled_dot_product_attention(
            query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), dropout_p=dropout, scale=scale
        )
        return out.squeeze(0).transpose(0, 1)
    heads, total, dim = query.shape
    batch = len(layout.sizes)
    q, k, v = (x.view(heads, batch, total // batch, dim).transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2).reshape(total, heads, dim)


def _at_once(
    query: Tensor, key: Tensor, value: Tensor, tokens: PackedTokens, scale: float, wanted: Wanted
) -> tuple[Tensor, Evidence]:
    sizes = tokens.layout.sizes
    gathered = Gathered(wanted, query, sizes)
    reads = gathered.of_whole(tokens) if wanted else [None] * len(sizes)
    context = query.new_empty(query.shape[1], len(query), value.shape[-1])
    attend_at_once(query, key, value, sizes, scale, context, reads)
    return context, gathered.evidence()


def _row_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: PackedTokens,
    scale: float,
    dropout: float,
    window: int | None,
    wanted: Wanted,
    position_bias: PositionBias | None,
) -> tuple[Tensor, Evidence]:
    learns = _learn(query, key, value, tokens.log_weight)
    constant = not (learns or dropout or wanted.full or being_exported())
    sizes = tokens.layout.sizes
    # Taken once for all rows: from one row to the next the system would take it back and clear it again.
    context = query.new_empty(query.shape[1], len(query), value.shape[-1]) if constant else None
    places = [None] * len(sizes) if context is None else context.split(sizes)
    memory: tuple[Tensor, Tensor] | None = None
    unit = wanted.block or 1  # no block is divided
    gathered = Gathered(wanted, query, sizes if constant else None)
    outputs: list[Tensor] = []
    for (q, k, v, row), place in zip(_rows(query, key, value, tokens), places, strict=True):
        bias = _bias(row, window, position_bias, q.dtype)
        n = q.shape[1]
        read = gathered.row(row).heads if wanted else None
        if place is not None and heads_apart(q, n, probabilities=bool(wanted)):
            memory = memory_for(query, sizes, unit) if memory is None else memory
            attend_by_head(q, k, v, scale, memory, place.transpose(0, 1), bias, read, unit)
            continue
        if read is not None or (learns and learns_from_probabilities(q, n)):
            out, probabilities = _materialised(q, k, v, bias, scale, dropout)
            if read is not None:
                read(probabilities)
        else:
            mask = None if bias is None else bias.expand(bias.shape[0], n, n).unsqueeze(0)
            out = F.scaled_dot_product_attention(
                q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), attn_mask=mask, dropout_p=dropout, scale=scale
            ).squeeze(0)
        if place is not None:
            place.copy_(out.transpose(0, 1))
        else:
            outputs.append(out.transpose(0, 1))
    return (join_rows(outputs) if context is None else context), gathered.evidence()


def _rows(
    query: Tensor, key: Tensor, value: Tensor, tokens: PackedTokens
) -> Iterator[tuple[Tensor, Tensor, Tensor, Row]]:
    layout = tokens.layout
    if layout.single:  # nothing to slice, hence no length that a traced graph would take for a constant
        yield query, key, value, Row(layout.positions, layout.segments, tokens.log_weight, tokens.alive)
        return
    sizes = layout.sizes
    parts = (query.split(sizes, 1), key.split(sizes, 1), value.split(sizes, 1))
    yield from zip(*parts, rows_of(tokens), strict=True)


def _materialised(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    logits = torch.bmm(q * scale, k.transpose(1, 2))
    if bias is not None:
        logits = logits + bias
    probabilities = logits.softmax(-1, dtype=torch.float32)
    weights = F.dropout(probabilities, dropout) if dropout else probabilities
    return torch.bmm(weights.to(v.dtype), v), probabilities


def _bias(row: Row, window: int | None, position_bias: PositionBias | None, dtype: torch.dtype) -> Tensor | None:
    """[1 or H, 1 or n, n] to add to one row's attention logits."""
    bias = None
    if row.log_weight is not None:
        bias = row.log_weight.to(dtype).unsqueeze(0)
    if window is not None:
        at = row.positions
        apart = (at.unsqueeze(0) - at.unsqueeze(1)).abs()
        far = apart > window
        blocked = torch.zeros(far.shape, dtype=dtype, device=at.device).masked_fill(far, float("-inf"))
        if bias is None:
            bias = blocked
        else:
            bias = bias + blocked
            # A simulated-dropped token whose whole window is dropped has nobody left to look at; it may see itself, and
            # nobody reads what it then computes.
            lonely = torch.isinf(bias).all(-1)
            bias = torch.where(lonely.unsqueeze(1) & (apart == 0), 0.0, bias)
    if position_bias is None:
        return None if bias is None else bias.unsqueeze(0)
    by_head = position_bias(row.positions).to(dtype)
    return by_head if bias is None else by_head + bias
