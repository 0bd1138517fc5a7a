"""What attention says about the tokens it read, and how that is gathered row by row from probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.packed import PackedTokens, being_exported
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

    @property
    def squares(self) -> bool:
        """Whether squares of a map are read, which bands do not show."""
        return self.full or self.block > 0

    def __bool__(self) -> bool:
        return self.received or self.squares


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


@dataclass(frozen=True)
class Row:
    """What attention needs to know of one row's n tokens beside q, k, v."""

    positions: Tensor
    segments: Tensor
    log_weight: Tensor | None
    alive: Tensor | None


def rows_of(tokens: PackedTokens) -> list[Row]:
    layout = tokens.layout
    parts = (layout.positions, layout.segments, tokens.log_weight, tokens.alive)
    split = [[None] * len(layout.sizes) if part is None else part.split(layout.sizes) for part in parts]
    return [Row(*row) for row in zip(*split, strict=True)]


class Gathered:
    """Collects one layer's evidence row by row."""

    def __init__(self, wanted: Wanted, query: Tensor, sizes: list[int] | None) -> None:
        """query: [H, T, d]. sizes: of the rows, when nothing learns, and blocks are written where they will stay."""
        self.wanted = wanted
        self.rows: list[_RowEvidence] = []
        self.sums: list[Tensor] = []
        self.tiles: Tensor | None = None
        # Short rows are many: what each would make for itself is made once.
        self.ones: Tensor | None = None
        if wanted.mass and sizes is not None:
            self.ones = query.new_ones(len(query) * max(sizes), dtype=torch.float32)
        if wanted.block and sizes is not None:
            self.counts = [-(-n // wanted.block) for n in sizes]
            shape = (sum(self.counts), len(query), wanted.block, wanted.block)
            self.tiles = torch.empty(shape, dtype=torch.float32, device=query.device)
            self.places = self.tiles.split(self.counts)

    def of_whole(self, tokens: PackedTokens) -> list[Callable[[Tensor], None]]:
        """For each row what is to be called with its probabilities [H, n, n], none of which is needed for gradients."""
        wanted = self.wanted
        if wanted.mass and not (wanted.diagonal or wanted.by_segment or wanted.block) and tokens.alive is None:
            return [self._sum] * len(tokens.layout.sizes)
        return [self.row(row).heads for row in rows_of(tokens)]

    def _sum(self, probabilities: Tensor) -> None:
        mark("attention")
        self.sums.append(_column_sums(probabilities, None, self.ones))
        mark("evidence")

    def row(self, row: Row) -> _RowEvidence:
        place = None if self.tiles is None else self.places[len(self.rows)]
        self.rows.append(_RowEvidence(self.wanted, row, place, self.ones))
        return self.rows[-1]

    def evidence(self) -> Evidence:
        mark("attention")
        wanted, rows = self.wanted, self.rows
        join = lambda wanted, one: join_rows([one(row) for row in rows]) if wanted else None  # noqa: E731
        found = Evidence(
            mass=self._mass() if wanted.mass else None,
            diagonal=join(wanted.diagonal, _RowEvidence.diagonal),
            by_segment=join(wanted.by_segment, _RowEvidence.by_segment),
            blocks=join(wanted.block, _RowEvidence.blocks) if self.tiles is None else self.tiles,
            full=tuple(join_rows(row.maps) for row in rows) if wanted.full else None,
        )
        mark("evidence")
        return found

    def _mass(self) -> Tensor:
        rows = self.rows
        if self.sums:
            each = [one.shape[0] * one.shape[2] for one in self.sums]
            return torch.cat(self.sums, 2).sum((0, 1)) / _repeated(each, self.sums)
        # Summed over heads and divided once for all rows: of short ones each step of each row counts.
        if len(rows) == 1 or any(row.alive is not None for row in rows):
            return join_rows([row.sums().sum((0, 1)) / row.summed() for row in rows])
        sums = [row.sums() for row in rows]
        if len({len(one) for one in sums}) > 1:
            sums = [one.sum(0, keepdim=True) for one in sums]
        return torch.cat(sums, 2).sum((0, 1)) / _repeated([row.summed() for row in rows], sums)


def _repeated(values: Sequence[int | Tensor], sums: list[Tensor]) -> Tensor:
    """[T], a row's value for each of its tokens. sums: of each row, [h, 1, n]."""
    sizes = torch.tensor([one.shape[2] for one in sums])
    each = torch.tensor(values, dtype=sums[0].dtype)
    return each.repeat_interleave(sizes, output_size=int(sizes.sum())).to(sums[0].device)


class _RowEvidence:
    """Evidence of one row, from its probabilities as they come: all heads at once or head by head."""

    def __init__(self, wanted: Wanted, row: Row, place: Tensor | None, ones: Tensor | None) -> None:
        """ones: at least as many as queries of all heads, float32."""
        self.wanted = wanted
        self.place = place
        self.ones = ones
        self.alive = row.alive
        self.count = 0
        self.by_heads: list[Tensor] = []
        self.diagonals: list[Tensor] = []
        self.queried: list[Tensor] = []
        self.tiles: list[Tensor] = []
        self.maps: list[Tensor] = []
        self.segments = row.segments

    def heads(self, probabilities: Tensor, asking: slice | None = None) -> None:
        """[h, m, n], of the queries `asking`, None: of all. Some heads' queries come one after the other, then other heads'."""
        mark("attention")
        wanted = self.wanted
        if asking is None or asking.start == 0:
            self.count += probabilities.shape[0]
        if wanted.mass:
            self.by_heads.append(_column_sums(probabilities, _some(self.alive, asking), self.ones))
        if wanted.diagonal:
            own = probabilities.diagonal(0 if asking is None else asking.start, dim1=1, dim2=2).sum(0)
            if asking is not None:
                own = F.pad(own, (asking.start, probabilities.shape[2] - asking.stop))
            self._add(self.diagonals, own)
        if wanted.by_segment:
            queries = _some(self._queries(probabilities.dtype), asking)
            assert queries is not None
            self._add(self.queried, _segment_sums(probabilities, queries))
        if wanted.block:
            self._tiles(probabilities, wanted.block, asking)
        if wanted.full:
            self.maps.append(probabilities)
        mark("evidence")

    def _tiles(self, probabilities: Tensor, size: int, asking: slice | None) -> None:
        """The diagonal blocks of these queries."""
        if self.place is None:
            self.tiles.append(diagonal_tiles(probabilities, size))
            return
        place = self.place[:, self.count - len(probabilities) : self.count]
        if asking is not None:
            place = place[asking.start // size : -(-asking.stop // size)]
            probabilities = probabilities[:, :, asking]
        diagonal_tiles(probabilities, size, place)

    @staticmethod
    def _add(sums: list[Tensor], value: Tensor) -> None:
        sums[:] = [sums[0] + value] if sums else [value]

    def _queries(self, dtype: torch.dtype) -> Tensor:
        """[2, n], the real queries of each segment."""
        in_second = self.segments.to(dtype)
        queries = torch.stack([1 - in_second, in_second])
        return queries if self.alive is None else queries * self.alive.to(dtype)

    def sums(self) -> Tensor:
        """[h, m, n], what each token receives, by head or of several heads together; m is 1 outside an exported graph."""
        return self.by_heads[0] if len(self.by_heads) == 1 else torch.cat(self.by_heads).sum(0, keepdim=True)

    def summed(self) -> int | Tensor:
        """How many distributions over the row's tokens these are the sums of."""
        queries = self.by_heads[0].shape[2] if self.alive is None else self.alive.sum()
        return queries * self.count

    def diagonal(self) -> Tensor:
        return self.diagonals[0] / self.count

    def by_segment(self) -> Tensor:
        (total,) = self.queried
        counts = self._queries(total.dtype).sum(1, keepdim=True).clamp(min=1)
        return (total / (counts * self.count)).T

    def blocks(self) -> Tensor:
        return self.tiles[0] if len(self.tiles) == 1 else torch.cat(self.tiles, 1)


def _some(values: Tensor | None, asking: slice | None) -> Tensor | None:
    """[..., m], what is said of some queries; None of all."""
    return values if values is None or asking is None else values[..., asking]


def _column_sums(probabilities: Tensor, alive: Tensor | None, ones: Tensor | None) -> Tensor:
    """[h or 1, 1, n], the sums over living queries of [h, m, n] float32. alive: [m]. ones: at least h * m of them.
    In an exported graph, where each step is an operator to call, what is to be summed, as it is."""
    if alive is None and being_exported():
        return probabilities
    heads, queries, _ = probabilities.shape
    weights = probabilities.new_ones(heads * queries) if ones is None else ones[: heads * queries]
    weights = weights.view(heads, 1, queries)
    if alive is not None:
        weights = weights * alive.to(weights.dtype)
    if torch.is_autocast_enabled(probabilities.device.type):  # which would round what a product sums
        return (probabilities * weights.transpose(1, 2)).sum((0, 1), keepdim=True)
    # Head by head, as the products before and after it, so that each thread reads what it has just written: one matrix-vector
    # product over all heads and queries would fetch half of it from another core's cache, twice.
    return torch.bmm(weights, probabilities)


def _segment_sums(probabilities: Tensor, queries: Tensor) -> Tensor:
    """[2, n], for the queries of each segment ([2, m] of ones and zeros) the sum over heads of [h, m, n] float32."""
    if torch.is_autocast_enabled(probabilities.device.type):
        return (probabilities.sum(0) * queries.unsqueeze(2)).sum(1)
    return torch.bmm(queries.expand(len(probabilities), -1, -1), probabilities).sum(0)


def join_rows(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
