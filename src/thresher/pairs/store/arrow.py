"""What a candidate store keeps, as Arrow columns: for stores that others' formats hold.

One row a candidate: its id, a column for every field of the schema ([k, dim] and other fixed shapes as one fixed-size list,
ragged vectors as a list of those), `_NAME_scales` beside what is kept in int8, and `_crc`, the CRC-32 of all of it. A user's
own names start with a letter, so that none of them meets these.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa

from thresher.pairs.store.coding import Array, decode, offsets_of
from thresher.pairs.store.schema import VECTORS, Field, Schema
from thresher.pairs.store.view import Candidates

ID, CRC = "id", "_crc"
ABOUT = b"thresher"  # the key of the schema's own metadata
PRIMARY = {"lance-schema:unenforced-primary-key": "true"}
VALUES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "int32": pa.int32(), "int64": pa.int64()}


def arrow_schema(schema: Schema, form: int) -> pa.Schema:
    """With `schema` and the number of this format in its metadata, from which `described` has them back."""
    fields = [pa.field(ID, pa.string(), nullable=False, metadata=PRIMARY)]
    for field in schema.fields:
        fields.append(pa.field(field.name, _kind(field, VALUES[field.dtype], field.shape), nullable=False))
        if field.scaled:
            fields.append(pa.field(_scales(field), _kind(field, pa.float32(), field.shape[:-1]), nullable=False))
    fields.append(pa.field(CRC, pa.uint32(), nullable=False))
    return pa.schema(fields, metadata={ABOUT: json.dumps({"format": form, **schema.to_dict()}).encode()})


def described(metadata: Mapping[bytes, bytes] | None) -> tuple[int, dict[str, Any]] | None:
    """The number of the format and what `Schema.from_dict` takes; None for a table that is no store.

    Raises ValueError, KeyError, TypeError or AttributeError where it is one, and is damaged.
    """
    found = (metadata or {}).get(ABOUT)
    if found is None:
        return None
    values = json.loads(found)
    return values.pop("format"), values


def table(schema: Schema, names: Sequence[str], columns: Mapping[str, Array], form: int) -> pa.Table:
    """names: N ids; columns: what `coding.encode` made of their arrays."""
    offsets = columns.get(f"{VECTORS}.offsets")
    arrays = [pa.array(names, pa.string())]
    pieces: list[tuple[Array, Array | None]] = []
    for field in schema.fields:
        places = offsets if field.most is not None else None
        kept = [(columns[field.name], field.shape)]
        if field.scaled:
            kept.append((columns[f"{field.name}.scales"], field.shape[:-1]))
        for values, shape in kept:
            arrays.append(_packed(values, shape, places))
            pieces.append((values, places))
    arrays.append(pa.array(_checksums(names, pieces), pa.uint32()))
    return pa.table(arrays, schema=arrow_schema(schema, form))


def candidates(schema: Schema, found: pa.RecordBatch, stored: bool) -> Candidates:
    """Rows as a store gives them; floats as float32, or as stored."""
    arrays: dict[str, Array] = {}
    scales: dict[str, Array] = {}
    lengths = None
    for field in schema.fields:
        data, sizes = _values(found, field.name, field, field.shape, field.stored)
        scale = _values(found, _scales(field), field, field.shape[:-1], np.dtype("<f4"))[0] if field.scaled else None
        if field.most is not None:
            lengths = sizes
        if not stored:
            arrays[field.name] = decode(field, data, scale)
        else:
            arrays[field.name] = data
            if scale is not None:
                scales[field.name] = scale
    vectors = arrays.pop(VECTORS)
    return Candidates(found.column(ID).to_pylist(), vectors, lengths, arrays, scales)


def damaged_rows(schema: Schema, found: pa.RecordBatch) -> list[str]:
    """The ids whose content has another checksum than it was written with."""
    kept = candidates(schema, found, stored=True)
    offsets = None if kept.lengths is None else offsets_of(kept.lengths)
    arrays = {VECTORS: kept.vectors, **kept.extras}
    pieces: list[tuple[Array, Array | None]] = []
    for field in schema.fields:
        places = offsets if field.most is not None else None
        pieces.append((arrays[field.name], places))
        if field.scaled:
            pieces.append((kept.scales[field.name], places))
    wrong = np.flatnonzero(np.asarray(found.column(CRC)) != np.array(_checksums(kept.ids, pieces), np.uint32))
    return [kept.ids[i] for i in wrong.tolist()]


def _scales(field: Field) -> str:
    return f"_{field.name}_scales"


def _kind(field: Field, value: pa.DataType, shape: tuple[int, ...]) -> pa.DataType:
    each = pa.list_(value, prod(shape)) if shape else value
    return each if field.most is None else pa.list_(each)


def _packed(values: Array, shape: tuple[int, ...], offsets: Array | None) -> pa.Array:
    """values [N, *shape], or with `offsets` [N + 1] [T, *shape]."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    each = pa.FixedSizeListArray.from_arrays(flat, prod(shape)) if shape else flat
    return each if offsets is None else pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), each)


def _values(
    found: pa.RecordBatch, name: str, field: Field, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[Array, Array | None]:
    """A column's numbers [N, *shape], or [T, *shape] and how many each row has."""
    column, sizes = found.column(name), None
    if field.most is not None:
        sizes = np.diff(np.asarray(column.offsets)).astype(np.int64)
        column = column.flatten()
    if shape:
        column = column.flatten()
    return np.asarray(column).astype(dtype, copy=False).reshape(-1, *shape), sizes


def _checksums(names: Sequence[str], pieces: Sequence[tuple[Array, Array | None]]) -> list[int]:
    """The CRC-32 of every id with its rows of every array."""
    columns = [_rows(array, offsets, len(names)) for array, offsets in pieces]
    sums = [zlib.crc32(name.encode()) for name in names]
    for rows in columns:
        sums = [zlib.crc32(row, before) for row, before in zip(rows, sums, strict=True)]
    return sums


def _rows(array: Array, offsets: Array | None, count: int) -> Iterator[memoryview]:
    width = prod(array.shape[1:]) * array.itemsize
    flat = np.ascontiguousarray(array).view(np.uint8).reshape(len(array), width)
    places = range(count + 1) if offsets is None else offsets.tolist()
    return (flat[start:stop].reshape(-1).data for start, stop in pairwise(places))


__all__ = ["CRC", "ID", "arrow_schema", "candidates", "damaged_rows", "described", "table"]
