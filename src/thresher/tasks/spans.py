"""From start and end logits to answers: the best spans of every window, merged over the windows of a question."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thresher.errors import OptionError

_DROPPED = -9e3  # an engine says about -1e4 of dropped tokens, or -inf
_SAME = 4  # spans looked at for each answer asked for: those of the bytes of a character are one piece of text
_CELLS = 4_000_000  # scores of spans held at a time


@dataclass(frozen=True)
class Answer:
    """A piece of a passage.

    Attributes:
        text: without white space around it.
        start, end: [start, end) in characters of the passage.
        score: start logit + end logit.
    """

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Windows:
    """What each of W windows shows of its passage. Tokens of all passages are numbered one after the other.

    Attributes:
        question: [W] the number of its question, from 0.
        begin: [W] the place of the passage's first token in the window.
        first: [W] the number of that token.
        count: [W] tokens of the passage.
        offsets: [T, 2] the characters that each token stands for, in its passage.
    """

    question: NDArray[np.int64]
    begin: NDArray[np.int64]
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, shown: Sequence[tuple[int, int, int, int, int]], offsets: Sequence[NDArray[np.int64]]) -> Windows:
        """shown: of each window its question, its passage's number, begin, start within the passage, and count.
        offsets: of every passage."""
        question, passage, begin, start, count = np.array(shown, dtype=np.int64).reshape(-1, 5).T
        bases = np.cumsum([0, *map(len, offsets)])
        return cls(question, begin, bases[passage] + start, count, np.concatenate(offsets))

    def __len__(self) -> int:
        return len(self.question)


def best_answers(
    predictions: NDArray[Any], windows: Windows, contexts: Sequence[str], *, n_best: int = 20, longest: int = 30
) -> list[list[Answer]]:
    """The best answers to each question over all its windows, best first, each piece of text once.

    Every span of the passage of at most `longest` tokens is considered. Of equal scores the earlier, then shorter span wins.

    Args:
        predictions: [W, N, 2] start and end logits; NaN (beyond a row's batch) and -9,000 and less (dropped) are no place
            for an answer.
        windows: what they are about.
        contexts: of every question.

    Raises:
        OptionError: predictions of another number of windows or of fewer tokens, or `n_best` or `longest` below 1.
    """
    if n_best < 1 or longest < 1:
        raise OptionError(f"Answers are at least 1 of at least 1 token, not {n_best} of {longest}.")
    _check(predictions, windows)
    parts = [_candidates(predictions, windows, chunk, n_best, longest) for chunk in _chunks(windows, longest)]
    window, first, last, score = (np.concatenate(column) for column in zip(*parts, strict=True))
    question = windows.question[window]
    start = windows.offsets[windows.first[window] + first, 0]
    end = windows.offsets[windows.first[window] + last, 1]
    order = np.lexsort((end, start, -score, question))
    found: list[list[Answer]] = [[] for _ in contexts]
    seen: list[set[tuple[int, int]]] = [set() for _ in contexts]
    columns = (column[order].tolist() for column in (question, start, end, score))
    for number, begin, close, value in zip(*columns, strict=True):
        if len(found[number]) == n_best:
            continue
        close = with_marks(contexts[number], close)
        text = contexts[number][begin:close]
        begin += len(text) - len(text.lstrip())
        text = text.strip()
        if text and (begin, begin + len(text)) not in seen[number]:
            seen[number].add((begin, begin + len(text)))
            found[number].append(Answer(text, begin, begin + len(text), value))
    if n_best == 1 and any(not found[number] for number in np.unique(question).tolist()):
        # The one span looked at was white space: look at some more.
        more = best_answers(predictions, windows, contexts, n_best=2, longest=longest)
        return [one or others[:1] for one, others in zip(found, more, strict=True)]
    return found


def with_marks(context: str, end: int) -> int:
    """The end of a span with the marks of its last character (accents, vowel signs, variation selectors): tokenizers that
    strip accents leave these to no token."""
    while end < len(context) and unicodedata.category(context[end]) == "Mn":
        end += 1
    return end


def null_scores(predictions: NDArray[Any], windows: Windows, count: int) -> NDArray[np.float64]:
    """[count] of each question the least start + end logit of [CLS], the first token, over its windows (SQuAD 2.0).

    inf for a question without a window that says it.
    """
    _check(predictions, windows)
    said = predictions[:, 0].astype(np.float64).sum(-1)
    least = np.full(count, np.inf)
    np.minimum.at(least, windows.question, np.where(np.isnan(said), np.inf, said))
    return least


def _check(predictions: NDArray[Any], windows: Windows) -> None:
    if predictions.ndim != 3 or predictions.shape[2] != 2 or len(predictions) != len(windows):
        raise OptionError(
            f"Predictions of {len(windows)} windows are [{len(windows)}, tokens, 2], not {list(predictions.shape)}."
        )
    if len(windows) and int((windows.begin + windows.count).max()) > predictions.shape[1]:
        raise OptionError(f"The windows have more than the {predictions.shape[1]} tokens of the predictions.")


def _chunks(windows: Windows, longest: int) -> list[NDArray[np.int64]]:
    """Numbers of windows of similar length, as many together as memory is meant for."""
    order = np.argsort(-windows.count, kind="stable")
    chunks = []
    while len(order):
        rows = max(1, _CELLS // int(max(windows.count[order[0]], 1) * longest))
        chunks.append(order[:rows])
        order = order[rows:]
    return chunks


def _candidates(
    predictions: NDArray[Any], windows: Windows, chunk: NDArray[np.int64], n_best: int, longest: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Window, first token, last token (of the passage, in the window) and score of the best spans of some windows."""
    width = max(1, int(windows.count[chunk].max()))
    places = np.arange(width)
    real = places < windows.count[chunk, None]
    taken = np.minimum(windows.begin[chunk, None] + places, predictions.shape[1] - 1)
    said = predictions[chunk[:, None], taken].astype(np.float64)
    said = np.where(real[..., None] & (said > _DROPPED), said, -np.inf)
    closed = np.pad(said[..., 1], ((0, 0), (0, longest - 1)), constant_values=-np.inf)
    # [rows, first token, tokens - 1] → [rows, spans]
    scores = said[..., :1] + np.lib.stride_tricks.sliding_window_view(closed, longest, axis=1)
    scores = scores.reshape(len(chunk), -1)
    best = 1 if n_best == 1 else min(_SAME * n_best, scores.shape[1])
    span = scores.argmax(1)[:, None] if best == 1 else np.argpartition(-scores, best - 1, axis=1)[:, :best]
    value = np.take_along_axis(scores, span, 1)
    row, column = np.nonzero(value > -np.inf)
    first, extra = np.divmod(span[row, column], longest)
    return chunk[row], first, first + extra, value[row, column]
