"""DeFormer (Cao et al. 2020): lower layers read each side alone, a candidate's once for all queries; upper ones read pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.attention import attend
from thresher.backbones.opened import open_layers
from thresher.errors import OptionError
from thresher.measure.layer import layer_flops
from thresher.model import attachment_of
from thresher.packed import Layout, PackedTokens
from thresher.pairs.cache import Block
from thresher.pairs.config import ScorerConfig
from thresher.pairs.heads import JointHead
from thresher.pairs.layers import Linears, after_attention, by_head
from thresher.pairs.reading import read, watch
from thresher.pairs.scorer import Query, Scorer


@dataclass(frozen=True, kw_only=True)
class DeFormerConfig(ScorerConfig):
    """lower: how many layers read the sides apart; None for three quarters of them (9 of 12 in the paper)."""

    kind: ClassVar[str] = "deformer"

    lower: int | None = None

    def split(self, count: int) -> int:
        """`lower` for an encoder of `count` layers. Raises OptionError."""
        found = max(1, 3 * count // 4) if self.lower is None else self.lower
        if not 0 < found < count:
            raise OptionError(f"Of {count} layers 1 to {count - 1} can read the sides apart, not {found}.")
        return found


class DeFormer(Scorer[DeFormerConfig]):
    """Keeps [n_i, D] of a candidate and [n, D] of a query, the states that the lower layers end with.

    A pair is [CLS] query [SEP] and candidate [SEP], the same tokens that a cross-encoder reads; positions of both sides begin
    at 0, and a candidate's token types are those of the second text.
    """

    config_class = DeFormerConfig
    chunk = 32

    def __init__(self, encoder: Any, tokenizer: Any, config: DeFormerConfig) -> None:
        super().__init__(encoder, tokenizer, config)
        self.layers = open_layers(encoder)
        watch(self.layers)
        self.lower = config.split(len(self.layers))
        self.linears = Linears(encoder)
        self.head = JointHead(encoder.config.hidden_size, config.classes)

    def query_room(self) -> tuple[list[int], list[int]]:
        return self.frame.before, self.frame.between[:1]

    def candidate_room(self) -> tuple[list[int], list[int]]:
        return self.frame.between[1:], self.frame.after

    def candidate_states(self, rows: Sequence[Sequence[int]]) -> Block:
        return self._lower(rows, kind=1, reduced=False)

    def query_states(self, rows: Sequence[Sequence[int]]) -> list[Query]:
        return [(states,) for states in self._lower(rows, kind=0, reduced=True).rows()]

    def _lower(self, rows: Sequence[Sequence[int]], *, kind: int, reduced: bool) -> Block:
        first = self.lower + 1
        types = [[kind] * len(row) for row in rows]
        reading = read(self.encoder, rows, types=types, entering=(first,), last=False, reduced=reduced)
        return Block(reading.entering[first].hidden, reading.entering[first].sizes)

    def match_flops(self, query: Query, block: Block) -> int:
        geometry = attachment_of(self.encoder).engine.entrance.geometry
        lengths = [len(query[0]) + size for size in block.sizes]
        return (len(self.layers) - self.lower) * sum(layer_flops(geometry, n, n) for n in lengths)

    def match(self, query: Query, block: Block) -> Tensor:
        return self.match_each([query], [block])[0]

    def match_each(self, queries: Sequence[Query], blocks: Sequence[Block]) -> list[Tensor]:
        *_, (states, sizes) = self.upper(queries, blocks)
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        scores = self.head(states[starts.to(states.device)])
        return list(scores.split([len(block) for block in blocks]))

    def upper(self, queries: Sequence[Query], blocks: Sequence[Block]) -> list[tuple[Tensor, list[int]]]:
        """What each upper layer ends with, of every pair [query; candidate of its block], query by query: [T, D], and
        how many tokens each pair has."""
        pairs = [(states, row) for (states,), block in zip(queries, blocks, strict=True) for row in block.rows()]
        tokens = _packed(torch.cat([part for pair in pairs for part in pair]), [len(a) + len(b) for a, b in pairs])
        found = []
        for layer in self.layers[self.lower :]:
            q, k, v = (
                by_head(self.linears(one, tokens.hidden), layer.heads) for one in (layer.query, layer.key, layer.value)
            )
            dropout = layer.dropout.p if layer.dropout.training else 0.0
            context, _ = attend(q, k, v, tokens, scale=layer.scale, dropout=dropout)
            tokens = tokens.with_hidden(
                after_attention(layer, context.reshape(len(context), -1), tokens.hidden, self.linears)
            )
            found.append((tokens.hidden, tokens.layout.sizes))
        return found

    def imitation(self, teacher: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor | None:
        """Mean squared difference of the upper layers' states (section 3.3), neither side dropping anything; needs a
        cross-encoder of the same shape.

        Raises OptionError where the teacher is another one.
        """
        reference = teacher.layer_states(pairs, range(self.lower + 1, len(self.layers) + 1), like=self.encoder)
        before, between = self.query_room()
        second, after = self.candidate_room()
        sides = self._lower([[*before, *query, *between] for query, _ in pairs], kind=0, reduced=False)
        queries = [(states,) for states in sides.rows()]
        block = self.candidate_states([[*second, *candidate, *after] for _, candidate in pairs])
        upper = self.upper(queries, [block.select([number]) for number in range(len(queries))])
        losses = [
            F.mse_loss(ours, theirs)
            for (states, sizes), layer in zip(upper, reference, strict=True)
            for ours, theirs in zip(states.split(sizes), layer, strict=True)
        ]
        return torch.stack(losses).mean()


def _packed(hidden: Tensor, sizes: list[int]) -> PackedTokens:
    """Rows side by side, of which nothing drops: attention asks for no more than how long they are."""
    lengths = torch.tensor(sizes, device=hidden.device)
    positions = torch.cat([torch.arange(size) for size in sizes]).to(hidden.device)
    layout = Layout(
        lengths=lengths,
        positions=positions,
        segments=torch.zeros_like(positions),
        protected=torch.ones_like(positions, dtype=torch.bool),
        original=lengths,
        width=max(sizes),
    )
    return PackedTokens(hidden, layout.knowing(sizes))
