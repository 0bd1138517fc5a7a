"""Models by the words of the command line, opened: the model, its tokenizer and what it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

import thresher
from thresher import checkpoint
from thresher.checkpoint import SETTINGS
from thresher.cli.checkpoints import (
    class_names,
    find,
    head_of,
    pair_length,
    plain_model,
    reach,
    selects,
    tokenizer_of,
    window_length,
)
from thresher.cli.data import numbered_as_read
from thresher.cli.question_work import QuestionWork
from thresher.cli.screen import notice
from thresher.cli.tagging_work import TaggingWork, tags_of_head
from thresher.cli.work import EmbeddingWork, ResponseWork, TextWork, Work
from thresher.errors import OptionError
from thresher.measure import run as running
from thresher.measure.run import Run
from thresher.model import attachment_of, find_encoder
from thresher.tasks.features import DEFAULT_MAX_LENGTH, EncodedRows
from thresher.tasks.text import TextTask


@dataclass(frozen=True)
class Opened:
    """A model with something attached, its tokenizer, and what it is for."""

    model: Any
    tokenizer: Any
    work: Work

    @property
    def has_policy(self) -> bool:
        return attachment_of(self.model).policy is not None

    def limit(self, asked: int | None = None) -> int:
        """Tokens to read of a row: as asked, as fitted, else what tokenizer and model can read, at most 512."""
        asked = self.work.max_length if asked is None else asked
        most = min(reach(self.model), self.tokenizer.model_max_length)
        if asked is None:
            return int(min(most, DEFAULT_MAX_LENGTH))
        if asked > reach(self.model):
            raise OptionError(
                f"A maximum length of {asked} is more than the {reach(self.model)} tokens the model can read."
            )
        return asked

    def encode(
        self,
        rows: datasets.Dataset,
        columns: dict[str, str],
        *,
        labels: bool = False,
        max_length: int | None = None,
        training: bool = False,
    ) -> EncodedRows:
        """The rows, by the columns the task reads, as token ids; labels are required where `labels`."""
        with numbered_as_read(rows):
            named = self.work.named(rows, columns)
            return self.work.encode(named, self.tokenizer, self.limit(max_length), labels=labels, training=training)

    def answer(
        self,
        rows: datasets.Dataset,
        *,
        batch_size: int | None = None,
        on_done: Callable[[int], object] | None = None,
    ) -> Run:
        """What the model says of encoded rows. on_done: called with the number of rows just done."""
        return running.run(self.model, rows, batch_size=batch_size, on_batch=on_done)

    def save(self, directory: Path) -> None:
        """The model with its policy and tokenizer, all or nothing."""
        with checkpoint.staged(directory) as staging:
            self.model.save_pretrained(str(staging))
            if not hasattr(self.model, "tokenizer"):
                self.tokenizer.save_pretrained(str(staging))

    def text_work(self) -> Work:
        """The task. Raises OptionError for a model whose answers no command can score."""
        if self.work.kind == "other":
            raise OptionError(
                f"{type(self.model).__name__} neither a classifier, a regressor, a question answerer nor a sentence "
                "embedder; thresher bench and thresher explain take it, and thresher.attach() does from Python."
            )
        return self.work


def open_model(name: str, device: str, *, plain_is_news: bool = True, speedup: float | None = None) -> Opened:
    """What `fit` saved; or a plain checkpoint, packed with nothing dropped, which is said. On `device` (cpu, cuda).

    speedup: the point of its frontier to run at.
    """
    path = find(name)
    if (Path(path) / SETTINGS).is_file():
        model = thresher.load(path, device=device, speedup=speedup)
    elif speedup is not None:
        raise OptionError(f"{name} is a plain checkpoint, which has no frontier to pick --speedup from.")
    else:
        model = thresher.attach(plain_model(path, device))
        if plain_is_news:
            notice(f"{name} is a plain checkpoint: it runs packed and drops nothing")
    noted = attachment_of(model).notes.get("task")
    work = Work.from_notes(noted) if noted is not None else _guessed(model)
    return Opened(model, tokenizer_of(model, path), work)


def open_in_float32(name: str, *, speedup: float | None = None) -> Opened:
    """The model on the CPU in float32, whatever it was saved in: what is quantized and exported."""
    opened = open_model(name, "cpu", speedup=speedup)
    if (dtype := find_encoder(opened.model).dtype) is not torch.float32:
        notice(f"{name} was saved in {str(dtype).removeprefix('torch.')} and is computed in float32 here")
        opened.model.float()
    return opened


def _guessed(model: Any) -> Work:
    """The task of a plain checkpoint; whether it reads pairs, the rows say later."""
    config = find_encoder(model).config
    if hasattr(model, "encode"):
        return EmbeddingWork()
    if head_of(config) == "QuestionAnswering":
        return QuestionWork(max_length=window_length(model), open=True)
    if (task := tags_of_head(config)) is not None:
        return TaggingWork(tagging=task)
    if head_of(config) != "SequenceClassification":
        return Work()
    if selects(config):
        return ResponseWork(max_length=pair_length(model))
    kind = "regression" if config.num_labels == 1 else "classification"
    names = class_names(config) if kind == "classification" else None
    return TextWork(text=TextTask(kind, config.num_labels, names), any_pair=True)  # type: ignore[arg-type]
