"""Hopeless pairs are dropped before the first layer, by how alike the embeddings of their tokens are (SEE, SIGIR 2025)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from thresher.backbones import enter
from thresher.errors import DataError, OptionError, TargetError
from thresher.measure.flops import dense_flops
from thresher.measure.run import run
from thresher.model import find_encoder
from thresher.pairs.cache import check_count
from thresher.pairs.reranker import Reranker
from thresher.pairs.scorer import Scorer
from thresher.pairs.texts import Text, flat, one_pair, pairs_of, tokens_of
from thresher.settings import is_number, is_whole
from thresher.tasks.features import length_limit
from thresher.tasks.pairs import Pairs, pairs
from thresher.tasks.ranking import ranking_metrics

FILTERED = -1e4  # the score of a pair that was dropped: far below any logit, and finite where it is written down
STEPS = 50  # thresholds that are tried
MOST = float(np.nextafter(np.float32(1.0), np.float32(2.0)))  # above every cosine


@dataclass(frozen=True)
class PrefilterFlops:
    """filtering: of comparing embeddings. reading: of the model on the pairs that pass. unfiltered: of the model on all pairs.

    The model's are those of nothing dropped inside it, on both sides.
    """

    filtering: int
    reading: int
    unfiltered: int

    @property
    def speedup(self) -> float:
        spent = self.filtering + self.reading
        return self.unfiltered / spent if spent else 1.0


@dataclass(frozen=True)
class PrefilterCalibration:
    """What was found: the threshold, the share of pairs that it filters, and the FLOPs speedup, the filter's work included; the
    metric with and without the filter (None where a share was asked for)."""

    threshold: float
    share: float
    speedup: float
    quality: float | None = None
    baseline: float | None = None


class Prefilter:
    """Stands in front of a cross-encoder, and has `predict` and `rank` as sentence-transformers' CrossEncoder has them.

        fast = Prefilter(CrossEncoder("..."), keep=10)
        fast.calibrate(rows, max_loss=0.005)
        fast.rank(query, documents)

    A pair's similarity is the mean over the query's tokens of the largest cosine between that token's embedding and those of
    the document's tokens, in [-1, 1]; special tokens are left out, and nothing but the model's own table of embeddings is
    read. A pair below `threshold` costs no layer and scores FILTERED, below every other, unless it is among the `keep` most
    similar of its query. So all candidates of a query belong into one call. A document without a token has similarity -1; a
    query without one filters nothing.

    model: a CrossEncoder (of sentence-transformers or of `thresher.pairs`), a Reranker, or a Hugging Face model for sequence
        classification, with one score a pair; attached or not. tokenizer: needed where the model holds none.
    threshold: -1 filters nothing; `calibrate` finds one.
    Raises OptionError for a threshold outside [-1, 1], keep below 1, no tokenizer, a model of several classes, or a scorer
    that reads no pairs; UnsupportedModelError for a family that cannot be entered.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, threshold: float = -1.0, keep: int = 10) -> None:
        self.model = Reranker(model) if isinstance(model, Scorer) else model
        inner = model.scorer if isinstance(model, Reranker) else model
        self.tokenizer: Any = getattr(inner, "tokenizer", None) if tokenizer is None else tokenizer
        if self.tokenizer is None:
            raise OptionError(f"A {type(model).__name__} holds no tokenizer; give Prefilter the model's own.")
        if not is_whole(keep) or keep < 1:
            raise OptionError(f"keep must be a whole number, at least 1 document of a query, not {keep!r}.")
        if isinstance(inner, Scorer) and not inner.joint:
            raise OptionError(
                f"A {type(inner).__name__} reads queries and documents apart, so there are no pairs to drop."
            )
        self.encoder = find_encoder(inner)
        if not isinstance(inner, Scorer) and not hasattr(model, "predict") and self.encoder.base_model is self.encoder:
            raise OptionError(
                f"A prefilter serves models that score a pair, and {type(self.encoder).__name__} has no head; give one for "
                "sequence classification."
            )
        classes = inner.config.classes if isinstance(inner, Scorer) else self.encoder.config.num_labels
        if (classes or 1) > 1:
            raise OptionError(f"A prefilter serves models that score a pair by one number, and this one has {classes}.")
        self.geometry = enter(self.encoder).geometry
        self.threshold, self.keep = threshold, keep
        self._special = set(self.tokenizer.all_special_ids)
        self._limit = length_limit(self.tokenizer, None, pair=True)

    @property
    def threshold(self) -> float:
        """The least similarity that passes. Set to what is no cosine it raises OptionError."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        if not is_number(value) or not -1.0 <= value <= MOST:
            raise OptionError(f"threshold is a cosine between -1 and 1, not {value!r}.")
        self._threshold = value

    def similarities(self, query: Text, documents: Sequence[Text]) -> NDArray[np.float32]:
        """[n] float32. Raises DataError for what is no text."""
        return self._similarities(*self._tokens(query, documents))

    def passing(self, query: Text, documents: Sequence[Text]) -> NDArray[np.bool_]:
        """[n] bool, the documents that the model is to read."""
        return self._passing(self.similarities(query, documents))

    def predict(
        self, inputs: Any = None, *, sentences: Any = None, **options: Any
    ) -> NDArray[np.float32] | np.floating[Any]:
        """[n] float32 scores of (query, document) pairs, FILTERED for those that do not pass; of a single pair its one score.

        inputs: a pair, or a sequence of them; `sentences` is its older name. options: for the model's own predict.
        Raises DataError for what is no pair.
        """
        given = sentences if inputs is None else inputs
        if one_pair(given):
            return self._scores([(given[0], given[1])], options)[0][0]  # type: ignore[no-any-return]
        return self._scores(pairs_of(given), options)[0]

    def rank(
        self,
        query: Text,
        documents: Sequence[Text],
        top_k: int | None = None,
        return_documents: bool = False,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """The documents, best first: {"corpus_id", "score"} and on request "text". Those that were filtered come last, the most
        similar first. Raises OptionError for a top_k below 1."""
        if not isinstance(query, str | Sequence) or isinstance(documents, str) or not isinstance(documents, Iterable):
            raise DataError("rank takes a query and a list of documents: rank(query, [text, text]).")
        top_k = None if top_k is None else check_count(top_k, "Ranking gives")
        scores, similarity = self._scores([(query, document) for document in documents], options)
        order = np.lexsort((-similarity, -scores))[:top_k].tolist()
        texts = [{"text": documents[place]} if return_documents else {} for place in order]
        return [
            {"corpus_id": place, "score": float(scores[place]), **text}
            for place, text in zip(order, texts, strict=True)
        ]

    def flops(self, query: Text, documents: Sequence[Text]) -> PrefilterFlops:
        """What `rank` costs, with and without the filter."""
        asked, offered = self._tokens(query, documents)
        return self._flops(asked, offered, self._passing(self._similarities(asked, offered)))

    def calibrate(
        self,
        rows: datasets.Dataset | Pairs,
        *,
        share: float | None = None,
        max_loss: float | None = None,
        metric: str = "MRR",
        **options: Any,
    ) -> PrefilterCalibration:
        """Set the threshold so that a target holds on validation rows.

        rows: what `tasks.pairs.pairs` takes (or gave) with queries and candidates. share: of all pairs, what is to be filtered;
            labels are not looked at. max_loss: the most that `metric` may fall; the threshold rises, in 50 steps of the pairs
            that can be filtered, for as long as that holds. metric: MRR, MAP, P@1, or R@k with any k; right candidates that
            are filtered count as last. options: for the model's own predict, which reads every pair once for `max_loss`.
        Raises OptionError for no or two targets, DataError for rows that are not ranked, TargetError when a target cannot be
        met; the threshold is then unchanged.
        """
        _check_target(share, max_loss)
        given = rows if isinstance(rows, Pairs) else pairs(rows)
        if not given.ranked:
            raise DataError("Rows of pairs with a label are not ranked; give queries with candidates and labels.")
        asked = [(given.query(row), row["candidates"]) for row in given.rows]
        tokens = [self._tokens(query, documents) for query, documents in asked]
        found = [self._similarities(*one) for one in tokens]
        similar = np.concatenate(found)
        free = np.concatenate([~self._most_similar(one) for one in found])
        able = np.sort(similar[free])
        if share is not None:
            wanted = math.ceil(share * len(similar))
            if wanted > len(able):
                raise TargetError(
                    f"With keep={self.keep} at most {len(able) / len(similar):.3f} of these pairs can be filtered, not "
                    f"{share:.3f}."
                )
            threshold, quality, baseline = _above(able[wanted - 1]) if wanted else -1.0, None, None
        else:
            assert max_loss is not None
            scores = self._read([(query, text) for query, documents in asked for text in documents], options)
            labels = [int(label > 0) for row in given.rows for label in row["labels"]]
            groups = np.repeat(np.arange(len(found)), [len(one) for one in found])

            def judged(threshold: float) -> float:
                filtered = np.where(free & (similar < threshold), FILTERED, scores)
                return _metric(filtered, labels, groups, metric)

            baseline = judged(-1.0)
            threshold, quality = _highest(judged, able, baseline, max_loss, metric)
        passing = [self._most_similar(one) | (one >= threshold) for one in found]
        costs = [self._flops(*one, passes) for one, passes in zip(tokens, passing, strict=True)]
        total = PrefilterFlops(
            sum(one.filtering for one in costs), sum(one.reading for one in costs), sum(one.unfiltered for one in costs)
        )
        self.threshold = threshold
        filtered = float(1 - np.concatenate(passing).mean())
        return PrefilterCalibration(threshold, filtered, total.speedup, quality, baseline)

    @property
    def _table(self) -> Tensor:
        """[V, D], the model's embeddings of tokens."""
        embeddings: Any = self.encoder.get_input_embeddings()
        return embeddings.weight  # type: ignore[no-any-return]

    def _tokens(self, query: Text, documents: Sequence[Text]) -> tuple[list[int], list[list[int]]]:
        read = tokens_of([query, *documents], self.tokenizer, self._limit).rows
        asked, *offered = [[number for number in row if number not in self._special] for row in read]
        return asked, offered

    @torch.no_grad()
    def _similarities(self, query: list[int], documents: list[list[int]]) -> NDArray[np.float32]:
        if not query or not documents:
            return np.ones(len(documents), dtype=np.float32)
        table = self._table
        ids = torch.tensor(flat(documents), dtype=torch.int64, device=table.device)
        different, place = ids.unique(return_inverse=True)  # texts repeat words: each is compared once
        asked, offered = (F.normalize(table[one].float(), dim=1) for one in (torch.tensor(query).to(ids), different))
        counts = torch.tensor([len(row) for row in documents], device=table.device)
        row = torch.arange(len(documents), device=table.device).repeat_interleave(counts, output_size=len(ids))
        cosines = (asked @ offered.T)[:, place]
        best = cosines.new_full((len(asked), len(documents)), -1.0)
        best = best.scatter_reduce(1, row.expand(len(asked), -1), cosines, "amax")
        return best.mean(0).clamp(-1.0, 1.0).cpu().numpy()  # type: ignore[no-any-return]

    def _most_similar(self, similarity: NDArray[np.float32]) -> NDArray[np.bool_]:
        """[n] bool, the `keep` documents of a query that always pass: of those equally similar the first."""
        always = np.zeros(len(similarity), dtype=bool)
        always[np.argsort(-similarity, kind="stable")[: self.keep]] = True
        return always

    def _passing(self, similarity: NDArray[np.float32]) -> NDArray[np.bool_]:
        return self._most_similar(similarity) | (similarity >= self.threshold)

    def _scores(
        self, given: list[tuple[Text, Text]], options: dict[str, Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The scores [n] and the similarities [n] of pairs."""
        similarity = np.ones(len(given), dtype=np.float32)
        passing = np.ones(len(given), dtype=bool)
        groups: dict[Any, list[int]] = {}
        for place, (query, _) in enumerate(given):
            groups.setdefault(query if isinstance(query, str) else tuple(query), []).append(place)
        for places in groups.values():
            similarity[places] = self.similarities(given[places[0]][0], [given[place][1] for place in places])
            passing[places] = self._passing(similarity[places])
        scores = np.full(len(given), FILTERED, dtype=np.float32)
        if passing.any():
            scores[passing] = self._read([pair for pair, passes in zip(given, passing, strict=True) if passes], options)
        return scores, similarity

    def _read(self, given: list[tuple[Text, Text]], options: dict[str, Any]) -> NDArray[np.float32]:
        """[n], what the model says of pairs."""
        if hasattr(self.model, "predict"):
            return np.asarray(self.model.predict(given, **options), dtype=np.float32).reshape(len(given))
        queries, documents = zip(*given, strict=True)
        encoded = self.tokenizer(list(queries), list(documents), truncation=True, max_length=self._limit)
        found = run(self.model, datasets.Dataset.from_dict(dict(encoded)), **options).predictions
        return found.reshape(len(given)).astype(np.float32)

    def _flops(self, query: list[int], documents: list[list[int]], passing: NDArray[np.bool_]) -> PrefilterFlops:
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        each = [dense_flops(self.geometry, min(len(query) + len(one) + special, self._limit)) for one in documents]
        width = self._table.shape[1]
        different = len(set(flat(documents)))
        filtering = 2 * width * (len(query) * different + len(query) + different)  # products, and lengths of vectors
        reading = sum(cost for cost, passes in zip(each, passing, strict=True) if passes)
        return PrefilterFlops(filtering, reading, sum(each))


def _check_target(share: float | None, max_loss: float | None) -> None:
    if (share is None) == (max_loss is None):
        raise OptionError("Give calibrate one target: share=0.5, or max_loss=0.005.")
    if share is not None and not (is_number(share) and 0.0 <= share <= 1.0):
        raise OptionError(f"share must lie between 0 and 1, not {share!r}.")
    if max_loss is not None and not (is_number(max_loss) and 0.0 <= max_loss <= 1.0):
        raise OptionError(f"max_loss must lie between 0 and 1, not {max_loss!r}.")


def _above(similarity: np.float32) -> float:
    """The least threshold that filters it."""
    return float(np.nextafter(similarity, np.float32(2.0)))


def _highest(
    judged: Any, able: NDArray[np.float32], baseline: float, max_loss: float, metric: str
) -> tuple[float, float]:
    """The threshold up to which the loss is allowed, and the metric there.

    able: similarities of what can be filtered, rising.
    """
    found: tuple[float, float] | None = None
    for step in range(1, STEPS + 1):
        place = math.ceil(step * len(able) / STEPS) - 1
        if place < 0:
            break
        threshold = _above(able[place])
        quality = judged(threshold)
        if quality < baseline - max_loss - 1e-12:
            break
        found = threshold, quality
    if found is None:
        raise TargetError(
            f"No threshold that filters anything keeps {metric} at {baseline - max_loss:.4f} or above on these rows; allow a "
            "larger loss."
        )
    return found


def _metric(scores: NDArray[Any], labels: list[int], groups: NDArray[Any], name: str) -> float:
    """Raises OptionError for a metric that is not known."""
    kind, _, cut = name.partition("@")
    if name in ("MRR", "MAP", "P@1"):
        return ranking_metrics(scores, labels, groups, ())[name]
    if kind == "R" and cut.isdecimal() and int(cut) > 0:
        found = ranking_metrics(scores, labels, groups, (int(cut),))
        return next(value for key, value in found.items() if key.startswith("R") and key.endswith(f"@{int(cut)}"))
    raise OptionError(f"There is no metric {name!r} to calibrate by; take MRR, MAP, P@1, or R@k with a number for k.")


__all__ = ["FILTERED", "Prefilter", "PrefilterCalibration", "PrefilterFlops"]
