"""Poly-encoder (Humeau et al. 2020, section 4.4): m views of the query, of which each candidate takes its own mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from thresher.errors import OptionError
from thresher.pairs.cache import Block
from thresher.pairs.config import ScorerConfig
from thresher.pairs.heads import PairHead, Similarity, check_choice
from thresher.pairs.reading import read
from thresher.pairs.scorer import Query, Scorer


@dataclass(frozen=True, kw_only=True)
class PolyConfig(ScorerConfig):
    """m: codes that look at the query (64 and 360 in the papers)."""

    kind: ClassVar[str] = "poly"

    m: int = 64
    similarity: Similarity = "dot"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("similarity", self.similarity, Similarity)
        if self.m < 1:
            raise OptionError(f"A poly-encoder has at least 1 code, not {self.m}.")


class PolyEncoder(Scorer[PolyConfig]):
    """Keeps [1, D] of a candidate, its [CLS] state, and [m, D] of a query: codes that attend over its states."""

    config_class = PolyConfig
    chunk = 4096

    def __init__(self, encoder: Any, tokenizer: Any, config: PolyConfig) -> None:
        super().__init__(encoder, tokenizer, config)
        size = encoder.config.hidden_size
        self.codes = nn.Parameter(torch.randn(config.m, size) * size**-0.5)
        self.head = PairHead(size, config.classes, config.similarity)

    def candidate_states(self, rows: Sequence[Sequence[int]]) -> Block:
        states = read(self.encoder, rows).last
        assert states is not None
        return Block(states.first(), [1] * len(rows))

    def query_states(self, rows: Sequence[Sequence[int]]) -> list[Query]:
        states = read(self.encoder, rows, reduced=True).last
        assert states is not None
        return [(torch.softmax(self.codes @ row.T, -1) @ row,) for row in states.rows()]

    def ask_flops(self, query: Query, n: int) -> int:
        return 4 * query[0].numel() * n  # the codes over the states: logits, and the mixtures

    def match_flops(self, query: Query, block: Block) -> int:
        return len(block) * (4 * query[0].numel() + self.head.flops)

    def match(self, query: Query, block: Block) -> Tensor:
        (views,) = query
        mixture = torch.softmax(block.values @ views.T, -1) @ views  # [N, D]
        return self.head(mixture, block.values)  # type: ignore[no-any-return]
