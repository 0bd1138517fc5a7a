"""Dual-encoder (Sentence-BERT, Reimers and Gurevych 2019): both sides read alone, one vector each, one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from thresher.pairs.cache import Block
from thresher.pairs.config import ScorerConfig
from thresher.pairs.heads import PairHead, Similarity, check_choice
from thresher.pairs.reading import States, read
from thresher.pairs.scorer import Query, Scorer

Pooling = Literal["cls", "mean"]


@dataclass(frozen=True, kw_only=True)
class DualConfig(ScorerConfig):
    """pooling: "cls", a text's first state; "mean", that of all its tokens (of those kept, under a policy)."""

    kind: ClassVar[str] = "dual"

    pooling: Pooling = "cls"
    similarity: Similarity = "dot"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pooling", self.pooling, Pooling)
        check_choice("similarity", self.similarity, Similarity)


class DualEncoder(Scorer[DualConfig]):
    """Keeps [1, D] of a candidate and [D] of a query."""

    config_class = DualConfig
    chunk = 1 << 15

    def __init__(self, encoder: Any, tokenizer: Any, config: DualConfig) -> None:
        super().__init__(encoder, tokenizer, config)
        self.head = PairHead(encoder.config.hidden_size, config.classes, config.similarity)

    def candidate_states(self, rows: Sequence[Sequence[int]]) -> Block:
        return Block(self._pooled(read(self.encoder, rows).last), [1] * len(rows))

    def query_states(self, rows: Sequence[Sequence[int]]) -> list[Query]:
        return [(vector,) for vector in self._pooled(read(self.encoder, rows, reduced=True).last)]

    def _pooled(self, states: States | None) -> Tensor:
        assert states is not None
        return states.first() if self.config.pooling == "cls" else states.mean()

    def match_flops(self, query: Query, block: Block) -> int:
        return len(block) * self.head.flops

    def match(self, query: Query, block: Block) -> Tensor:
        (vector,) = query
        if self.head.mlp is None and self.config.similarity == "dot":
            return torch.mv(block.values, vector)
        return self.head(vector.expand_as(block.values), block.values)  # type: ignore[no-any-return]
