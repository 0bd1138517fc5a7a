"""Which kind of store a place has: a directory of files, or a Lance table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.errors import StoreError
from thresher.pairs.store import manifest
from thresher.pairs.store.candidates import CandidateStore
from thresher.pairs.store.files import NoStoreError

if TYPE_CHECKING:
    from thresher.pairs.store.lance import LanceStore

    Store = CandidateStore | LanceStore

SUFFIX = ".lance"


def create(place: str | Path, **settings: Any) -> Store:
    """An empty store at `place`: a Lance table for a URI (s3://bucket/store) and for a path that ends with .lance, else a
    directory of files. Settings, and what is raised, as in `CandidateStore.create`."""
    return _kind(place).create(place, **settings)


def open_store(place: str | Path, fingerprint: str | None = None, **expected: Any) -> Store:
    """The store at `place`, of the kind that `create` gives it; the rest as in `CandidateStore.open`."""
    return _kind(place).open(place, fingerprint, **expected)


def holds_store(place: str | Path) -> bool:
    """Whether there is a store already; a damaged one is one.

    Raises StoreError: other files are there, or nobody can tell.
    """
    if is_lance(place):
        kind = _kind(place)
        try:
            kind.open(place).close()
        except NoStoreError:
            return False
        return True
    directory = Path(place)
    if manifest.exists(directory):
        return True
    if manifest.holds_others(directory):
        raise StoreError(
            f"{directory} holds files, and none of them is a store's {manifest.MANIFEST}; give a new directory, or that of a "
            "store."
        )
    return False


def is_lance(place: str | Path) -> bool:
    return "://" in str(place) or str(place).rstrip("/").endswith(SUFFIX)


def _kind(place: str | Path) -> type[CandidateStore] | type[LanceStore]:
    if not is_lance(place):
        return CandidateStore
    try:
        from thresher.pairs.store.lance import LanceStore
    except ImportError as error:
        raise StoreError(
            f"{place} is a Lance table, which needs pylance: pip install 'thresher[lance]', or give another directory."
        ) from error
    return LanceStore


__all__ = ["create", "holds_store", "is_lance", "open_store"]
