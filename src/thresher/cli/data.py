"""Rows by the words of the command line, and the task that a model was made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from thresher.cli.screen import notice
from thresher.errors import CheckpointError, DataError, OptionError
from thresher.tasks import corpus
from thresher.tasks.data import load_rows, map_columns
from thresher.tasks.features import EncodedRows, encode_texts
from thresher.tasks.retrieval import agreement
from thresher.tasks.text import TextTask, canonical

HELD_OUT = 0.1


def source_and_split(spec: str) -> tuple[str, str | None]:
    """`imdb:train` as its name and split; a path that exists is never taken apart."""
    name, colon, split = spec.rpartition(":")
    if not colon or Path(spec).expanduser().exists() or not split.replace("-", "").replace("_", "").isalnum():
        return spec, None
    return name, split


def read_rows(spec: str, *, split: str | None = None, limit: int | None = None, seed: int = 0) -> datasets.Dataset:
    """The rows of `spec`; a limit draws them with `seed`. split: for the built-in corpus, when `spec` names none."""
    name, named = source_and_split(spec)
    if name == corpus.NAME and named is None:
        named = split
        notice(f"{corpus.NAME} without a split: taking {named}")
    return load_rows(name, split=named, limit=limit, seed=None if limit is None else seed)


def hold_out(rows: datasets.Dataset, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training rows, and the tenth of them that is kept back."""
    if len(rows) < 2:
        raise DataError("One row cannot be divided into training and validation rows; give --validation FILE.")
    count = max(1, round(len(rows) * HELD_OUT))
    notice(f"No --validation: {count:,} of the {len(rows):,} rows are held out (seed {seed})")
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(sorted(order[count:])), rows.select(sorted(order[:count]))


@dataclass(frozen=True)
class Work:
    """What a model is for, as the command line needs it and as it is saved with the model.

    text: the classification or regression; None for embeddings, and for models that only `bench` and `explain` take.
    any_pair: of a plain checkpoint, whose rows decide whether it reads pairs.
    """

    kind: str
    text: TextTask | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    max_length: int | None = None
    any_pair: bool = False

    def notes(self) -> dict[str, Any]:
        """`attachment.notes["task"]`."""
        text = self.text
        return {
            "kind": self.kind,
            "label_names": list(text.label_names) if text and text.label_names else None,
            "num_labels": text.num_labels if text else None,
            "pair": None if self.any_pair else bool(text and text.pair),
            "columns": dict(self.columns),
            "max_length": self.max_length,
            "metric": text.metric if text else "cosine",
        }

    @classmethod
    def from_notes(cls, notes: Mapping[str, Any], *, file: str = "thresher.json", again: str = "fit") -> Work:
        """file, again: what an error calls the file of the notes, and what makes it."""
        try:
            kind, text, any_pair = notes["kind"], None, False
            if kind in ("classification", "regression"):
                names = tuple(notes["label_names"]) if notes["label_names"] else None
                any_pair = notes["pair"] is None
                text = TextTask(kind, notes["num_labels"], names, bool(notes["pair"]), notes["metric"])
            return cls(kind, text, dict(notes["columns"]), notes["max_length"], any_pair)
        except (KeyError, TypeError, ValueError, OptionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"The task noted in {file} is not readable ({reason}); {again} the model again."
            ) from error

    @property
    def metric(self) -> str:
        """The name of what `quality` gives."""
        return self.text.metric if self.text else "cosine"

    def named(self, rows: datasets.Dataset, columns: Mapping[str, str]) -> datasets.Dataset:
        """Rows with the columns the task reads: `columns` first, then those it was fitted with, where they are there."""
        fitted = {
            new: old
            for new, old in self.columns.items()
            if old in rows.column_names and new not in columns and old not in columns.values()
        }
        return map_columns(rows, {**fitted, **columns})

    def settled(self, rows: datasets.Dataset, columns: Mapping[str, str]) -> Work:
        """The same with what the first rows decide: whether they are pairs, and their columns."""
        if self.text is None or not self.any_pair:
            return self
        pair = "text_pair" in canonical(self.named(rows, columns)).column_names
        return replace(self, text=replace(self.text, pair=pair), columns=columns, any_pair=False)

    def encode(self, rows: datasets.Dataset, tokenizer: Any, limit: int, *, labels: bool) -> EncodedRows:
        """Token ids and, where `labels` (then required) or there are any, labels; says what was cut or empty."""
        if self.text is not None:
            given = canonical(rows)
            if not labels and "label" in given.column_names and not any(v is not None for v in given["label"][:]):
                given = given.remove_columns("label")
            pair = "text_pair" in given.column_names if self.any_pair else self.text.pair
            encoded = replace(self.text, pair=pair).encode(given, tokenizer, limit, require_labels=labels)
        else:
            given = canonical(rows)
            pair = self.kind != "embedding" and "text_pair" in given.column_names
            encoded = encode_texts(given, ["text", "text_pair"] if pair else ["text"], tokenizer, limit)
        if (remark := encoded.notice()) is not None:
            notice(remark)
        return encoded

    def quality(self, labels: Any, reference: np.ndarray) -> Callable[[np.ndarray], float] | None:
        """What a target is about: the metric on labels, likeness to the `reference` embeddings, or None (agreement)."""
        text = self.text
        if text is not None:
            return None if labels is None else lambda predictions: text.score(predictions, labels)
        return lambda predictions: agreement(predictions, reference)["cosine"]

    def metrics(self, predictions: np.ndarray, labels: Any, reference: np.ndarray) -> dict[str, float]:
        """The task's metrics where there are labels, and how alike the answers are to `reference`, the undropped model's."""
        alike = self.alike(predictions, reference)
        if self.kind != "regression":
            return self.scores(predictions, labels) | alike
        return self.scores(predictions, labels) or {"pearson with stock": alike["pearson"]}

    def scores(self, predictions: np.ndarray, labels: Any) -> dict[str, float]:
        """The task's metrics; none without labels, and none of embeddings."""
        return {} if labels is None or self.text is None else self.text.metrics(predictions, labels)

    def alike(self, predictions: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """How alike two sets of answers to the same rows are: agreement, or pearson, or cosine."""
        if self.text is None:
            return {"cosine": agreement(predictions, reference)["cosine"]}
        if self.kind == "regression":
            return {"pearson": self.text.metrics(predictions, reference.reshape(-1))["pearson"]}
        return {"agreement": float((predictions.argmax(-1) == reference.argmax(-1)).mean())}


def labels_of(encoded: EncodedRows) -> list[Any] | None:
    return list(encoded.rows["labels"]) if "labels" in encoded.rows.column_names else None
