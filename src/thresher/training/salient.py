"""The saliency of the training rows, asked once of what a run starts from and kept with the run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from accelerate import PartialState
from tqdm.auto import tqdm

from thresher.attribution import saliency
from thresher.errors import CheckpointError, DataError
from thresher.training.resuming import by_one

COLUMN = "saliency"
FILE = "saliency.npy"
NEAR = 1e-2  # to 1: half precision, summed


def check_saliency(rows: datasets.Dataset) -> None:
    """Raises DataError for the first row (from 1) whose saliency is no distribution over its tokens."""
    for number, (given, ids) in enumerate(zip(rows[COLUMN], rows["input_ids"], strict=True), start=1):
        if isinstance(given, list) and len(given) != len(ids):
            raise DataError(f"Row {number} has {len(ids)} tokens but {len(given)} of {COLUMN!r}.")
        try:
            values = np.array(given, dtype=np.float64)
        except (TypeError, ValueError):
            values = np.zeros(0)
        if values.shape != (len(ids),) or not (values >= 0).all() or abs(values.sum() - 1.0) > NEAR:
            raise DataError(
                f"Row {number} has a {COLUMN} that is not one number a token, none negative, that sum to 1; give what "
                "thresher.saliency(model, rows) gives, or leave the column out."
            )


def with_saliency(
    models: Sequence[Any], rows: datasets.Dataset, directory: Path, processes: PartialState, *, progress: bool = True
) -> datasets.Dataset:
    """`rows` with the column that AdapLeR learns from: the gradient x input of each token, dropping nothing, averaged over
    `models`.

    Computed by the main process and kept in `directory`, from where the others and a run that goes on read it.
    Raises CheckpointError when what is kept is of other rows, or damaged.
    """
    by_one(processes, partial(_keep, models, rows, directory / FILE, progress))
    offsets = np.cumsum([0, *map(len, rows["input_ids"])])
    try:
        values = np.load(directory / FILE)
    except (EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{directory / FILE} is damaged ({error}); remove it.") from error
    if values.shape != (offsets[-1],) or values.dtype != np.float32:
        raise CheckpointError(f"{directory / FILE} is not of these rows or damaged; remove it.")
    column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
    return rows.add_column(COLUMN, column)


def _keep(models: Sequence[Any], rows: datasets.Dataset, file: Path, progress: bool) -> None:
    if file.is_file():
        return
    with tqdm(total=len(rows), desc="saliency", disable=not progress) as bar:
        found = saliency(list(models), rows, on_batch=bar.update)
    new = file.with_name(f".{file.name}")
    with new.open("wb") as out:
        np.save(out, np.concatenate(found))
    os.replace(new, file)
