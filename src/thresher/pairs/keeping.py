"""A scorer with its candidates in a store: they are encoded once, kept on disk, and scored chunk by chunk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from thresher.errors import DataError, OptionError, StoreError
from thresher.pairs import store as stores
from thresher.pairs.cache import Block, Cache, check_count, check_ids
from thresher.pairs.scorer import NO_NUMBER, TOKENS, Scorer
from thresher.pairs.store import Candidates
from thresher.pairs.store.base import PresentError
from thresher.pairs.store.schema import VECTORS
from thresher.pairs.texts import Text

if TYPE_CHECKING:
    from thresher.pairs.store.places import Store

BATCH = 2048  # candidates encoded and committed at a time: what an interruption loses at most
CUT = "longer than the limit"
TERMS = "terms"


@dataclass(frozen=True)
class Added:
    """What became of the candidates: how many are new in the store, how many were there already, and how many of the new ones
    were cut to the scorer's limit."""

    new: int
    there: int
    cut: int

    def warn(self) -> None:
        """Warn of candidates that were cut, on behalf of the caller's caller."""
        if self.cut:
            were = "was" if self.cut == 1 else "were"
            warnings.warn(f"{self.cut} of {self.new} candidates {were} {CUT} and {were} cut.", stacklevel=3)


class Index:
    """A scorer and the store of its candidates. Made by `create` or `open`, which both keep the store to this very scorer.

    What is kept is what `Scorer.encode_candidates` gives in the storage of the same name, and it is scored the same.
    """

    def __init__(self, scorer: Scorer[Any], store: Store) -> None:
        """store: made for this scorer, which is not checked here."""
        self.scorer = scorer
        self.store = store

    @classmethod
    def create(cls, scorer: Scorer[Any], directory: str | Path, *, dtype: str = "float16") -> Index:
        """An empty store in `directory`, stamped with the scorer's fingerprint and signature: files there; or, for a URI
        (s3://bucket/store) and for a name that ends with .lance, a Lance table, which needs the extra `lance`.

        dtype: float32, float16 or int8. Raises StoreError as `CandidateStore.create` does; OptionError for a cross-encoder, of
        whose candidates nothing is computed beforehand.
        """
        k, dim, ragged = _shape(scorer)
        store = stores.create(
            directory,
            fingerprint=scorer.fingerprint(),
            strategy=scorer.signature,
            k=k,
            dim=dim,
            dtype=dtype,
            ragged=ragged,
            extras={TERMS: ((scorer.config.lexical,), "int32")} if scorer.config.lexical else None,
        )
        return cls(scorer, store)

    @classmethod
    def open(cls, scorer: Scorer[Any], directory: str | Path, *, dtype: str | None = None) -> Index:
        """The store in `directory`. Raises StoreError where another scorer, or this one with other weights, filled it, or where
        it keeps another dtype than the one that is given."""
        if scorer.config.lexical:
            _check_terms(directory)
        store = stores.open_store(directory, scorer.fingerprint(), strategy=scorer.signature, dtype=dtype)
        return cls(scorer, store)

    def close(self) -> None:
        """Let the next writer in; neither adds nor scores any more."""
        self.store.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.store)

    def add(
        self,
        candidates: Iterable[tuple[str, Text]],
        *,
        batch: int = BATCH,
        batch_tokens: int = TOKENS,
        on_done: Callable[[int], None] | None = None,
    ) -> Added:
        """Encode (id, text) candidates and keep them, `batch` at a time; each batch is committed as a whole.

        Ids that the store has from before are skipped, whatever their text, so that after an interruption or an error the same
        call goes on where it stopped. Memory is that of a batch, and of the ids.

        batch_tokens: as in `Scorer.encode_candidates`. on_done: called with the number of candidates just dealt with.
        Warns once, at the end, of candidates that were cut.
        Raises OptionError for a batch below 1, DataError for an id that is empty, no text or given twice, or for what is no
        text, StoreError as `CandidateStore.add` does; batches before that are kept.
        """
        batch = check_count(batch, "A batch has")
        self.store.hold()  # another writer may have been here since this handle was opened
        seen: set[str] = set()
        new = there = cut = 0
        rest = _iterated(candidates)
        while given := list(islice(rest, batch)):
            check_new(given, seen)
            missing = [
                one for one, known in zip(given, self.store.contains(i for i, _ in given), strict=True) if not known
            ]
            kept, shortened = self._keep(missing, batch_tokens) if missing else (0, 0)
            new, there, cut = new + kept, there + len(given) - kept, cut + shortened
            if on_done is not None:
                on_done(len(given))
        added = Added(new, there, cut)
        added.warn()
        return added

    def update(self, candidates: Iterable[tuple[str, Text]], *, batch_tokens: int = TOKENS) -> None:
        """Encode (id, text) candidates that are there anew, and replace what is kept of them: all in one commit.

        Warns of candidates that were cut. Raises DataError as `add`, StoreError as `CandidateStore.update` does; then nothing
        has changed.
        """
        given = list(_iterated(candidates))
        check_new(given, set())
        if not given:
            return
        cache = self._encoded(given, batch_tokens)
        names, vectors, options = self._columns([name for name, _ in given], *_arrays(cache))
        self.store.update(names, vectors, **options)
        Added(len(given), 0, cache.cut).warn()

    def delete(self, ids: Iterable[str]) -> None:
        """Take candidates away, all in one commit. Raises StoreError, and changes nothing, for an id that is not there."""
        self.store.delete(ids)

    def _keep(self, candidates: Sequence[tuple[str, Text]], batch_tokens: int) -> tuple[int, int]:
        """Encode and commit; how many were added, and how many cut."""
        cache = self._encoded(candidates, batch_tokens)
        return self.put([name for name, _ in candidates], *_arrays(cache)), cache.cut

    def _encoded(self, candidates: Sequence[tuple[str, Text]], batch_tokens: int) -> Cache:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".*{CUT}")  # counted, and said once for all batches
            return self.scorer.encode_candidates([text for _, text in candidates], batch_tokens=batch_tokens)

    def _columns(
        self, names: Sequence[str], data: np.ndarray, lengths: np.ndarray, terms: np.ndarray | None
    ) -> tuple[Sequence[str], np.ndarray, dict[str, Any]]:
        """What the store's `add` and `update` take: ids, vectors, and the rest by name."""
        options: dict[str, Any] = {} if terms is None else {"extras": {TERMS: terms}}
        if self.store.schema.ragged:
            return names, data, {**options, "lengths": lengths}
        return names, data.reshape(len(names), -1, data.shape[-1]), options

    def put(self, names: Sequence[str], data: np.ndarray, lengths: np.ndarray, terms: np.ndarray | None) -> int:
        """Commit candidates that this scorer encoded, wherever that was: data [T, d] float32, lengths [N], terms [N, M].

        Returns how many were added: those that another writer added meanwhile stay as they are.

        Raises StoreError as `CandidateStore.add` does.
        """
        ids, vectors, options = self._columns(names, data, lengths, terms)
        try:
            self.store.add(ids, vectors, **options)
        except PresentError as error:
            left = np.array([name not in error.names for name in names])
            if not left.any():
                return 0
            kept = [name for name, still in zip(names, left, strict=True) if still]
            return self.put(kept, data[np.repeat(left, lengths)], lengths[left], None if terms is None else terms[left])
        return len(names)

    def score(self, query: Text, ids: Sequence[str] | None = None, *, chunk: int | None = None) -> Tensor:
        """[N] float32 on the scorer's device, in the order of `ids`, or else of `store.ids()`; [N, C] logits where the scorer
        has classes > 1.

        chunk: candidates read and matched at a time, the scorer's own number by default; memory is that of a chunk and of the
        scores. Warns of a query that was cut.
        Raises DataError for no candidates or an id given twice, StoreError for one that is not there, OptionError for a chunk
        below 1.
        """
        return self.scorer.score_blocks(query, self.blocks(ids, chunk))

    def rank(
        self, query: Text, k: int | None = 10, ids: Sequence[str] | None = None, *, chunk: int | None = None
    ) -> list[tuple[str, float]]:
        """The best k candidates (all for None, or where there are fewer), best first, with their scores; of equal ones the
        smaller id first, so that the order in which they were added does not show.

        ids: only these. The rest, errors too, as in `score`; OptionError also for k below 1 and a scorer of several classes,
        StoreError where a score is no number because a file is damaged.
        """
        k = None if k is None else check_count(k, "Ranking gives")
        if self.scorer.config.classes > 1:
            raise OptionError(f"A scorer of {self.scorer.config.classes} classes does not rank; use score.")
        names: list[Sequence[str]] = []
        scores = self.scorer.score_blocks(query, self.blocks(ids, chunk, names)).flatten().cpu().numpy()
        if np.isnan(scores).any():
            self.store.verify()  # the scorer's weights are numbers, or it would not have loaded
            raise DataError(NO_NUMBER)
        return _best(scores, names, k)

    def blocks(
        self, ids: Sequence[str] | None = None, chunk: int | None = None, names: list[Sequence[str]] | None = None
    ) -> Iterator[Block]:
        """The candidates chunk by chunk, as they are matched, on the scorer's device; the ids of each chunk go into `names`."""
        size = self.scorer.chunk if chunk is None else check_count(chunk, "A chunk has")
        if ids is not None:
            check_ids(tuple(ids))
        for found in self.store.chunks(size, ids, stored=True):
            if names is not None:
                names.append(found.ids)
            yield _block(found, self.scorer.device)


def _shape(scorer: Scorer[Any]) -> tuple[int, int, bool]:
    """How many vectors a candidate has (or may have, where longer texts have more), their size, and whether longer ones do."""
    tried = scorer.encode_candidates(["a", "a a"])
    if not tried.data.is_floating_point():
        raise OptionError(
            f"The scorer {scorer.config.kind!r} computes nothing of a candidate before it knows the query, so there is nothing "
            "to keep in a store; rank texts with it, or take another scorer."
        )
    few, many = tried.lengths.tolist()
    return (few if few == many else scorer.config.max_candidate), tried.data.shape[-1], few != many


def _check_terms(directory: str | Path) -> None:
    """Raises StoreError for a store that keeps no terms."""
    with stores.open_store(directory) as store:
        if not any(field.name == TERMS for field in store.schema.extras):
            raise StoreError(
                f"{directory} was built without the terms that this scorer compares (lexical); index the candidates again "
                "with it, or take the scorer that the store was built with."
            )


def _arrays(cache: Cache) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """data, lengths and terms."""
    return cache.data.numpy(), cache.lengths.numpy(), None if cache.terms is None else cache.terms.numpy()


def _iterated(candidates: Any) -> Iterator[tuple[str, Text]]:
    """Raises DataError for what is no collection of candidates."""
    if isinstance(candidates, str | bytes) or not isinstance(candidates, Iterable):
        raise DataError(f"Candidates that are kept are ids with their texts, not {candidates!r:.80}.")
    return iter(candidates)


def check_new(candidates: Sequence[tuple[str, Text]], seen: set[str]) -> None:
    """Put the ids into `seen`. Raises DataError."""
    for one in candidates:
        if not isinstance(one, list | tuple) or len(one) != 2:
            raise DataError(f"A candidate that is kept is an id with its text, not {one!r:.80}.")
        name = one[0]
        if not isinstance(name, str):
            raise DataError(f"The id of a candidate that is kept is a text, not {name!r}.")
        if not name:
            raise DataError("A candidate has an empty id.")
        check_once(name, seen)


def check_once(name: str, seen: set[str]) -> None:
    """Put the id into `seen`. Raises DataError where it is there."""
    if name in seen:
        raise DataError(f"The id {name!r} is given twice; every candidate needs its own.")
    seen.add(name)


def _block(found: Candidates, device: torch.device) -> Block:
    """As `Cache.block` gives it. What is stored goes to the device, and becomes float32 there."""
    width = found.vectors.shape[-1]
    values = _tensor(found.vectors, device).view(-1, width).to(torch.float32)
    if VECTORS in found.scales:
        values = values * _tensor(found.scales[VECTORS], device).view(-1, 1)
    count = len(found)
    sizes = [len(values) // count] * count if found.lengths is None else found.lengths.tolist()
    terms = _tensor(found.extras[TERMS], device) if TERMS in found.extras else None
    return Block(values, sizes, terms)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    # A view of the file cannot be written to, which a tensor has to be.
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def _best(scores: np.ndarray, names: Sequence[Sequence[str]], k: int | None) -> list[tuple[str, float]]:
    """The k largest of scores [N] with their ids, which are decoded for those alone (and for their equals)."""
    places = np.arange(len(scores))
    if k is not None and k < len(scores):
        places = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    starts = np.cumsum([0, *(len(some) for some in names)])
    chunks = np.searchsorted(starts, places, "right") - 1
    found = [
        (names[chunk][within], score)
        for chunk, within, score in zip(
            chunks.tolist(), (places - starts[chunks]).tolist(), scores[places].tolist(), strict=True
        )
    ]
    return sorted(found, key=lambda one: (-one[1], one[0]))[:k]


__all__ = ["Added", "Index", "check_new", "check_once"]
