"""Metrics of ranked candidates: response selection, and reranking with as many candidates as a question happens to have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thresher.errors import DataError, OptionError, ThresherError


def ranking_metrics(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike, cutoffs: Sequence[int] = (1, 2, 5)
) -> dict[str, float]:
    """How high the right candidates of each group rank, by ir_measures; means over the groups.

    A right candidate ranks after the wrong ones of the same score, so scores that are all alike score the worst. Groups
    without a right candidate are left out.

    Args:
        scores: [n] or [n, 1], higher is better; the rows of a group need not lie together.
        labels: [n], 1 for a right candidate and 0 for a wrong one.
        groups: [n], the number of the group that a candidate belongs to.
        cutoffs: the k of recall at k.

    Returns:
        Recall at each cutoff, the share of a group's right candidates among its first k, named R10@k where every group
        has 10 candidates (for instance) and R@k where their numbers differ; then MAP, MRR and P@1. All in [0, 1].

    Raises:
        DataError: shapes that do not fit, no rows, a score that is NaN, a label other than 0 and 1, or no group with a
            right candidate.
        OptionError: a cutoff below 1.
        ThresherError: ir_measures is not installed.
    """
    if any(k < 1 for k in cutoffs):
        raise OptionError(f"Recall is at 1 candidate or more, not at {min(cutoffs)}.")
    found, true, group = _checked(scores, labels, groups)
    try:
        import ir_measures
        from ir_measures import AP, RR, P, R
    except ImportError as error:
        raise ThresherError('Ranking metrics need ir_measures; run pip install "thresher[train]".') from error
    judged, ranked = _judged_and_ranked(found, true, group)
    sizes = {len(candidates) for candidates in judged.values()}
    recall = f"R{sizes.pop()}" if len(sizes) == 1 else "R"
    measures: dict[str, Any] = {f"{recall}@{k}": R @ k for k in cutoffs}
    measures |= {"MAP": AP, "MRR": RR, "P@1": P @ 1}
    values = ir_measures.calc_aggregate(list(measures.values()), judged, ranked)
    return {name: float(values[measure]) for name, measure in measures.items()}


def _checked(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Scores, labels and the numbers of the groups counted from 0, each [n], of the groups with a right candidate."""
    found, true, group = np.asarray(scores, dtype=np.float64), np.asarray(labels), np.asarray(groups)
    if not true.size or true.ndim != 1 or group.shape != true.shape or found.shape not in (true.shape, (true.size, 1)):
        raise DataError(
            f"Scores [n], labels [n] and groups [n] do not fit together or are empty: their shapes are {found.shape}, "
            f"{true.shape} and {group.shape}."
        )
    found = found.reshape(-1)
    if np.isnan(found).any():
        raise DataError(f"The score of row {int(np.isnan(found).argmax()) + 1} is NaN, which ranks nowhere.")
    if (wrong := ~np.isin(true, (0, 1))).any():
        row = int(wrong.argmax())
        raise DataError(f"Row {row + 1} has the label {true[row]}, where 0 or 1 is expected.")
    numbers = np.unique(group, return_inverse=True)[1]
    counts = np.bincount(numbers, weights=true)
    kept = counts[numbers] > 0
    if not kept.any():
        raise DataError("No group has a right candidate, so there is no ranking to score.")
    return found[kept], true[kept].astype(np.int64), numbers[kept]


def _judged_and_ranked(
    scores: NDArray[np.float64], labels: NDArray[np.int64], groups: NDArray[np.int64]
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """{group: {candidate: label}} and {group: {candidate: -rank}}.

    Ranks instead of scores, because trec_eval compares in float32 and settles ties by the candidates' names.
    """
    order = np.lexsort((labels, -scores, groups))
    judged: dict[str, dict[str, int]] = {}
    ranked: dict[str, dict[str, float]] = {}
    for group, label in zip(map(str, groups[order].tolist()), labels[order].tolist(), strict=True):
        rank = len(ranked.setdefault(group, {}))
        judged.setdefault(group, {})[str(rank)] = label
        ranked[group][str(rank)] = float(-rank)
    return judged, ranked
