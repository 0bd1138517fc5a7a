"""What a model's head says, where Thresher has the last word: dropped tokens that are no answer, and rows that left early."""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import (
    ForQuestionAnsweringLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)

from thresher.exits import NO_ANSWER
from thresher.packed import Fill


@dataclass(frozen=True)
class Handed:
    """What rows that left together hand out, of an encoder without a head: [T, D] states.

    rows: [K] int64 of the input. flat: [T] int64 indices into B * N of their tokens.
    """

    rows: Tensor
    flat: Tensor
    states: Tensor


SPANS, CLASSES = ("start_logits", "end_logits"), ("logits",)


@dataclass
class Edits:
    """What one call of a model is to change in what its head says.

    silent: flat indices into B * N, tokens that may not be a start or an end of a span.
    left: the rows that left together [K] and their answers, [K, C], [K, N, 2] or [K, N, C] (where NO_ANSWER stands for
        columns without a token, of which the head has the last word).
    frozen: flat indices into B * N of tokens that froze together [K] and their answers [K, C].
    handed: the states of rows that left together.
    """

    silent: list[Tensor] = field(default_factory=list)
    left: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    handed: list[Handed] = field(default_factory=list)

    @property
    def early(self) -> bool:
        """Whether an answer is not the head's own."""
        return bool(self.left or self.frozen)

    def of(self, logits: Tensor, column: int | None) -> Tensor:
        """The logits as they are to be. column: 0 for start logits, 1 for end logits, None for those of classes and tags."""
        for flat in self.silent if column is not None else ():  # a tag of a dropped token is an answer
            nothing = torch.full_like(flat, NO_ANSWER, dtype=logits.dtype)
            logits = logits.flatten().scatter(0, flat, nothing).view_as(logits)
        for rows, said in self.left:
            said = (said if column is None else said[..., column]).to(logits.dtype)
            if column is None and said.dim() == 3:
                said = torch.where(said == NO_ANSWER, logits[rows], said)
            logits = logits.index_copy(0, rows, said)
        for flat, said in self.frozen:
            logits = logits.flatten(0, 1).index_copy(0, flat, said.to(logits.dtype)).view_as(logits)
        return logits

    def onto(self, hidden: Tensor, fill: Fill, mask: Tensor | None) -> Tensor:
        """The states that an encoder ends with, [B, N, D], with those of the rows that left in their places.

        fill, mask: as `PackedTokens.restore` takes them.
        """
        batch, width, size = hidden.shape
        for one in self.handed:
            if fill == "mean":
                place = one.flat // width
                total = hidden.new_zeros(batch, size).index_add(0, place, one.states)
                count = hidden.new_zeros(batch).index_add(0, place, torch.ones_like(place, dtype=hidden.dtype))
                means = (total[one.rows] / count[one.rows].unsqueeze(1)).unsqueeze(1).expand(-1, width, -1)
                if mask is not None:
                    means = means * mask[one.rows].unsqueeze(2).to(means.dtype)
                hidden = hidden.index_copy(0, one.rows, means)
            hidden = hidden.reshape(-1, size).index_copy(0, one.flat, one.states).view(batch, width, size)
        return hidden


_edits: ContextVar[Edits | None] = ContextVar("thresher_edits", default=None)


def expected() -> Edits | None:
    """The place for the edits of the call that is running; None where what the encoder says does not go to a guarded head."""
    return _edits.get()


def answers_with_spans(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForQuestionAnswering")


def guard(model: PreTrainedModel) -> None:
    """From here on, what `model` returns is edited.

    Its loss is the head's own unless rows left: an answer that was dropped goes on being taught from the token's last state.
    With rows that left, or tokens that froze, it is that of the logits returned.
    """
    model.forward = functools.update_wrapper(functools.partial(_run, model), model.forward)  # type: ignore[method-assign]


def release(model: PreTrainedModel) -> None:
    """Take `guard` off again."""
    del model.forward


def _run(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """The model's forward, with a place for what its encoder's pass has to say of the answers."""
    edits = Edits()
    token = _edits.set(edits)
    try:
        outputs = type(model).forward(model, *args, **kwargs)
    finally:
        _edits.reset(token)
    if not edits.silent and not edits.early:
        return outputs
    names = SPANS if answers_with_spans(model) else CLASSES
    if not isinstance(outputs, tuple):
        found = [outputs[name] for name in names]
    else:  # return_dict=False: the loss, if there are labels, then logits, the rest
        at = 0 if outputs[0].dim() else 1
        found = list(outputs[at : at + len(names)])
    edited = [edits.of(one, column if names == SPANS else None) for column, one in enumerate(found)]
    loss = _loss(model, args, kwargs, edited) if edits.early else None
    if isinstance(outputs, tuple):
        before = outputs[:at] if loss is None else (loss,)
        return (*before, *edited, *outputs[at + len(names) :])
    for name, one in zip(names, edited, strict=True):
        outputs[name] = one
    if loss is not None:
        outputs["loss"] = loss
    return outputs


def _loss(model: PreTrainedModel, args: Any, kwargs: Any, logits: list[Tensor]) -> Tensor | None:
    """The task's loss of `logits`, as transformers computes it; None where the call gives no labels."""
    given = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
    if len(logits) == len(SPANS):
        start, end = logits
        places = given.get("start_positions"), given.get("end_positions")
        return ForQuestionAnsweringLoss(start, end, *places)  # type: ignore[no-any-return]
    labels = given.get("labels")
    if labels is None:
        return None
    if logits[0].dim() == 3:
        return ForTokenClassification(logits[0], labels, model.config)  # type: ignore[no-any-return]
    return ForSequenceClassificationLoss(labels, logits[0], model.config)


__all__ = ["NO_ANSWER", "Edits", "answers_with_spans", "expected", "guard", "release"]
