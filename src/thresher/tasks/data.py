"""Rows from wherever the user has them: a file, a folder of splits, the built-in corpus, or the hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import datasets

from thresher.errors import DataError, OptionError, nearest
from thresher.tasks import corpus
from thresher.tasks.files import SUFFIXES, data_suffix, read_file

DATA_VARIABLE = "THRESHER_DATA"
"""The environment variable that names the folder in which data sets are looked up by name."""


def load_rows(
    source: str | Path, *, split: str | None = None, limit: int | None = None, seed: int | None = None
) -> datasets.Dataset:
    """Read rows, and on request shuffle them and keep the first few.

    Args:
        source: the first of these that it names:
            "python-docs", the built-in corpus with rows {id, topic, text} (splits: train, test; None for both);
            a .jsonl, .json, .csv, .tsv (never quoted) or .parquet file, also .gz but for the last, which is one split;
            a directory with one such file a split, `train.jsonl.gz` for instance;
            such a file or directory inside the directory that the environment variable THRESHER_DATA names;
            a data set on the Hugging Face hub (only a string that does not look like a file).
        split: which split of a directory, corpus or hub data set; None where there is only one. A file takes none.
        limit: keep at most this many rows; None for all.
        seed: shuffle with this seed before limiting; None keeps the order.

    Raises:
        DataError: the source or split is not there, or what is there is empty or malformed; the message names file
            and line.
        OptionError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"The limit on rows must be at least 1, not {limit}.")
    rows = _find(source, split)
    if seed is not None:
        rows = rows.shuffle(seed=seed, keep_in_memory=True)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def local_file(source: str | Path, split: str | None = None) -> Path | None:
    """The file that holds a split of a source, as `load_rows` looks it up; None for what is no file or directory here.

    Raises:
        DataError: the directory has no such split, or a split is asked of a file.
    """
    path = Path(source).expanduser()
    root = os.environ.get(DATA_VARIABLE)
    for place in (path, Path(root).expanduser() / path) if root else (path,):
        if place.is_file():
            if split is not None:
                raise DataError(f"{place} is one file, so there is no split '{split}' in it: leave the split out.")
            return place
        if place.is_dir():
            return _split_file(place, split)
    return None


def map_columns(rows: datasets.Dataset, mapping: Mapping[str, str]) -> datasets.Dataset:
    """Rename columns to the names a task expects.

    Args:
        rows: any rows.
        mapping: new name → name in `rows`, as in {"text": "review", "label": "stars"}. A column that already bears a
            new name, and is not itself renamed, gives way.

    Raises:
        DataError: a column is not there, or is asked for under two names.
    """
    for column in mapping.values():
        if column not in rows.column_names:
            there = ", ".join(rows.column_names)
            raise DataError(
                f"There is no column '{column}' (there are {there}){_suggestion(column, rows.column_names)}"
            )
    renamed = {old: new for new, old in mapping.items()}
    if len(renamed) < len(mapping):
        raise DataError(f"Each column can be mapped to one name only, and {dict(mapping)} uses a column twice.")
    shadowed = [c for c in rows.column_names if c in mapping and c not in renamed]
    return rows.remove_columns(shadowed).rename_columns(renamed)


def name_columns(
    rows: datasets.Dataset, columns: Mapping[str, str], usual: Mapping[str, str] | None = None
) -> datasets.Dataset:
    """As `map_columns` by `columns`, and by `usual` where those columns are there and nothing else is said of them."""
    return map_columns(rows, {**still_usual(rows.column_names, columns, usual or {}), **columns})


def still_usual(there: Iterable[str], columns: Mapping[str, str], usual: Mapping[str, str]) -> dict[str, str]:
    """What of `usual` holds for columns that are there, beside the `columns` that were asked for."""
    free = set(there) - set(columns.values())
    return {new: old for new, old in usual.items() if old in free and new not in columns}


def _find(source: str | Path, split: str | None) -> datasets.Dataset:
    if source == corpus.NAME:
        sections = corpus.python_docs(split)
        return datasets.Dataset.from_list([{"id": s.id, "topic": s.topic, "text": s.text} for s in sections])
    file = local_file(source, split)
    if file is not None:
        return read_file(file)
    if isinstance(source, Path) or _looks_local(source):
        path, root = Path(source).expanduser(), os.environ.get(DATA_VARIABLE)
        meant = Path(root).expanduser() / path if root and not path.parent.is_dir() else path
        raise DataError(f"There is no file or directory {path}{_beside(meant)}")
    return _from_hub(source, split)


def _split_file(folder: Path, split: str | None) -> Path:
    files: dict[str, Path] = {}
    for suffix in SUFFIXES:  # in order of preference, should one split lie there in two formats
        for file in sorted(folder.glob("*" + suffix)):
            files.setdefault(file.name.removesuffix(suffix), file)
    if not files:
        raise DataError(f"The directory {folder} holds no data file ({', '.join(SUFFIXES)}).")
    if split is None and len(files) > 1:
        raise DataError(f"The directory {folder} holds the splits {', '.join(sorted(files))}: name one.")
    name = split if split is not None else next(iter(files))
    if name not in files:
        raise DataError(f"The directory {folder} has no split '{name}'; it has {', '.join(sorted(files))}.")
    return files[name]


def _from_hub(name: str, split: str | None) -> datasets.Dataset:
    try:
        found = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client fails in a dozen ways: network, name, access, split, parsing
        what = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"'{name}' is no local file or directory{_in_root(name)}, "
            f"and the hub did not give it as a data set: {what}."
        ) from error
    if isinstance(found, Mapping):
        if len(found) != 1:
            raise DataError(f"The hub data set '{name}' has the splits {', '.join(map(str, found))}: name one.")
        found = next(iter(found.values()))
    if not isinstance(found, datasets.Dataset) or not len(found):
        raise DataError(f"The hub data set '{name}' holds no rows that can be read here.")
    return found


def _looks_local(source: str) -> bool:
    return source.startswith((".", "~", os.sep)) or source.count("/") > 1 or data_suffix(Path(source)) is not None


def _beside(path: Path) -> str:
    """What a missing file may have been meant to be: its neighbours, or the nearest ancestor's absence."""
    if not path.parent.is_dir():
        return f": its directory {path.parent} is not there either."
    neighbours = [p.name for p in path.parent.iterdir() if p.is_dir() or data_suffix(p)]
    return _suggestion(path.name, neighbours)


def _suggestion(name: str, known: list[str]) -> str:
    """The nearest of `known`; unlike `nearest`, short when there are hundreds of files and none is close."""
    if not known:
        return "."
    text = nearest(name, known)
    return text if "did you mean" in text else "."


def _in_root(name: str) -> str:
    root = os.environ.get(DATA_VARIABLE)
    if not root:
        return ""
    folder = Path(root).expanduser()
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return f" (nor a data set in {root}, which {DATA_VARIABLE} names{_suggestion(name, names).rstrip('.')})"
