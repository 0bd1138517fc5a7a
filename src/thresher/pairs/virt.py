"""VIRT (Li et al. 2022): a dual-encoder that learns to look across as a cross-encoder does, and looks across once, at its end.

What the last step computes exactly is chosen here: it has no weights of its own, and its two results are compared like a
dual-encoder's vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from thresher.backbones.opened import OpenedLayer, open_layers
from thresher.pairs.cache import Block
from thresher.pairs.config import ScorerConfig
from thresher.pairs.heads import PairHead, Similarity, check_choice
from thresher.pairs.layers import by_head
from thresher.pairs.reading import read, watch
from thresher.pairs.scorer import Query, Scorer


@dataclass(frozen=True, kw_only=True)
class VIRTConfig(ScorerConfig):
    """similarity: of the two sides' vectors."""

    kind: ClassVar[str] = "virt"

    similarity: Similarity = "dot"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("similarity", self.similarity, Similarity)


class VIRT(Scorer[VIRTConfig]):
    """Keeps [n_i, D] of a candidate and [n, D] of a query: the states of all tokens."""

    config_class = VIRTConfig
    chunk = 128

    def __init__(self, encoder: Any, tokenizer: Any, config: VIRTConfig) -> None:
        super().__init__(encoder, tokenizer, config)
        self.layers = open_layers(encoder)
        watch(self.layers)
        self.head = PairHead(encoder.config.hidden_size, config.classes, config.similarity)

    def candidate_states(self, rows: Sequence[Sequence[int]]) -> Block:
        states = read(self.encoder, rows).last
        assert states is not None
        return Block(states.hidden, states.sizes)

    def query_states(self, rows: Sequence[Sequence[int]]) -> list[Query]:
        states = read(self.encoder, rows, reduced=True).last
        assert states is not None
        return [(row,) for row in states.rows()]

    def match_flops(self, query: Query, block: Block) -> int:
        (states,) = query
        logits, seen = 2 * len(block.values) * states.numel(), 2 * block.values.numel()
        return logits + seen + len(block) * (2 * states.numel() + self.head.flops)

    def match(self, query: Query, block: Block) -> Tensor:
        """Each side's tokens attend over the other side's states, and what they find is averaged: with X [n, D] of the query
        and Y [m, D] of a candidate, u = mean softmax(X Y^T / sqrt D) Y and v = mean softmax(Y X^T / sqrt D) X.
        """
        with torch.autocast(block.values.device.type, enabled=False):
            u, v = _across(query[0].float(), block)
        return self.head(v, u)  # type: ignore[no-any-return]

    def imitation(self, teacher: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor | None:
        """Mean squared difference of the attention maps across, of every layer and head, in both directions: the teacher's from
        reading both texts together, ours from one side's queries and the other side's keys, read apart.

        Each map is a softmax over the other side's tokens alone. Raises OptionError where the teacher has another shape.
        """
        numbers = range(1, len(self.layers) + 1)
        reference = teacher.layer_inputs(pairs, numbers, like=self.encoder)
        (before, after), (before_candidate, after_candidate) = self.query_room(), self.candidate_room()
        asked = [[*before, *query, *after] for query, _ in pairs]
        offered = [[*before_candidate, *candidate, *after_candidate] for _, candidate in pairs]
        ours = [read(self.encoder, rows, entering=numbers, last=False).entering for rows in (asked, offered)]
        teachers = open_layers(teacher.encoder)
        losses = []
        for number in numbers:
            layer, guide = self.layers[number - 1], teachers[number - 1]
            sides = [states[number].rows() for states in ours]
            for pair, (query, candidate) in enumerate(pairs):
                x = sides[0][pair][len(before) : len(before) + len(query)]
                y = sides[1][pair][len(before_candidate) : len(before_candidate) + len(candidate)]
                both = reference[number][pair]
                a = both[teacher.query_place(query)]
                b = both[teacher.candidate_place(query, candidate)]
                for (own, other), (of, over) in (((x, y), (a, b)), ((y, x), (b, a))):
                    if len(own) and len(other):
                        with torch.no_grad():
                            wanted = _map(guide, of, over)
                        losses.append((_map(layer, own, other) - wanted).square().sum(-1).mean())
        return torch.stack(losses).mean() if losses else None


def _across(states: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """u and v of every candidate, [N, D]. states: [n, D] float32. The means are taken of the weights, so that nothing of
    [n, m, D] exists."""
    values, owners, count = block.values.float(), block.owners, len(block)
    logits = values @ states.T / states.shape[1] ** 0.5  # [T, n]
    largest: Tensor = torch.segment_reduce(logits.detach(), "max", lengths=block.lengths, axis=0)  # [N, n]
    exponents = (logits - largest[owners]).exp()
    sums = exponents.new_zeros(count, len(states)).index_add(0, owners, exponents)
    seen = (exponents / sums[owners]).mean(1, keepdim=True)  # [T, 1], how much the query's tokens look at it
    u = values.new_zeros(count, states.shape[1]).index_add(0, owners, seen * values)
    weights = logits.softmax(-1)
    looked = weights.new_zeros(count, len(states)).index_add(0, owners, weights) / block.lengths.unsqueeze(1)
    return u, looked @ states


def _map(layer: OpenedLayer, queries: Tensor, keys: Tensor) -> Tensor:
    """[H, n, m], the attention of `queries` [n, D] over `keys` [m, D] by a layer's projections."""
    q, k = by_head(layer.query(queries), layer.heads), by_head(layer.key(keys), layer.heads)
    return (q @ k.transpose(1, 2) * layer.scale).softmax(-1)
