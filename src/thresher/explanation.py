"""Which words a model stopped reading, and where: token maps of single texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from thresher.attribution import Method, saliency
from thresher.errors import OptionError
from thresher.exits import Exit, TokEEExit
from thresher.model import attachment_of, evaluating, find_encoder
from thresher.policy import Trace, tracing
from thresher.report.tokens import TokenMap, surface_tokens
from thresher.tasks.features import DEFAULT_MAX_LENGTH

TITLE_LENGTH = 60
LONGEST_SPAN = 30  # tokens of an extracted answer
DROPPED = -9e3  # a logit this low is that of a dropped token
SHOWN_TAGS = 8

Text = str | tuple[str, ...]


def explain(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    max_length: int | None = None,
    *,
    threshold: float | None = None,
    salient: Method | None = None,
) -> list[TokenMap]:
    """What an attached model read of each text, with its answer as the note; an answer that is a piece of the text is marked.
    Of a model with an exit also after which layer each text left, and where tokens freeze, after which layer each did.

    model: a classifier, regressor, span or token model, a SentenceTransformer or a CrossEncoder, attached.
    texts: single texts, or pairs as tuples. tokenizer: the model's own, a fast one, since surface text needs offsets.
    max_length: tokens read at most; None for what the tokenizer says the model reads, but at most 512.
    threshold: of a span model, by how much "no answer" must score above the best answer to be given; None: never.
    salient: how to measure what each token matters for the answer, see `thresher.saliency`; None: not at all.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise OptionError("Token maps need a fast tokenizer (a tokenizer.json beside the model), which knows offsets.")
    encoder = find_encoder(model)
    layers, exit = attachment_of(model).engine.entrance.calls, attachment_of(model).exit
    limit = min(tokenizer.model_max_length, DEFAULT_MAX_LENGTH) if max_length is None else max_length
    maps, read = [], []
    with evaluating(model), torch.inference_mode():
        for text in texts:
            sides = [text] if isinstance(text, str) else list(text)
            encoded = tokenizer(
                *sides, truncation=True, max_length=limit, return_offsets_mapping=True, return_tensors="pt"
            )
            offsets = [(int(start), int(end)) for start, end in encoded.pop("offset_mapping")[0]]
            sequence_ids = encoded.sequence_ids(0)
            names = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0].tolist())
            pieces = surface_tokens(sides, offsets, names, sequence_ids)
            read.append({name: value[0].tolist() for name, value in encoded.items()})
            with tracing(record=True) as traces:
                outputs = encoder(**encoded.to(encoder.device))
            dropped = [layer or None for layer in traces[-1].dropped_at()[0].tolist()]
            note = answer(outputs, encoder.config, pieces, sequence_ids, threshold)
            place = _span(outputs, sequence_ids, threshold) if "start_logits" in outputs else None
            one = TokenMap(_title(sides), tuple(pieces), tuple(dropped), layers, note, place)
            maps.append(one if exit is None else replace(one, **_early(traces[-1], exit)))
    if salient is None or not maps:
        return maps
    scores = saliency(model, dict(tokenizer.pad(read, return_tensors="pt")), salient)
    return [
        replace(one, saliency=tuple(score.tolist()), saliency_by=salient)
        for one, score in zip(maps, scores, strict=True)
    ]


def _early(trace: Trace, exit: Exit[Any]) -> dict[str, Any]:
    """Of the one row of a pass: the layer after which it left, and where tokens freeze, those after which they did."""
    found: dict[str, Any] = {"exited_at": trace.exited_at[0]}
    if isinstance(exit, TokEEExit):
        found["frozen_at"] = tuple(layer or None for layer in trace.frozen_at()[0].tolist())
    return found


def _title(sides: list[str]) -> str:
    title = " | ".join(" ".join(side.split()) for side in sides)
    return title if len(title) <= TITLE_LENGTH else title[: TITLE_LENGTH - 1].rstrip() + "…"


def answer(
    outputs: Any,
    config: Any,
    pieces: Sequence[str],
    sequence_ids: Sequence[int | None],
    threshold: float | None = None,
) -> str:
    """What the model says about one row, in words: a class and its probability, a value, an answer span, tags, or nothing."""
    if "start_logits" in outputs:
        place = _span(outputs, sequence_ids, threshold)
        if place is None:
            return "" if threshold is None else "no answer"
        return "".join(pieces[slice(*place)]).strip()
    if "logits" not in outputs:
        return ""
    logits, names = outputs["logits"][0].float(), config.id2label
    if logits.dim() == 2:
        best = logits.argmax(-1).tolist()
        tags = [
            f"{piece.strip()} {names[tag]}"
            for piece, tag, side in zip(pieces, best, sequence_ids, strict=True)
            if side is not None and names[tag] != "O"
        ]
        return ", ".join(tags[:SHOWN_TAGS]) + (", …" if len(tags) > SHOWN_TAGS else "")
    if len(logits) == 1:
        return f"{logits.item():.3g}"
    probability, number = logits.softmax(-1).max(-1)
    return f"{names[int(number)]}, {float(probability):.2f}"


def _span(outputs: Any, sequence_ids: Sequence[int | None], threshold: float | None) -> tuple[int, int] | None:
    """[first, end) of the best answer inside the context, the last text of the row; None where there is none to give."""
    context = max((side for side in sequence_ids if side is not None), default=None)
    start, end = outputs["start_logits"][0].float(), outputs["end_logits"][0].float()
    outside = torch.tensor([context is None or side != context for side in sequence_ids], device=start.device)
    outside |= (start <= DROPPED) | (end <= DROPPED)
    scores = start.masked_fill(outside, -torch.inf)[:, None] + end.masked_fill(outside, -torch.inf)[None, :]
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(LONGEST_SPAN - 1)
    scores = scores.masked_fill(~allowed, -torch.inf)
    best = float(scores.max())
    if best == -torch.inf or (threshold is not None and float(start[0] + end[0]) - best > threshold):
        return None
    first, last = divmod(int(scores.argmax()), len(sequence_ids))
    return first, last + 1
