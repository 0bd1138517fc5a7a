"""What a way of running a model is in `peers.py`, and the ways that torch has.

A builder makes a `Built` from a `Job`; an exception that it raises becomes the reason printed in the way's place.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)

from peers_data import LOADS, Answers, Row, pad
from thresher.measure.run import said

Predict = Callable[[Sequence[Row]], Answers]
MODELS = {"sequence": AutoModelForSequenceClassification, "question-answering": AutoModelForQuestionAnswering}


class Unavailable(Exception):
    """Why a way is not measured here."""


@dataclass(frozen=True)
class Built:
    """predict: rows in the caller's order → their logits, [C], or [N, 2] for question answering. flops: rows → how many times
    fewer FLOPs they take than with nothing dropped, where something is."""

    predict: Predict
    note: str = ""
    flops: Callable[[Sequence[Row]], float] | None = None


@dataclass(frozen=True)
class Way:
    """single: it also makes sense for one request at a time. ours: a way of Thresher's."""

    id: str
    label: str
    build: Callable[[Job], Built]
    single: bool = True
    ours: bool = False


@dataclass
class Job:
    """start: a whole checkpoint, head included. batch 1: one request at a time, on all cores."""

    start: Path
    method: Path | None
    head: str
    batch: int
    threads: int
    calibration: list[Row]
    work: Path
    max_tokens: int
    made: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What several ways share, made by the first. A failure is kept as well."""
        if name not in self.made:
            try:
                self.made[name] = make()
            except Exception as error:
                self.made[name] = error
        if isinstance(self.made[name], Exception):
            raise self.made[name]
        return self.made[name]

    @property
    def pad_id(self) -> int:
        return self.once("pad", lambda: AutoConfig.from_pretrained(self.start).pad_token_id or 0)

    def model(self, **options: Any) -> Any:
        """A fresh copy of the start."""
        return MODELS[self.head].from_pretrained(self.start, **options).eval()

    def stock(self) -> Any:
        return self.once("stock", lambda: self.model(attn_implementation="sdpa"))


def whole(load: str, start: Path, work: Path) -> tuple[Path, str, bool]:
    """A checkpoint with a head for the load, the head's name, and whether that was fine-tuned.

    A checkpoint without a head gets a random one, the same for every way.
    """
    config = AutoConfig.from_pretrained(start)
    names = " ".join(config.architectures or ())
    for suffix, head in (("ForSequenceClassification", "sequence"), ("ForQuestionAnswering", "question-answering")):
        if suffix in names:
            return start, head, True
    head = LOADS[load].head
    set_seed(0)
    options = {"num_labels": LOADS[load].labels} if head == "sequence" else {}
    model = MODELS[head].from_pretrained(start, **options)
    # As drawn, a head's answers differ so little that rounding decides; as large as a trained one's they can be compared.
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    torch.nn.init.normal_(last.weight, std=0.2)
    model.save_pretrained(work / "start")
    AutoTokenizer.from_pretrained(start).save_pretrained(work / "start")
    return work / "start", head, False


def batched(rows: Sequence[Row], size: int, *, by_length: bool = True) -> list[list[int]]:
    """Row numbers in batches, longest first or in the order they came in."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"])) if by_length else list(range(len(rows)))
    return [order[i : i + size] for i in range(0, len(order), size)]


def in_batches(job: Job, forward: Callable[[dict[str, np.ndarray]], np.ndarray], *, by_length: bool = True) -> Predict:
    """A way that pads: `forward` from padded arrays to logits [B, C] or [B, N, 2]."""

    def predict(rows: Sequence[Row]) -> Answers:
        out: list[Any] = [None] * len(rows)
        for index in batched(rows, job.batch, by_length=by_length):
            logits = forward(pad([rows[i] for i in index], job.pad_id))
            for i, one in zip(index, logits, strict=True):
                out[i] = trimmed(one, rows[i])
        return out

    return predict


def trimmed(logits: np.ndarray, row: Row) -> np.ndarray:
    """Without what was said of the padding."""
    return logits[: len(row["input_ids"])] if logits.ndim == 2 else logits


def torch_forward(model: Any) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    @torch.inference_mode()
    def forward(batch: dict[str, np.ndarray]) -> np.ndarray:
        return said(model(**{name: torch.from_numpy(values) for name, values in batch.items()})).float().numpy()

    return forward


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters and quantizers print."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def stock_padded(job: Job) -> Built:
    return Built(in_batches(job, torch_forward(job.stock()), by_length=False))


def stock_sorted(job: Job) -> Built:
    return Built(in_batches(job, torch_forward(job.stock())))


def torch_bf16(job: Job) -> Built:
    return Built(in_batches(job, torch_forward(job.model(dtype=torch.bfloat16))))


def torch_int8(job: Job) -> Built:
    from torch.ao.quantization import quantize_dynamic

    model = quantize_dynamic(job.model(), {torch.nn.Linear}, dtype=torch.qint8)
    return Built(in_batches(job, torch_forward(model)), "quantize_dynamic of every Linear, as it comes")


def torch_compile(job: Job) -> Built:
    model = torch.compile(job.model(), dynamic=True)
    return Built(in_batches(job, torch_forward(model)), "dynamic=True; compilation is not timed")


def cross_encoder(job: Job) -> Built:
    """sentence-transformers' own predict: its sorting, its batches, its features; only its tokenizer is left out."""
    if job.head != "sequence":
        raise Unavailable("CrossEncoder loads sequence classifiers only")
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(job.start), device="cpu", activation_fn=torch.nn.Identity(), local_files_only=True)

    def features(rows: Sequence[Row], **_: Any) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(values) for name, values in pad(rows, job.pad_id).items()}

    model.preprocess = features
    model._input_length = lambda row: len(row["input_ids"])
    model.is_singular_input = lambda rows: False

    def predict(rows: Sequence[Row]) -> Answers:
        logits = model.predict(list(rows), batch_size=job.batch, show_progress_bar=False)
        return list(np.asarray(logits).reshape(len(rows), -1))

    return Built(predict, "fed token ids")


TORCH = (
    Way("stock-padded", "Hugging Face, padded, arrival order", stock_padded),
    Way("stock-sorted", "Hugging Face, sorted by length", stock_sorted, single=False),
    Way("cross-encoder", "sentence-transformers CrossEncoder", cross_encoder),
    Way("torch-bf16", "torch bfloat16, sorted", torch_bf16),
    Way("torch-int8", "torch dynamic int8, sorted", torch_int8),
    Way("torch-compile", "torch.compile, sorted", torch_compile),
)
