"""What was computed of each candidate, once, in memory: a ragged batch of vectors with ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from thresher.errors import DataError, OptionError, nearest
from thresher.settings import is_whole

Id = str | int
Storage = Literal["float32", "float16", "int8", "int32"]

_TYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8, "int32": torch.int32}


@dataclass(frozen=True)
class Block:
    """The vectors of some candidates, side by side.

    values: [T, d] float32 (of a cross-encoder token ids, [T, 1] int32). sizes: how many of them each candidate has; none has 0.
    terms: [N, M] int32, what `Lexical` compares with a query's tokens; None where the scorer has no lexical signal.
    """

    values: Tensor
    sizes: list[int]
    terms: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def dense(self) -> Tensor:
        """[N, k, d], for candidates of k vectors each."""
        return self.values.view(len(self.sizes), -1, self.values.shape[-1])

    @cached_property
    def lengths(self) -> Tensor:
        """[N] int64, `sizes` on the values' device."""
        return torch.tensor(self.sizes, device=self.values.device)

    @cached_property
    def owners(self) -> Tensor:
        """[T] int64, the candidate that each vector is of."""
        return torch.repeat_interleave(self.lengths, output_size=len(self.values))

    def rows(self) -> tuple[Tensor, ...]:
        """N tensors [n_i, d]."""
        return self.values.split(self.sizes)  # type: ignore[no-any-return]

    def select(self, index: Sequence[int]) -> Block:
        rows = self.rows()
        terms = None if self.terms is None else self.terms[list(index)]
        return Block(torch.cat([rows[i] for i in index]), [self.sizes[i] for i in index], terms)


@dataclass(frozen=True)
class Cache:
    """Candidates as a scorer reads them.

    ids: one for each candidate, texts or numbers, none twice; those that were given, or 0..N-1.
    data: [T, d], what is kept: float32, float16, int8 (then a value is data * its vector's scale), or int32 for token ids.
    lengths: [N] int64 >= 1, how many of the T vectors each candidate has: k for all of [k, d], or n_i of ragged [n_i, d].
    signature: the kind and the settings of the scorer that made it; another scorer refuses it.
    scales: [T] float32 for int8, else None.
    cut: how many candidates were longer than the limit and were cut.
    terms: [N, M] int32, each candidate's strongest tokens (see `thresher.pairs.lexical`), or None.
    """

    ids: tuple[Id, ...]
    data: Tensor
    lengths: Tensor
    signature: str
    scales: Tensor | None = None
    cut: int = 0
    terms: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", check_ids(self.ids))
        if len(self.ids) != len(self.lengths) or int(self.lengths.sum()) != len(self.data):
            raise DataError(
                f"{len(self.ids)} ids, {len(self.lengths)} lengths of {int(self.lengths.sum())} vectors and {len(self.data)} "
                "vectors do not fit together."
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def storage(self) -> Storage:
        return next(name for name in get_args(Storage) if _TYPES[name] is self.data.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors, their scales and the terms."""
        return self.data.nbytes + sum(x.nbytes for x in (self.scales, self.terms) if x is not None)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *self.lengths.cumsum(0).tolist()]

    @cached_property
    def _places(self) -> dict[Id, int]:
        return {name: place for place, name in enumerate(self.ids)}

    def notice(self) -> str | None:
        """What a user should know, a sentence without its full stop; None when there is nothing."""
        if not self.cut:
            return None
        were = "was" if self.cut == 1 else "were"
        return f"{self.cut} of {len(self)} candidates {were} longer than the limit and {were} cut"

    def block(self, start: int, stop: int, device: torch.device | None = None) -> Block:
        """The candidates start..stop-1 as they are computed with."""
        first, last = self._starts[start], self._starts[min(stop, len(self))]
        values = _values(self.data[first:last], None if self.scales is None else self.scales[first:last])
        terms = None if self.terms is None else self.terms[start:stop].to(device)
        return Block(values.to(device), self.lengths[start:stop].tolist(), terms)

    def blocks(self, size: int, device: torch.device | None = None) -> Iterator[Block]:
        """All candidates, `size` at a time (the last one may hold fewer)."""
        for start in range(0, len(self), size):
            yield self.block(start, start + size, device)

    def vectors(self, name: Id) -> Tensor:
        """[k or n_i, d] of one candidate, as it is computed with. Raises DataError for an id that is not there."""
        place = self._place(name)
        return self.block(place, place + 1).values

    def select(self, ids: Sequence[Id]) -> Cache:
        """Some of the candidates, in the order of `ids`; what `cut` counts stays behind.

        Raises DataError for no ids, an id twice, or one that is not there.
        """
        names = check_ids(tuple(ids))
        places = [self._place(name) for name in names]
        index = torch.cat([torch.arange(self._starts[p], self._starts[p + 1]) for p in places]).to(self.data.device)
        scales = None if self.scales is None else self.scales[index]
        terms = None if self.terms is None else self.terms[places]
        return Cache(names, self.data[index], self.lengths[places], self.signature, scales, terms=terms)

    def _place(self, name: Id) -> int:
        found = self._places.get(name)
        if found is None:
            raise DataError(f"There is no candidate with the id {name!r} among the {len(self)} of this cache.")
        return found

    def to(self, storage: Storage) -> Cache:
        """The same candidates kept another way.

        float16: every value to the nearest half, ties to even; there and back again changes nothing more.
        int8: each vector is divided by its scale, which is its largest magnitude / 127 rounded to 16 bits of mantissa, and
            rounded to the nearest whole number; back again it is exactly code * scale, of which int8 makes the same codes
            and scales.
        Raises OptionError for another name, DataError for a value that is NaN, infinite, or beyond a half's 65504.
        """
        if storage not in get_args(Storage):
            raise OptionError(f"There is no storage {storage!r}{nearest(str(storage), get_args(Storage))}")
        if storage == self.storage:
            return self
        if "int32" in (storage, self.storage):
            raise OptionError(
                "Token ids are kept as int32, and vectors are not: a cross-encoder's cache cannot be rounded."
            )
        values = _values(self.data, self.scales)
        if storage == "int8":
            scales = _scales(_finite(values))
            codes = (values / scales.unsqueeze(1)).round().to(torch.int8)
            return replace(self, data=codes, scales=scales)
        data = values if storage == "float32" else _finite(values).to(torch.float16)
        if not data.isfinite().all():
            raise DataError("A value is too large for float16 (the largest is 65504); keep float32 or int8.")
        return replace(self, data=data, scales=None)

    @staticmethod
    def concat(caches: Sequence[Cache]) -> Cache:
        """The candidates of all of them, in order.

        Raises DataError for no cache, an id twice, or caches of other scorers or another storage.
        """
        if not caches:
            raise DataError("There are no caches to put together.")
        first = caches[0]
        for other in caches:
            if (other.signature, other.storage) != (first.signature, first.storage):
                raise DataError(
                    f"A cache of {other.signature} in {other.storage} does not go with one of {first.signature} in "
                    f"{first.storage}."
                )
        scales = [c.scales for c in caches if c.scales is not None]
        terms = [c.terms for c in caches if c.terms is not None]
        return Cache(
            tuple(name for c in caches for name in c.ids),
            torch.cat([c.data for c in caches]),
            torch.cat([c.lengths for c in caches]),
            first.signature,
            torch.cat(scales) if scales else None,
            sum(c.cut for c in caches),
            torch.cat(terms) if terms else None,
        )


def check_ids(ids: tuple[Id, ...]) -> tuple[Id, ...]:
    """The ids again. Raises DataError where there is none, one is empty, of another type or given twice."""
    if not ids:
        raise DataError("There are no candidates; give at least one.")
    ids = tuple(int(name) if is_whole(name) else name for name in ids)  # type: ignore[call-overload]  # numpy's numbers too
    for name in ids:
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise DataError(f"An id is a text or a whole number, not {name!r}.")
        if name == "":
            raise DataError("A candidate has an empty id.")
    if len(set(ids)) < len(ids):
        seen: set[Id] = set()
        twice = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise DataError(f"The id {twice!r} is given twice; every candidate needs its own.")
    return ids


def check_count(value: Any, what: str) -> int:
    """How many candidates, as an int. what: the subject and verb of the error, "Ranking gives".

    Raises OptionError for what is no whole number above 0.
    """
    if not is_whole(value) or value < 1:
        raise OptionError(f"{what} a whole number of candidates, at least 1, not {value!r}.")
    return int(value)


def _values(data: Tensor, scales: Tensor | None) -> Tensor:
    if data.dtype is torch.int32:
        return data
    values = data.to(torch.float32)
    return values if scales is None else values * scales.unsqueeze(1)


def _finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise DataError("A candidate's vector holds NaN or infinity, which cannot be rounded; are the weights whole?")
    return values


def _scales(values: Tensor) -> Tensor:
    """[T], such that 127 * scale is exact in float32: then the same scale is found again from what was rounded with it."""
    largest = values.abs().amax(1)
    bits = (largest / 127).view(torch.int32)
    scales = ((bits + 0x80) & ~0xFF).view(torch.float32)
    # A vector of zeros has no scale of its own; any does.
    return torch.where(largest > 0, scales.clamp(min=torch.finfo(torch.float32).tiny), torch.ones_like(scales))
