"""A candidate store in a Lance table: on object storage, for many machines. Needs pylance (the extra `lance`).

Lance commits every change as a new version of the table, and a reader keeps the one it opened. Where two machines change a
table at once and what they change is not the same, both changes are kept; where it is, the later one is checked against the
new state, as if it had come after. So there is no lock, any number of machines may write, and a writer that is killed leaves
the last committed version.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from thresher.errors import StoreError
from thresher.pairs.store import arrow
from thresher.pairs.store.arrow import ID
from thresher.pairs.store.base import BaseStore, another_kind, check_size, closed_handle, refuse_present
from thresher.pairs.store.coding import Array, encode, listed, refuse_absent
from thresher.pairs.store.files import no_store
from thresher.pairs.store.schema import Schema, extra_fields
from thresher.pairs.store.view import Candidates

FORMAT = 1
ORIGIN = "thresher.origin"
IDS_AT_ONCE = 4096
READ_AHEAD = 64 << 20  # bytes of a scan that are on their way
ATTEMPTS = 20
# How Lance says that another change came first.
CONFLICTS = ("Too many concurrent writers", "incompatible with concurrent")
LEFT = ("_versions", "_transactions")  # what a creation that was killed leaves behind
SMALL = 1 << 20  # rows; fragments below it are merged
FAN = 64  # as many small fragments are too many
SHOWN = 300  # characters of what Lance says
KEPT = timedelta(days=1)  # old versions stay so long for who still reads them


class LanceStore(BaseStore):
    """Candidates in a Lance table, by id. Made by `create` or `open`; used like `CandidateStore`, whose methods these are.

    A handle sees the version that was the last one when it was opened, and a newer one after `refresh` or a change of its own.

    Every method raises StoreError where the table is damaged, missing or cannot be read or written.
    """

    def __init__(self, data: lance.LanceDataset) -> None:
        """data: that of a store, which `open` checks."""
        self.directory = str(data.uri)
        self._schema = _schema_of(data)
        self._kept: lance.LanceDataset | None = data

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
    ) -> LanceStore:
        """An empty store at `directory`: a path, or a URI such as s3://bucket/store; credentials come from the environment.

        The rest, errors too, as in `CandidateStore.create`.
        """
        schema = Schema(fingerprint, strategy, k, dim, dtype, ragged, extra_fields(extras))
        place = str(directory)
        _refuse_a_file(place)
        if "://" not in place and _holds_files(Path(place)):
            raise StoreError(
                f"{place} holds files already; give a new directory for the store, or open it if it is one."
            )
        with _told(place, "create"):
            # Not write_dataset, which writes over what another creation has committed meanwhile.
            nothing = lance.LanceOperation.Overwrite(arrow.arrow_schema(schema, FORMAT), [])
            return cls(lance.LanceDataset.commit(place, nothing, max_retries=0))

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
    ) -> LanceStore:
        """The store at `directory`, at its last version. What is given besides must be what it was created with.

        Raises StoreError.
        """
        _refuse_a_file(str(directory))
        with _told(str(directory), "open"):
            store = cls(lance.dataset(str(directory)))
        store.schema.require(
            store.directory,
            {"fingerprint": fingerprint, "strategy": strategy, "k": k, "dim": dim, "dtype": dtype},
        )
        return store

    def close(self) -> None:
        """Let go of the table. Arrays that were read stay good."""
        self._kept = None

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process, on another machine: a handle of the state that is the last one there."""
        return LanceStore.open, (self.directory, self.schema.fingerprint)

    def refresh(self) -> bool:
        """See the last committed version from now on; whether it is another one than before."""
        before = self._data.version
        with _told(self.directory, "read"):
            after = lance.dataset(self.directory)
        if _schema_of(after) != self.schema:
            raise another_kind(self.directory)
        self._kept = after
        return bool(after.version != before)

    def hold(self) -> None:
        """Bring the last committed version into view. Nothing is held: others may go on writing."""
        self.refresh()

    @property
    def _data(self) -> lance.LanceDataset:
        if self._kept is None:
            raise closed_handle(self.directory)
        return self._kept

    # What it is.

    @property
    def schema(self) -> Schema:
        return self._schema

    @property
    def closed(self) -> bool:
        return self._kept is None

    @property
    def origin(self) -> str | None:
        """Where the scorer lies that filled it, as `remember_origin` was told."""
        with _told(self.directory, "read"):
            return self._data.config().get(ORIGIN)  # type: ignore[no-any-return]

    def remember_origin(self, origin: str) -> None:
        def change(data: lance.LanceDataset) -> None:
            if self.origin != origin:
                data.update_config({ORIGIN: origin})

        self._change(change, True)

    @property
    def nbytes(self) -> int:
        """The bytes of the last version's data files, dead rows included."""
        with _told(self.directory, "read"):
            return sum(file.file_size_bytes or 0 for part in self._data.get_fragments() for file in part.data_files())

    def __len__(self) -> int:
        with _told(self.directory, "read"):
            return int(self._data.count_rows())

    def verify(self) -> None:
        """Read every candidate and compare its checksum. Raises StoreError with the id of one that is damaged."""
        for found in self._scan(self._data, IDS_AT_ONCE):
            with _told(self.directory, "read"):
                wrong = arrow.damaged_rows(self.schema, found)
            if wrong:
                raise StoreError(
                    f"{self.directory} is damaged (the checksum of id {wrong[0]!r} differs); restore it from a copy, or "
                    "remove it and index the candidates anew."
                )

    # Reading.

    def contains(self, ids: Iterable[str]) -> Array:
        """Which ids are here: [N] bool."""
        names, _ = listed(ids, unique=False)
        there = {name for found in self._find(self._data, names, [ID]) for name in found.column(ID).to_pylist()}
        return np.array([name in there for name in names], bool)

    def read(self, ids: Iterable[str], *, stored: bool = False) -> Candidates:
        """All that is kept of N ids, in their order; floats as float32, or as stored. Raises StoreError: an unknown id."""
        return self._read(self._data, listed(ids, unique=False)[0], stored)

    def ids(self) -> Iterator[str]:
        """All ids, in the order of `chunks`."""
        return (name for found in self._scan(self._data, IDS_AT_ONCE, [ID]) for name in found.column(ID).to_pylist())

    def chunks(self, size: int, ids: Iterable[str] | None = None, *, stored: bool = False) -> Iterator[Candidates]:
        """As `CandidateStore.chunks`: all candidates, or those of `ids` in their order, `size` at a time.

        Raises StoreError, before the first chunk: an unknown id, or a size below 1.
        """
        check_size(size)
        data = self._data
        if ids is None:
            return (arrow.candidates(self.schema, found, stored) for found in self._scan(data, size))
        names, _ = listed(ids, unique=False)
        self._known(names)
        return (self._read(data, names[start : start + size], stored) for start in range(0, len(names), size))

    def _scan(self, data: lance.LanceDataset, size: int, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All rows in order, `size` at a time."""
        with _told(self.directory, "read"):
            yield from data.to_batches(
                columns=columns,
                batch_size=size,
                strict_batch_size=True,
                scan_in_order=True,
                batch_readahead=1,
                fragment_readahead=1,
                io_buffer_size=READ_AHEAD,
            )

    def _find(
        self, data: lance.LanceDataset, names: Iterable[str], columns: list[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The rows of these ids, each once, in any order."""
        once = list(dict.fromkeys(names))
        with _told(self.directory, "read"):
            for start in range(0, len(once), IDS_AT_ONCE):
                yield from data.to_batches(columns=columns, filter=_among(once[start : start + IDS_AT_ONCE]))

    def _read(self, data: lance.LanceDataset, names: Sequence[str], stored: bool) -> Candidates:
        wanted = data.schema if names else data.schema.empty_table()
        found = pa.Table.from_batches(self._find(data, names), data.schema) if names else wanted
        place = {name: number for number, name in enumerate(found.column(ID).to_pylist())}
        refuse_absent([name for name in names if name not in place], self.directory)
        rows = found.take(pa.array([place[name] for name in names], pa.int64())).combine_chunks()
        batch = rows.to_batches()[0] if names else pa.RecordBatch.from_pylist([], rows.schema)
        with _told(self.directory, "read"):
            return arrow.candidates(self.schema, batch, stored)

    def _known(self, names: Sequence[str]) -> None:
        """Raises StoreError for ids that are not here."""
        refuse_absent([n for n, there in zip(names, self.contains(names), strict=True) if not there], self.directory)

    # Changing.

    def add(
        self, ids: Iterable[str], vectors: Any, *, lengths: Any = None, extras: Mapping[str, Any] | None = None
    ) -> None:
        """Add N candidates that are not here yet: as `CandidateStore.add`, whoever else adds meanwhile."""
        names, _ = listed(ids, unique=True)
        rows = arrow.table(self.schema, names, encode(self.schema, names, vectors, lengths, extras), FORMAT)

        def change(data: lance.LanceDataset) -> None:
            refuse_present([n for n, there in zip(names, self.contains(names), strict=True) if there], self.directory)
            merge = data.merge_insert(ID).when_matched_fail().when_not_matched_insert_all()
            merge.conflict_retries(0).execute(rows)

        self._change(change, bool(names))

    def update(
        self, ids: Iterable[str], vectors: Any, *, lengths: Any = None, extras: Mapping[str, Any] | None = None
    ) -> None:
        """Replace all that is kept of N candidates. Arguments and errors as for `add`, but every id must be here."""
        names, _ = listed(ids, unique=True)
        rows = arrow.table(self.schema, names, encode(self.schema, names, vectors, lengths, extras), FORMAT)

        def change(data: lance.LanceDataset) -> None:
            self._known(names)
            data.merge_insert(ID).when_matched_update_all().conflict_retries(0).execute(rows)

        self._change(change, bool(names))

    def delete(self, ids: Iterable[str]) -> None:
        """Remove N candidates. Raises StoreError, and changes nothing: an id that is not here, or given twice."""
        names, _ = listed(ids, unique=True)

        def change(data: lance.LanceDataset) -> None:
            self._known(names)
            data.delete(_among(names), conflict_retries=0)

        self._change(change, bool(names))

    def compact(self) -> None:
        """Rewrite small fragments and dead rows, index the ids, and remove versions that are older than a day."""
        data = self._data
        with _told(self.directory, "change"):
            indexed = any(index.name == f"{ID}_idx" for index in data.describe_indices())
            if indexed:  # fragments that are in the index are not merged with such as are not
                data.optimize.optimize_indices()
            data.optimize.compact_files(target_rows_per_fragment=SMALL, materialize_deletions_threshold=0.0)
            if not indexed and data.count_rows():
                data.create_scalar_index(ID, "BTREE")
            data.cleanup_old_versions(older_than=KEPT, error_if_tagged_old_versions=False)
        self.refresh()

    def _change(self, change: Callable[[lance.LanceDataset], None], anything: bool) -> None:
        """`change` the last version, which it checks first; again where another change came between."""
        for _ in range(ATTEMPTS):
            self.refresh()
            if not anything:
                return
            try:
                with _told(self.directory, "change"):
                    change(self._data)
                break
            except _Conflict:
                continue
        else:
            raise StoreError(f"{self.directory} is being changed by others all the time; try again later.")
        self.refresh()
        # The change is committed: if this fails, nothing is lost and a later one tries again.
        with contextlib.suppress(StoreError):
            sizes = [part.metadata.num_rows for part in self._data.get_fragments()]
            small = [rows for rows in sizes if rows < SMALL]
            if len(small) >= FAN and sum(small) >= 2 * max(small):  # every candidate is rewritten a few times only
                self.compact()


class _Conflict(StoreError):
    """Another change came first."""


def _refuse_a_file(place: str) -> None:
    if "://" not in place and Path(place).exists() and not Path(place).is_dir():
        raise StoreError(f"{place} is a file; give a new directory for the store, or that of one.")


def _holds_files(directory: Path) -> bool:
    """Whether there is anything that a creation which was killed would not have left."""
    if not directory.is_dir():
        return False
    return any(path.name not in LEFT for path in directory.iterdir()) or any(directory.glob("_versions/*.manifest"))


def _among(names: Iterable[str]) -> str:
    quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in names)
    return f"{ID} IN ({quoted})"


def _schema_of(data: lance.LanceDataset) -> Schema:
    """Raises StoreError: a table that is no store, of another format, or damaged."""
    try:
        found = arrow.described(data.schema.metadata)
        if found is not None and found[0] == FORMAT:
            return Schema.from_dict(found[1])
    except (ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
        raise StoreError(
            f"{data.uri} is damaged ({type(error).__name__}: {error}); remove it and index the candidates anew."
        ) from error
    if found is None:
        raise StoreError(f"{data.uri} is a Lance table, but no candidate store; give that of a store, or a new place.")
    raise StoreError(
        f"{data.uri} has format {found[0]!r}, this version reads {FORMAT}; index the candidates again with this version."
    )


@contextlib.contextmanager
def _told(place: str, what: str) -> Iterator[None]:
    """Raises StoreError instead of what Lance raises, in one sentence and without the places in its source."""
    try:
        yield
    except StoreError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, pa.ArrowException) as error:
        said = _plain(str(error))
        if any(words in said for words in CONFLICTS):
            raise _Conflict(said) from error
        missing = "was not found" in said and "_versions" in said
        if missing and what != "create":
            raise no_store(place) from error
        if missing or "already exists" in said:
            raise StoreError(f"{place} holds a table already; open it, or give another place.") from error
        raise StoreError(f"Could not {what} {place}: {said}.") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what a damaged file makes of Lance now and then
            raise
        raise StoreError(f"{place} is damaged ({_plain(str(error))}); restore it from a copy.") from error


def _plain(said: str) -> str:
    """What Lance says, on one line, without the places in its source; of an object store's answer only the message."""
    answered = re.search(r"<Message>(.*?)</Message>", said, re.DOTALL)
    said = " ".join((answered[1] if answered else said).split(", /")[0].split()).rstrip(".")
    return said if len(said) <= SHOWN else said[:SHOWN] + "…"


__all__ = ["LanceStore"]
