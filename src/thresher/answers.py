"""What a question-answering head may say of dropped tokens: under some policies, that they are no answer."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from thresher.packed import PackedTokens
from thresher.policy import Policy

NO_ANSWER = -1e4  # far below any logit; yet sums and losses of it stay finite, in half precision too

_dropped: ContextVar[list[Tensor] | None] = ContextVar("thresher_dropped", default=None)


def guard(model: PreTrainedModel) -> None:
    """From here on, start and end logits of `model`, if it answers questions, are NO_ANSWER where `note` was told so.

    Only what it returns: its loss is that of the logits which it computes from a dropped token's last state, and so goes on
    teaching where an answer was dropped.
    """
    if _answers(model):
        model.forward = functools.update_wrapper(functools.partial(_run, model), model.forward)


def release(model: PreTrainedModel) -> None:
    """Take `guard` off again; the forward of any other model is not its own."""
    if _answers(model):
        del model.forward


def _answers(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForQuestionAnswering")


def note(policy: Policy[Any] | None, tokens: PackedTokens) -> None:
    """Tell the call of the model that is running what its encoder's pass has dropped. tokens: as the last layer left them."""
    found = _dropped.get()
    if found is not None and policy is not None and not policy.dropped_may_answer and tokens.departed:
        found.append(torch.cat([flat for _, flat in tokens.departed]))


def _run(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """The model's forward, with a place for what is dropped in this call."""
    found: list[Tensor] = []
    token = _dropped.set(found)
    try:
        outputs = type(model).forward(model, *args, **kwargs)
    finally:
        _dropped.reset(token)
    if not found:
        return outputs
    if isinstance(outputs, tuple):  # return_dict=False: the loss, if there are labels, start and end logits, the rest
        at = 0 if outputs[0].dim() else 1
        silent = (_silenced(logits, found[0]) for logits in outputs[at : at + 2])
        return (*outputs[:at], *silent, *outputs[at + 2 :])
    for name in ("start_logits", "end_logits"):
        outputs[name] = _silenced(outputs[name], found[0])
    return outputs


def _silenced(logits: Tensor, dropped: Tensor) -> Tensor:
    """logits: [B, N]; dropped: indices into B * N."""
    nothing = torch.full_like(dropped, NO_ANSWER, dtype=logits.dtype)
    return logits.flatten().scatter(0, dropped, nothing).view_as(logits)


__all__ = ["NO_ANSWER", "guard", "note", "release"]
