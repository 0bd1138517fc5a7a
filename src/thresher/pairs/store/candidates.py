"""The candidate store, as it is used."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from thresher.errors import StoreError
from thresher.pairs.store import manifest as manifests
from thresher.pairs.store import writing
from thresher.pairs.store.base import BaseStore, another_kind, check_size, closed_handle, refuse_present
from thresher.pairs.store.coding import Array, encode, listed
from thresher.pairs.store.files import Lock
from thresher.pairs.store.manifest import Manifest
from thresher.pairs.store.schema import Schema, extra_fields
from thresher.pairs.store.view import Candidates, View, load

IDS_AT_ONCE = 4096
ORIGIN = "scorer.txt"


class CandidateStore(BaseStore):
    """Candidates on disk, by id: vectors [k, dim] and extra arrays of each. Made by `create` or `open`.

    One writer, many readers, in any number of processes and threads. A handle sees the state that was committed when it was
    opened, and a newer one after `refresh`. The first change makes it the writer (after a refresh) until it is closed or its
    process ends; another one that tries to change the store meanwhile gets a StoreError at once. Every change is committed
    as a whole when its method returns, and not at all when it raises: add thousands at a time rather than one by one.

    Every method raises StoreError where a file is damaged, missing or cannot be read or written.
    """

    def __init__(self, view: View, lock: Lock | None = None) -> None:
        self._view: View | None = view
        self._lock = lock
        self._one_at_a_time = threading.RLock()
        self.directory = view.directory

    # Opening and closing.

    @classmethod
    def create(
        cls,
        directory: Any,
        *,
        fingerprint: str,
        strategy: str,
        k: int,
        dim: int,
        dtype: str = "float16",
        ragged: bool = False,
        extras: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
    ) -> CandidateStore:
        """An empty store in `directory`, which is made where it is not there; the handle is its writer.

        fingerprint: which model the vectors are of; strategy: how it made them. Both are compared when the store is opened.
        k, dim: every candidate has vectors [k, dim]; ragged: [n, dim] with its own n from 1 to k.
        dtype: what the vectors are kept in: float32, float16, or int8 with one scale per vector.
        extras: further arrays of every candidate, {name: (shape, dtype)}; dtype as above, or int32 or int64.

        Raises StoreError: a setting that cannot be, or a store that is there already.
        """
        schema = Schema(fingerprint, strategy, k, dim, dtype, ragged, extra_fields(extras))
        path = Path(directory)
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path} is a file; give a directory for the store.")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"Could not create {path}: {error.strerror or error}.") from error
        lock = Lock(path)
        try:
            if manifests.exists(path):
                raise StoreError(f"{path} holds a candidate store already; open it, or remove it first.")
            manifests.sweep(path, None)
            return cls(writing.start(path, Manifest(schema)), lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(
        cls,
        directory: Any,
        fingerprint: str | None = None,
        *,
        strategy: str | None = None,
        k: int | None = None,
        dim: int | None = None,
        dtype: str | None = None,
    ) -> CandidateStore:
        """The store in `directory`, at its last committed state; in milliseconds, whatever its size.

        What is given besides must be what it was created with. The sizes of its files are checked; their content when `chunks`
        first reads all of it, or by `verify`.
        Raises StoreError.
        """
        view = load(Path(directory), {})
        expected = {"fingerprint": fingerprint, "strategy": strategy, "k": k, "dim": dim, "dtype": dtype}
        view.schema.require(view.directory, expected)
        return cls(view)

    def close(self) -> None:
        """Let the next writer in, and drop the files. Arrays that were read stay good."""
        with self._one_at_a_time:
            self._view = None
            if self._lock is not None:
                self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process: a reader of the state that is the last one there."""
        return CandidateStore.open, (self.directory, self.schema.fingerprint)

    def refresh(self) -> bool:
        """See the last committed state from now on; whether it is another one than before."""
        with self._one_at_a_time:
            before = self._state
            after = load(self.directory, before.maps, before.sound)
            if after.schema != before.schema:
                raise another_kind(self.directory)
            self._view = after
            return after.manifest != before.manifest

    @property
    def _state(self) -> View:
        view = self._view
        if view is None:
            raise closed_handle(self.directory)
        return view

    # What it is.

    @property
    def schema(self) -> Schema:
        """What it was created with: fingerprint, strategy, k, dim, dtype, ragged, extras."""
        return self._state.schema

    @property
    def closed(self) -> bool:
        return self._view is None

    @property
    def origin(self) -> str | None:
        """Where the scorer lies that filled it, as `remember_origin` was told."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (self.directory / ORIGIN).read_text(encoding="utf-8") or None
        return None

    def remember_origin(self, origin: str) -> None:
        new = self.directory / f"{ORIGIN}.new"
        try:
            new.write_text(origin, encoding="utf-8")
            new.replace(self.directory / ORIGIN)
        except OSError as error:
            raise StoreError(f"Could not write {self.directory / ORIGIN}: {error.strerror or error}.") from error

    @property
    def nbytes(self) -> int:
        """The bytes of its files, dead rows included."""
        return sum(entry.size for entry in self._state.manifest.files)

    def __len__(self) -> int:
        return self._state.manifest.count

    def verify(self) -> None:
        """Read every byte and compare the checksums. Raises StoreError with the name of the file that is damaged."""
        self._state.verify()

    # Reading.

    def contains(self, ids: Iterable[str]) -> Array:
        """Which ids are here: [N] bool."""
        _, encoded = listed(ids, unique=False)
        return np.asarray(self._state.locate(encoded)[0] >= 0)

    def read(self, ids: Iterable[str], *, stored: bool = False) -> Candidates:
        """All that is kept of N ids, in their order; floats as float32, or as stored. Raises StoreError: an unknown id."""
        view = self._state
        names, encoded = listed(ids, unique=False)
        return view.read(names, *view.located(names, encoded), stored)

    def ids(self) -> Iterator[str]:
        """All ids, decoded as they are asked for, in the order of `chunks`."""
        view = self._state
        return (name for parts in view.all_parts(IDS_AT_ONCE) for part in parts for name in view.names(*part))

    def chunks(self, size: int, ids: Iterable[str] | None = None, *, stored: bool = False) -> Iterator[Candidates]:
        """All candidates, or those of `ids` in their order, `size` at a time (the last chunk fewer).

        Memory is that of a chunk: what was read is let go when the next one is asked for. They come from the state that the
        handle sees now, even if it changes before the last one, in an order that lasts until the store is changed.
        Raises StoreError, before the first chunk: an unknown id, a size below 1, and without `ids` a file whose checksum
        differs (compared once for every file).
        """
        check_size(size)
        view = self._state
        if ids is None:
            return view.chunks(size, stored)
        names, encoded = listed(ids, unique=False)
        return view.chosen(names, *view.located(names, encoded), size, stored)

    # Changing.

    def add(
        self, ids: Iterable[str], vectors: Any, *, lengths: Any = None, extras: Mapping[str, Any] | None = None
    ) -> None:
        """Add N candidates that are not here yet.

        vectors: [N, k, dim]; in a ragged store a list of N arrays [n, dim], or [T, dim] and `lengths` [N].
        extras: [N, *shape] by name, all that the store was created with. Numbers are converted to the store's dtypes.

        Raises StoreError, and changes nothing: ids that are not texts, empty, given twice or here already; NaN or infinite
        numbers, or such as do not fit the dtype; shapes that do not fit; another writer; no room on the disk.
        """
        names, encoded = listed(ids, unique=True)
        columns = encode(self.schema, names, vectors, lengths, extras)
        with self._writing() as view:
            there = np.flatnonzero(view.locate(encoded)[0] >= 0).tolist()
            refuse_present([names[i] for i in there], self.directory)
            if names:
                self._view = writing.change(view, encoded, columns, {})
        self._tidy()

    def update(
        self, ids: Iterable[str], vectors: Any, *, lengths: Any = None, extras: Mapping[str, Any] | None = None
    ) -> None:
        """Replace all that is kept of N candidates. Arguments and errors as for `add`, but every id must be here."""
        names, encoded = listed(ids, unique=True)
        columns = encode(self.schema, names, vectors, lengths, extras)
        with self._writing() as view:
            old = _by_segment(*view.located(names, encoded))
            if names:
                self._view = writing.change(view, encoded, columns, old)
        self._tidy()

    def delete(self, ids: Iterable[str]) -> None:
        """Remove N candidates. Raises StoreError, and changes nothing: an id that is not here, or given twice."""
        names, encoded = listed(ids, unique=True)
        with self._writing() as view:
            old = _by_segment(*view.located(names, encoded))
            if names:
                self._view = writing.change(view, [], {}, old)
        self._tidy()

    def compact(self) -> None:
        """Rewrite the store as one segment without what was deleted or replaced; needs room for it on the disk meanwhile.

        Small segments and mostly dead ones are rewritten by themselves as the store changes; this does the rest.
        """
        with self._writing() as view:
            entries = view.manifest.segments
            if len(entries) > 1 or any(entry.dead for entry in entries):
                self._view = writing.merge(view, range(len(entries)))

    def hold(self) -> None:
        """Become the writer now, with the last committed state in view, until `close`. Raises StoreError where another is."""
        with self._writing():
            pass

    @contextlib.contextmanager
    def _writing(self) -> Iterator[View]:
        """Become the writer, with the last committed state in view, or raise StoreError."""
        with self._one_at_a_time:
            if self._lock is None or not self._lock.held:
                _ = self._state  # raises where the handle is closed
                lock = Lock(self.directory)
                try:
                    self.refresh()
                    with contextlib.suppress(OSError):
                        manifests.sweep(self.directory, self._state.manifest)
                except BaseException:
                    lock.release()
                    raise
                self._lock = lock
            try:
                yield self._state
            except BaseException:
                try:
                    self.refresh()  # what is on the disk counts, should it have come that far
                except StoreError:
                    self._lock.release()
                raise

    def _tidy(self) -> None:
        """Merge what is due. The change before it is committed: if this fails, nothing is lost and a later one tries again."""
        with contextlib.suppress(StoreError), self._writing() as view:
            while numbers := writing.due(view.manifest):
                self._view = view = writing.merge(view, numbers)


def _by_segment(which: Array, rows: Array) -> dict[int, Array]:
    return {number: rows[which == number] for number in np.unique(which).tolist()}


__all__ = ["CandidateStore", "Candidates"]
