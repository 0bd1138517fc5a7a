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
from thresher.errors import DataError
from thresher.exits import Exit, TokEEExit
from thresher.model import attachment_of, evaluating, find_encoder
from thresher.outputs import answers_with_spans
from thresher.policy import Trace, tracing
from thresher.report.tokens import TokenMap, surface_tokens
from thresher.targets import SEVERAL
from thresher.tasks.reading import Reading
from thresher.tasks.spans import Answer, Windows, best_answers, null_scores

TITLE_LENGTH = 60
SHOWN_TAGS = 8

Text = str | tuple[str, ...]


def explain(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text | Reading],
    max_length: int | None = None,
    *,
    threshold: float | None = None,
    questions: Sequence[int] | None = None,
    salient: Method | None = None,
) -> list[TokenMap]:
    """What an attached model read of each text, with its answer as the note; an answer that is a piece of the text is marked.
    Of a model with an exit also after which layer each text left, and where tokens freeze, after which layer each did.

    model: a classifier, regressor, span or token model, a SentenceTransformer or a CrossEncoder, attached.
    texts: single texts, or pairs as tuples; or how each is read (`Reading.of_words` for what a tagger reads), as it is.
    tokenizer: the model's own, a fast one, since surface text needs offsets.
    max_length: tokens read at most; None for what the tokenizer says the model reads, but at most 512.
    threshold: of a span model, by how much "no answer" must score above the best answer to be given; None: never.
    questions: of a span model, the question that each text is a window of, of which the window with the best answer shows
        it; None: each text is a question of its own.
    salient: how to measure what each token matters for the answer, see `thresher.saliency`; None: not at all.
    Raises OptionError for a slow tokenizer or a length without room for a text, DataError for what is no list of texts.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise DataError(f"Give a list of texts, not {'one text' if isinstance(texts, str) else repr(texts)[:60]}.")
    if questions is not None and len(questions) != len(texts):
        raise DataError(f"{len(texts)} texts are windows of as many questions, and {len(questions)} are named.")
    encoder = find_encoder(model)
    layers, exit = attachment_of(model).engine.entrance.calls, attachment_of(model).exit
    maps, read, spans = [], [], []
    with evaluating(model), torch.inference_mode():
        for text in texts:
            # Answers are looked for in a text as it is written, where a special token is text too.
            row = (
                text
                if isinstance(text, Reading)
                else Reading.of(text, tokenizer, max_length, plain=answers_with_spans(encoder))
            )
            names = tokenizer.convert_ids_to_tokens(row.inputs["input_ids"])
            pieces = surface_tokens(row.sides, row.offsets, names, row.sequence_ids)
            read.append(dict(row.inputs))
            with tracing(record=True) as traces:
                outputs = encoder(
                    **{name: torch.tensor([value], device=encoder.device) for name, value in row.inputs.items()}
                )
            dropped = [layer or None for layer in traces[-1].dropped_at()[0].tolist()]
            if answers_with_spans(encoder):
                logits = torch.stack([outputs["start_logits"][0], outputs["end_logits"][0]], -1)
                inside = [i for i, side in enumerate(row.sequence_ids) if side == len(row.sides) - 1]
                spans.append(Span.best(logits, inside, row.offsets, row.sides[-1]))
            note = answer(outputs, encoder.config, pieces, row)
            one = TokenMap(_title(row.sides), tuple(pieces), tuple(dropped), layers, note)
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


def _title(sides: Sequence[str]) -> str:
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


def answer(outputs: Any, config: Any, pieces: Sequence[str], row: Reading) -> str:
    """What the model says about one row, in words: a class and its probability, all of at least one half where classes go
    together, a value, tags, or nothing."""
    if "logits" not in outputs:
        return ""
    logits, names = outputs["logits"][0].float(), config.id2label
    if logits.dim() == 2:
        best = logits.argmax(-1).tolist()
        said = {i: piece.strip() for i, piece in enumerate(pieces) if row.sequence_ids[i] is not None}
        if row.words is not None:  # a word has the tag of its first token
            places: dict[int, list[int]] = {}
            for i, number in enumerate(row.words):
                if number is not None:
                    places.setdefault(number, []).append(i)
            said = {own[0]: "".join(pieces[i] for i in own).strip() for own in places.values()}
        tags = [f"{what} {names[best[i]]}" for i, what in said.items() if names[best[i]] != "O"]
        return ", ".join(tags[:SHOWN_TAGS]) + (", …" if len(tags) > SHOWN_TAGS else "")
    if len(logits) == 1:
        return f"{logits.item():.3g}"
    if config.problem_type == SEVERAL:
        high = [(names[number], value) for number, value in enumerate(logits.sigmoid().tolist()) if value >= 0.5]
        return ", ".join(f"{name} {value:.2f}" for name, value in high) or "no class"
    probability, number = logits.softmax(-1).max(-1)
    return f"{names[int(number)]}, {float(probability):.2f}"
