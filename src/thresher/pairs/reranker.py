"""A scorer where a sentence-transformers CrossEncoder is expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thresher.pairs.cache import check_count
from thresher.pairs.scorer import Scorer
from thresher.pairs.texts import one_pair, pairs_of


class Reranker:
    """Has `predict` and `rank` as sentence-transformers' CrossEncoder has them; what those take beside is accepted and ignored
    where it has no meaning here (batch_size, show_progress_bar, device, prompt, ...)."""

    def __init__(self, scorer: Scorer[Any]) -> None:
        self.scorer = scorer

    def predict(
        self,
        inputs: Any = None,
        *,
        sentences: Any = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **ignored: Any,
    ) -> Any:
        """[n] float32 scores ([n, C] logits) of (query, document) pairs, n may be 0; of a single pair its one score.

        inputs: a pair, or a sequence of them; `sentences` is its older name. activation_fn: applied to the scores as one
        tensor; apply_softmax: over the classes of [n, C], after it. An array, or on request a tensor or a list of tensors.
        Raises DataError for what is no pair.
        """
        given = sentences if inputs is None else inputs
        alone = one_pair(given)
        pairs = [tuple(given)] if alone else pairs_of(given)
        classes = self.scorer.config.classes
        found = self.scorer.predict(pairs) if pairs else np.zeros((0, classes) if classes > 1 else 0, np.float32)
        scores = torch.from_numpy(found)
        if activation_fn is not None:
            scores = activation_fn(scores)
        if apply_softmax and scores.dim() > 1:
            scores = scores.softmax(1)
        if not convert_to_tensor:
            said: Any = scores.float().numpy() if convert_to_numpy else list(scores)
        else:
            said = scores
        return said[0] if alone else said

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        **ignored: Any,
    ) -> list[dict[str, Any]]:
        """The documents, best first: {"corpus_id", "score"} and on request "text". None of them: none.

        activation_fn: applied to the scores of all documents before they are sorted.
        """
        top_k = None if top_k is None else check_count(top_k, "Ranking gives")
        documents = list(documents)
        if not documents:
            return []
        found = self.scorer.rank(query, documents)
        if activation_fn is not None:
            scores = activation_fn(torch.tensor([score for _, score in found])).tolist()
            found = [(place, score) for (place, _), score in zip(found, scores, strict=True)]
            found.sort(key=lambda one: -one[1])
        found = found[:top_k]
        texts = [{"text": documents[int(place)]} if return_documents else {} for place, _ in found]
        return [{"corpus_id": place, "score": score, **text} for (place, score), text in zip(found, texts, strict=True)]
