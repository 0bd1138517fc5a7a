"""Cross-encoder (Nogueira and Cho 2019): every pair is read as one; nothing is computed before the query is there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from thresher.backbones.opened import open_layers
from thresher.errors import OptionError
from thresher.pairs.cache import Block
from thresher.pairs.config import LEAST, LIMITS, ScorerConfig
from thresher.pairs.heads import JointHead
from thresher.pairs.reading import Reading, by_length, longest, read, watch
from thresher.pairs.scorer import Query, Scorer
from thresher.pairs.texts import pair

TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class CrossConfig(ScorerConfig):
    """max_query and max_candidate: as in every scorer, so that all of them read the same texts."""

    kind: ClassVar[str] = "cross"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lexical:
            raise OptionError("A cross-encoder reads the tokens themselves; leave lexical at 0.")


class CrossEncoder(Scorer[CrossConfig]):
    """Keeps token ids [n_i, 1] of a candidate and [n] of a query. A policy on the encoder reduces the pairs, and an early exit
    that the model was fitted with lets pairs leave.

    encoder: without a head, on which a new one is put; or a trained model for sequence classification with as many logits as
        the config has classes (one for 0).
    """

    config_class = CrossConfig
    chunk = 256
    joint = True
    takes_heads = True

    def __init__(self, encoder: Any, tokenizer: Any, config: CrossConfig) -> None:
        super().__init__(encoder, tokenizer, config)
        most = longest(encoder)
        if config.max_query + config.max_candidate > most:
            raise OptionError(
                f"max_query={config.max_query} and max_candidate={config.max_candidate} make pairs longer than the {most} "
                "tokens that the encoder has positions for."
            )
        self.headed = encoder.base_model is not encoder
        wanted = max(1, config.classes)
        if self.headed and encoder.config.num_labels != wanted:
            raise OptionError(
                f"The model has {encoder.config.num_labels} logits, and {wanted} are needed; set classes."
            )
        self.head = None if self.headed else JointHead(encoder.config.hidden_size, config.classes)

    @classmethod
    def limits(cls, most: int, given: Mapping[str, Any]) -> dict[str, int]:
        """As in every scorer, but both sides share the encoder's positions: in the proportion of the defaults, or one has what
        the other that is given leaves."""
        found = super().limits(most, given)
        if len(found) == 2:
            candidate = CrossConfig.max_candidate
            found["max_candidate"] = min(candidate, candidate * most // (CrossConfig.max_query + candidate))
            found["max_query"] = min(CrossConfig.max_query, most - found["max_candidate"])
            return found
        left = most - sum(given.get(name, 0) for name in LIMITS)
        return {name: max(LEAST, min(value, left)) for name, value in found.items()}

    def query_room(self) -> tuple[list[int], list[int]]:
        return [], []

    def candidate_room(self) -> tuple[list[int], list[int]]:
        return [], []

    def query_rows(self, queries: Sequence[Any]) -> tuple[list[list[int]], int]:
        room = self.config.max_query - len(self.frame.before) - len(self.frame.between[:1])
        return self._framed(queries, ([], []), room)

    def candidate_rows(self, texts: Sequence[Any]) -> tuple[list[list[int]], int]:
        room = self.config.max_candidate - len(self.frame.between[1:]) - len(self.frame.after)
        return self._framed(texts, ([], []), room)

    def candidate_states(self, rows: Sequence[Sequence[int]]) -> Block:
        # One number stands where a text is empty, since a candidate has at least one vector.
        kept = [[*row] or [_EMPTY] for row in rows]
        ids = torch.tensor([number for row in kept for number in row], dtype=torch.int32, device=self.device)
        return Block(ids.unsqueeze(1), [len(row) for row in kept])

    def query_states(self, rows: Sequence[Sequence[int]]) -> list[Query]:
        return [(torch.tensor(row, dtype=torch.int32),) for row in rows]

    def match(self, query: Query, block: Block) -> Tensor:
        return self.match_each([query], [block])[0]

    def match_each(self, queries: Sequence[Query], blocks: Sequence[Block]) -> list[Tensor]:
        framed = [
            pair(query[0].tolist(), [n for n in row.flatten().tolist() if n != _EMPTY], self.frame)
            for query, block in zip(queries, blocks, strict=True)
            for row in block.rows()
        ]
        found: dict[int, Tensor] = {}
        for index in by_length([len(ids) for ids, _ in framed], TOKENS):
            reading = self._read([framed[i] for i in index], reduced=True)
            found.update(zip(index, self._said(reading), strict=True))
        return list(torch.stack([found[i] for i in range(len(framed))]).split([len(block) for block in blocks]))

    def _read(
        self, framed: Sequence[tuple[list[int], list[int]]], *, reduced: bool, entering: Collection[int] = ()
    ) -> Reading:
        ids, types = zip(*framed, strict=True)
        return read(self.encoder, ids, types=types, reduced=reduced, entering=entering)

    def _said(self, reading: Reading) -> Tensor:
        if self.head is not None:
            assert reading.last is not None
            return self.head(reading.last.first())  # type: ignore[no-any-return]
        assert reading.logits is not None
        return reading.logits.squeeze(-1) if reading.logits.shape[-1] == 1 else reading.logits

    # What distillation asks of a teacher.

    def layer_inputs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], layers: Collection[int], like: PreTrainedModel
    ) -> dict[int, tuple[Tensor, ...]]:
        """The states [n, D] that enter the layers (from 1), of every pair; nothing is dropped, and no gradient is kept.

        Raises OptionError where this encoder's layers are not as many or as wide as those of `like`.
        """
        self._check_shape(like)
        return {number: states.rows() for number, states in self._entering(pairs, layers).entering.items()}

    def layer_states(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], layers: Collection[int], like: PreTrainedModel
    ) -> list[tuple[Tensor, ...]]:
        """What the layers (from 1, ascending, up to the last one) end with: for each of them [n, D] of every pair.

        Raises OptionError as `layer_inputs`.
        """
        self._check_shape(like)
        reading = self._entering(pairs, [number + 1 for number in layers][:-1])
        if reading.last is None:
            raise OptionError(
                "A teacher with a head of its own does not hand out its last layer; take one on a plain encoder."
            )
        return [*(reading.entering[number].rows() for number in sorted(reading.entering)), reading.last.rows()]

    def _entering(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], layers: Collection[int]) -> Reading:
        watch(open_layers(self.encoder))
        framed = [pair(list(query), list(candidate), self.frame) for query, candidate in pairs]
        with torch.no_grad():
            return self._read(framed, reduced=False, entering=layers)

    def _check_shape(self, like: PreTrainedModel) -> None:
        own, other = (
            (e.config.num_hidden_layers, e.config.hidden_size, e.config.num_attention_heads)
            for e in (self.encoder, like)
        )
        if own != other:
            raise OptionError(
                f"The teacher has {own[0]} layers of {own[1]} with {own[2]} heads and the scorer {other[0]} of {other[1]} with "
                f"{other[2]}; what happens inside can be imitated only where they are the same."
            )

    def query_place(self, query: Sequence[int]) -> slice:
        """Where a pair's query lies, without special tokens."""
        start = len(self.frame.before)
        return slice(start, start + len(query))

    def candidate_place(self, query: Sequence[int], candidate: Sequence[int]) -> slice:
        """Where a pair's candidate lies, without special tokens."""
        start = len(self.frame.before) + len(query) + len(self.frame.between)
        return slice(start, start + len(candidate))


_EMPTY = -1
