"""Which words a model stopped reading, and where: token maps of single texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thresher.attribution import Method, saliency
from thresher.errors import OptionError
from thresher.exits import Exit, TokEEExit
from thresher.model import attachment_of, evaluating, find_encoder
from thresher.outputs import answers_with_spans
from thresher.policy import Trace, tracing
from thresher.report.tokens import TokenMap, surface_tokens
from thresher.tasks.features import DEFAULT_MAX_LENGTH
from thresher.tasks.spans import Answer, Windows, best_answers, null_scores

TITLE_LENGTH = 60
SHOWN_TAGS = 8

Text = str | tuple[str, ...]


def explain(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    max_length: int | None = None,
    *,
    threshold: float | None = None,
    questions: Sequence[int] | None = None,
    salient: Method | None = None,
) -> list[TokenMap]:
    """What an attached model read of each text, with its answer as the note; an answer that is a piece of the text is marked.
    Of a model with an exit also after which layer each text left, and where tokens freeze, after which layer each did.

    model: a classifier, regressor, span or token model, a SentenceTransformer or a CrossEncoder, attached.
    texts: single texts, or pairs as tuples. tokenizer: the model's own, a fast one, since surface text needs offsets.
    max_length: tokens read at most; None for what the tokenizer says the model reads, but at most 512.
    threshold: of a span model, by how much "no answer" must score above the best answer to be given; None: never.
    questions: of a span model, the question that each text is a window of, of which the window with the best answer shows
        it; None: each text is a question of its own.
    salient: how to measure what each token matters for the answer, see `thresher.saliency`; None: not at all.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise OptionError("Token maps need a fast tokenizer (a tokenizer.json beside the model), which knows offsets.")
    encoder = find_encoder(model)
    layers, exit = attachment_of(model).engine.entrance.calls, attachment_of(model).exit
    limit = min(tokenizer.model_max_length, DEFAULT_MAX_LENGTH) if max_length is None else max_length
    # Answers are looked for in a text as it is written, where a special token is text too.
    options = {"split_special_tokens": True} if answers_with_spans(encoder) else {}
    maps, read, spans = [], [], []
    with evaluating(model), torch.inference_mode():
        for text in texts:
            sides = [text] if isinstance(text, str) else list(text)
            encoded = tokenizer(
                *sides, truncation=True, max_length=limit, return_offsets_mapping=True, return_tensors="pt", **options
            )
            offsets = [(int(start), int(end)) for start, end in encoded.pop("offset_mapping")[0]]
            sequence_ids = encoded.sequence_ids(0)
            names = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0].tolist())
            pieces = surface_tokens(sides, offsets, names, sequence_ids)
            read.append({name: value[0].tolist() for name, value in encoded.items()})
            with tracing(record=True) as traces:
                outputs = encoder(**encoded.to(encoder.device))
            dropped = [layer or None for layer in traces[-1].dropped_at()[0].tolist()]
            if answers_with_spans(encoder):
                logits = torch.stack([outputs["start_logits"][0], outputs["end_logits"][0]], -1)
                inside = [i for i, side in enumerate(sequence_ids) if side == len(sides) - 1]
                spans.append(Span.best(logits, inside, offsets, sides[-1]))
            note = answer(outputs, encoder.config, pieces, sequence_ids)
            one = TokenMap(_title(sides), tuple(pieces), tuple(dropped), layers, note)
            maps.append(one if exit is None else replace(one, **_early(traces[-1], exit)))
    if spans:
        maps = _answered(maps, spans, range(len(maps)) if questions is None else questions, threshold)
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


@dataclass(frozen=True)
class Span:
    """The best answer inside one text, None where there is none to give. place: its [first, end) in tokens. null: the score of
    [CLS], which says that there is no answer."""

    answer: Answer | None
    place: tuple[int, int] | None
    null: float

    @classmethod
    def best(cls, logits: Tensor, inside: Sequence[int], offsets: Sequence[tuple[int, int]], context: str) -> Span:
        """logits: [N, 2], of start and end. inside: the tokens of the context. offsets: of each token, in its text."""
        said = logits.unsqueeze(0).double().cpu().numpy()
        shown = (0, 0, inside[0] if inside else 0, 0, len(inside))
        windows = Windows.of([shown], [np.array([offsets[i] for i in inside], dtype=np.int64).reshape(-1, 2)])
        (found,), (null,) = best_answers(said, windows, [context], n_best=1), null_scores(said, windows, 1).tolist()
        if not found:
            return cls(None, None, null)
        held = [i for i in inside if offsets[i][0] < found[0].end and offsets[i][1] > found[0].start]
        return cls(found[0], (held[0], held[-1] + 1), null)

    @property
    def score(self) -> float:
        return -math.inf if self.answer is None else self.answer.score


def _answered(
    maps: Sequence[TokenMap], spans: Sequence[Span], questions: Sequence[int], threshold: float | None
) -> list[TokenMap]:
    """The maps, each question's answer in the one whose text holds its best. questions: of each map."""
    said = list(maps)
    for question in set(questions):
        windows = [number for number, one in enumerate(questions) if one == question]
        best = max(windows, key=lambda number: spans[number].score)
        null, span = min(spans[number].null for number in windows), spans[best]
        if threshold is not None and null - span.score > threshold:
            said[best] = replace(said[best], note="no answer")
        elif span.answer is not None:
            said[best] = replace(said[best], note=span.answer.text, answer=span.place)
    return said


def answer(outputs: Any, config: Any, pieces: Sequence[str], sequence_ids: Sequence[int | None]) -> str:
    """What the model says about one row, in words: a class and its probability, a value, tags, or nothing."""
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
