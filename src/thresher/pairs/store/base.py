"""What every kind of candidate store does alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from thresher.errors import StoreError
from thresher.pairs.store.coding import Array, refuse
from thresher.pairs.store.schema import Schema
from thresher.pairs.store.view import Candidates


class BaseStore(ABC):
    """Candidates by id, wherever they are kept; see `CandidateStore` for what the methods promise."""

    directory: Any

    @property
    @abstractmethod
    def schema(self) -> Schema:
        """What it was created with: fingerprint, strategy, k, dim, dtype, ragged, extras."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether `close` was called."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held. Arrays that were read stay good."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def contains(self, ids: Iterable[str]) -> Array:
        """Which ids are here: [N] bool."""

    @abstractmethod
    def read(self, ids: Iterable[str], *, stored: bool = False) -> Candidates:
        """All that is kept of N ids, in their order; floats as float32, or as stored. Raises StoreError: an unknown id."""

    def get(self, ids: Iterable[str], *, stored: bool = False) -> Array:
        """The vectors of N ids, in their order: [N, k, dim] float32, or in the store's dtype.

        Raises StoreError: an unknown id, or a ragged store, whose vectors `read` gives with their lengths.
        """
        if self.schema.ragged:
            raise StoreError(
                f"{self.directory} keeps a number of vectors of its own for each id; use read, which tells it."
            )
        return self.read(ids, stored=stored).vectors

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name != "" and bool(self.contains([name])[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        about = "closed" if self.closed else f"{len(self)} candidates of {self.schema.shown}"
        return f"{type(self).__name__}({str(self.directory)!r}, {about})"


def closed_handle(place: Any) -> StoreError:
    return StoreError(f"This handle of {place} was closed; open the store again.")


def another_kind(place: Any) -> StoreError:
    return StoreError(f"{place} was replaced by a store of another kind; open it again.")


def check_size(size: Any) -> None:
    """Raises StoreError for what is no size of a chunk."""
    if not isinstance(size, int) or size < 1:
        raise StoreError(f"The size of a chunk must be a whole number of at least 1, not {size!r}.")


class PresentError(StoreError):
    """Ids that were to be added are in the store already. names: which."""

    def __init__(self, names: Sequence[str], place: Any) -> None:
        are = "is" if len(names) == 1 else "are"
        super().__init__(str(refuse(names, f"{are} in {place} already; use update to replace.")))
        self.names = frozenset(names)


def refuse_present(names: Sequence[str], place: Any) -> None:
    """Raises PresentError for ids that are here already."""
    if names:
        raise PresentError(names, place)


__all__ = ["BaseStore", "PresentError", "another_kind", "check_size", "closed_handle", "refuse_present"]
