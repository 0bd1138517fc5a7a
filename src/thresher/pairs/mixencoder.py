"""MixEncoder (Yang et al. 2023, "Once is Enough"): candidates of k vectors look at a query that is encoded once.

Where the paper leaves something open, what is chosen here is written beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from thresher.backbones.opened import OpenedLayer, open_layers
from thresher.errors import OptionError
from thresher.pairs.cache import Block
from thresher.pairs.config import ScorerConfig
from thresher.pairs.heads import PairHead, Similarity, check_choice
from thresher.pairs.interaction import Interaction, Residual
from thresher.pairs.layers import Linears, by_head
from thresher.pairs.reading import States, read, watch
from thresher.pairs.scorer import Query, Scorer

Strategy = Literal["S", "C", "M"]
Start = Literal["paper", "dual"]
SHARE = 0.2  # of what interacted, where a scorer starts as a dual-encoder


@dataclass(frozen=True, kw_only=True)
class MixEncoderConfig(ScorerConfig):
    """The defaults are MixEncoder-a.

    k: vectors kept of a candidate.
    layers: the interaction layers, counted from the last: -1 the last, -2 the one before it; or from 1, the first.
    strategy: "S", the outputs of k learned vectors read in place of [CLS]; "C", k codes that attend over a candidate's states;
        "M", the means of k equal pieces of these states (k = 1: of all of them), which have no weights to learn.
    start: "paper", the head compares H and E alone; "dual", it compares the query's mean state + a H and the mean of what was
        kept + b E, a and b learned and small at first, so that with strategy "M" and cosine a sentence encoder starts about
        as good as it is.
    similarity: "dot" as the released code, "cosine" as the paper's 3.2. With classes an MLP on [h; e; |h - e|] instead.
    use_h: False for the ablation without H (table 3): the query is its [CLS] state, the same for every candidate.
    use_e: False for the ablation without E: a candidate stays what was kept of it.
    residual: what is added to the query's side of an interaction behind attention, which the paper does not say: "attended",
        the query's states averaged with that attention, as a token of the query carries its own state along; "previous",
        H_{j-1}.
    """

    kind: ClassVar[str] = "mixencoder"

    k: int = 1
    layers: tuple[int, ...] = (-1,)
    strategy: Strategy = "S"
    start: Start = "paper"
    similarity: Similarity = "dot"
    use_h: bool = True
    use_e: bool = True
    residual: Residual = "attended"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("strategy", self.strategy, Strategy)
        check_choice("start", self.start, Start)
        check_choice("similarity", self.similarity, Similarity)
        check_choice("residual", self.residual, Residual)
        if self.k < 1:
            raise OptionError(f"A candidate is kept as at least 1 vector, not {self.k}.")
        if not self.layers:
            raise OptionError("MixEncoder needs at least one interaction layer.")
        if not (self.use_h or self.use_e):
            raise OptionError("Without both H and E nothing interacts; that is a dual-encoder.")

    @classmethod
    def a(cls, **settings: Any) -> Self:
        """MixEncoder-a: k = 1, the last layer."""
        return cls(**{"k": 1, "layers": (-1,), **settings})

    @classmethod
    def b(cls, **settings: Any) -> Self:
        """MixEncoder-b: k = 1, the last three layers."""
        return cls(**{"k": 1, "layers": (-3, -2, -1), **settings})

    @classmethod
    def c(cls, **settings: Any) -> Self:
        """MixEncoder-c: k = 2, the last three layers."""
        return cls(**{"k": 2, "layers": (-3, -2, -1), **settings})

    def numbers(self, count: int) -> tuple[int, ...]:
        """The interaction layers of an encoder of `count` layers, counted from 1, ascending. Raises OptionError."""
        found = sorted(number + count + 1 if number < 0 else number for number in self.layers)
        if found[0] < 1 or found[-1] > count or len(set(found)) < len(found):
            raise OptionError(
                f"The interaction layers {self.layers} are not different ones of an encoder of {count} layers."
            )
        return tuple(found)


class MixEncoder(Scorer[MixEncoderConfig]):
    """Keeps [k, D] of a candidate; of a query, for each interaction layer, its keys and values [H, n, d] and the states [n, D]
    that entered the layer; last, where the head needs it, a state of its own [D]: without H the [CLS] state, started as a
    dual-encoder the mean of all."""

    config_class = MixEncoderConfig
    chunk = 512

    def __init__(self, encoder: Any, tokenizer: Any, config: MixEncoderConfig) -> None:
        super().__init__(encoder, tokenizer, config)
        layers = open_layers(encoder)
        watch(layers)
        self.numbers = config.numbers(len(layers))
        self.opened: tuple[OpenedLayer, ...] = tuple(layers[number - 1] for number in self.numbers)
        self.linears = Linears(encoder)
        size = encoder.config.hidden_size
        self.context = _context(encoder, tokenizer, config)
        self.share = nn.Parameter(torch.full((2,), SHARE)) if config.start == "dual" else None
        self.interactions = nn.ModuleList(
            Interaction(layer, size, use_h=config.use_h, use_e=config.use_e, residual=config.residual)
            for layer in self.opened
        )
        self.head = PairHead(size, config.classes, config.similarity)

    def candidate_room(self) -> tuple[list[int], list[int]]:
        return ([] if self.config.strategy == "S" else self.frame.before), self.frame.after

    def candidate_rows(self, texts: Sequence[Any]) -> tuple[list[list[int]], int]:
        vectors = self.config.k if self.config.strategy == "S" else 0
        return self._framed(texts, self.candidate_room(), self.config.max_candidate - vectors)

    def candidate_states(self, rows: Sequence[Sequence[int]]) -> Block:
        k = self.config.k
        if self.config.strategy == "S":
            states = read(self.encoder, rows, vectors=self.context).last
            assert states is not None
            kept = [row[:k] for row in states.rows()]
        else:
            states = read(self.encoder, rows).last
            assert states is not None
            kept = [self._pooled(row) for row in states.rows()]
        return Block(torch.cat(kept), [k] * len(rows))

    def _pooled(self, row: Tensor) -> Tensor:
        """[n, D] → [k, D]"""
        if self.context is not None:
            return torch.softmax(self.context @ row.T, -1) @ row
        starts = [i * len(row) // self.config.k for i in range(self.config.k + 1)]
        return torch.stack([row[a : max(b, a + 1)].mean(0) for a, b in pairwise(starts)])

    @property
    def _whole(self) -> bool:
        """Whether a query is read to the end, for a state of its own."""
        return self.share is not None or not self.config.use_h

    def query_states(self, rows: Sequence[Sequence[int]]) -> list[Query]:
        reading = read(self.encoder, rows, entering=self.numbers, last=self._whole, reduced=True)
        layers = [
            self._keys_and_values(layer, reading.entering[number])
            for layer, number in zip(self.opened, self.numbers, strict=True)
        ]
        queries = [tuple(x for layer in layers for x in layer[row]) for row in range(len(rows))]
        if not self._whole:
            return queries
        assert reading.last is not None
        own = reading.last.first() if self.share is None else reading.last.mean()
        return [(*query, state) for query, state in zip(queries, own, strict=True)]

    def _keys_and_values(self, layer: OpenedLayer, states: States) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each query its keys and values [H, n, d] and its states [n, D]."""
        both = (by_head(self.linears(linear, states.hidden), layer.heads) for linear in (layer.key, layer.value))
        key, value = (x.split(states.sizes, 1) for x in both)
        return list(zip(key, value, states.rows(), strict=True))

    def ask_flops(self, query: Query, n: int) -> int:
        read = [states.shape[0] for states in query[2 : 3 * len(self.opened) : 3]]
        return sum(4 * tokens * layer.key.weight.numel() for tokens, layer in zip(read, self.opened, strict=True))

    def match_flops(self, query: Query, block: Block) -> int:
        lengths = [states.shape[0] for states in query[2 : 3 * len(self.opened) : 3]]
        each = sum(
            cast(Interaction, interaction).flops(layer, self.config.k, n)
            for interaction, layer, n in zip(self.interactions, self.opened, lengths, strict=True)
        )
        return len(block) * (each + self.head.flops)

    def match(self, query: Query, block: Block) -> Tensor:
        return self.match_each([query], [block])[0]

    def match_each(self, queries: Sequence[Query], blocks: Sequence[Block]) -> list[Tensor]:
        counts = [len(block) for block in blocks]
        kept = blocks[0].dense if len(blocks) == 1 else torch.cat([block.dense for block in blocks])
        e, h = kept, None
        for number, interaction in enumerate(self.interactions):
            looked_at = [query[3 * number : 3 * number + 3] for query in queries]
            e, h = interaction(self.opened[number], self.linears, looked_at, counts, e, h)
        candidate = e.mean(1)
        if self.share is not None and self.config.use_e:
            candidate = kept.mean(1) + self.share[1] * candidate
        asked = h
        if asked is None or self.share is not None:
            own = [query[-1].expand(count, -1) for query, count in zip(queries, counts, strict=True)]
            asked = own[0] if len(own) == 1 else torch.cat(own)
            if self.share is not None and h is not None:
                asked = asked + self.share[0] * h
        return list(self.head(asked, candidate).split(counts))

    @property
    def speaks_apart(self) -> bool:
        return self.share is not None and not self.config.classes

    def apart_each(self, queries: Sequence[Query], blocks: Sequence[Block]) -> list[Tensor]:
        return [
            self.head(query[-1].expand(len(block), -1), block.dense.mean(1))
            for query, block in zip(queries, blocks, strict=True)
        ]


def _context(encoder: Any, tokenizer: Any, config: MixEncoderConfig) -> nn.Parameter | None:
    """What a candidate is summed up with. S: [k, E], which begin as [CLS], so that k = 1 begins as a dual-encoder; positions
    tell them apart. C: [k, D] codes (Humeau et al. 2020). M: nothing."""
    if config.strategy == "M":
        return None
    if config.strategy == "C":
        return nn.Parameter(torch.randn(config.k, encoder.config.hidden_size) * encoder.config.hidden_size**-0.5)
    if config.max_candidate <= config.k + 2:
        raise OptionError(f"max_candidate={config.max_candidate} has no room for a text beside k={config.k} vectors.")
    start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    word = encoder.get_input_embeddings().weight[start].detach()
    return nn.Parameter(word.repeat(config.k, 1))
