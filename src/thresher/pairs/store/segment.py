"""A segment: some candidates in one immutable file, and how several become one."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from thresher.pairs.store.coding import Array, hashed, offsets_of, spread
from thresher.pairs.store.files import Block, release
from thresher.pairs.store.manifest import SegmentEntry
from thresher.pairs.store.schema import VECTORS, Field, Schema

Rows = slice | Array
ALIGNED = 64
STEP = 1 << 23  # bytes of a column that a merge holds at a time


@dataclass(frozen=True)
class Column:
    """An array in the file. along: what its first axis counts; the index is in the order of the hashes, not of the rows."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    along: Literal["index", "offsets", "rows", "tokens", "bytes"]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layout(schema: Schema, rows: int, tokens: int, id_bytes: int) -> tuple[Column, ...]:
    """The columns of a segment's file, in their order, each starting at a multiple of 64 bytes."""
    columns: list[Column] = []

    def column(name: str, dtype: Any, count: int, along: Any, shape: tuple[int, ...] = ()) -> None:
        end = columns[-1].start + columns[-1].nbytes if columns else 0
        start = -(-end // ALIGNED) * ALIGNED
        columns.append(Column(name, np.dtype(dtype), (count, *shape), along, start))

    column("hashes", "<u8", rows, "index")
    column("order", "<u4", rows, "index")
    column("ids.offsets", "<i8", rows + 1, "offsets")
    column("ids", "|u1", id_bytes, "bytes")
    for field in schema.fields:
        ragged = field.most is not None
        if ragged:
            column(f"{field.name}.offsets", "<i8", rows + 1, "offsets")
        count, along = (tokens, "tokens") if ragged else (rows, "rows")
        if field.scaled:
            column(f"{field.name}.scales", "<f4", count, along, field.shape[:-1])
        column(field.name, field.stored, count, along, field.shape)
    return tuple(columns)


def size_of(columns: Sequence[Column]) -> int:
    return columns[-1].start + columns[-1].nbytes


def blocks(columns: Iterable[Column], source: Callable[[str], Iterable[Array]]) -> Iterator[Block]:
    """The bytes of a file: every column's blocks, and zeros up to the next."""
    at = 0
    for column in columns:
        yield bytes(column.start - at)
        for block in source(column.name):
            yield np.ascontiguousarray(block, column.dtype).data
        at = column.start + column.nbytes


def index_of(hashes: Array, id_lengths: Array) -> dict[str, Array]:
    """The columns that find ids, from the hashes [rows] and the bytes [rows] of each."""
    order = np.argsort(hashes, kind="stable")
    return {"hashes": hashes[order], "order": order.astype("<u4"), "ids.offsets": offsets_of(id_lengths)}


def fresh(names: Sequence[bytes], columns: dict[str, Array]) -> dict[str, Array]:
    """All columns of a segment of new candidates, from their ids and what `encode` made of their arrays."""
    index = index_of(hashed(names), np.array([len(name) for name in names]))
    return {**index, "ids": np.frombuffer(b"".join(names), np.uint8), **columns}


class Segment:
    """A segment's file and dead rows, mapped. Its methods raise IndexError or ValueError where the file does not make sense."""

    def __init__(self, schema: Schema, entry: SegmentEntry, mapping: mmap.mmap, dead: mmap.mmap | None) -> None:
        self.entry = entry
        self.rows = entry.rows
        self.layout = {column.name: column for column in layout(schema, entry.rows, entry.tokens, entry.id_bytes)}
        self.columns = {
            name: np.frombuffer(mapping, c.dtype, math.prod(c.shape), c.start).reshape(c.shape)
            for name, c in self.layout.items()
        }
        self.dead: Array = np.frombuffer(dead, "<u4") if dead is not None else np.empty(0, "<u4")
        self._mapping = mapping

    def find(self, hashes: Array, names: Sequence[bytes]) -> Array:
        """Rows [N] int64 of N ids, -1 for those that are not here or dead."""
        index, order = self.columns["hashes"], self.columns["order"]
        found = np.full(len(names), -1, np.int64)
        at = np.searchsorted(index, hashes)
        left = np.arange(len(names))
        while True:  # once, and once more for every id of another name that has the same hash
            left = left[at[left] < self.rows]
            left = left[index[at[left]] == hashes[left]]
            if not left.size:
                return self._without_dead(found)
            rows = order[at[left]].astype(np.int64)
            same = np.array([a == names[i] for a, i in zip(self.names(rows), left.tolist(), strict=True)], bool)
            found[left[same]] = rows[same]
            left = left[~same]
            at[left] += 1

    def _without_dead(self, rows: Array) -> Array:
        if self.dead.size:
            at = np.minimum(np.searchsorted(self.dead, rows), len(self.dead) - 1)
            rows[self.dead[at] == rows] = -1
        return rows

    def names(self, rows: Rows) -> list[bytes]:
        """The ids of some rows, in UTF-8."""
        offsets, text = self.columns["ids.offsets"], self.columns["ids"].data
        if isinstance(rows, slice):
            ends = offsets[rows.start : rows.stop + 1].tolist()
            return [bytes(text[a:b]) for a, b in itertools.pairwise(ends)]
        pairs = zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
        return [bytes(text[a:b]) for a, b in pairs]

    def live(self, start: int, stop: int) -> Rows:
        """The rows from start up to stop without the dead: a slice where there are none."""
        a, b = np.searchsorted(self.dead, [start, stop])
        if a == b:
            return slice(start, stop)
        return np.delete(np.arange(start, stop), self.dead[a:b].astype(np.int64) - start)

    def lengths(self, name: str, rows: Rows) -> Array:
        """How many entries each row has in a column that has offsets: [N] int64."""
        offsets = self.columns[f"{name}.offsets"]
        if isinstance(rows, slice):
            return np.diff(offsets[rows.start : rows.stop + 1])
        return np.asarray(offsets[rows + 1] - offsets[rows])

    def take(self, name: str, rows: Rows) -> Array:
        """A column's entries of some rows, as stored; a view of the file where the rows are a slice."""
        along = self.layout[name].along
        column = self.columns[name]
        if along == "rows":
            return column[rows]
        owner = "ids" if along == "bytes" else VECTORS
        offsets = self.columns[f"{owner}.offsets"]
        if isinstance(rows, slice):
            return column[int(offsets[rows.start]) : int(offsets[rows.stop])]
        return column[spread(offsets[rows], self.lengths(owner, rows))]

    def counts(self, field: Field, rows: Rows) -> Array | None:
        """lengths [N] of a ragged field. Raises ValueError where they cannot be."""
        if field.most is None:
            return None
        lengths = self.lengths(field.name, rows)
        if lengths.size and not 1 <= int(lengths.min()) <= int(lengths.max()) <= field.most:
            raise ValueError("offsets out of range")
        return lengths

    def hash_of_rows(self) -> Array:
        """[rows] uint64, in the order of the rows."""
        hashes = np.empty(self.rows, "<u8")
        hashes[self.columns["order"]] = self.columns["hashes"]
        return hashes

    def release(self) -> None:
        release(self._mapping)


class Merge:
    """The live rows of several segments, one after another, as the columns of one.

    Memory: about 40 bytes an id for the index, and some megabytes of one column at a time.
    """

    def __init__(self, schema: Schema, segments: Sequence[Segment]) -> None:
        self._segments = segments
        whole = [segment.live(0, segment.rows) for segment in segments]
        hashes = np.concatenate([s.hash_of_rows()[rows] for s, rows in zip(segments, whole, strict=True)])
        lengths = np.concatenate([s.lengths("ids", rows) for s, rows in zip(segments, whole, strict=True)])
        self._known = index_of(hashes, lengths)
        self.rows, self.id_bytes, self.tokens = len(hashes), int(lengths.sum()), 0
        if schema.ragged:
            counts = np.concatenate([s.lengths(VECTORS, rows) for s, rows in zip(segments, whole, strict=True)])
            self._known[f"{VECTORS}.offsets"] = offsets_of(counts)
            self.tokens = int(counts.sum())
        self.layout = layout(schema, self.rows, self.tokens, self.id_bytes)

    def column(self, name: str) -> Iterator[Array]:
        if name in self._known:
            yield self._known[name]
            return
        for segment in self._segments:
            step = max(1, STEP * segment.rows // segment.layout[name].nbytes)
            for start in range(0, segment.rows, step):
                yield segment.take(name, segment.live(start, min(start + step, segment.rows)))
                segment.release()


__all__ = ["Column", "Merge", "Rows", "Segment", "blocks", "fresh", "layout", "size_of"]
