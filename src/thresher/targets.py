"""Encoded rows against the model that they are for: ids and labels that do not fit are named before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from thresher.errors import DataError
from thresher.settings import is_number, is_whole

IGNORED = -100  # the label of a token that is not scored; what losses pass over
LABELS = ("labels", "start_positions", "end_positions")  # the columns that may hold them
ENDS = ("start_positions", "end_positions")
SEVERAL = "multi_label_classification"


def check_labels(encoder: Any, rows: Any) -> None:
    """Raises DataError for the first row (from 1) whose label the model's head cannot be taught.

    encoder: a Hugging Face model; one without a head takes any label. rows: columns of values by name, with `input_ids`.
    """
    kind, config = type(encoder).__name__, encoder.config
    if kind.endswith("ForQuestionAnswering"):
        for name in ENDS:
            for number, value in enumerate(_column(rows, name), start=1):
                if not is_whole(value) or value < 0:
                    raise DataError(
                        f"Row {number} has {name} {value!r}, where the place of a token, from 0, is expected."
                    )
        return
    if "For" not in kind:
        return
    labels, count = _column(rows, "labels"), config.num_labels or 0
    if kind.endswith("ForTokenClassification"):
        sizes = [len(ids) for ids in rows["input_ids"]] if len(labels) else []
        for number, (value, size) in enumerate(zip(labels, sizes, strict=True), start=1):
            _check_tags(number, value, size, count)
        return
    several = config.problem_type == SEVERAL
    for number, value in enumerate(labels, start=1):
        if several:
            _check_several(number, value, count)
        elif count > 1:
            _check_class(number, value, count)
        elif not _finite(value):
            raise DataError(f"Row {number} has the label {value!r}, where a number is expected.")


def check_tokens(encoder: Any, rows: Any) -> None:
    """Raises DataError for the first row (from 1) with a token id that the model has no embedding of.

    encoder: a Hugging Face model. rows: columns of values by name, with `input_ids`.
    """
    known = len(encoder.get_input_embeddings().weight)
    for number, ids in enumerate(rows["input_ids"], start=1):
        if len(ids) and not (min(ids) >= 0 and max(ids) < known):
            strange = next(one for one in ids if not 0 <= one < known)
            raise DataError(
                f"Row {number} has the token id {strange}, and the model knows 0 to {known - 1}; encode the rows with its own "
                "tokenizer."
            )


def refuse_one_answer(rows: Any, kind: str, source: str = "the training data") -> None:
    """Raises DataError when the labels of encoded rows are all the same.

    kind: "classification", "regression" or "tagging"; of anything else labels are not looked at. source: what to call the rows.
    """
    if kind not in ("classification", "regression", "tagging"):
        return
    labels = _column(rows, "labels")
    if not len(labels):
        return
    different = set(labels) if not isinstance(labels[0], list) else set(map(tuple, labels))
    if kind == "tagging":
        different = {label for row in labels for label in row} - {IGNORED}
    if len(different) < 2:
        what, more = {
            "classification": ("Every row of {} has the same label", "classes"),
            "regression": ("Every row of {} has the same value", "values"),
            "tagging": ("Every word of {} has the same tag", "tags"),
        }[kind]
        raise DataError(f"{what.format(source)}, so nothing can be learned or lost; give rows of two {more} or more.")


def kind_of_labels(encoder: Any) -> str:
    """What `refuse_one_answer` calls the labels of a model's head."""
    kind, config = type(encoder).__name__, encoder.config
    if kind.endswith("ForTokenClassification"):
        return "tagging"
    if kind.endswith("ForSequenceClassification"):
        return "regression" if config.num_labels == 1 and config.problem_type != SEVERAL else "classification"
    return "other"


def _column(rows: Any, name: str) -> Sequence[Any]:
    names = getattr(rows, "column_names", rows)
    return rows[name][:] if name in names else ()


def _check_class(number: int, value: Any, count: int) -> None:
    if not is_whole(value):
        raise DataError(f"Row {number} has the label {value!r}, where a class, a whole number, is expected.")
    if not 0 <= value < count:
        raise DataError(f"Row {number} has the label {value}, and the model has the classes 0 to {count - 1}.")


def _check_tags(number: int, value: Any, size: int, count: int) -> None:
    if not isinstance(value, list) or len(value) != size:
        given = f"{len(value)} labels" if isinstance(value, list) else f"the label {value!r}"
        raise DataError(
            f"Row {number} has {given} and {size} tokens, of which each needs one ({IGNORED} where it has none)."
        )
    tags = np.array(value)
    if tags.dtype.kind != "i":
        raise DataError(f"Row {number} has a tag that is no whole number.")
    strange = tags[(tags != IGNORED) & ((tags < 0) | (tags >= count))]
    if strange.size:
        raise DataError(f"Row {number} has the label {strange[0]}, and the model has the classes 0 to {count - 1}.")


def _check_several(number: int, value: Any, count: int) -> None:
    given = value if isinstance(value, list) else [value]
    if len(given) != count or not all(_finite(one) and 0.0 <= one <= 1.0 for one in given):
        raise DataError(f"Row {number} has the labels {value!r:.60}, where {count} numbers from 0 to 1 are expected.")


def _finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


__all__ = ["IGNORED", "LABELS", "check_labels", "check_tokens", "kind_of_labels", "refuse_one_answer"]
