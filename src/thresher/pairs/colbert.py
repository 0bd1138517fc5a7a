"""ColBERT (Khattab and Zaharia 2020): a small vector for every token; each of the query's finds its best in the candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.errors import OptionError
from thresher.pairs.cache import Block
from thresher.pairs.config import ScorerConfig
from thresher.pairs.reading import read
from thresher.pairs.scorer import Query, Scorer


@dataclass(frozen=True, kw_only=True)
class ColBERTConfig(ScorerConfig):
    """size: of a token's vector.

    augment: shorter queries are filled with [MASK] to as many tokens (32 in the paper, section 3.2); 0 for none, which is
        right for long queries such as dialogues.
    """

    kind: ClassVar[str] = "colbert"

    size: int = 128
    augment: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes:
            raise OptionError(
                "ColBERT's MaxSim gives one score and no classes; leave classes at 0, or take another scorer."
            )
        if self.size < 1:
            raise OptionError(f"A token's vector has at least 1 number, not {self.size}.")
        if not 0 <= self.augment <= self.max_query:
            raise OptionError(f"augment must be from 0 to max_query ({self.max_query}), not {self.augment}.")


class ColBERT(Scorer[ColBERTConfig]):
    """Keeps [n_i, size] of a candidate and [n, size] of a query, each vector of length 1.

    The paper's markers [Q] and [D] and its list of punctuation are left out.
    """

    config_class = ColBERTConfig
    chunk = 512

    def __init__(self, encoder: Any, tokenizer: Any, config: ColBERTConfig) -> None:
        super().__init__(encoder, tokenizer, config)
        if config.augment and tokenizer.mask_token_id is None:
            raise OptionError(f"A {type(tokenizer).__name__} has no mask token to fill queries with; set augment=0.")
        self.project = nn.Linear(encoder.config.hidden_size, config.size, bias=False)

    def candidate_states(self, rows: Sequence[Sequence[int]]) -> Block:
        return self._vectors(rows, reduced=False)

    def query_states(self, rows: Sequence[Sequence[int]]) -> list[Query]:
        fill = self.config.augment
        filled = [[*row, *[self.tokenizer.mask_token_id] * (fill - len(row))] for row in rows]
        return [(vectors,) for vectors in self._vectors(filled, reduced=True).rows()]

    def _vectors(self, rows: Sequence[Sequence[int]], *, reduced: bool) -> Block:
        states = read(self.encoder, rows, reduced=reduced).last
        assert states is not None
        return Block(F.normalize(self.project(states.hidden), dim=-1), states.sizes)

    def ask_flops(self, query: Query, n: int) -> int:
        return 2 * query[0].numel() * self.project.in_features

    def match_flops(self, query: Query, block: Block) -> int:
        return 2 * len(block.values) * query[0].numel()

    def match(self, query: Query, block: Block) -> Tensor:
        """The sum over the query's vectors of the largest product with one of the candidate's (section 3.3)."""
        (vectors,) = query
        products = (block.values @ vectors.T).float()  # [T, n]
        best: Tensor = torch.segment_reduce(products, "max", lengths=block.lengths, axis=0)
        return best.sum(-1)
