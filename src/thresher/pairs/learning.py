"""Training a scorer on transformers.Trainer: accumulation, mixed precision, checkpoints and resuming come with it."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from thresher.errors import DataError, OptionError, ThresherError
from thresher.padding import padded
from thresher.pairs.losses import NO_TOKEN, PairLearner, PairLoss
from thresher.pairs.scorer import Scorer
from thresher.settings import is_number, is_whole
from thresher.tasks.pairs import Pairs, pairs
from thresher.training.resuming import begin, last_checkpoint, refuse_another_run
from thresher.training.stages import Precision, RatesTrainer, training_arguments

_BATCH = 1000  # rows tokenized at a time


@dataclass(frozen=True)
class Example:
    """One query with the candidates that it brings to a batch, as token ids.

    target: the place of the right one. right: every right candidate of the query, also those that are not brought.
    """

    query: list[int]
    candidates: list[list[int]]
    labels: list[float]
    target: int
    right: frozenset[tuple[int, ...]]


@dataclass(frozen=True)
class Examples:
    """What training runs over; `cut` counts the texts that were longer than their limit, `left_out` queries without a right
    candidate."""

    made: list[Example]
    cut: int
    left_out: int


def examples(
    scorer: Scorer[Any], rows: datasets.Dataset | Pairs, *, hard: int | None = None, seed: int = 0
) -> Examples:
    """Rows as a scorer learns from them: one example for each right candidate; with classes, one for each pair.

    hard: the most wrong candidates of a query's own that an example brings, drawn by `seed`; None for all.
    Raises DataError for rows that `tasks.pairs.pairs` refuses, that do not fit the scorer's classes, or of which none is left;
    OptionError for a `hard` below 0.
    """
    if hard is not None and (not is_whole(hard) or hard < 0):
        raise OptionError(f"hard, the wrong candidates that a query brings, is a whole number or None, not {hard!r}.")
    canonical = rows if isinstance(rows, Pairs) else pairs(rows)
    classes = scorer.config.classes
    if not classes and not canonical.ranked:
        raise DataError("Rows of pairs with a label train a scorer with classes, and this one has none; set classes.")
    made: list[Example] = []
    cut = left_out = 0
    for start in range(0, len(canonical.rows), _BATCH):
        batch = [canonical.rows[i] for i in range(start, min(start + _BATCH, len(canonical.rows)))]
        queries, queries_cut = scorer.query_rows([canonical.query(row) for row in batch])
        candidates, candidates_cut = scorer.candidate_rows([text for row in batch for text in row["candidates"]])
        cut += queries_cut + candidates_cut
        given = iter(candidates)
        for number, (row, query) in enumerate(zip(batch, queries, strict=True), start):
            texts, labels = [next(given) for _ in row["candidates"]], list(map(float, row["labels"]))
            if classes:
                _check_labels(labels, classes, number + 1)
                made += [Example(query, [c], [label], 0, frozenset()) for c, label in zip(texts, labels, strict=True)]
            else:
                left_out += not any(labels)
                made += _ranked(query, texts, labels, hard, random.Random(f"hard {seed} {number}"))
    if not made:
        raise DataError("No query has a right candidate, so there is nothing to learn.")
    return Examples(made, cut, left_out)


def _ranked(
    query: list[int], texts: list[list[int]], labels: list[float], hard: int | None, draw: random.Random
) -> list[Example]:
    right = [text for text, label in zip(texts, labels, strict=True) if label > 0]
    wrong = [text for text, label in zip(texts, labels, strict=True) if label <= 0]
    if hard is not None and len(wrong) > hard:
        wrong = draw.sample(wrong, hard)
    return [Example(query, [text, *wrong], [], 0, frozenset(map(tuple, right))) for text in right]


def _check_labels(labels: Sequence[float], classes: int, number: int) -> None:
    for label in labels:
        if not math.isfinite(label):
            raise DataError(f"Row {number} has the label {label!r}, where a number is expected.")
        if classes > 1 and not (label == int(label) and 0 <= label < classes):
            raise DataError(f"Row {number} has the label {label!r}, where a class from 0 to {classes - 1} is expected.")


def collate(batch: Sequence[Example]) -> dict[str, Tensor]:
    """What `PairLearner` takes."""
    candidates = [c for example in batch for c in example.candidates]
    owners = [b for b, example in enumerate(batch) for _ in example.candidates]
    starts = [sum(len(e.candidates) for e in batch[:b]) for b in range(len(batch))]
    targets = [start + example.target for start, example in zip(starts, batch, strict=True)]
    keys = [tuple(c) for c in candidates]
    hidden = [
        [c != target and key in example.right for c, key in enumerate(keys)]
        for example, target in zip(batch, targets, strict=True)
    ]
    labels = [label for example in batch for label in example.labels] or [0.0] * len(candidates)
    return {
        "queries": padded([example.query for example in batch], NO_TOKEN),
        "candidates": padded(candidates, NO_TOKEN),
        "owners": torch.tensor(owners),
        "targets": torch.tensor(targets),
        "labels": torch.tensor(labels),
        "hidden": torch.tensor(hidden),
    }


def train(
    scorer: Scorer[Any],
    rows: datasets.Dataset | Pairs,
    directory: str | Path,
    *,
    loss: PairLoss | None = None,
    teacher: Scorer[Any] | None = None,
    hard: int | None = None,
    epochs: float = 1.0,
    batch_size: int = 64,
    learning_rate: float = 1e-5,
    own_learning_rate: float | None = None,
    warmup: float = 0.06,
    weight_decay: float = 0.01,
    dropout: bool = True,
    seed: int = 0,
    precision: Precision = "auto",
    progress: bool = True,
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> dict[str, float]:
    """Train a scorer in place. Returns the trainer's own metrics, with the counts of `Examples`. The defaults are MixEncoder's
    (A.1) but for its 50 epochs.

    rows: what `tasks.pairs.pairs` takes, or gave.
    directory: checkpoints go here; a run that was interrupted goes on from the last one when `resume`.
    loss: what is learned from; by default in-batch negatives, or the labels of a scorer with classes.
    teacher: a trained scorer, usually a cross-encoder, for distillation.
    hard: the most wrong candidates of its own that a query brings; None for all.
    own_learning_rate: of the weights that are the scorer's own and not its encoder's, such as interactions, codes and heads,
        which begin from nothing and at an encoder's rate stay near it; None: learning_rate.
    batch_size: queries a step. dropout: whether the encoder's own is on.
    arguments: anything else transformers.TrainingArguments takes (gradient_accumulation_steps, max_steps, use_cpu, ...).
    A scorer with a lexical signal counts its document frequencies over the candidates of `rows`.
    A policy on the encoder acts as it is set and is not itself trained.
    Raises DataError for rows that cannot be learned from, OptionError for settings that do not fit, or when `directory` holds
    an unfinished run with others, ThresherError where training diverges.
    """
    own_rate = learning_rate if own_learning_rate is None else own_learning_rate
    _check(epochs, batch_size, learning_rate=learning_rate, own_learning_rate=own_rate)
    found = examples(scorer, rows, hard=hard, seed=seed)
    if scorer.lexical is not None:
        scorer.lexical.count(text for example in found.made for text in example.candidates)
    learner = _Learner(scorer, _settled(loss or PairLoss(), found.made), teacher)
    learner.dropout = dropout
    given = {
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "warmup_steps": warmup,
        "weight_decay": weight_decay,
        "seed": seed,
        "disable_tqdm": not progress,
        **arguments,
    }
    run = {
        "scorer": scorer.signature,
        "loss": dataclasses.asdict(learner.loss),
        "examples": [len(found.made), found.made[0].query, found.made[-1].query],
        "settings": [epochs, batch_size, learning_rate, own_rate, seed, hard],
    }
    work = Path(directory)
    if resume:
        refuse_another_run(work, run)
    settings = training_arguments(directory, given, precision)
    trainer = _TwoRates(learner, settings, train_dataset=found.made, data_collator=collate, callbacks=list(callbacks))  # type: ignore[arg-type]
    trainer.own_rate = own_rate
    trainer.remove_callback(PrinterCallback)  # it would print to standard output, which belongs to the caller
    last = last_checkpoint(work) if resume else None
    begin(work, run)
    try:
        result = trainer.train(resume_from_checkpoint=last)
    finally:
        scorer.eval()
    if not all(parameter.isfinite().all() for parameter in scorer.parameters()):
        raise ThresherError(
            f"Training diverged: the scorer's weights are no numbers any more; lower learning_rate={learning_rate:g}."
        )
    return {**result.metrics, "cut": float(found.cut), "left_out": float(found.left_out)}


class _TwoRates(RatesTrainer):
    """With a learning rate of its own for what is not the encoder's."""

    own_rate: float

    def rate_of(self, name: str) -> float:
        return float(self.args.learning_rate) if name.startswith("scorer.encoder.") else self.own_rate


def _check(epochs: float, batch_size: int, **rates: float) -> None:
    if not is_whole(batch_size) or batch_size < 1:
        raise OptionError(f"A step learns from a whole number of queries, at least 1, not {batch_size!r}.")
    for name, value in {"epochs": epochs, **rates}.items():
        if not is_number(value) or not 0.0 < value < math.inf:
            raise OptionError(f"{name} must be a number above 0, not {value!r}.")


def _settled(loss: PairLoss, made: list[Example]) -> PairLoss:
    """With what all labels together say of their kind: one batch of numbers could lie within [0, 1] by chance."""
    if loss.numbers is not None:
        return loss
    return dataclasses.replace(loss, numbers=any(not 0.0 <= label <= 1.0 for one in made for label in one.labels))


class _Learner(PairLearner):
    """Leaves dropout off when asked to."""

    dropout = True

    def train(self, mode: bool = True) -> _Learner:
        return super().train(mode and self.dropout)
