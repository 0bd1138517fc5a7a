"""One data file into rows, with errors that name the line."""

from __future__ import annotations

import bisect
import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import InMemoryTable

from thresher.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
"""The endings `read_file` knows, the most faithful formats first."""

# Only what is written back the same: "007" and a number too long for its type are names, and stay text.
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_FLOAT = re.compile(r"-?((0|[1-9]\d{0,14})(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?")

_IDS = ("id", "relevant")  # fields that hold names, where whole numbers may not become others
_NO_COLUMN = (pa.ArrowException, ValueError, OverflowError, TypeError)  # what pyarrow raises for values that make none


def data_suffix(path: Path) -> str | None:
    """The ending of a file that can be read ('.jsonl.gz'), or None."""
    return next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)


def read_file(path: Path) -> datasets.Dataset:
    """All rows of a file, in order; every row has the same fields.

    Raises:
        DataError: the ending is unknown, the file cannot be read or holds no rows, or a line is malformed.
    """
    suffix = data_suffix(path)
    if suffix is None:
        raise DataError(f"{path} has an ending that is not known; known are {', '.join(SUFFIXES)}.")
    if suffix == ".parquet":
        return _parquet(path)
    content = _bytes(path)
    if not content.strip():
        raise DataError(f"{path} is empty; give a file with rows.")
    if suffix.startswith((".csv", ".tsv")):
        columns = _separated(path, content, "," if suffix.startswith(".csv") else "\t")
    elif suffix.startswith(".json") and not suffix.startswith(".jsonl") and content.lstrip().startswith(b"["):
        columns = _columns(path, "row", list(enumerate(_json_list(path, content), start=1)))
    else:  # a .json file that is no list is taken for one object a line, as data libraries write it
        columns = _columns(path, "line", _json_lines(path, content))
    return datasets.Dataset.from_dict(columns)


def _bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.name.lower().endswith(".gz") else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {str(error).rstrip('.')}.") from error
    return content.removeprefix(codecs.BOM_UTF8)


def _parquet(path: Path) -> datasets.Dataset:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {str(error).rstrip('.')}.") from error
    if not table.num_rows:
        raise DataError(f"{path} holds no rows.")
    return datasets.Dataset(InMemoryTable(table))


def _text(path: Path, line: int, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {line + raw[: error.start].count(10)}: the text is not UTF-8.") from error


def what_is_wrong(error: Exception) -> str:
    """Of JSON that could not be read: what json says and where; or it is nested too deep, or a number has too many digits."""
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"{error.msg.removesuffix(' at')} at {line}column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else "a number has too many digits"


def kind_of(value: Any) -> str:
    """What JSON calls a value, after "a"."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    kinds: tuple[tuple[Any, str], ...] = (
        (str, "text"),
        ((int, float), "number"),
        (Mapping, "JSON object"),
        ((list, tuple), "list"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


def _json_lines(path: Path, content: bytes) -> list[tuple[int, Any]]:
    rows = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        text = _text(path, number, raw)
        if not text.strip():
            continue
        try:
            rows.append((number, json.loads(text)))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: this is not valid JSON ({what_is_wrong(error)}).") from error
    return rows


def _json_list(path: Path, content: bytes) -> list[Any]:
    text = _text(path, 1, content)
    try:
        rows: list[Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: this is not valid JSON ({what_is_wrong(error)}).") from error
    return rows


def _columns(path: Path, unit: str, rows: Sequence[tuple[int, Any]]) -> dict[str, pa.Array]:
    """Rows, each with the number of its line, to columns; all rows must have the fields of the first."""
    if not rows:
        raise DataError(f"{path} holds no rows.")
    first_number, first = rows[0]
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, {unit} {number}: a row must be an object, and this is a {kind_of(row)}.")
        if row.keys() != first.keys():
            missing = next((field for field in first if field not in row), None)
            where, other = (number, first_number) if missing is not None else (first_number, number)
            field = missing if missing is not None else next(field for field in row if field not in first)
            raise DataError(
                f"{path}, {unit} {where}: the field '{field}', which {unit} {other} has, is missing "
                "(write null for no value)."
            )
    if not first:
        raise DataError(f"{path}, {unit} {first_number}: the rows have no fields.")
    for field in first:
        if problem := _refused(field):
            raise DataError(f"{path}, {unit} {first_number}: the name of the field {field!r} {problem}.")
    return {field: _array(path, unit, field, [(number, row[field]) for number, row in rows]) for field in first}


def _array(path: Path, unit: str, field: str, numbered: list[tuple[int, Any]]) -> pa.Array:
    values = [value for _, value in numbered]
    _check_ids(path, unit, field, numbered)
    try:
        return pa.array(values)
    except _NO_COLUMN as error:
        # The error tells no row: it is the first with which those before it make no column.
        place = bisect.bisect_left(range(len(values)), True, key=lambda last: bool(_refused(*values[: last + 1])))
        number, value = numbered[place]
        alone = _refused(value)
        for other, before in numbered[:place]:
            if not alone and before is not None and type(before) is not type(value):
                raise DataError(
                    f"{path}, {unit} {number}: the field '{field}' is of type {type(value).__name__}, "
                    f"but in {unit} {other} it is of type {type(before).__name__}."
                ) from error
        problem = alone or _refused(*values[: place + 1])
        raise DataError(f"{path}, {unit} {number}: the field '{field}' {problem}.") from error


def _refused(*values: Any) -> str:
    """Why values make no column, a sentence without its subject and its full stop; "" where they make one."""
    try:
        pa.array(values)
    except UnicodeEncodeError as error:
        return f"has half a character (a lone surrogate), at {error.start}; write the whole one, or leave it out"
    except OverflowError:
        return "has a whole number that does not fit into 64 bits; write the numbers of this field as texts"
    except _NO_COLUMN as error:
        return f"cannot be made a column: {str(error).rstrip('.')}; write values of one type in all rows"
    return ""


def _check_ids(path: Path, unit: str, field: str, numbered: list[tuple[int, Any]]) -> None:
    """Raises DataError for ids of which some are whole numbers and some are not: a column would make 1.0 of 1, another id."""
    if field not in _IDS:
        return
    seen: dict[type, tuple[int, Any]] = {}  # type → the first row that has it
    for number, value in numbered:
        # Beside a query's list of relevant ids, `relevant` may be the name of a score.
        for name in value if isinstance(value, list) else [value] * (field == "id"):
            seen.setdefault(type(name), (number, name))
    if {int, float} <= seen.keys():
        (number, name), (other, whole) = seen[float], seen[int]
        raise DataError(
            f"{path}, {unit} {number}: the field '{field}' is {name!r}, and in {unit} {other} it is {whole!r}; "
            "ids are whole numbers, or all of them texts."
        )


def _separated(path: Path, content: bytes, separator: str) -> dict[str, list[Any]]:
    """Columns of a .csv or .tsv; a column of nothing but numbers, or of numbers and gaps, becomes numbers and nulls.

    Ids become numbers only where all of them are whole."""
    csv.field_size_limit(2**31 - 1)  # the limit is the process's, and documents are longer than its default of 131,072
    # Tab-separated files are written without quoting as a rule, and a stray quotation mark would swallow lines.
    stream = io.StringIO(_text(path, 1, content), newline="")
    if separator == "\t":
        reader = csv.reader(stream, delimiter=separator, quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(stream, delimiter=separator, strict=True)
    header: list[str] = []
    rows: list[list[str]] = []
    start = 1
    try:
        for fields in reader:
            if not header:
                header = fields
                if len(set(header)) < len(header):
                    raise DataError(f"{path}, line {start}: a column name stands twice in the header.")
            elif fields and len(fields) != len(header):
                raise DataError(
                    f"{path}, line {start}: {len(fields)} fields, "
                    f"but the header has {len(header)} ({', '.join(header)})."
                )
            elif fields:
                rows.append(fields)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: this is not a valid row ({error}).") from error
    if not rows:
        raise DataError(f"{path} holds a header but no rows.")
    return {name: _numbers(name, list(column)) for name, column in zip(header, zip(*rows, strict=True), strict=True)}


def _numbers(name: str, column: list[str]) -> list[Any]:
    filled = [value for value in column if value]
    forms = ((int, _INTEGER), (float, _FLOAT))[: 1 if name == "id" else 2]
    kind = next((kind for kind, form in forms if all(form.fullmatch(value) for value in filled)), None)
    return column if kind is None or not filled else [kind(value) if value else None for value in column]
