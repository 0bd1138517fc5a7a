"""From a caller's ids and arrays to what is stored, checked, and back to float32."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thresher.errors import StoreError
from thresher.pairs.store.schema import VECTORS, Field, Schema

Array = NDArray[Any]
BLOCK = 1 << 14  # rows checked and converted at a time, so that a large array needs no second one of its size


def hashed(names: Sequence[bytes]) -> Array:
    """[N] uint64, the same in every process (Python's own hash is not)."""
    digests = b"".join([hashlib.blake2b(name, digest_size=8).digest() for name in names])
    return np.frombuffer(digests, "<u8")


def listed(ids: Iterable[str], *, unique: bool) -> tuple[list[str], list[bytes]]:
    """The ids and their UTF-8. Raises StoreError: not texts, empty, or given twice where they must be unique."""
    if isinstance(ids, str | bytes):
        raise StoreError(f"ids must be a list of texts, not the one text {ids!r}.")
    try:
        names = list(ids)
    except TypeError as error:
        raise StoreError(f"ids must be a list of texts, not {ids!r}.") from error
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise StoreError(f"Every id must be a text; number {number + 1} is {name!r}.")
        if not name:
            raise StoreError(f"An id must not be empty; number {number + 1} is.")
    try:
        encoded = [name.encode() for name in names]
    except UnicodeEncodeError as error:
        raise StoreError(f"The id {error.object!r} cannot be written as UTF-8.") from error
    if unique and len(set(names)) < len(names):
        seen: set[str] = set()
        twice = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        raise StoreError(f"{_some(twice)} given more than once; every id may come once at a time.")
    return [str(name) for name in names], encoded


def refuse(names: Sequence[str], what: str) -> StoreError:
    return StoreError(f"{_some(names)} {what}")


def refuse_absent(names: Sequence[str], place: Any) -> None:
    """Raises StoreError for ids that are not in the store at `place`."""
    if names:
        are = "is" if len(names) == 1 else "are"
        raise refuse(names, f"{are} not in {place}; add them first, or leave them out.")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'Id' if len(names) == 1 else 'Ids'} {shown}{more}"


def offsets_of(lengths: Array) -> Array:
    """[N + 1] int64 from lengths [N]."""
    offsets = np.zeros(len(lengths) + 1, "<i8")
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def spread(starts: Array, lengths: Array) -> Array:
    """The indices start, start + 1, ... of every piece, one piece after another: [sum of lengths] int64."""
    lengths = lengths.astype(np.int64)
    return np.repeat(starts - offsets_of(lengths)[:-1], lengths) + np.arange(int(lengths.sum()))


def encode(
    schema: Schema, ids: Sequence[str], vectors: Any, lengths: Any, extras: Mapping[str, Any] | None
) -> dict[str, Array]:
    """What a segment keeps of the arrays, by column. Raises StoreError where a shape, a dtype or a value does not fit."""
    first, *others = schema.fields
    given = dict(extras or {})
    if set(given) != {field.name for field in others}:
        wanted = ", ".join(field.name for field in others) or "none"
        raise StoreError(f"The extra arrays of this store are: {wanted}; given were: {', '.join(given) or 'none'}.")
    columns: dict[str, Array] = {}
    if first.most is None:
        if lengths is not None:
            raise StoreError("lengths belong to a ragged store; this one keeps the same number of vectors of every id.")
        columns |= _columns(first, vectors, ids, np.arange(len(ids) + 1))
    else:
        flat, counts = _flattened(first, vectors, lengths, ids)
        columns[f"{VECTORS}.offsets"] = offsets_of(counts)
        columns |= _columns(first, flat, ids, columns[f"{VECTORS}.offsets"])
    for field in others:
        columns |= _columns(field, given[field.name], ids, np.arange(len(ids) + 1))
    return columns


def _flattened(field: Field, vectors: Any, lengths: Any, ids: Sequence[str]) -> tuple[Any, Array]:
    """Vectors [T, dim] and lengths [N] from the same, or from a list of N arrays [n, dim]."""
    if lengths is None:
        try:
            pieces = [np.asarray(piece) for piece in vectors]
            flat = np.concatenate(pieces) if pieces else np.empty((0, *field.shape), np.float32)
            counts = np.array([len(piece) for piece in pieces], np.int64)
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"A ragged store takes a list of arrays of shape [n, {field.shape[0]}], or all in a row and lengths ({error})."
            ) from error
    else:
        flat, counts = vectors, np.asarray(lengths)
    if counts.shape != (len(ids),) or counts.dtype.kind not in "iu":
        raise StoreError(
            f"{len(ids)} ids need as many lengths, each a whole number; they are {counts.shape} {counts.dtype}."
        )
    assert field.most is not None
    wrong = np.flatnonzero((counts < 1) | (counts > field.most))
    if wrong.size:
        at = int(wrong[0])
        raise StoreError(f"Id {ids[at]!r} has {int(counts[at])} vectors; this store takes 1 to {field.most} of each.")
    return flat, counts.astype(np.int64)


def _columns(field: Field, values: Any, ids: Sequence[str], offsets: Array) -> dict[str, Array]:
    """One field's columns; `offsets` [N + 1] say which of its rows belong to which id."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise StoreError(f"{field.name} is not an array of numbers ({' '.join(str(error).split())}).") from error
    expected = (int(offsets[-1]), *field.shape)
    if array.shape != expected:
        raise StoreError(
            f"{field.name} of {len(ids)} ids must have the shape {list(expected)}, not {list(array.shape)}."
        )
    if array.dtype.kind not in ("iuf" if field.returned.kind == "f" else "iu"):
        raise StoreError(f"{field.name} is kept as {field.dtype} and cannot be made of {array.dtype}.")
    stored = np.empty(expected, field.stored)
    scales = np.empty(expected[:-1], "<f4") if field.scaled else None
    for start in range(0, expected[0], BLOCK):
        rows = slice(start, start + BLOCK)
        block = array[rows]
        bad = _convert(block, stored[rows], None if scales is None else scales[rows])
        if bad is not None:
            whose = ids[int(np.searchsorted(offsets, start + bad, "right")) - 1]
            if block.dtype.kind == "f" and not np.isfinite(block[bad]).all():
                raise StoreError(f"{field.name} of id {whose!r} holds NaN or an infinite number.")
            wider = "; a store of its own with dtype float32 keeps it" if field.dtype == "float16" else ""
            raise StoreError(f"{field.name} of id {whose!r} holds a number that does not fit {field.dtype}{wider}.")
    return {field.name: stored} if scales is None else {f"{field.name}.scales": scales, field.name: stored}


def _convert(block: Array, stored: Array, scales: Array | None) -> int | None:
    """Fill `stored` (and `scales`) from `block`; the first row that does not fit, or None."""
    with np.errstate(over="ignore", invalid="ignore"):
        if stored.dtype.kind == "i" and scales is None:
            stored[...] = block
            fits = stored == block
        elif scales is None:
            stored[...] = block
            fits = np.isfinite(stored)
        else:
            floats = block.astype(np.float32)
            fits = np.isfinite(floats)
            if fits.all():
                scales[...] = _scales(np.abs(floats).max(axis=-1))
                floats /= scales[..., None]
                stored[...] = np.rint(floats)
    wrong = np.flatnonzero(~fits.reshape(len(block), -1).all(axis=1))
    return int(wrong[0]) if wrong.size else None


def _scales(largest: Array) -> Array:
    """From the largest magnitude of every vector, its 127th part rounded to 16 bits of mantissa, as `thresher.pairs.cache` has
    it: then 127 * scale is exact in float32, and what was read back is kept as the same codes and scales again."""
    bits = (largest / np.float32(127)).view(np.int32)
    scales = ((bits + 0x80) & ~0xFF).view(np.float32)
    # A vector of zeros has no scale of its own; any does.
    return np.where(largest > 0, np.maximum(scales, np.finfo(np.float32).tiny), np.float32(1))


def decode(field: Field, data: Array, scales: Array | None) -> Array:
    """Floats as float32, whole numbers as they are."""
    if scales is None:
        return data.astype(field.returned, copy=False)
    floats = data.astype(np.float32)
    with np.errstate(over="ignore"):  # only where a flipped bit made a scale too large; see `verify`
        floats *= scales[..., None]
    return floats


__all__ = ["Array", "decode", "encode", "hashed", "listed", "offsets_of", "refuse", "refuse_absent", "spread"]
