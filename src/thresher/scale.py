"""The same work in many processes: candidates encoded and pairs scored by workers that take and give dicts of arrays.

`CandidateEncoder` and `Rerank` are picklable and read their scorer when they are first called, in whatever process that is, so
that they fit Ray Data as they are:

    rows = ray.data.read_json("passages.jsonl")
    encoded = rows.map_batches(CandidateEncoder, fn_constructor_args=("scorer",), concurrency=7, batch_size=512)
    with Index.create(load("scorer"), "store") as index:
        write(index, encoded.iter_batches(batch_size=2048))

Each worker takes a core for itself: of 8 leave Ray one to read with, or it waits for ever.

`fill` does this on one machine with worker processes of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

from thresher.errors import DataError, OptionError, StoreError, ThresherError
from thresher.pairs.cache import check_count
from thresher.pairs.keeping import BATCH, CUT, Added, Index, check_new, check_once
from thresher.settings import is_whole

Batch = Mapping[str, np.ndarray]


class _Worker:
    """Loads the scorer of a directory at its first call and leaves it behind when it is pickled.

    scorer: the directory. threads: torch's in a worker; None leaves them as they are. device: as `thresher.pairs.load`.
    """

    def __init__(self, scorer: str | Path, *, device: str | None = None, threads: int | None = None) -> None:
        self.directory = str(scorer)
        self.device = device
        self.threads = threads
        self._scorer: Any = None
        self._made_by = ""

    @property
    def made_by(self) -> str:
        """The fingerprint of the scorer."""
        self._made_by = self._made_by or self.scorer.fingerprint()
        return self._made_by

    @property
    def scorer(self) -> Any:
        if self._scorer is None:
            import torch

            from thresher.pairs.saving import load

            if self.threads is not None:
                torch.set_num_threads(self.threads)
            self._scorer = load(self.directory, device=self.device)
        return self._scorer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scorer": None, "_made_by": ""}


class CandidateEncoder(_Worker):
    """Candidates to what a store keeps of them.

    __call__ takes `id` and `text`, [N] each (a text, or the list of a dialogue's utterances), and gives `id` as texts [N],
    `vectors` [N] of float32 arrays [k or n, d], `cut` [N] int64 (1 in the first row for every candidate that was cut, so that
    they add up), `made_by` [N], the scorer's fingerprint, which `write` compares with the store's, and for a scorer with a
    lexical signal `terms` [N, M] int32. N may be 0. Ids may be whole numbers, which become their digits.
    Raises DataError for a missing column, an id that is none, or what is no text.
    """

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        texts = [_plain(text) for text in _column(batch, "text")]
        names = [_id(name) for name in _column(batch, "id")]
        if not texts and not names:
            return self._nothing()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".*{CUT}")
            cache = self.scorer.encode_candidates(texts, names)
        cut = np.zeros(len(names), np.int64)
        cut[0] = cache.cut
        found = {
            "id": np.array(names, object),
            "vectors": _objects(vectors.numpy() for vectors in cache.data.split(cache.lengths.tolist())),
            "cut": cut,
            "made_by": _objects([self.made_by] * len(names)),
        }
        return found if cache.terms is None else found | {"terms": cache.terms.numpy()}

    def _nothing(self) -> dict[str, np.ndarray]:
        """What an empty batch gives."""
        found = {name: _objects([]) for name in ("id", "vectors", "made_by")} | {"cut": np.zeros(0, np.int64)}
        kept = self.scorer.config.lexical
        return found | {"terms": np.zeros((0, kept), np.int32)} if kept else found


class Rerank(_Worker):
    """Candidates ranked for queries: those that each query brings, or those of a store.

    store: the directory of an index of this scorer. k: how many are given back at most; None for all.

    __call__ takes `query` [N], and without a store `candidates` [N] of lists of texts; it gives all columns that it was given,
    and best first `ranked` [N] of arrays of ids (places among the query's candidates, or ids of the store) and `scores` [N]
    of float32 arrays.
    Raises DataError for a missing column, what is no text, or a query without candidates.
    """

    def __init__(self, scorer: str | Path, store: str | Path | None = None, k: int | None = 10, **worker: Any) -> None:
        super().__init__(scorer, **worker)
        self.store = None if store is None else str(store)
        self.k = None if k is None else check_count(k, "Ranking gives")
        self._index: Index | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_index": None}

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        queries = [_plain(query) for query in _column(batch, "query")]
        if self.store is not None:
            found = [self._opened.rank(query, self.k) for query in queries]
        else:
            offered = [_plain(texts) for texts in _column(batch, "candidates")]
            if len(offered) != len(queries):
                raise DataError(f"{len(queries)} queries do not go with the candidates of {len(offered)}.")
            found = [self.scorer.rank(query, texts, self.k) for query, texts in zip(queries, offered, strict=True)]
        ranked = _objects(np.array([name for name, _ in one]) for one in found)
        scores = _objects(np.array([score for _, score in one], np.float32) for one in found)
        return {**batch, "ranked": ranked, "scores": scores}

    @property
    def _opened(self) -> Index:
        assert self.store is not None
        if self._index is None:
            self._index = Index.open(self.scorer, self.store)
        return self._index


def write(index: Index, batches: Iterable[Batch], on_done: Callable[[int], None] | None = None) -> Added:
    """Keep what `CandidateEncoder` gave, a batch at a time; each is committed as a whole.

    Ids that the store has already are skipped, so that after an interruption the same call goes on. The order of the batches is
    that of the store. on_done: called with the number of candidates just dealt with.
    Raises DataError for an id that comes twice and a batch that `CandidateEncoder` did not make; StoreError for one encoded by
    another scorer, or by this one with other weights, and as `CandidateStore.add` does.
    """
    index.store.hold()  # another writer may have been here since this handle was opened
    seen: set[str] = set()
    new = there = cut = 0
    for batch in batches:
        for name in ("vectors", "cut"):
            _column(batch, name)
        names = [_id(name) for name in _column(batch, "id")]
        _check_made(index, _column(batch, "made_by"))
        for name in names:
            check_once(name, seen)
        fresh, added = np.flatnonzero(~index.store.contains(names)), 0
        if len(fresh):
            vectors = [np.asarray(_stacked(batch["vectors"][i]), np.float32) for i in fresh]
            terms = np.stack([np.asarray(batch["terms"][i]) for i in fresh]) if "terms" in batch else None
            lengths = np.array([len(one) for one in vectors])
            added = index.put([names[i] for i in fresh], np.concatenate(vectors), lengths, terms)
        new, there, cut = new + added, there + len(names) - added, cut + int(np.sum(batch["cut"]))
        if on_done is not None:
            on_done(len(names))
    return Added(new, there, cut)


def _check_made(index: Index, makers: Iterable[Any]) -> None:
    if others := {str(maker) for maker in makers} - {index.store.schema.fingerprint}:
        raise StoreError(
            f"{index.store.directory} is of another scorer than these candidates were encoded by (fingerprint "
            f"{sorted(others)[0]!r}); give the workers the directory of the index's own scorer, as it is now."
        )


def fill(
    index: Index,
    scorer: str | Path,
    candidates: Iterable[tuple[str, Any]],
    *,
    workers: int = 2,
    batch: int = BATCH,
    restarts: int = 3,
    threads: int | None = 1,
    device: str | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Added:
    """`Index.add` with (id, text) candidates encoded in `workers` processes.

    Batches are committed in order and by this process alone, so that the store holds what `Index.add` would have put there. A
    worker that is killed is replaced, and what it had is done again; when this process is, the same call goes on from the last
    committed batch. Ids that are there already are not encoded.

    scorer: the directory that the index's scorer was saved to. restarts: how often workers are replaced before it is an error.
    threads: torch's in each worker. on_done: as in `write`. Warns once, at the end, of candidates that were cut.
    Raises OptionError for counts below 1, DataError as `Index.add`, StoreError as `write`, ThresherError where workers keep
    dying.
    """
    for name, value in (("workers", workers), ("batch", batch)):
        if not is_whole(value) or value < 1:
            raise OptionError(f"Indexing takes a whole number of {name}, at least 1, not {value!r}.")
    index.store.hold()
    encoder = CandidateEncoder(scorer, device=device, threads=threads)
    missing = _Missing(index, candidates, batch, on_done)
    new = write(index, _encoded(encoder, missing, workers, restarts), on_done)
    added = Added(new.new, new.there + missing.there, new.cut)
    added.warn()
    return added


class _Missing:
    """Candidates that a store lacks, in batches. there: those that it has, so far."""

    def __init__(
        self, index: Index, candidates: Iterable[tuple[str, Any]], size: int, on_done: Callable[[int], None] | None
    ) -> None:
        self.there = 0
        self._on_done = on_done
        self._index = index
        self._rest = iter(candidates)
        self._size = size

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        seen: set[str] = set()
        while given := list(itertools.islice(self._rest, self._size)):
            check_new(given, seen)
            names = [name for name, _ in given]
            known = self._index.store.contains(names)
            self.there += int(known.sum())
            if self._on_done is not None and known.any():
                self._on_done(int(known.sum()))
            new = [one for one, there in zip(given, known, strict=True) if not there]
            if new:
                yield {"id": _objects(name for name, _ in new), "text": _objects(text for _, text in new)}


def _encoded(
    encoder: CandidateEncoder, batches: Iterable[Batch], workers: int, restarts: int
) -> Iterator[dict[str, np.ndarray]]:
    """What the workers give, in the order of `batches`; twice as many as there are workers are on their way at a time."""
    rest = iter(batches)
    waiting: deque[Batch] = deque()
    running: deque[Future[dict[str, np.ndarray]]] = deque()
    pool = _pool(workers, encoder)
    try:
        while True:
            while len(waiting) < 2 * workers and (batch := next(rest, None)) is not None:
                waiting.append(batch)
            if not waiting:
                return
            try:
                while len(running) < len(waiting):
                    with _ours_to_interrupt():
                        running.append(pool.submit(_encode, waiting[len(running)]))
                found = running[0].result()
            except BrokenProcessPool as error:
                pool.shutdown(wait=False, cancel_futures=True)
                if not restarts:
                    raise ThresherError(
                        "Workers were killed again and again while encoding; give fewer workers or a smaller batch, should "
                        "memory be short. What was committed is kept, and the same call goes on from there."
                    ) from error
                restarts -= 1
                running.clear()
                pool = _pool(workers, encoder)
                continue
            waiting.popleft()
            running.popleft()
            yield found
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(workers: int, encoder: CandidateEncoder) -> ProcessPoolExecutor:
    # Not forked: torch's threads do not survive it.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(encoder,))


@contextlib.contextmanager
def _ours_to_interrupt() -> Iterator[None]:
    """Processes started in this block never see Ctrl-C, which a terminal sends to all: who started them answers it, after the
    block where it came in it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_encoder: CandidateEncoder | None = None  # of a worker process


def _begin(encoder: CandidateEncoder) -> None:
    global _encoder
    _encoder = encoder
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A killed parent closes nothing: without this its workers would wait for their next batch for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode(batch: Batch) -> dict[str, np.ndarray]:
    assert _encoder is not None
    return _encoder(batch)


def _column(batch: Batch, name: str) -> np.ndarray:
    if name not in batch:
        raise DataError(f"A batch needs the column {name!r}; it has {', '.join(batch) or 'none'}.")
    return batch[name]


def _id(value: Any) -> str:
    name = _plain(value)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise DataError(f"A candidate has the id {name!r}, where a text or a whole number is expected.")
    return str(name)


def _plain(value: Any) -> Any:
    """Texts and lists of them, as arrays of some libraries hold them, as Python's own."""
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def _stacked(value: Any) -> Any:
    """[n, d] also of what came back as n rows."""
    return value if isinstance(value, np.ndarray) and value.dtype != object else np.stack(list(value))


def _objects(values: Iterable[Any]) -> np.ndarray:
    """[N] of anything; an array of arrays stays one of N of them, however alike their shapes are."""
    given = list(values)
    made = np.empty(len(given), object)
    for place, value in enumerate(given):
        made[place] = value
    return made


__all__ = ["CandidateEncoder", "Rerank", "fill", "write"]
