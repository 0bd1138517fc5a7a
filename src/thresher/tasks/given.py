"""Rows as callers hand them over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets

from thresher.errors import DataError


def as_rows(rows: Any) -> datasets.Dataset:
    """A data set as it is, or one made of a list of dicts, all with the same keys.

    Raises:
        DataError: it is neither, or dicts whose values do not fit each other.
    """
    if isinstance(rows, datasets.Dataset):
        return rows
    if isinstance(rows, Mapping) and rows and all(isinstance(one, datasets.Dataset) for one in rows.values()):
        first, splits = next(iter(rows)), ", ".join(map(str, rows))
        raise DataError(f"These are the splits {splits}; give the rows of one, such as rows[{first!r}].")
    if not isinstance(rows, list | tuple) or not all(isinstance(one, Mapping) for one in rows):
        raise DataError(f"Rows are a datasets.Dataset or a list of dicts, not {rows!r:.80}.")
    if not rows:
        raise DataError("There are no rows.")
    names = list(rows[0])
    other = next((number for number, one in enumerate(rows, start=1) if set(one) != set(names)), None)
    if other is not None:
        raise DataError(f"Row {other} has other keys than the first ({', '.join(map(str, names))}).")
    try:
        return datasets.Dataset.from_dict({name: [one[name] for one in rows] for name in names})
    except (TypeError, ValueError, OverflowError) as error:  # pyarrow's own errors are ValueErrors and TypeErrors
        raise DataError(f"The dicts cannot be made rows: {error}.") from error


__all__ = ["as_rows"]
