"""Dialogues for response selection: contexts of several utterances, each with candidate responses."""

from __future__ import annotations

import gzip
import itertools
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from thresher.errors import DataError, OptionError, nearest
from thresher.tasks.data import DATA_VARIABLE, load_rows, name_columns
from thresher.tasks.files import data_suffix, kind_of
from thresher.tasks.given import as_rows

SUFFIXES = (".txt", ".txt.gz", ".tsv", ".tsv.gz")
"""The endings of files in the layout that `read_tsv` reads."""

_NEGATIVES = ("adversarial", "random")
_FORMS = (("candidates", "labels"), ("candidates", "label"), *(("positives", name) for name in _NEGATIVES))
_BATCH = 1000  # dialogues handled at a time, so that only one batch is ever held as Python lists
_TEXTS = datasets.Sequence(datasets.Value("string"))
# Declared, because a batch of empty candidates would not show them.
_FEATURES = datasets.Features(context=_TEXTS, candidates=_TEXTS, labels=datasets.Sequence(datasets.Value("int64")))

_Dialogue = tuple[list[str], list[str], list[int]]  # context, candidates, labels


def load_dialogues(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    columns: Mapping[str, str] | None = None,
    usual: Mapping[str, str] | None = None,
    labelled: bool = True,
) -> datasets.Dataset:
    """Read dialogues, and on request shuffle them and keep the first few.

    Args:
        source: what `load_rows` takes, with columns that `dialogues` knows; or a .txt or .tsv file, also .gz, in the
            layout of `read_tsv`, or a directory with one such file a split.
        split, limit, seed: as in `load_rows`; a limit counts dialogues.
        columns: those that the source calls otherwise, {"context": "turns"}. usual: as `columns`, where they are there.
        labelled: as in `dialogues`.

    Returns:
        The columns context, candidates and labels, see `dialogues`.

    Raises:
        DataError: the source or split is not there, or what is there is empty or malformed.
        OptionError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"The limit on dialogues must be at least 1, not {limit}.")
    file = _tsv_file(source, split)
    read = load_rows(source, split=split) if file is None else read_tsv(file)
    rows = name_columns(read, columns or {}, usual)
    if file is None:
        rows = dialogues(rows, labelled=labelled)
    if seed is not None:
        rows = rows.shuffle(seed=seed, keep_in_memory=True)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def dialogues(rows: datasets.Dataset, *, labelled: bool = True) -> datasets.Dataset:
    """Dialogues in one form: `context` (texts, oldest first), `candidates` (texts) and `labels` (1 = right, 0 = wrong).

    Args:
        rows: the column context and one of these: candidates and labels; candidates and label, the index of the right
            one; positives and adversarial or random or both (remove the one that is not to be used). A null among the
            texts counts as an empty text. No candidate need be right, and several may be.
        labelled: False also takes candidates about which nothing is said; they are labelled wrong.

    Raises:
        DataError: there are no rows or not these columns, or a row (named, from 1) has no utterance, no candidate,
            something that is no text, or labels that do not fit its candidates.
    """
    rows = as_rows(rows)
    there = rows.column_names
    forms = _FORMS if labelled else (*_FORMS, ("candidates",))
    if "context" not in there or not any(set(form) <= set(there) for form in forms):
        raise DataError(
            f"The rows are no dialogues (there are {', '.join(there)}): they need context, and candidates with label or "
            "labels, or positives with adversarial or random."
        )

    def each() -> Iterator[_Dialogue]:
        batches = rows.with_format(None).iter(batch_size=_BATCH)
        plain = (
            dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True)
        )
        for number, row in enumerate(plain, start=1):
            yield _canonical(row, number)

    return _collect(each(), "There are no dialogues.")


def read_tsv(path: str | Path) -> datasets.Dataset:
    """Dialogues of a file in the layout of the Ubuntu, Douban and E-commerce corpora, in the form `dialogues` gives.

    A line is a label (0 or 1), the utterances and one response, separated by tabs; there is no header. Consecutive
    lines with the same utterances are one dialogue. Blank lines are skipped.

    Raises:
        DataError: the file cannot be read or holds no dialogue, or a line (named, from 1) has fewer than three fields
            or another label.
    """
    path = Path(path).expanduser()

    def each() -> Iterator[_Dialogue]:
        parsed = (_fields(f"{path}, line {number}", line) for number, line in _lines(path))
        for context, lines in itertools.groupby(parsed, key=lambda fields: fields[1]):
            labels, _, responses = zip(*lines, strict=True)
            yield context, list(responses), list(labels)

    return _collect(each(), f"{path} holds no dialogues.")


def _canonical(row: dict[str, Any], number: int) -> _Dialogue:
    context = _texts(row, "context", number)
    if not context:
        raise DataError(f"Row {number} has an empty context; a dialogue has at least one utterance.")
    if "candidates" in row:
        candidates = _texts(row, "candidates", number)
        if not candidates:
            raise DataError(f"Row {number} has no candidates.")
        known = "label" in row or "labels" in row
        labels = _labels(row, len(candidates), number) if known else [0] * len(candidates)
    else:
        candidates = _texts(row, "positives", number)
        labels = [1] * len(candidates)
        for name in _NEGATIVES:
            if name in row:
                candidates += _texts(row, name, number)
        labels += [0] * (len(candidates) - len(labels))
    if not candidates:
        raise DataError(f"Row {number} has no candidates.")
    return context, candidates, labels


def _texts(row: dict[str, Any], name: str, number: int) -> list[str]:
    texts = row[name]
    if not isinstance(texts, list):
        raise DataError(f"Row {number} holds a {kind_of(texts)} as its {name}, where a list of texts is expected.")
    for text in texts:
        if not isinstance(text, str | None):
            raise DataError(f"Row {number} holds a {kind_of(text)} among its {name}, where a text is expected.")
    return ["" if text is None else text for text in texts]


def _labels(row: dict[str, Any], count: int, number: int) -> list[int]:
    if "labels" not in row:
        label = row["label"]
        if type(label) is not int or not 0 <= label < count:
            raise DataError(
                f"Row {number} has the label {label!r}, which is not the index of one of its {count} candidates."
            )
        return [int(i == label) for i in range(count)]
    labels = row["labels"]
    if not isinstance(labels, list) or len(labels) != count or any(label not in (0, 1) for label in labels):
        raise DataError(
            f"Row {number} has the labels {labels!r}, where 0 or 1 is expected for each of {count} candidates."
        )
    return [int(label) for label in labels]


def _collect(found: Iterator[_Dialogue], nothing: str) -> datasets.Dataset:
    """Dialogues as rows. nothing: the error where there are none."""
    made = []
    while batch := list(itertools.islice(found, _BATCH)):
        context, candidates, labels = map(list, zip(*batch, strict=True))
        columns = {"context": context, "candidates": candidates, "labels": labels}
        made.append(datasets.Dataset.from_dict(columns, features=_FEATURES))
    if not made:
        raise DataError(nothing)
    return datasets.concatenate_datasets(made)


def _tsv_file(source: str | Path, split: str | None) -> Path | None:
    """The file in the layout of `read_tsv` that `source` and `split` name; None where `load_rows` knows what they name."""
    path = Path(source).expanduser()
    root = os.environ.get(DATA_VARIABLE)
    for place in (path, Path(root).expanduser() / path) if root else (path,):
        if place.is_file():
            if _tsv_suffix(place) is None:
                return None
            if split is not None:
                raise DataError(f"{place} is one file, so there is no split '{split}' in it: leave the split out.")
            return place
        if place.is_dir():
            return _tsv_split(place, split)
    return None


def _tsv_split(folder: Path, split: str | None) -> Path | None:
    if any(data_suffix(file) and not _tsv_suffix(file) for file in folder.iterdir()):
        return None
    files = {file.name.removesuffix(ending): file for file in sorted(folder.iterdir()) if (ending := _tsv_suffix(file))}
    if not files:
        return None
    if split is None and len(files) > 1:
        raise DataError(f"The directory {folder} holds the splits {', '.join(files)}: name one.")
    name = split if split is not None else next(iter(files))
    if name not in files:
        raise DataError(f"The directory {folder} has no split '{name}'{nearest(name, files)}")
    return files[name]


def _tsv_suffix(file: Path) -> str | None:
    return next((ending for ending in SUFFIXES if file.name.lower().endswith(ending)), None)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers; one at a time, because the training files are large."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line.strip(" "):
                    yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: the text is not UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {str(error).rstrip('.')}.") from error


def _fields(where: str, line: str) -> tuple[int, list[str], str]:
    """Label, context and response."""
    label, *texts = line.split("\t")
    if len(texts) < 2:
        raise DataError(
            f"{where}: a label, utterances and a response are expected with tabs between them, and this line has "
            f"{len(texts) + 1} of them."
        )
    if label not in ("0", "1"):
        raise DataError(f"{where}: the label is '{label}', where 0 or 1 is expected.")
    return int(label), texts[:-1], texts[-1]
