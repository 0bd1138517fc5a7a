"""Rows by the words of the command line."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np

from thresher.cli.screen import notice
from thresher.errors import DataError
from thresher.tasks import corpus
from thresher.tasks.data import load_rows
from thresher.tasks.dialogues import load_dialogues

HELD_OUT = 0.1


def source_and_split(spec: str) -> tuple[str, str | None]:
    """`imdb:train` as its name and split; a path that exists is never taken apart."""
    name, colon, split = spec.rpartition(":")
    if not colon or Path(spec).expanduser().exists() or not split.replace("-", "").replace("_", "").isalnum():
        return spec, None
    return name, split


def read_rows(
    spec: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    kind: str | None = None,
    labelled: bool = True,
) -> datasets.Dataset:
    """The rows of `spec`; a limit draws them with `seed`. split: for the built-in corpus, when `spec` names none. kind: the
    task, where that is known: dialogues have file formats of their own, and labels unless not `labelled`."""
    name, named = source_and_split(spec)
    if name == corpus.NAME and named is None:
        named = split
        notice(f"{corpus.NAME} without a split: taking {named}")
    drawn = {"split": named, "limit": limit, "seed": None if limit is None else seed}
    if kind == "response":
        return load_dialogues(name, **drawn, labelled=labelled)  # type: ignore[arg-type]
    return load_rows(name, **drawn)  # type: ignore[arg-type]


def holds_dialogues(rows: datasets.Dataset) -> bool:
    """Whether rows are contexts with candidate responses."""
    there = set(rows.column_names)
    return "context" in there and bool({"candidates", "positives"} & there)


def hold_out(rows: datasets.Dataset, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training rows, and the tenth of them that is kept back."""
    if len(rows) < 2:
        raise DataError("One row cannot be divided into training and validation rows; give --validation FILE.")
    count = max(1, round(len(rows) * HELD_OUT))
    notice(f"No --validation: {count:,} of the {len(rows):,} rows are held out (seed {seed})")
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(sorted(order[count:])), rows.select(sorted(order[:count]))
