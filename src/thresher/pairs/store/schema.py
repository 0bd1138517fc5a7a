"""What one candidate is made of: its vectors and extra arrays, and how each is kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from thresher.errors import StoreError

FLOATS = ("float32", "float16", "int8")  # what an array of floats is kept in
DTYPES = {"float32": "<f4", "float16": "<f2", "int8": "|i1", "int32": "<i4", "int64": "<i8"}
VECTORS = "vectors"
TAKEN = (VECTORS, "ids", "id", "hashes", "order")  # columns that every store has


@dataclass(frozen=True)
class Field:
    """One array of a candidate: `shape` in `dtype`; where `most` is given, from 1 to `most` of such arrays, as many as it has.

    int8 keeps floats as round(x / scale) with one float32 scale per vector (the last axis), scale = max |x| / 127 rounded
    to 16 bits of mantissa.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    most: int | None = None

    @property
    def stored(self) -> np.dtype[Any]:
        return np.dtype(DTYPES[self.dtype])

    @property
    def returned(self) -> np.dtype[Any]:
        return np.dtype("float32") if self.dtype in FLOATS else self.stored

    @property
    def scaled(self) -> bool:
        return self.dtype == "int8"


@dataclass(frozen=True)
class Schema:
    """What a store was made for. Every candidate has vectors [k, dim] (ragged: [n, dim], n from 1 to k), and the extras."""

    fingerprint: str
    strategy: str
    k: int
    dim: int
    dtype: str
    ragged: bool = False
    extras: tuple[Field, ...] = ()

    def __post_init__(self) -> None:
        for name in ("fingerprint", "strategy"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise StoreError(f"{name} must be a text that is not empty, not {value!r}.")
        for name in ("k", "dim"):
            if not _whole(getattr(self, name)):
                raise StoreError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}.")
        if self.dtype not in FLOATS:
            raise StoreError(f"dtype must be one of {', '.join(FLOATS)}, not {self.dtype!r}.")
        if not isinstance(self.ragged, bool):
            raise StoreError(f"ragged must be True or False, not {self.ragged!r}.")

    @property
    def fields(self) -> tuple[Field, ...]:
        if self.ragged:
            return Field(VECTORS, (self.dim,), self.dtype, most=self.k), *self.extras
        return Field(VECTORS, (self.k, self.dim), self.dtype), *self.extras

    def to_dict(self) -> dict[str, Any]:
        extras = {field.name: [list(field.shape), field.dtype] for field in self.extras}
        return {**asdict(self), "extras": extras}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schema:
        """Raises StoreError, KeyError or TypeError."""
        return cls(**{**values, "extras": extra_fields(values["extras"])})

    @property
    def shown(self) -> str:
        """A candidate's shape and dtype, for people."""
        return f"[{'<=' if self.ragged else ''}{self.k}, {self.dim}] {self.dtype}"

    def require(self, place: Any, expected: Mapping[str, Any]) -> None:
        """Raises StoreError where what is `expected` and not None is not what the store at `place` has."""
        names = [name for name, value in expected.items() if value is not None and getattr(self, name) != value]
        if names:
            has = ", ".join(f"{name} {getattr(self, name)!r}" for name in names)
            needed = ", ".join(f"{name} {expected[name]!r}" for name in names)
            raise StoreError(
                f"{place} was made with {has}, not {needed}; index the candidates again, or use what it was made with."
            )


def extra_fields(extras: Mapping[str, tuple[Any, str]] | None) -> tuple[Field, ...]:
    """Fields from `{name: (shape, dtype)}`. Raises StoreError."""
    fields = []
    for name, what in (extras or {}).items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name) or name.lower() in TAKEN:
            raise StoreError(
                f"{name!r} cannot name an extra array; use letters, digits and _, and none of {', '.join(TAKEN)}."
            )
        try:
            shape, dtype = what
            shape = tuple(shape)
        except (TypeError, ValueError) as error:
            raise StoreError(f"The extra array {name!r} needs (shape, dtype), not {what!r}.") from error
        if dtype not in DTYPES:
            raise StoreError(f"The extra array {name!r} must be one of {', '.join(DTYPES)}, not {dtype!r}.")
        if not all(map(_whole, shape)) or (dtype == "int8" and not shape):
            raise StoreError(f"The extra array {name!r} cannot have the shape {shape!r} in {dtype}.")
        fields.append(Field(name, shape, dtype))
    return tuple(fields)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


__all__ = ["DTYPES", "FLOATS", "VECTORS", "Field", "Schema", "extra_fields"]
