"""One committed state of a store, as a reader sees it: it does not change, whatever a writer does meanwhile."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from thresher.pairs.store import manifest as manifests
from thresher.pairs.store.coding import Array, decode, hashed, offsets_of, refuse_absent, spread
from thresher.pairs.store.files import FileEntry, MissingFileError, checked, damaged, mapped
from thresher.pairs.store.manifest import Manifest
from thresher.pairs.store.schema import VECTORS, Field, Schema
from thresher.pairs.store.segment import Rows, Segment

Part = tuple[Segment, Rows]


@dataclass(frozen=True, eq=False)
class Candidates:
    """N candidates out of a store.

    ids: N texts; those of a chunk are decoded when they are asked for, so that scoring a million pays for the best only.
    vectors: [N, k, dim]; in a ragged store [T, dim], those of the first id, then those of the second.
    lengths: [N] int64 in a ragged store, how many vectors each has; else None.
    extras: [N, *shape] by name.
    scales: empty, unless int8 was asked for as it is stored: then by name ("vectors" or an extra's), the array's shape less its
        last axis, float32; the floats are `array * scales[..., None]`.

    Floats are float32, unless they were asked for as stored; these, and float32 ones, may be read-only views of the file.
    """

    ids: Sequence[str]
    vectors: Array
    lengths: Array | None = None
    extras: Mapping[str, Array] = field(default_factory=dict)
    scales: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


class LazyIds(Sequence[str]):
    """The ids of some rows, decoded when asked for."""

    def __init__(self, view: View, parts: Sequence[Part]) -> None:
        self._view = view
        self._parts = parts
        self._offsets = offsets_of(np.array([count_of(rows) for _, rows in parts], np.int64))

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        number = int(np.searchsorted(self._offsets, at, "right")) - 1
        segment, rows = self._parts[number]
        within = at - int(self._offsets[number])
        row = rows.start + within if isinstance(rows, slice) else int(rows[within])
        return self._view.names(segment, slice(row, row + 1))[0]

    def __iter__(self) -> Iterator[str]:
        for segment, rows in self._parts:
            yield from self._view.names(segment, rows)

    def __repr__(self) -> str:
        return repr(list(self))


def count_of(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


class View:
    """Made by `load`."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        maps: Mapping[FileEntry, mmap.mmap],
        sound: Collection[FileEntry] = (),
    ) -> None:
        """Maps the files that `maps` does not hold yet. sound: those whose checksums were compared. Raises StoreError."""
        self.directory = directory
        self.manifest = manifest
        self.maps = {entry: maps.get(entry) or mapped(directory, entry) for entry in manifest.files}
        self.sound = set(sound) & set(self.maps)
        self.segments = []
        for entry in manifest.segments:
            dead = self.maps[entry.dead] if entry.dead else None
            try:
                self.segments.append(Segment(manifest.schema, entry, self.maps[entry.file], dead))
            except ValueError as error:
                raise damaged(directory / manifests.MANIFEST, f"{entry.file.name} is not as it says") from error

    @property
    def schema(self) -> Schema:
        return self.manifest.schema

    @contextlib.contextmanager
    def _making_sense(self, segment: Segment) -> Iterator[None]:
        """A flipped bit is found for certain by `verify` only; where it leads reading astray, say what it is."""
        try:
            yield
        except (IndexError, ValueError) as error:
            raise damaged(self.directory / segment.entry.file.name, "its content makes no sense") from error

    def names(self, segment: Segment, rows: Rows) -> list[str]:
        with self._making_sense(segment):
            return [name.decode() for name in segment.names(rows)]

    def locate(self, names: Sequence[bytes]) -> tuple[Array, Array]:
        """The segment [N] and row [N] of every id, -1 where it is not in the store."""
        which, rows = np.full(len(names), -1, np.int64), np.full(len(names), -1, np.int64)
        hashes, left = hashed(names), np.arange(len(names))
        for number, segment in enumerate(self.segments):
            if not left.size:
                break
            with self._making_sense(segment):
                found = segment.find(hashes[left], [names[i] for i in left.tolist()])
            here = found >= 0
            which[left[here]], rows[left[here]] = number, found[here]
            left = left[~here]
        return which, rows

    def located(self, ids: Sequence[str], names: Sequence[bytes]) -> tuple[Array, Array]:
        """Like `locate`, for ids that must be there. Raises StoreError."""
        which, rows = self.locate(names)
        refuse_absent([ids[i] for i in np.flatnonzero(which < 0).tolist()], self.directory)
        return which, rows

    def read(self, ids: Sequence[str], which: Array, rows: Array, stored: bool) -> Candidates:
        """The candidates at these places, in this order."""
        order = np.argsort(which, kind="stable")
        numbers, starts = np.unique(which[order], return_index=True)
        parts = (
            [
                (self.segments[number], rows[places])
                for number, places in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True)
            ]
            if len(which)
            else []
        )
        found = self._gather(parts, ids, stored)
        return found if len(parts) < 2 else _reordered(found, np.argsort(order, kind="stable"))

    def all_parts(self, size: int) -> Iterator[list[Part]]:
        """All live rows, `size` at a time (the last ones fewer)."""
        parts: list[Part] = []
        have = 0
        for segment in self.segments:
            start = 0
            while start < segment.rows:
                stop = min(start + size, segment.rows)
                with self._making_sense(segment):
                    rows = segment.live(start, stop)
                need, count = size - have, count_of(rows)
                if count > need:
                    rows, count = (slice(start, start + need) if isinstance(rows, slice) else rows[:need]), need
                    stop = rows.stop if isinstance(rows, slice) else int(rows[-1]) + 1
                start = stop
                if count:
                    parts.append((segment, rows))
                    have += count
                if have == size:
                    yield parts
                    parts, have = [], 0
        if parts:
            yield parts

    def chunks(self, size: int, stored: bool) -> Iterator[Candidates]:
        before: list[Part] = []
        for segment in self.segments:
            self._vouch(segment)
        for parts in self.all_parts(size):
            _release(before)
            yield self._gather(parts, LazyIds(self, parts), stored)
            before = parts

    def chosen(self, ids: Sequence[str], which: Array, rows: Array, size: int, stored: bool) -> Iterator[Candidates]:
        for start in range(0, len(ids), size):
            if start:
                _release(
                    [(self.segments[number], slice(0)) for number in np.unique(which[start - size : start]).tolist()]
                )
            part = slice(start, start + size)
            yield self.read(ids[part], which[part], rows[part], stored)

    def verify(self) -> None:
        for entry, mapping in self.maps.items():
            checked(self.directory, entry, mapping)
            self.sound.add(entry)

    def _vouch(self, segment: Segment) -> None:
        """Compare the checksums of a segment's files that were not compared before: who reads all of it pays for it once.
        Raises StoreError."""
        for entry in (segment.entry.file, segment.entry.dead):
            if entry is not None and entry not in self.sound:
                checked(self.directory, entry, self.maps[entry])
                self.sound.add(entry)

    def _gather(self, parts: Sequence[Part], ids: Sequence[str], stored: bool) -> Candidates:
        arrays: dict[str, Array] = {}
        scales: dict[str, Array] = {}
        lengths = None
        for each in self.schema.fields:
            if each.most is not None:
                lengths = _joined([self._counts(each, *part) for part in parts], (0,), np.dtype(np.int64))
            pieces = [self._piece(each, *part, stored) for part in parts]
            arrays[each.name] = _joined(
                [data for data, _ in pieces], (0, *each.shape), each.stored if stored else each.returned
            )
            if stored and each.scaled:
                kept = [scale for _, scale in pieces if scale is not None]
                scales[each.name] = _joined(kept, (0, *each.shape[:-1]), np.dtype("<f4"))
        vectors = arrays.pop(VECTORS)
        return Candidates(ids, vectors, lengths, arrays, scales)

    def _counts(self, each: Field, segment: Segment, rows: Rows) -> Array:
        with self._making_sense(segment):
            counts = segment.counts(each, rows)
        assert counts is not None
        return counts

    def _piece(self, each: Field, segment: Segment, rows: Rows, stored: bool) -> tuple[Array, Array | None]:
        with self._making_sense(segment):
            data = segment.take(each.name, rows)
            scales = segment.take(f"{each.name}.scales", rows) if each.scaled else None
        return (data, scales) if stored else (decode(each, data, scales), None)


def _joined(pieces: Sequence[Array], empty: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if pieces else np.empty(empty, dtype)


def _reordered(found: Candidates, order: Array) -> Candidates:
    """The arrays of `found` in another order; its ids are in that order already."""
    rows = order
    lengths = found.lengths
    if lengths is not None:
        rows = spread(offsets_of(lengths)[order], lengths[order])
        lengths = lengths[order]
    scales = {name: s[rows if name == VECTORS else order] for name, s in found.scales.items()}
    extras = {name: e[order] for name, e in found.extras.items()}
    return replace(found, vectors=found.vectors[rows], lengths=lengths, extras=extras, scales=scales)


def _release(parts: Sequence[Part]) -> None:
    for segment, _ in parts:
        segment.release()


def load(directory: Path, maps: Mapping[FileEntry, mmap.mmap], sound: Collection[FileEntry] = ()) -> View:
    """The last committed state. maps, sound: of an earlier one. Raises StoreError."""
    before = None
    while True:
        manifest = manifests.read(directory)
        try:
            return View(directory, manifest, maps, sound)
        except MissingFileError:
            # A writer may have committed a newer state since, and removed what only the older one named.
            if manifest == before:
                raise
            before = manifest


__all__ = ["Candidates", "View", "load"]
