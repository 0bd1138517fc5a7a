"""Smaller models for a policy to sit on: a student of fewer layers, a model with fewer heads, and what trains both back.

Dropping tokens composes with making the model itself smaller (Block-Skim, figure 5): attach a policy to either afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from thresher.backbones import enter
from thresher.backbones.heads import remove_heads
from thresher.backbones.opened import OpenedLayer, open_layers
from thresher.engine import stock
from thresher.errors import OptionError
from thresher.measure.run import MODEL_INPUTS
from thresher.model import attach, detach, evaluating, find_encoder, is_attached, save
from thresher.policy import Stage
from thresher.settings import is_whole
from thresher.targets import LABELS
from thresher.tasks.given import as_rows
from thresher.training.identity import digest, weights
from thresher.training.learner import stock_copy
from thresher.training.resuming import begin, by_one, refuse_another_run
from thresher.training.row_losses import row_losses
from thresher.training.stages import run_stage, trains_on_cpu

ModelT = TypeVar("ModelT")

DISTIL = Stage(name="distil", mode="off", epochs=3.0, learning_rate=5e-5, label_weight=0.5, distil_weight=0.5)
_PER_LAYER = ("layer_types", "removed_heads")  # settings that are a list with an entry for each layer


def student(model: ModelT, layers: int) -> ModelT:
    """A shallow copy of a model: its embeddings, its head and some of its layers, evenly spread from the first to the last.

    These are the layers that DistilBERT starts from (Sanh et al. 2019): of 12, layers 1, 3, 5, 8, 10 and 12 for a student of
    6. What is attached to the model is not copied. ALBERT's shared layer runs less often. Train the student with `distil`.
    Raises OptionError for a number of layers that is not from 1 to that of the model.
    """
    made = copy.deepcopy(model)
    if is_attached(made):
        detach(made)
    encoder = find_encoder(made)
    config, there = encoder.config, enter(encoder).layers
    depth = config.num_hidden_layers
    if not is_whole(layers) or not 1 <= layers <= depth:
        raise OptionError(f"A student has from 1 to the {depth} layers of its teacher, not {layers!r}.")
    kept = [round(place) for place in np.linspace(0, depth - 1, layers).tolist()]
    if len(there) == depth:
        _keep_layers(encoder, [there[number] for number in kept])
        for name in _PER_LAYER:
            if getattr(config, name, None):
                setattr(config, name, [getattr(config, name)[number] for number in kept])
    config.num_hidden_layers = layers
    return made.eval()  # type: ignore[attr-defined, no-any-return]


def _keep_layers(encoder: nn.Module, kept: list[nn.Module]) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and any(one is kept[0] for one in module):
            del module[:]
            module.extend(kept)
            return


def head_importance(model: Any, rows: datasets.Dataset) -> Tensor:
    """How much the loss changes when a head's output does: [L, H] float32, the mean over rows of |d loss / d factor|.

    The factor, 1, is on the head's output (Michel et al. 2019, equation 2); one gradient gives those of all heads. Rows are
    read one by one, since padding has a part in the loss of question answering.
    model: with a head for the task; rows: encoded, with labels or the ends of answers.
    Raises OptionError for rows without them or not encoded, UnsupportedModelError for a family whose layers cannot be opened.
    """
    encoder = find_encoder(model)
    layers = open_layers(encoder)
    rows = as_rows(rows)
    if not len(rows):
        raise OptionError("The importance of heads is measured on rows, and there are none.")
    sigmoid = getattr(encoder.config, "problem_type", None) == "multi_label_classification"
    names = [name for name in rows.column_names if name in (*MODEL_INPUTS, *LABELS)]
    if "input_ids" not in names:
        raise OptionError(f"Rows are encoded first: they need input_ids, and have {', '.join(rows.column_names)}.")
    total = torch.zeros(len(layers), layers[0].heads)
    with evaluating(model), stock():
        for row in rows.select_columns(names):
            batch = {name: torch.tensor([value], device=encoder.device) for name, value in row.items()}
            factors = [torch.ones(layer.heads, 1, device=encoder.device).requires_grad_() for layer in layers]
            with _scaled(layers, factors):
                outputs = model(**{name: value for name, value in batch.items() if name not in LABELS})
            gradients = torch.autograd.grad(row_losses(outputs, batch, sigmoid=sigmoid).sum(), factors)
            total += torch.stack([gradient.abs().flatten() for gradient in gradients]).float().cpu()
    return total / len(rows)


@contextlib.contextmanager
def _scaled(layers: Sequence[OpenedLayer], factors: Sequence[Tensor]) -> Iterator[None]:
    """Inside this block the heads' outputs are multiplied by `factors`, [H, 1] for each layer."""

    def scale(factor: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        by_head = args[0].unflatten(-1, (len(factor), -1))
        return ((by_head * factor).flatten(-2), *args[1:])

    pairs = zip(layers, factors, strict=True)
    handles = [layer.out.register_forward_pre_hook(partial(scale, factor)) for layer, factor in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prune_heads(model: ModelT, rows: datasets.Dataset, *, share: float = 0.5) -> ModelT:
    """Remove the least important heads of every layer, in place: their part of the linear layers is really gone.

    rows: what importance is measured on, see `head_importance`; a few hundred will do. share: of the heads, rounded to whole
    heads, the same in every layer, which keeps one at least.
    Train afterwards, with `distil` or with a method. A checkpoint is one of the whole model with zeros for what is gone, so
    that it loads without Thresher too; `thresher.load` and `thresher.attach` remove the heads again.
    Raises OptionError for a share outside [0, 1) or a model that something is attached to.
    """
    if not 0.0 <= share < 1.0:
        raise OptionError(f"The share of heads to remove must be at least 0 and below 1, not {share!r}.")
    if is_attached(model):
        raise OptionError(
            "Heads are removed from a model before anything is attached to it; call thresher.detach(model)."
        )
    importance = head_importance(model, rows)
    heads = importance.shape[1]
    least = importance.argsort(dim=1, stable=True)[:, : min(round(heads * share), heads - 1)]
    remove_heads(find_encoder(model), least.tolist())
    return model


def distil(
    student: ModelT,
    teacher: Any,
    rows: datasets.Dataset,
    tokenizer: Any,
    directory: str | Path,
    *,
    stage: Stage = DISTIL,
    seed: int = 0,
    **arguments: Any,
) -> ModelT:
    """Train a smaller model to say what its teacher says of `rows`, and save it to `directory`; it comes back packed.

    student: of `student` or `prune_heads`. teacher: a fine-tuned model of the same head; run as it was written.
    stage: the weights of the teacher's logits and of the rows' labels, and how long. arguments: what `run_stage` takes.
    An interrupted run goes on when called again with the same arguments. Raises OptionError for rows without the labels that
    the stage learns from, or when `directory` holds an unfinished run with other settings.
    """
    rows = as_rows(rows)
    work = Path(directory) / "training"
    processes = PartialState(cpu=trains_on_cpu(arguments))
    settings = {"stage": asdict(stage), "rows": digest(rows), "seed": seed, "model": weights(student, head=True)}
    settings = json.loads(json.dumps(settings))
    refuse_another_run(work, settings)
    by_one(processes, lambda: begin(work, settings))
    if not is_attached(student):
        attach(student)
    run_stage(student, stage, rows, tokenizer, work, teacher=stock_copy(teacher), seed=seed, **arguments)
    by_one(processes, lambda: _finish(student, tokenizer, directory, work))
    return student


def _finish(model: Any, tokenizer: Any, directory: str | Path, work: Path) -> None:
    save(model, directory)
    tokenizer.save_pretrained(str(directory))
    shutil.rmtree(work, ignore_errors=True)


__all__ = ["DISTIL", "distil", "head_importance", "prune_heads", "student"]
