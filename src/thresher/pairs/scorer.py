"""The one interface of all scorers: candidates are encoded once, then scored and ranked for each query."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thresher.errors import CheckpointError, DataError, OptionError
from thresher.model import attach, evaluating, is_attached
from thresher.pairs.cache import Block, Cache, Id, Storage, check_count
from thresher.pairs.config import LIMITS, ScorerConfig
from thresher.pairs.encoders import open_encoder, settings_of
from thresher.pairs.lexical import Lexical
from thresher.pairs.reading import by_length, longest
from thresher.pairs.texts import Frame, Text, pairs_of, reads_as, tokens_of
from thresher.policy import PolicyConfig

TOKENS = 4096  # read in one pass: enough to keep every core busy, few enough for the caches and for memory

NO_NUMBER = "A score is no number: the scorer's weights are not, or what it computes overflows; load or train it again."

Query = tuple[Tensor, ...]
"""What a scorer keeps of one query while candidates are matched against it; which tensors, each scorer says."""


@dataclass(frozen=True)
class Asked:
    """One query, ready to be compared. states: as `query_states` gives them. shares: [V], `Lexical.asked`, or None."""

    states: Query
    shares: Tensor | None = None


ConfigT = TypeVar("ConfigT", bound=ScorerConfig)


class Scorer(nn.Module, Generic[ConfigT]):
    """Scores one query against candidates.

    A subclass says what is kept of a candidate (`candidate_states`), of a query (`query_states`), and how the two are matched
    (`match`); the three are differentiable and what training runs. The encoder runs packed; a policy on it reduces queries
    (and the pairs that a joint reader reads), never what is cached of a candidate.

    chunk: candidates matched at a time by default. joint: whether nothing is computed of a candidate before the query is there.
    """

    config_class: ClassVar[type[ScorerConfig]]
    chunk: ClassVar[int] = 1024
    joint: ClassVar[bool] = False
    takes_heads: ClassVar[bool] = False

    def __init__(self, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ConfigT) -> None:
        """encoder: without a head; it is attached (packed, no policy) where it is not yet."""
        super().__init__()
        if encoder.base_model is not encoder and not self.takes_heads:
            raise OptionError(
                f"The {config.called()} reads an encoder without a head, and this is a {type(encoder).__name__}; give its "
                "base_model, or use from_encoder."
            )
        most = longest(encoder)
        for name in LIMITS:
            if (wanted := getattr(config, name)) > most:
                raise OptionError(f"{name}={wanted} is more than the {most} tokens that the encoder has positions for.")
        self.encoder = encoder if is_attached(encoder) else attach(encoder)
        self.tokenizer = tokenizer
        self.config = config
        self.frame = Frame.of(tokenizer)
        # What no scorer reads is not trained either: an optimizer would only let it decay.
        if isinstance(pooler := getattr(self.encoder, "pooler", None), nn.Module):
            pooler.requires_grad_(False)
        self.lexical = None
        if config.lexical:
            vocabulary = max(len(tokenizer), len(encoder.get_input_embeddings().weight))  # type: ignore[arg-type]
            self.lexical = Lexical(vocabulary, tokenizer.all_special_ids, config.lexical, config.max_candidate // 2)

    @classmethod
    def from_encoder(
        cls, source: Any, config: ConfigT | None = None, policy: PolicyConfig | str | None = None, **settings: Any
    ) -> Self:
        """A new scorer, still to be trained, on the encoder in a directory (or of a hub name).

        A cross-encoder keeps the head of a model for sequence classification that has as many logits as it needs, and so
        scores as that model does.

        settings: of the config, e.g. k=2, instead of or over `config`. Without a config, limits that are not given are their
            defaults, or less where the encoder has positions for less.
        policy: one that needs no training, for a scorer's training leaves it as it is. None: the one that `source` was saved
            with, as it was trained; nothing is dropped where there is none.
        Raises CheckpointError where nothing can be loaded from `source`, OptionError for settings that do not fit or a policy
        that knows nothing before it is trained.
        """
        classes = settings.get("classes", 0 if config is None else config.classes)
        encoder, tokenizer = open_encoder(source, policy, max(1, classes) if cls.takes_heads else None)
        limits = {} if config is not None else cls.limits(longest(encoder), settings)
        given = {} if config is None else config.to_dict()
        made: Any = cls.config_class.from_dict({**given, **limits, **settings})
        return cls(encoder, tokenizer, made).eval()

    @classmethod
    def limits(cls, most: int, given: Mapping[str, Any]) -> dict[str, int]:
        """max_query and max_candidate, where they are not given, for an encoder that reads `most` tokens."""
        defaults = {name: getattr(cls.config_class, name) for name in LIMITS}
        return {name: min(value, most) for name, value in defaults.items() if name not in given}

    # What a scorer is.

    def candidate_states(self, rows: Sequence[Sequence[int]]) -> Block:
        """What is kept of candidates, given as `candidate_rows` frames them."""
        raise NotImplementedError

    def query_states(self, rows: Sequence[Sequence[int]]) -> list[Query]:
        """What is kept of queries, given as `query_rows` frames them."""
        raise NotImplementedError

    def match(self, query: Query, block: Block) -> Tensor:
        """[N] float32 scores; [N, C] logits where the config has classes."""
        raise NotImplementedError

    def match_each(self, queries: Sequence[Query], blocks: Sequence[Block]) -> list[Tensor]:
        """`match` of each query with the block of its place; the scores depend on the company by rounding only."""
        return [self.match(query, block) for query, block in zip(queries, blocks, strict=True)]

    def query_room(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a query."""
        return self.frame.before, self.frame.after

    def candidate_room(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a candidate. Vectors that are put before it take room of their own."""
        return self.frame.before, self.frame.after

    def ask_flops(self, query: Query, n: int) -> int:
        """What reading a query costs beyond the encoder's passes, of which the last one ends with n tokens."""
        return 0

    def match_flops(self, query: Query, block: Block) -> int:
        """What `match` costs; of a joint scorer its passes say it."""
        raise NotImplementedError

    # The same with the lexical signal, where the config has it.

    def ask(self, rows: Sequence[Sequence[int]]) -> list[Asked]:
        """Queries as `compare` takes them, given as `query_rows` frames them."""
        states = self.query_states(rows)
        if self.lexical is None:
            return [Asked(one) for one in states]
        return [Asked(one, self.lexical.asked(row)) for one, row in zip(states, rows, strict=True)]

    def offer(self, rows: Sequence[Sequence[int]]) -> Block:
        """Candidates as `compare` takes them, given as `candidate_rows` frames them."""
        block = self.candidate_states(rows)
        return block if self.lexical is None else replace(block, terms=self.lexical.terms(rows).to(self.device))

    def compare(self, asked: Asked, block: Block) -> Tensor:
        """[N] scores; [N, C] logits where the config has classes. Raises DataError for candidates kept without terms."""
        return self.compare_each([asked], [block])[0]

    def compare_each(self, asked: Sequence[Asked], blocks: Sequence[Block]) -> list[Tensor]:
        """`compare` of each query with the block of its place."""
        scores = self.match_each([one.states for one in asked], blocks)
        if self.lexical is None:
            return scores
        found = []
        for one, block, score in zip(asked, blocks, scores, strict=True):
            if block.terms is None or one.shares is None:
                raise DataError(
                    "This scorer compares terms, and the candidates were encoded without; encode them again."
                )
            found.append(score + self.lexical(one.shares, block.terms))
        return found

    # What a caller does with it.

    @property
    def device(self) -> torch.device:
        return self.encoder.device  # type: ignore[no-any-return]

    @property
    def signature(self) -> str:
        """Kind and the settings that a candidate depends on: a cache is of use to scorers with the same one, as long as the
        weights are the same."""
        settings = {"hidden": self.encoder.config.hidden_size, **self.config.to_dict()}
        del settings["max_query"]
        return f"{self.config.kind} {json.dumps(settings, sort_keys=True)}"

    def fingerprint(self) -> str:
        """SHA-256 of signature, weights, tokenizer and the encoder's settings, hexadecimal: what a store is stamped with.

        Takes a moment for large models.
        """
        digest = hashlib.sha256(self.signature.encode())
        read = [settings_of(self.encoder), reads_as(self.tokenizer)]
        digest.update(json.dumps(read, sort_keys=True, default=str).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def query_rows(self, queries: Sequence[Text]) -> tuple[list[list[int]], int]:
        """Token ids as a query is read, and how many were cut. Raises DataError for what is no text."""
        return self._framed(queries, self.query_room(), self.config.max_query)

    def candidate_rows(self, texts: Sequence[Text]) -> tuple[list[list[int]], int]:
        """Token ids as a candidate is read, and how many were cut. Raises DataError for what is no text."""
        return self._framed(texts, self.candidate_room(), self.config.max_candidate)

    def _framed(
        self, texts: Sequence[Text], room: tuple[list[int], list[int]], limit: int
    ) -> tuple[list[list[int]], int]:
        before, after = room
        found = tokens_of(texts, self.tokenizer, limit - len(before) - len(after))
        return [[*before, *row, *after] for row in found.rows], found.cut

    def encode_candidates(
        self,
        texts: Sequence[Text],
        ids: Sequence[Id] | None = None,
        *,
        storage: Storage = "float32",
        batch_tokens: int = TOKENS,
    ) -> Cache:
        """What is kept of each candidate, on the CPU, in the order of `texts`.

        ids: texts or numbers, none twice; by default 0..N-1. batch_tokens: read in one pass; the result depends on it by
        rounding only. Warns of candidates that were cut.
        Raises DataError for no candidates, ids that do not fit them, or what is no text.
        """
        rows, cut = self.candidate_rows(texts)
        if not rows:
            raise DataError("There are no candidates; give at least one.")
        if ids is not None and len(ids) != len(rows):
            raise DataError(f"{len(ids)} ids do not fit {len(rows)} candidates.")
        found: list[Tensor | None] = [None] * len(rows)
        with self.answering():
            for index in by_length([len(row) for row in rows], batch_tokens):
                states = self.candidate_states([rows[i] for i in index])
                for i, vectors in zip(index, states.values.cpu().split(states.sizes), strict=True):
                    found[i] = vectors
        whole = [vectors for vectors in found if vectors is not None]
        data, lengths = torch.cat(whole), torch.tensor([len(v) for v in whole])
        names = tuple(range(len(rows)) if ids is None else ids)
        terms = None if self.lexical is None else self.lexical.terms(rows)
        cache = Cache(names, data, lengths, self.signature, cut=cut, terms=terms)
        if data.is_floating_point():
            cache = cache.to(storage)
        if (notice := cache.notice()) is not None:
            warnings.warn(notice + ".", stacklevel=2)
        return cache

    def score(self, query: Text, candidates: Cache | Sequence[Text], *, chunk: int | None = None) -> Tensor:
        """[N] float32 on the encoder's device, in the order of the candidates; [N, C] logits where the config has classes > 1.

        candidates: a cache, or texts.
        chunk: candidates matched at a time; memory grows with it, the scores depend on it by rounding only.
        Warns of a query that was cut. Raises DataError for a cache of another scorer and where a score is no number,
        OptionError for a chunk below 1.
        """
        cache = candidates if isinstance(candidates, Cache) else self.encode_candidates(candidates)
        self.check_cache(cache)
        size = self.chunk if chunk is None else check_count(chunk, "A chunk has")
        found = self.score_blocks(query, cache.blocks(size, self.device))
        if bool(found.isnan().any()):
            raise DataError(NO_NUMBER)
        return found

    def check_cache(self, cache: Cache) -> None:
        """Raises DataError for a cache of another scorer."""
        if cache.signature != self.signature:
            raise DataError(f"The cache was made by {cache.signature}, and this scorer is {self.signature}.")

    def score_blocks(self, query: Text, blocks: Iterable[Block]) -> Tensor:
        """As `score`, of candidates that lie elsewhere (in a store): one block on the encoder's device after the other, so that
        memory is bounded by a block. Whether this scorer made them is for the caller to know. Raises DataError for no blocks.
        """
        rows, cut = self.query_rows([query])
        if cut:
            warnings.warn(f"The query is longer than {self.config.max_query} tokens and was cut.", stacklevel=3)
        with self.answering():
            (asked,) = self.ask(rows)
            found = [self.compare(asked, block) for block in blocks]
        if not found:
            raise DataError("There are no candidates; give at least one.")
        return torch.cat(found).to(torch.float32)

    def rank(
        self, query: Text, candidates: Cache | Sequence[Text], k: int | None = None, *, chunk: int | None = None
    ) -> list[tuple[Id, float]]:
        """The best k candidates (all where there are fewer), best first, with their scores; of equal ones the earlier first.

        candidates: a cache; or texts, whose ids are then their places.
        Raises OptionError for k below 1 or a scorer of several classes; the rest as in `score`.
        """
        k = None if k is None else check_count(k, "Ranking gives")
        if self.config.classes > 1:
            raise OptionError(f"A scorer of {self.config.classes} classes does not rank; use score or predict.")
        cache = candidates if isinstance(candidates, Cache) else self.encode_candidates(candidates)
        scores = self.score(query, cache, chunk=chunk)
        best = scores.argsort(descending=True, stable=True)[:k]
        return [(cache.ids[i], value) for i, value in zip(best.tolist(), scores[best].tolist(), strict=True)]

    def predict(self, pairs: Sequence[tuple[Text, Text]]) -> np.ndarray:
        """[n] float32 scores of (query, candidate) pairs in their order; [n, C] logits where the config has classes > 1.

        A text that comes up in many pairs is encoded once. Raises DataError for no pairs.
        """
        pairs = pairs_of(pairs)
        if not pairs:
            raise DataError("There are no pairs; give at least one.")
        queries, candidates = ([_key(pair[side]) for pair in pairs] for side in (0, 1))
        places = {text: place for place, text in enumerate(dict.fromkeys(candidates))}
        cache = self.encode_candidates(list(places))
        out: list[Tensor | None] = [None] * len(pairs)
        for query in dict.fromkeys(queries):
            asked = [i for i, text in enumerate(queries) if text == query]
            wanted = list(dict.fromkeys(places[candidates[i]] for i in asked))
            scores = dict(zip(wanted, self.score(query, cache.select(wanted)).cpu(), strict=True))
            for i in asked:
                out[i] = scores[places[candidates[i]]]
        return torch.stack([one for one in out if one is not None]).numpy()

    def save(self, directory: Any) -> None:
        """Write everything that `thresher.pairs.load` reads; see `thresher.pairs.saving`."""
        from thresher.pairs.saving import save

        save(self, directory)

    def save_pretrained(self, save_directory: Any) -> None:
        """`save`, by the name that Hugging Face models have for it."""
        self.save(save_directory)

    @classmethod
    def from_pretrained(cls, directory: Any, *, device: str | torch.device | None = None) -> Self:
        """`thresher.pairs.load`, for a scorer of this kind. Raises CheckpointError also for one of another."""
        from thresher.pairs.saving import load

        found = load(directory, device=device)
        if not isinstance(found, cls):
            raise CheckpointError(
                f"{directory} holds a scorer {found.config.kind!r}, no {cls.__name__}; load it with thresher.pairs.load."
            )
        return found

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """eval mode and no gradients inside the block."""
        mode = evaluating(self) if self.training or self.encoder.training else contextlib.nullcontext()
        with mode, torch.inference_mode():
            yield

    @property
    def speaks_apart(self) -> bool:
        """Whether `apart_each` has something to say."""
        return False

    def apart_each(self, queries: Sequence[Query], blocks: Sequence[Block]) -> list[Tensor]:
        """Scores as `match_each` gives them, of what a query and a candidate are before they interact."""
        raise NotImplementedError

    def imitation(self, teacher: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor | None:
        """What distillation adds to the teacher's scores: a loss over (query row, candidate row) pairs; None for nothing."""
        return None


def _key(text: Text) -> Any:
    return tuple(text) if isinstance(text, Sequence) and not isinstance(text, str) else text
