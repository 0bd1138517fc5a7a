"""How well a scorer ranks: each query's own candidates, or one corpus for all queries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from thresher.errors import DataError, OptionError
from thresher.pairs.cache import Cache, Id
from thresher.pairs.keeping import CUT, Index
from thresher.pairs.reading import by_length
from thresher.pairs.scorer import NO_NUMBER, TOKENS, Asked, Scorer
from thresher.pairs.texts import check_row
from thresher.tasks.given import as_rows
from thresher.tasks.pairs import Pairs, pairs
from thresher.tasks.ranking import ranking_metrics

CUTOFFS = (1, 2, 5, 10)
BATCH = 64  # queries whose candidates are encoded together
NOTHING_RIGHT = "No query has a right candidate, so there is no ranking to score."


@dataclass(frozen=True)
class Ranked:
    """metrics: as `ranking_metrics` names them, means over the queries. queries: those that were ranked. candidates: how many
    different texts, or the size of the corpus. left_out: queries without a right candidate. cut: texts that were longer than
    the scorer's limits."""

    metrics: dict[str, float]
    queries: int
    candidates: int
    left_out: int
    cut: int


def evaluate(
    scorer: Scorer[Any],
    rows: datasets.Dataset | Pairs,
    *,
    cutoffs: Sequence[int] = CUTOFFS,
    on_done: Callable[[int], None] | None = None,
) -> Ranked:
    """R@k, MAP, MRR and P@1 of queries that bring their own candidates.

    rows: what `tasks.pairs.pairs` takes (or gave) with queries and candidates; those without a right one are left out.
    A text that comes up more than once among the candidates of 64 queries is encoded once.
    cutoffs: the k of recall; those beyond the most candidates of a query are left out. on_done: called with the number of
    queries just dealt with.
    Raises DataError for rows that are labelled pairs or of which none has a right candidate, OptionError for a scorer of
    several classes.
    """
    given = rankable(scorer, rows)
    scores: list[np.ndarray] = []
    labels: list[bool] = []
    texts = cut = 0
    for start in range(0, len(given.rows), BATCH):
        batch = [given.rows[i] for i in range(start, min(start + BATCH, len(given.rows)))]
        judged = [row for row in batch if any(label > 0 for label in row["labels"])]
        if judged:
            found = _own(scorer, [given.query(row) for row in judged], [row["candidates"] for row in judged])
            scores += found.scores
            texts, cut = texts + found.texts, cut + found.cut
            labels += [label > 0 for row in judged for label in row["labels"]]
        if on_done is not None:
            on_done(len(batch))
    sizes = [len(one) for one in scores]
    kept = [k for k in cutoffs if k <= max(sizes)]
    metrics = ranking_metrics(np.concatenate(scores), labels, np.repeat(np.arange(len(sizes)), sizes), kept)
    return Ranked(metrics, len(scores), texts, len(given.rows) - len(scores), cut)


def rankable(scorer: Scorer[Any], rows: datasets.Dataset | Pairs) -> Pairs:
    """Rows as `evaluate` ranks them. Raises what `evaluate` raises, before anything is encoded."""
    _check_ranks(scorer)
    given = rows if isinstance(rows, Pairs) else pairs(rows)
    if not given.ranked:
        raise DataError(
            "Rows of pairs with a label are not ranked; evaluate on queries with candidates and label or labels."
        )
    if not any(label > 0 for labels in given.rows["labels"] for label in labels):
        raise DataError(NOTHING_RIGHT)
    return given


def evaluate_corpus(
    scorer: Scorer[Any],
    rows: datasets.Dataset,
    candidates: Cache | Index,
    *,
    cutoffs: Sequence[int] = CUTOFFS,
    on_done: Callable[[int], None] | None = None,
) -> Ranked:
    """R@k, MAP, MRR and P@1 of queries that are ranked against one corpus, all of it.

    rows: the columns query (a text or a dialogue) and relevant (the ids of the right candidates, compared as texts); those
    without one are left out. candidates: encoded by this scorer. Memory is that of 64 queries' scores and of a chunk.
    A right candidate ranks after the wrong ones of the same score. The rest as in `evaluate`.
    Raises DataError for other columns, an id that is not in the corpus, no right candidate at all, or a cache of another
    scorer.
    """
    rows = as_rows(rows)
    if isinstance(candidates, Cache):
        scorer.check_cache(candidates)
    names = candidates.ids if isinstance(candidates, Cache) else tuple(candidates.store.ids())
    right = relevant_places(scorer, rows, names)
    judged = [number for number, found in enumerate(right) if found]
    cut, ranks = 0, []
    for start in range(0, len(judged), BATCH):
        batch = judged[start : start + BATCH]
        asked, more = _asked(scorer, [rows[number]["query"] for number in batch])
        cut += more
        found = _scores(scorer, asked, candidates)
        ranks += [_ranks(scores, right[number]) for scores, number in zip(found, batch, strict=True)]
        if on_done is not None:
            on_done(len(batch))
    kept = [k for k in cutoffs if k <= len(names)]
    return Ranked(_of_ranks(ranks, kept), len(judged), len(names), len(rows) - len(judged), cut)


def relevant_places(scorer: Scorer[Any], rows: datasets.Dataset, ids: Sequence[Id]) -> list[list[int]]:
    """Where among `ids` the right candidates of each query are. Whatever `evaluate_corpus` refuses is refused here, so that no
    corpus need be encoded in vain."""
    _check_ranks(scorer)
    if missing := {"query", "relevant"} - set(rows.column_names):
        raise DataError(
            f"Queries of a corpus need the columns query and relevant; {sorted(missing)[0]!r} is not there."
        )
    for number, query in enumerate(rows["query"], start=1):
        check_row(query, len(scorer.tokenizer), number)
    places = {str(name): place for place, name in enumerate(ids)}
    right = [_places(given, places, number) for number, given in enumerate(rows["relevant"], start=1)]
    if not any(right):
        raise DataError(NOTHING_RIGHT)
    return right


@dataclass(frozen=True)
class _Found:
    scores: list[np.ndarray]
    texts: int
    cut: int


def _check_ranks(scorer: Scorer[Any]) -> None:
    if scorer.config.classes > 1:
        raise OptionError(
            f"A scorer of {scorer.config.classes} classes does not rank, so there is no ranking to score."
        )


def _own(scorer: Scorer[Any], queries: Sequence[Any], offered: Sequence[Sequence[str]]) -> _Found:
    """The scores of each query's own candidates."""
    places = {text: place for place, text in enumerate(dict.fromkeys(text for some in offered for text in some))}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{CUT}")  # counted instead
        cache = scorer.encode_candidates(list(places))
    asked, cut = _asked(scorer, queries)
    found = []
    for one, some in zip(asked, offered, strict=True):
        wanted = list(dict.fromkeys(places[text] for text in some))
        scores = dict(zip(wanted, _scores(scorer, [one], cache.select(wanted))[0].tolist(), strict=True))
        found.append(np.array([scores[places[text]] for text in some]))
    return _Found(found, len(places), cut + cache.cut)


def _asked(scorer: Scorer[Any], queries: Sequence[Any]) -> tuple[list[Asked], int]:
    """Queries ready to be compared, and how many were cut."""
    rows, cut = scorer.query_rows(queries)
    found: dict[int, Asked] = {}
    with scorer.answering():
        for index in by_length([len(row) for row in rows], TOKENS):
            found.update(zip(index, scorer.ask([rows[i] for i in index]), strict=True))
    return [found[i] for i in range(len(rows))], cut


def _scores(scorer: Scorer[Any], asked: Sequence[Asked], candidates: Cache | Index) -> list[np.ndarray]:
    """[N] of each query; each block of candidates is read once for all of them."""
    blocks = candidates.blocks(scorer.chunk, scorer.device) if isinstance(candidates, Cache) else candidates.blocks()
    parts: list[list[Tensor]] = [[] for _ in asked]
    with scorer.answering():
        for block in blocks:
            for one, mine in zip(asked, parts, strict=True):
                mine.append(scorer.compare(one, block).float().cpu())
    return [torch.cat(mine).numpy() for mine in parts]


def _places(given: Any, places: Mapping[str, int], number: int) -> list[int]:
    """Where the right candidates of a query are. Raises DataError."""
    if not isinstance(given, list | None):
        raise DataError(f"Row {number} has {given!r} as relevant, where a list of ids is expected.")
    found = []
    for name in given or []:
        if str(name) not in places:
            raise DataError(f"Row {number} names the relevant id {name!r}, which is not among the candidates.")
        found.append(places[str(name)])
    return sorted(set(found))


def _ranks(scores: np.ndarray, right: Sequence[int]) -> np.ndarray:
    """The ranks (from 1, ascending) of the right candidates."""
    if np.isnan(scores).any():
        raise DataError(NO_NUMBER)
    own = np.sort(scores[right])[::-1]
    wrong = np.sort(np.delete(scores, right))
    return len(wrong) - np.searchsorted(wrong, own, "left") + np.arange(1, len(own) + 1)


def _of_ranks(ranks: Sequence[np.ndarray], cutoffs: Sequence[int]) -> dict[str, float]:
    """What `ranking_metrics` says, of the ranks alone: a corpus has too many candidates to list them for every query."""
    metrics = {f"R@{k}": float(np.mean([(one <= k).mean() for one in ranks])) for k in cutoffs}
    precision = [(np.arange(1, len(one) + 1) / one).mean() for one in ranks]
    return metrics | {
        "MAP": float(np.mean(precision)),
        "MRR": float(np.mean([1 / one[0] for one in ranks])),
        "P@1": float(np.mean([one[0] == 1 for one in ranks])),
    }
