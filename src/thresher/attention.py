"""Attention over a ragged batch, and the evidence that policies read from it. The one place that picks a kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.packed import Layout, PackedTokens


@dataclass(frozen=True)
class Wanted:
    """Which evidence a policy wants from one layer.

    mass: attention each token receives. diagonal: what it gives itself. by_segment: mass split by the querying segment.
    block: size b of the diagonal blocks, 0 for none. full: the whole map.
    """

    mass: bool = False
    diagonal: bool = False
    by_segment: bool = False
    block: int = 0
    full: bool = False

    @property
    def probabilities(self) -> bool:
        """Whether the n x n probabilities have to exist for a moment."""
        return self.mass or self.diagonal or self.by_segment or self.full

    def __bool__(self) -> bool:
        return self.probabilities or self.block > 0


NOTHING = Wanted()


@dataclass(frozen=True)
class Evidence:
    """What one layer's attention says about its tokens; A_h[i, j] is the probability query i of head h puts on key j.

    mass: [T], mean over heads and real queries of A_h[i, j]; sums to 1 over a row (the AM score of PoWER-BERT, LAT and
    LTP).
    diagonal: [T], mean over heads of A_h[j, j]; `mass_off_diagonal` leaves it out, as PoWER-BERT does.
    by_segment: [T, 2], the mass received from queries of segment 0 and of segment 1, each a mean over that segment's
    queries
        (zero where a row has none).
    blocks: [sum of ceil(n / b), H, b, b], diagonal blocks row after row, zero beyond a row's end.
    full: one [H, n, n] for each row.
    """

    mass: Tensor | None = None
    diagonal: Tensor | None = None
    by_segment: Tensor | None = None
    blocks: Tensor | None = None
    full: tuple[Tensor, ...] | None = None

    def mass_off_diagonal(self, tokens: PackedTokens) -> Tensor:
        """[T], mass without the query i = j (still divided by the number of all real queries)."""
        assert self.mass is not None
        assert self.diagonal is not None
        queries = tokens.layout.spread(tokens.lengths).to(self.mass.dtype)
        return self.mass - self.diagonal / queries


NO_EVIDENCE = Evidence()


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
) -> tuple[Tensor, Evidence]:
    """Each row attends to itself.

    query, key, value: [H, T, d]. window: tokens farther apart than this in *original* positions do not see each other.
    Returns the context [T, H, d] and the evidence wanted (float32).
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    layout = tokens.layout
    plain = tokens.log_weight is None and window is None
    if plain and not wanted:
        if query.is_cuda and dropout == 0.0 and query.dtype in (torch.float16, torch.bfloat16):
            return _varlen(query, key, value, layout, scale), NO_EVIDENCE
        if len(set(layout.sizes)) == 1:
            return _equal_lengths(query, key, value, layout, scale, dropout), NO_EVIDENCE
    if plain and wanted.block and not wanted.probabilities and _has_flash_lse(query, dropout):
        return _with_blocks(query, key, value, layout, scale, wanted.block)
    return _row_by_row(query, key, value, tokens, scale, dropout, window, wanted)


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(layout.sizes)
    cu = layout.cu_seqlens
    q, k, v = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale)  # type: ignore[return-value]


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


def _row_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: PackedTokens,
    scale: float,
    dropout: float,
    window: int | None,
    wanted: Wanted,
) -> tuple[Tensor, Evidence]:
    gathered = _Gathered(wanted)
    outputs = []
    for q, k, v, row in _rows(query, key, value, tokens):
        bias = _bias(row, window, q.dtype)
        if wanted:
            out, probabilities = _materialised(q, k, v, bias, scale, dropout)
            gathered.add(probabilities, row)
        else:
            mask = None if bias is None else bias.expand(1, 1, q.shape[1], q.shape[1])
            out = F.scaled_dot_product_attention(
                q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), attn_mask=mask, dropout_p=dropout, scale=scale
            ).squeeze(0)
        outputs.append(out.transpose(0, 1))
    return _join(outputs), gathered.evidence()


@dataclass(frozen=True)
class _Row:
    """What attention needs to know of one row's n tokens beside q, k, v."""

    positions: Tensor
    segments: Tensor
    log_weight: Tensor | None
    alive: Tensor | None


def _rows(
    query: Tensor, key: Tensor, value: Tensor, tokens: PackedTokens
) -> Iterator[tuple[Tensor, Tensor, Tensor, _Row]]:
    layout = tokens.layout
    if layout.single:  # nothing to slice, hence no length that a traced graph would take for a constant
        yield query, key, value, _Row(layout.positions, layout.segments, tokens.log_weight, tokens.alive)
        return
    sizes = layout.sizes
    parts = (query.split(sizes, 1), key.split(sizes, 1), value.split(sizes, 1))
    nothing = [None] * len(sizes)
    about = (
        layout.positions.split(sizes),
        layout.segments.split(sizes),
        nothing if tokens.log_weight is None else tokens.log_weight.split(sizes),
        nothing if tokens.alive is None else tokens.alive.split(sizes),
    )
    for q, k, v, *row in zip(*parts, *about, strict=True):
        yield q, k, v, _Row(*row)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _materialised(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    logits = torch.bmm(q * scale, k.transpose(1, 2))
    if bias is not None:
        logits = logits + bias
    probabilities = logits.softmax(-1, dtype=torch.float32)
    weights = F.dropout(probabilities, dropout) if dropout else probabilities
    return torch.bmm(weights.to(v.dtype), v), probabilities


def _bias(row: _Row, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """[1 or n, n] to add to one row's attention logits."""
    bias = None
    if row.log_weight is not None:
        bias = row.log_weight.to(dtype).unsqueeze(0)
    if window is not None:
        at = row.positions
        apart = (at.unsqueeze(0) - at.unsqueeze(1)).abs()
        far = apart > window
        blocked = torch.zeros(far.shape, dtype=dtype, device=at.device).masked_fill(far, float("-inf"))
        bias = blocked if bias is None else bias + blocked
        # A simulated-dropped token whose whole window is dropped has nobody left to look at; it may see itself, and
        # nobody reads what it then computes.
        lonely = torch.isinf(bias).all(-1)
        bias = torch.where(lonely.unsqueeze(1) & (apart == 0), 0.0, bias)
    return bias


class _Gathered:
    """Collects one layer's evidence row by row."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.mass: list[Tensor] = []
        self.diagonal: list[Tensor] = []
        self.by_segment: list[Tensor] = []
        self.blocks: list[Tensor] = []
        self.full: list[Tensor] = []

    def add(self, probabilities: Tensor, row: _Row) -> None:
        """probabilities: [H, n, n] of one row."""
        wanted = self.wanted
        alive = None if row.alive is None else row.alive.to(probabilities.dtype)
        if wanted.mass:
            self.mass.append(_column_mean(probabilities, alive))
        if wanted.diagonal:
            self.diagonal.append(probabilities.diagonal(dim1=1, dim2=2).mean(0))
        if wanted.by_segment:
            in_second = row.segments.to(probabilities.dtype)
            queries = torch.stack([1 - in_second, in_second])
            queries = queries if alive is None else queries * alive
            counts = queries.sum(1, keepdim=True).clamp(min=1)
            self.by_segment.append(((queries / counts) @ probabilities.mean(0)).T)
        if wanted.block:
            self.blocks.append(_diagonal_blocks(probabilities, wanted.block))
        if wanted.full:
            self.full.append(probabilities)

    def evidence(self) -> Evidence:
        join = lambda parts: _join(parts) if parts else None  # noqa: E731
        return Evidence(
            mass=join(self.mass),
            diagonal=join(self.diagonal),
            by_segment=join(self.by_segment),
            blocks=join(self.blocks),
            full=tuple(self.full) if self.wanted.full else None,
        )


def _column_mean(probabilities: Tensor, alive: Tensor | None) -> Tensor:
    """[n], the mean over heads and living queries of [H, n, n]."""
    heads, n = probabilities.shape[0], probabilities.shape[-1]
    # One matrix-vector product over the [H * n, n] view: the cheapest column sum on every device.
    if alive is None:
        weights, total = torch.ones_like(probabilities[:, :, 0]).reshape(-1), heads * n
        return weights @ probabilities.reshape(-1, n) / total
    return (alive / (alive.sum() * heads)).repeat(heads) @ probabilities.reshape(-1, n)


def _diagonal_blocks(probabilities: Tensor, size: int) -> Tensor:
    """[ceil(n / b), H, b, b] from [H, n, n]; zero beyond n."""
    n = probabilities.shape[-1]
    count = -(-n // size)
    padded = F.pad(probabilities, (0, count * size - n, 0, count * size - n))
    tiles = padded.view(-1, count, size, count, size)
    return tiles.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)


def _has_flash_lse(query: Tensor, dropout: float) -> bool:
    return query.device.type == "cpu" and dropout == 0.0 and not (torch.is_grad_enabled() and query.requires_grad)


def _with_blocks(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, size: int
) -> tuple[Tensor, Evidence]:
    """Diagonal blocks without any n x n: exp(q_blk k_blk^T * scale - lse), with the row's log-sum-exp from the flash kernel."""
    sizes = layout.sizes
    outputs, blocks = [], []
    for q, k, v in zip(query.split(sizes, 1), key.split(sizes, 1), value.split(sizes, 1), strict=True):
        n = q.shape[1]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), 0.0, False, scale=scale
        )
        outputs.append(out.squeeze(0).transpose(0, 1))
        count = -(-n // size)
        pad = count * size - n
        tile = lambda x: F.pad(x, (0, 0, 0, pad)).view(x.shape[0], count, size, -1).float()  # noqa: E731, B023
        q_blocks, k_blocks = tile(q), tile(k)
        lse_blocks = F.pad(lse.reshape(q.shape[0], n), (0, pad), value=float("inf")).view(-1, count, size, 1)
        probabilities = torch.exp(q_blocks @ k_blocks.transpose(-1, -2) * scale - lse_blocks)
        if pad:
            probabilities[:, -1, :, size - pad :] = 0.0
        blocks.append(probabilities.transpose(0, 1))
    return torch.cat(outputs), Evidence(blocks=torch.cat(blocks))
