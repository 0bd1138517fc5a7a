"""Token ids through an attached encoder to packed states: those it ends with, and those that enter a layer."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thresher.backbones.general import takes_types
from thresher.backbones.opened import OpenedLayer
from thresher.engine import keep_everything
from thresher.model import attachment_of
from thresher.padding import padded
from thresher.policy import Trace, tracing


@dataclass(frozen=True)
class States:
    """hidden: [T, D], the states of all rows side by side, without padding and without what a policy dropped.
    sizes: how many each row has, at least 1."""

    hidden: Tensor
    sizes: list[int]

    def rows(self) -> tuple[Tensor, ...]:
        return self.hidden.split(self.sizes)  # type: ignore[no-any-return]

    def first(self) -> Tensor:
        """[B, D], of each row's first token, which no policy drops."""
        starts = torch.tensor([0, *self.sizes[:-1]]).cumsum(0)
        return self.hidden[starts.to(self.hidden.device)]

    def mean(self) -> Tensor:
        """[B, D]"""
        return torch.stack([row.mean(0) for row in self.rows()])


@dataclass
class Reading:
    """last: what the encoder ends with; None where it was stopped before. entering: by layer (from 1), what its query, key
    and value read. logits: of an encoder with a head."""

    last: States | None = None
    entering: dict[int, States] = field(default_factory=dict)
    logits: Tensor | None = None


class _Enough(Exception):
    """Every state that was asked for is there."""


class _Capture:
    """Collects states during one pass. mask: [B, N] bool, real tokens. traces: of a pass in which tokens drop or rows leave."""

    def __init__(self, layers: Collection[int], mask: Tensor, stop: bool) -> None:
        self.layers = frozenset(layers)
        self.stop = max(self.layers) if stop else 0
        self.mask = mask
        self.traces: list[Trace] | None = None
        self.found: dict[int, States] = {}

    def alive(self) -> Tensor:
        """[B, N] bool, the tokens that were not dropped so far."""
        if not self.traces:
            return self.mask
        alive = self.mask.clone()
        for _, index in self.traces[-1].dropped:
            alive.view(-1)[index] = False
        return alive

    def note(self, layer: int, hidden: Tensor) -> None:
        """hidden: [1, T, D] in a packed pass, [B, N, D] in a stock one."""
        if layer in self.layers:
            padded = len(self.mask) > 1 and len(hidden) == len(self.mask)
            packed = hidden[self.mask] if padded else hidden[0]
            alive = self.alive()
            there = alive.clone()
            for _, rows, _, _ in self._handed():
                there[rows] = False
            if len(packed) != int(there.sum()):  # drops are simulated: what is gone still lies there
                packed = packed[there[self.mask]]
            self.found[layer] = self._with_handed(packed, there, alive)
        if layer == self.stop:
            raise _Enough

    def finish(self) -> dict[int, States]:
        """What enters each of the layers, also of those that nobody was left to run."""
        for layer in self.layers - set(self.found):
            alive = self.alive()
            self.found[layer] = self._with_handed(self._handed()[0][3][:0], torch.zeros_like(alive), alive)
        return self.found

    def _handed(self) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        return self.traces[-1].handed if self.traces else []

    def _with_handed(self, packed: Tensor, there: Tensor, alive: Tensor) -> States:
        """packed: the states of the tokens `there`; those of rows that left lie where they were."""
        sizes = alive.sum(1).tolist()
        if not self._handed():
            return States(packed, sizes)
        _, _, flat, states = zip(*self._handed(), strict=True)
        places = torch.cat([there.view(-1).nonzero().squeeze(1), *flat])
        return States(torch.cat([packed, *states])[places.argsort()], sizes)


_watched: ContextVar[list[Trace] | None] = ContextVar("thresher_reading", default=None)


@contextlib.contextmanager
def passes() -> Iterator[list[Trace]]:
    """Collect the trace of every `read` inside the block, by this thread."""
    found: list[Trace] = []
    token = _watched.set(found)
    try:
        yield found
    finally:
        _watched.reset(token)


_capturing: ContextVar[_Capture | None] = ContextVar("thresher_capturing", default=None)


def _on_attention(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    capture = _capturing.get()
    if capture is not None:
        capture.note(layer, args[0] if args else kwargs["hidden_states"])


def watch(layers: Sequence[OpenedLayer]) -> None:
    """Let `read` hand out what enters these layers; once for a model, further calls change nothing.

    The hooks are on the attention modules, inside the layer: there the states are packed, whatever was hooked to the layer
    later.
    """
    for number, layer in enumerate(layers, start=1):
        hooks = layer.attention._forward_pre_hooks.values()
        if not any(isinstance(hook, partial) and hook.func is _on_attention for hook in hooks):
            layer.attention.register_forward_pre_hook(partial(_on_attention, number), with_kwargs=True)


def read(
    encoder: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    *,
    types: Sequence[Sequence[int]] | None = None,
    vectors: Tensor | None = None,
    entering: Collection[int] = (),
    last: bool = True,
    reduced: bool = False,
) -> Reading:
    """One packed pass over rows of token ids.

    types: token types of every token; by default 0, and left out where the family has none.
    vectors: [k, E], input embeddings put before every row.
    entering: layers (from 1) whose input is wanted; `watch` must have been called. last: False stops before the layer after
        the last of these.
    reduced: whether the encoder's policy may drop tokens here, and its exit let rows leave.
    """
    device = encoder.device
    inputs, mask = _inputs(encoder, rows, types, vectors)
    capture = _Capture(entering, mask, stop=not last)
    policy, exit = attachment_of(encoder).policy, attachment_of(encoder).exit
    drops = reduced and ((policy is not None and policy.mode != "off") or (exit is not None and not exit.idle))
    watched = _watched.get()
    with contextlib.ExitStack() as stack:
        if drops or watched is not None:
            traces = stack.enter_context(tracing(record=drops, passed_on=True))
            capture.traces = traces if drops else None
            stack.callback(lambda: None if watched is None else watched.extend(traces))
        if not drops and not reduced:
            stack.enter_context(keep_everything())
        token = _capturing.set(capture)
        try:
            outputs = encoder(**{name: value.to(device) for name, value in inputs.items()})
        except _Enough:
            return Reading(entering=capture.finish())
        finally:
            _capturing.reset(token)
    if "logits" in outputs:
        return Reading(None, capture.finish(), outputs.logits)
    alive = capture.alive()
    return Reading(States(outputs.last_hidden_state[alive], alive.sum(1).tolist()), capture.finish())


def _inputs(
    encoder: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    types: Sequence[Sequence[int]] | None,
    vectors: Tensor | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The encoder's arguments, and [B, N] bool, where their real tokens are. Padding lasts until the layers begin."""
    pad = encoder.config.pad_token_id or 0
    ids, mask = padded(rows, pad), padded([[1] * len(row) for row in rows], 0)
    inputs = {"input_ids": ids.to(encoder.device)}
    if takes_types(encoder):
        inputs["token_type_ids"] = torch.zeros_like(ids) if types is None else padded(types, 0)
    if vectors is not None:
        words = encoder.get_input_embeddings()(inputs.pop("input_ids"))
        inputs["inputs_embeds"] = torch.cat([vectors.expand(len(rows), -1, -1).to(words.dtype), words], 1)
        before = mask.new_ones(len(rows), len(vectors))
        mask = torch.cat([before, mask], 1)
        if "token_type_ids" in inputs:
            inputs["token_type_ids"] = torch.cat([torch.zeros_like(before), inputs["token_type_ids"]], 1)
    return {**inputs, "attention_mask": mask}, mask.bool().to(encoder.device)


def by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Numbers 0..n-1 in batches of similar length, longest first, each of about `tokens` tokens with padding."""
    made: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not made or lengths[number] > room:
            made.append([])
            room = tokens
        made[-1].append(number)
        room -= lengths[number]
    return made


def longest(encoder: PreTrainedModel) -> int:
    """The most tokens that the encoder has positions for."""
    offset = getattr(getattr(encoder.base_model, "embeddings", None), "padding_idx", None)
    most: int = encoder.config.max_position_embeddings
    return most if offset is None else most - offset - 1  # RoBERTa's positions begin behind that of padding
