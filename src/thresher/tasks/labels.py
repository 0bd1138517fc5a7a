"""Labels as a data set holds them (names, numbers, numbers as floats) to class numbers or values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from thresher.errors import DataError, nearest


def has_fraction(label: Any) -> bool:
    """Whether a label is a number that can be no class."""
    return isinstance(label, float) and not math.isnan(label) and not label.is_integer()


def class_numbers(labels: Sequence[Any], names: Sequence[str] | None, count: int | None) -> list[int]:
    """The class number of every label.

    Args:
        labels: class names, or class numbers as integers, booleans or whole floats.
        names: the class names in the order of their numbers; None where labels are numbers.
        count: the number of classes; None for any.

    Raises:
        DataError: a label is missing, no class number, out of range or an unknown name; its row is named, from 1.
    """
    known = {name: number for number, name in enumerate(names or ())}
    numbers = []
    for row, label in enumerate(labels, start=1):
        _refuse_missing(row, label)
        if isinstance(label, str):
            if label not in known:
                hint = nearest(label, known) if known else ": the classes have no names, so labels must be numbers."
                raise DataError(f"Row {row} has the label '{label}', which is not a known class{hint}")
            numbers.append(known[label])
            continue
        if not isinstance(label, int | float) or has_fraction(label):
            raise DataError(f"Row {row} has the label {label!r}, which is not the number of a class.")
        number = int(label)
        if number < 0 or (count is not None and number >= count):
            allowed = "0 or more" if count is None else f"0 to {count - 1}"
            raise DataError(f"Row {row} has the label {number}, but class numbers are {allowed}.")
        numbers.append(number)
    return numbers


def values(labels: Sequence[Any]) -> list[float]:
    """Every label as a float.

    Raises:
        DataError: a label is missing, no number or not finite; its row is named, from 1.
    """
    for row, label in enumerate(labels, start=1):
        _refuse_missing(row, label)
        if not isinstance(label, int | float) or not math.isfinite(label):
            raise DataError(f"Row {row} has the label {label!r}, which is not a finite number.")
    return [float(label) for label in labels]


def _refuse_missing(row: int, label: Any) -> None:
    if label is None or (isinstance(label, float) and math.isnan(label)):
        raise DataError(f"Row {row} has no label: its value is {'null' if label is None else 'NaN'}.")
