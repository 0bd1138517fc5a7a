"""Whether a model reads on what people call the reasons: agreement with human rationales, by ERASER's definitions.

DeYoung et al., ACL 2020. A ranking of words is judged by the area under its precision-recall curve; a choice of words by its
F1 against the rationale's words, and by IOU F1: a stretch of chosen words counts where it and a stretch of the rationale have
at least half of what they cover together in common. Every figure is of documents, then their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from thresher.errors import DataError, OptionError, nearest
from thresher.measure.run import prepared
from thresher.model import attachment_of, evaluating, find_encoder
from thresher.policy import tracing
from thresher.report.tokens import TokenMap, to_html
from thresher.settings import is_number, is_whole
from thresher.tasks.rationales import RationaleRows, Span, numbers

IOU = 0.5
Unread = Literal["last", "left out"]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Choice:
    """How chosen words agree with the rationales. precision, recall, f1: of words, means over documents. iou_f1: of stretches,
    the F1 of mean precision and mean recall, as ERASER takes it. share: of the words that were chosen."""

    precision: float
    recall: float
    f1: float
    iou_f1: float
    share: float


@dataclass(frozen=True)
class Agreement:
    """How a score of words agrees with the rationales.

    auprc: the area under the precision-recall curve, its points joined by straight lines as ERASER does; average_precision: the
    same without joining, which flatters no ties. chance: what a constant score has as its average precision.
    choice: of the words that score highest, see `top_share`. documents: those that have a rationale (in what was read, where
    the rest is left out); the others are not counted.
    """

    auprc: float
    average_precision: float
    chance: float
    choice: Choice
    documents: int


def kept_layers(
    model: Any, rows: RationaleRows, *, batch_size: int | None = None, on_batch: Callable[[int], object] | None = None
) -> list[NDArray[np.float64]]:
    """Of each document [n], the layer at which the attached policy dropped each token; one more than the layers for tokens that
    were kept. The later, the more important the model holds a token to be."""
    layers = attachment_of(model).engine.entrance.calls
    found: dict[int, NDArray[np.float64]] = {}
    encoder = find_encoder(model)
    with evaluating(model), torch.inference_mode():
        for index, batch in prepared(model, rows.rows, batch_size):
            with tracing(record=True) as traces:
                encoder(**batch)
            dropped = traces[-1].dropped_at().cpu()
            for row, at in zip(index, dropped, strict=True):
                at = at[at >= 0]
                found[row] = at.masked_fill(at == 0, layers + 1).double().numpy()
            if on_batch:
                on_batch(len(index))
    return [found[row] for row in range(len(rows))]


def agreement(
    rows: RationaleRows, scores: Sequence[ArrayLike], *, share: float | None = None, unread: Unread = "last"
) -> Agreement:
    """How scores of tokens, of a policy (`kept_layers`) or of any saliency, agree with the rationales.

    scores: of each document one number a token, special tokens included; higher is more important. A word has the largest of
        its tokens', one without a token is as one that was not read. share: of a document's words that are chosen; None: the
        mean share of the rationales.
    unread: words beyond the tokens that were read are "last" in importance (ERASER's whole document), or "left out".
    Raises DataError when no document has a rationale, or scores are missing.
    """
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve

    judged = _judged(rows, rows.word_scores(scores), unread)
    chance = float(np.mean([truth.mean() for _, truth, _ in judged]))
    share = chance if share is None else share
    _check_share(share)
    areas, precisions = [], []
    for score, truth, _ in judged:
        precision, recall, _ = precision_recall_curve(truth, score)
        areas.append(auc(recall, precision))
        precisions.append(average_precision_score(truth, score))
    chosen = [(top_share(score, share), truth, spans) for score, truth, spans in judged]
    return Agreement(float(np.mean(areas)), float(np.mean(precisions)), chance, _choice(chosen), len(judged))


def agreement_by_layer(
    rows: RationaleRows, layers: Sequence[ArrayLike], count: int, *, unread: Unread = "last"
) -> list[Choice]:
    """Of each of `count` layers, how the words that are still read after it agree. layers: as `kept_layers` gives them.

    Raises OptionError for a count that is no whole number of at least 1, and what `agreement` raises.
    """
    if not is_whole(count) or count < 1:
        raise OptionError(f"A model has a whole number of layers, at least 1, not {count!r}.")
    judged = _judged(rows, rows.word_scores(layers), unread)
    return [_choice([(at > layer, truth, spans) for at, truth, spans in judged]) for layer in range(1, count + 1)]


def top_share(scores: NDArray[np.float64], share: float) -> Mask:
    """The round(share * n) best words, at least one, and every other word that scores as much as the last of them; words that
    score lowest of all are only chosen where that is all there is to choose. Raises DataError for no scores, or one that is not
    finite; OptionError for a share that is none."""
    _check_share(share)
    if not len(scores) or not np.isfinite(scores).all():
        raise DataError("The best words are chosen by finite scores, at least one; these are none, or not all finite.")
    bar = np.sort(scores)[::-1][max(round(share * len(scores)), 1) - 1]
    above: Mask = scores > scores.min()
    return (scores >= bar) & above if above.any() else np.ones_like(above)


def _check_share(share: Any) -> None:
    if not is_number(share) or not 0.0 < share <= 1.0:
        raise OptionError(f"share must be above 0 and at most 1, not {share!r}.")


def spans_of(mask: Iterable[Any]) -> list[Span]:
    """[start, end) of each unbroken stretch of chosen words."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], np.asarray(mask, dtype=bool), [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def overlap(one: Span, other: Span) -> float:
    """Words in both / words in either."""
    both = max(min(one[1], other[1]) - max(one[0], other[0]), 0)
    return both / (one[1] - one[0] + other[1] - other[0] - both)


def rationale_maps(rows: RationaleRows, number: int, layers: ArrayLike, count: int, title: str = "") -> list[TokenMap]:
    """Document `number` (from 0) twice: what the person and what the model held to be worth reading.

    layers: of its tokens, as `kept_layers` gives them; count: layers of the model.
    Raises DataError for a number that no document has, or layers of another document's tokens.
    """
    if not is_whole(number) or not 0 <= number < len(rows):
        raise DataError(f"There are {len(rows)} documents, from 0, and {number} is none of them.")
    words = rows.words[number]
    human = np.ones(len(words), dtype=np.int64)
    for start, end in rows.rationales[number]:
        human[start:end] = 0
    found = np.zeros(len(words))
    word_of, values = rows.word_of[number], numbers(layers)
    if values is None or values.shape != word_of.shape:
        what = "values that are no numbers" if values is None else f"layers of shape {values.shape}"
        raise DataError(f"Document {number} has {len(word_of)} tokens, and {what} are not theirs.")
    if not np.isfinite(values).all():
        raise DataError(f"Document {number} has a layer that is no number.")
    np.maximum.at(found, word_of[word_of >= 0], values[word_of >= 0])
    machine = [0 if at > count else max(int(at), 1) for at in found]
    texts = tuple(word if place == 0 else " " + word for place, word in enumerate(words))
    name = title or f"Document {number + 1}"
    return [
        TokenMap(f"{name}: {who}", texts, tuple(int(at) or None for at in dropped), count)
        for who, dropped in (("the person", human), ("the model", machine))
    ]


def rationales_page(
    rows: RationaleRows, layers: Sequence[ArrayLike], count: int, numbers: Sequence[int], title: str
) -> str:
    """A self-contained HTML page of some documents, human and machine rationales beside each other. Raises DataError for
    layers of other documents, and what `rationale_maps` raises."""
    if len(layers) != len(rows):
        raise DataError(f"There are layers of {len(layers)} documents, but {len(rows)} documents.")
    strange = [number for number in numbers if not is_whole(number) or not 0 <= number < len(rows)]
    if strange:
        raise DataError(f"There are {len(rows)} documents, from 0, and {strange[0]!r} is none of them.")
    return to_html([one for number in numbers for one in rationale_maps(rows, number, layers[number], count)], title)


def _judged(
    rows: RationaleRows, scores: Sequence[NDArray[np.float64]], unread: Unread
) -> list[tuple[NDArray[np.float64], Mask, list[Span]]]:
    """Scores and truth of the words of each document that has a rationale among them, and the rationale's stretches."""
    if unread not in get_args(Unread):
        raise OptionError(
            f"unread is one of {get_args(Unread)}, not {unread!r}{nearest(str(unread), get_args(Unread))}"
        )
    found = []
    for score, spans in zip(scores, rows.rationales, strict=True):
        read = ~np.isnan(score)
        if unread == "left out":
            before = np.concatenate([[0], read.cumsum()])  # each word's place among those that were read
            spans = tuple((int(before[start]), int(before[end])) for start, end in spans if before[start] < before[end])
            score = score[read]
        else:
            score = np.where(read, score, score[read].min() - 1.0 if read.any() else 0.0)
        truth = np.zeros(len(score), dtype=bool)
        for start, end in spans:
            truth[start:end] = True
        if spans:
            found.append((score, truth, sorted(set(spans))))
    if not found:
        raise DataError("No document has a rationale in what is judged, so there is nothing to agree with.")
    return found


def _choice(chosen: Sequence[tuple[Mask, Mask, list[Span]]]) -> Choice:
    words = np.array([_of_words(mask, truth) for mask, truth, _ in chosen])
    precisions, recalls = [], []
    for mask, _, wanted in chosen:
        said = spans_of(mask)
        right = sum(max(overlap(one, other) for other in wanted) >= IOU for one in said)
        precisions += [right / len(said)] if said else []  # a document of which nothing is said has no precision
        recalls.append(right / len(wanted))
    iou_f1 = _f1(float(np.mean(precisions)), float(np.mean(recalls))) if precisions else 0.0
    precision, recall, f1 = (float(value) for value in words.mean(0))
    return Choice(precision, recall, f1, iou_f1, float(np.mean([mask.mean() for mask, _, _ in chosen])))


def _of_words(mask: Mask, truth: Mask) -> tuple[float, float, float]:
    right = float((mask & truth).sum())
    precision, recall = right / max(int(mask.sum()), 1), right / int(truth.sum())
    return precision, recall, _f1(precision, recall)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision and recall else 0.0


__all__ = [
    "Agreement",
    "Choice",
    "agreement",
    "agreement_by_layer",
    "kept_layers",
    "overlap",
    "rationale_maps",
    "rationales_page",
    "spans_of",
    "top_share",
]
