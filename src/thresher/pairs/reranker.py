"""A scorer where a sentence-transformers CrossEncoder is expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from thresher.pairs.scorer import Scorer


class Reranker:
    """Has `predict` and `rank` as sentence-transformers' CrossEncoder has them; what those take beside is accepted and ignored
    where it has no meaning here (batch_size, show_progress_bar, ...)."""

    def __init__(self, scorer: Scorer[Any]) -> None:
        self.scorer = scorer

    def predict(self, sentences: Sequence[Any], **ignored: Any) -> np.ndarray | np.floating[Any]:
        """[n] float32 scores ([n, C] logits) of (query, document) pairs, n may be 0; of a single pair its one score."""
        if not len(sentences):
            classes = self.scorer.config.classes
            return np.zeros((0, classes) if classes > 1 else 0, np.float32)
        if len(sentences) == 2 and all(isinstance(text, str) for text in sentences):
            return self.scorer.predict([(sentences[0], sentences[1])])[0]  # type: ignore[no-any-return]
        return self.scorer.predict([(query, document) for query, document in sentences])

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        **ignored: Any,
    ) -> list[dict[str, Any]]:
        """The documents, best first: {"corpus_id", "score"} and on request "text". None of them: none."""
        if not len(documents):
            return []
        found = self.scorer.rank(query, documents, top_k)
        texts = [{"text": documents[int(place)]} if return_documents else {} for place, _ in found]
        return [{"corpus_id": place, "score": score, **text} for (place, score), text in zip(found, texts, strict=True)]
