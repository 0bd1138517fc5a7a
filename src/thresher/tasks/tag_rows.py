"""Rows of words and BIO tags in one form, checked."""

from __future__ import annotations

import re
from collections.abc import Sequence

import datasets

from thresher.errors import DataError
from thresher.tasks.data import map_columns
from thresher.tasks.files import kind_of
from thresher.tasks.given import as_rows

OUTSIDE = "O"
BIO = re.compile(r"O|[BI]-.+", re.DOTALL)

TOKEN_ALIASES = ("words",)
TAG_ALIASES = ("ner_tags", "labels")


def canonical(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows with the columns `tokens` and, if there are tags, `tags`; columns of these names, else a common alias of each.

    Raises:
        DataError: no column is known to be the words.
    """
    rows = as_rows(rows)
    there = rows.column_names
    mapping = {}
    for name, aliases in (("tokens", TOKEN_ALIASES), ("tags", TAG_ALIASES)):
        alias = next((alias for alias in aliases if alias in there), None)
        if name not in there and alias is not None:
            mapping[name] = alias
    if not {"tokens", *TOKEN_ALIASES} & set(there):
        raise DataError(f"The rows have no column known to be the words (there are {', '.join(there)}): map 'tokens'.")
    return map_columns(rows, mapping).with_format(None)


def repaired(tags: Sequence[str]) -> list[str]:
    """The same in IOB2: an I- that continues no entity of its type begins one, so it becomes a B-.

    This changes no entity: the CoNLL evaluation, and seqeval as it is by default, read such an I- the same way.
    """
    made = []
    for before, tag in zip([OUTSIDE, *tags], tags, strict=False):
        made.append("B" + tag[1:] if tag[0] == "I" and before[1:] != tag[1:] else tag)
    return made


def words_of(rows: datasets.Dataset) -> list[list[str]]:
    """The words of every row.

    Raises:
        DataError: there are no rows, or a row (named, from 1) holds something else.
    """
    if not len(rows):
        raise DataError("There are no rows to encode.")
    found = rows["tokens"][:]
    for number, row in enumerate(found, start=1):
        if not isinstance(row, list):
            raise DataError(f"Row {number} holds {row!r} as its tokens, where a list of words is expected.")
        for word in row:
            if not isinstance(word, str):
                raise DataError(f"Row {number} holds a {kind_of(word)} among its tokens, where a word is expected.")
    return found  # type: ignore[no-any-return]


def declared_tags(rows: datasets.Dataset) -> tuple[str, ...] | None:
    """The names that the column of tags declares, if it does."""
    label = getattr(rows.features["tags"], "feature", None)
    return tuple(label.names) if isinstance(label, datasets.ClassLabel) else None


def has_tags(rows: datasets.Dataset) -> bool:
    """Whether a row says something of tags."""
    return "tags" in rows.column_names and any(row is not None for row in rows["tags"][:])


def tags_of(rows: datasets.Dataset, words: list[list[str]]) -> list[list[str]]:
    """The tags of every row as given, by name.

    Raises:
        DataError: there is no such column; or, named by its row (from 1), a tag is not BIO, or there are not as many tags as
            `words`.
    """
    if "tags" not in rows.column_names:
        there = ", ".join(rows.column_names)
        raise DataError(f"The rows have no column known to be the tags (there are {there}): map one to 'tags'.")
    declared = declared_tags(rows)
    found = []
    for number, (row, of) in enumerate(zip(rows["tags"][:], words, strict=True), start=1):
        if not isinstance(row, list):
            raise DataError(f"Row {number} holds {row!r} as its tags, where a list of tags is expected.")
        if len(row) != len(of):
            raise DataError(f"Row {number} has {len(row)} tags for {len(of)} tokens.")
        named = [declared[tag] if declared and tag in range(len(declared)) else tag for tag in row]
        for tag in named:
            if not isinstance(tag, str) or not BIO.fullmatch(tag):
                raise DataError(
                    f"Row {number} has the tag {tag!r}, which is not BIO: tags are O, and B- or I- with a type."
                )
        found.append(named)
    return found
