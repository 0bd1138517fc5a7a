"""Attention over a ragged batch, and the evidence that policies read from it. The one place that picks a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher import cuda
from thresher.cpu import attend_by_head, heads_apart, learns_from_probabilities, memory_for
from thresher.packed import Layout, PackedTokens, being_exported, on_cuda
from thresher.tiles import diagonal_tiles
from thresher.timing import mark


@dataclass(frozen=True)
class Wanted:
    """Which evidence a policy wants from one layer.

    mass: attention each token receives. diagonal: what it gives itself. by_segment: mass split by the querying segment.
    block: size b of the diagonal blocks, 0 for none. full: the whole map.
    detached: the evidence only selects and no gradient is asked of it, so that a kernel without a backward may make it.
    """

    mass: bool = False
    diagonal: bool = False
    by_segment: bool = False
    block: int = 0
    full: bool = False
    detached: bool = False

    @property
    def received(self) -> bool:
        """Whether something is summed over queries."""
        return self.mass or self.diagonal or self.by_segment

    def __bool__(self) -> bool:
        return self.received or self.full or self.block > 0


NOTHING = Wanted()

PositionBias = Callable[[Tensor], Tensor]  # original positions [..., n] → [..., H, n, n]


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
    position_bias: PositionBias | None = None,
) -> tuple[Tensor, Evidence]:
    """Each row attends to itself.

    query, key, value: [H, T, d]. window: tokens farther apart than this in *original* positions do not see each other.
    position_bias: what is added to a row's logits, from its tokens' original positions; called for some rows at a time.
    Returns the context [T, H, d] and the evidence wanted (float32).
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    layout = tokens.layout
    if on_cuda(query) and not wanted.full:
        return _on_cuda(query, key, value, tokens, scale, dropout, window, wanted, position_bias)
    plain = tokens.log_weight is None and window is None and position_bias is None
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
    if window is not None and layout.width - 1 <= window:
        window = None  # it reaches every token of the widest row
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
    if weights is None or sums is None:
        return context, _only(wanted, None, blocks)
    return context, _only(wanted, cuda.means(sums, own, weights, layout, len(query)), blocks)


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
    memory: Tensor | None = None
    gathered = _Gathered(wanted, query, sizes if constant else None)
    outputs: list[Tensor] = []
    for (q, k, v, row), place in zip(_rows(query, key, value, tokens), places, strict=True):
        bias = _bias(row, window, position_bias, q.dtype)
        n = q.shape[1]
        read = gathered.row(row).heads if wanted else None
        if place is not None and heads_apart(q, n, probabilities=bool(wanted)):
            memory = memory_for(query, sizes) if memory is None else memory
            attend_by_head(q, k, v, scale, memory, place.transpose(0, 1), bias, read)
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
    return (_join(outputs) if context is None else context), gathered.evidence()


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


def _bias(row: _Row, window: int | None, position_bias: PositionBias | None, dtype: torch.dtype) -> Tensor | None:
    """[1 or H, 1 or n, n] to add to one row's attention logits."""
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
    if position_bias is None:
        return None if bias is None else bias.unsqueeze(0)
    by_head = position_bias(row.positions).to(dtype)
    return by_head if bias is None else by_head + bias


class _Gathered:
    """Collects one layer's evidence row by row."""

    def __init__(self, wanted: Wanted, query: Tensor, sizes: list[int] | None) -> None:
        """query: [H, T, d]. sizes: of the rows, when nothing learns, and blocks are written where they will stay."""
        self.wanted = wanted
        self.rows: list[_RowEvidence] = []
        self.tiles: Tensor | None = None
        if wanted.block and sizes is not None:
            self.counts = [-(-n // wanted.block) for n in sizes]
            shape = (sum(self.counts), len(query), wanted.block, wanted.block)
            self.tiles = torch.zeros(shape, dtype=torch.float32, device=query.device)
            self.places = self.tiles.split(self.counts)

    def row(self, row: _Row) -> _RowEvidence:
        place = None if self.tiles is None else self.places[len(self.rows)]
        self.rows.append(_RowEvidence(self.wanted, row, place))
        return self.rows[-1]

    def evidence(self) -> Evidence:
        mark("attention")
        wanted, rows = self.wanted, self.rows
        join = lambda wanted, one: _join([one(row) for row in rows]) if wanted else None  # noqa: E731
        found = Evidence(
            mass=join(wanted.mass, _RowEvidence.mass),
            diagonal=join(wanted.diagonal, _RowEvidence.diagonal),
            by_segment=join(wanted.by_segment, _RowEvidence.by_segment),
            blocks=join(wanted.block, _RowEvidence.blocks) if self.tiles is None else self.tiles,
            full=tuple(_join(row.maps) for row in rows) if wanted.full else None,
        )
        mark("evidence")
        return found


class _RowEvidence:
    """Evidence of one row, from its probabilities as they come: all heads at once or head by head."""

    def __init__(self, wanted: Wanted, row: _Row, place: Tensor | None) -> None:
        self.wanted = wanted
        self.place = place
        self.alive = row.alive
        self.count = 0
        self.sums: list[Tensor] = []
        self.diagonals: list[Tensor] = []
        self.queried: list[Tensor] = []
        self.tiles: list[Tensor] = []
        self.maps: list[Tensor] = []
        self.segments = row.segments

    def heads(self, probabilities: Tensor) -> None:
        """[h, n, n]"""
        mark("attention")
        wanted, before = self.wanted, self.count
        self.count += probabilities.shape[0]
        if wanted.mass:
            self._add(self.sums, _column_sum(probabilities, self.alive))
        if wanted.diagonal:
            self._add(self.diagonals, probabilities.diagonal(dim1=1, dim2=2).sum(0))
        if wanted.by_segment:
            self._add(self.queried, _segment_sums(probabilities, self._queries(probabilities.dtype)))
        if wanted.block:
            place = None if self.place is None else self.place[:, before : self.count]
            self.tiles.append(diagonal_tiles(probabilities, wanted.block, place))
        if wanted.full:
            self.maps.append(probabilities)
        mark("evidence")

    @staticmethod
    def _add(sums: list[Tensor], value: Tensor) -> None:
        sums[:] = [sums[0] + value] if sums else [value]

    def _queries(self, dtype: torch.dtype) -> Tensor:
        """[2, n], the real queries of each segment."""
        in_second = self.segments.to(dtype)
        queries = torch.stack([1 - in_second, in_second])
        return queries if self.alive is None else queries * self.alive.to(dtype)

    def mass(self) -> Tensor:
        (total,) = self.sums
        return total / ((total.shape[0] if self.alive is None else self.alive.sum()) * self.count)

    def diagonal(self) -> Tensor:
        return self.diagonals[0] / self.count

    def by_segment(self) -> Tensor:
        (total,) = self.queried
        counts = self._queries(total.dtype).sum(1, keepdim=True).clamp(min=1)
        return (total / (counts * self.count)).T

    def blocks(self) -> Tensor:
        return self.tiles[0] if len(self.tiles) == 1 else torch.cat(self.tiles, 1)


def _column_sum(probabilities: Tensor, alive: Tensor | None) -> Tensor:
    """[n], the sum over heads and living queries of [h, n, n] float32."""
    weights = torch.ones_like(probabilities[:, :, 0])
    if alive is not None:
        weights = weights * alive.to(weights.dtype)
    if torch.is_autocast_enabled(probabilities.device.type):  # which would round what a product sums
        return (probabilities * weights.unsqueeze(2)).sum((0, 1))
    # One matrix-vector product over the [h * n, n] view: the cheapest column sum on every device.
    return weights.reshape(-1) @ probabilities.reshape(-1, probabilities.shape[-1])


def _segment_sums(probabilities: Tensor, queries: Tensor) -> Tensor:
    """[2, n], for the queries of each segment ([2, n] of ones and zeros) the sum over heads of [h, n, n] float32."""
    if torch.is_autocast_enabled(probabilities.device.type):
        return (probabilities.sum(0) * queries.unsqueeze(2)).sum(1)
    return queries.repeat(1, len(probabilities)) @ probabilities.reshape(-1, probabilities.shape[-1])
