"""How a state becomes the next one: new files, then a new manifest, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from thresher.errors import StoreError
from thresher.pairs.store import manifest as manifests
from thresher.pairs.store.coding import Array
from thresher.pairs.store.files import Block, FileEntry, checked, remove, write_file
from thresher.pairs.store.manifest import Manifest, SegmentEntry
from thresher.pairs.store.schema import VECTORS
from thresher.pairs.store.segment import Merge, blocks, fresh, layout
from thresher.pairs.store.view import View, load

FAN = 8  # so many segments of about one size become one
LARGE = FAN**7  # one of so many candidates is merged no further by itself


class Numbered:
    """Writes files under new names, and knows which."""

    def __init__(self, view: View) -> None:
        self._directory = view.directory
        self.next = view.manifest.next
        self.written: list[FileEntry] = []

    def write(self, name: str, content: Iterable[Block]) -> FileEntry:
        entry = write_file(self._directory, name.format(self.next), content)
        self.written.append(entry)
        self.next += 1
        return entry


@contextlib.contextmanager
def _all_or_nothing(view: View) -> Iterator[Numbered]:
    """Files written in the block stay if the manifest names them at its end. Raises StoreError for an OSError."""
    files = Numbered(view)
    try:
        yield files
    except BaseException as error:
        named: set[FileEntry] = set()
        with contextlib.suppress(StoreError):
            # What counts is on the disk: the very last sync may have failed after the manifest was in place.
            named = set(manifests.read(view.directory).files)
            for entry in files.written:
                if entry not in named:
                    remove(view.directory / entry.name)
        if isinstance(error, OSError):
            raise StoreError(
                f"Could not write to {view.directory}: {error.strerror or error}; it holds what it held before."
            ) from error
        raise


def _commit(view: View, files: Numbered, segments: Iterable[SegmentEntry]) -> View:
    before = view.manifest
    manifest = replace(before, version=before.version + 1, next=files.next, segments=tuple(segments))
    after = View(view.directory, manifest, view.maps)  # first, so that nothing can fail once the manifest is in place
    manifest.write(view.directory)
    named = set(manifest.files)
    for entry in before.files:
        if entry not in named:
            remove(view.directory / entry.name)
    return after


def change(view: View, names: Sequence[bytes], columns: dict[str, Array], dead: Mapping[int, Array]) -> View:
    """Add the candidates of `columns` (none where there are no names), and pass over rows of segments from now on.

    dead: by the segment's number. Returns the new state. Raises StoreError, with the last state in place.
    """
    with _all_or_nothing(view) as files:
        segments = [
            _without(view, files, number, dead[number]) if number in dead else segment.entry
            for number, segment in enumerate(view.segments)
        ]
        if names:
            columns = fresh(names, columns)
            tokens = len(columns[VECTORS]) if view.schema.ragged else 0
            place = layout(view.schema, len(names), tokens, len(columns["ids"]))
            file = files.write("segment-{:08}.seg", blocks(place, lambda name: [columns[name]]))
            segments.append(SegmentEntry(file, len(names), tokens, len(columns["ids"])))
        return _commit(view, files, [entry for entry in segments if entry is not None])


def _without(view: View, files: Numbered, number: int, rows: Array) -> SegmentEntry | None:
    """The segment with more dead rows, None where none is left."""
    segment = view.segments[number]
    if segment.entry.dead is not None:  # a damaged file must not get a fresh checksum
        checked(view.directory, segment.entry.dead, view.maps[segment.entry.dead])
    dead = np.union1d(segment.dead, rows.astype("<u4"))
    if len(dead) == segment.rows:
        return None
    return replace(segment.entry, dead=files.write("dead-{:08}.rows", [dead.data]))


def merge(view: View, numbers: Sequence[int]) -> View:
    """Make one segment of these, without what is dead in them. Raises StoreError, with the last state in place."""
    sources = [view.segments[number] for number in numbers]
    for segment in sources:  # as above
        for part in (segment.entry.file, segment.entry.dead):
            if part is not None:
                checked(view.directory, part, view.maps[part])
    with _all_or_nothing(view) as files:
        merged = Merge(view.schema, sources)
        file = files.write("segment-{:08}.seg", blocks(merged.layout, merged.column))
        entry = SegmentEntry(file, merged.rows, merged.tokens, merged.id_bytes)
        kept = [
            entry if number == numbers[0] else segment.entry
            for number, segment in enumerate(view.segments)
            if number == numbers[0] or number not in numbers
        ]
        return _commit(view, files, kept)


def due(manifest: Manifest) -> list[int]:
    """The segments to merge next, by number; none, mostly.

    Eight of about one size (within a factor of eight) become one, so that there are few of them however small the batches
    were, and every candidate is rewritten a few times only. One that is mostly dead is rewritten alone.
    """
    sizes: dict[int, list[int]] = {}
    for number, entry in enumerate(manifest.segments):
        if entry.live * 2 < entry.rows:
            return [number]
        if entry.live < LARGE:
            sizes.setdefault(_power(entry.live), []).append(number)
    return next((numbers for _, numbers in sorted(sizes.items()) if len(numbers) >= FAN), [])


def _power(count: int) -> int:
    """The p with FAN^p <= count < FAN^(p + 1)."""
    power = 0
    while count >= FAN:
        count //= FAN
        power += 1
    return power


def start(directory: Path, manifest: Manifest) -> View:
    """Write the first manifest. Raises StoreError."""
    try:
        manifest.write(directory)
    except OSError as error:
        raise StoreError(f"Could not create a store in {directory}: {error.strerror or error}.") from error
    return load(directory, {})


__all__ = ["change", "due", "merge", "start"]
