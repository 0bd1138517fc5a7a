"""Workers that take and give dicts of arrays: pickled, in processes of their own, killed, and under Ray."""

from __future__ import annotations

import pickle
import random
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairs import killing
from pairs.scoring import scorer
from thresher import scale
from thresher.errors import DataError, OptionError, StoreError, ThresherError
from thresher.pairs import Index, load
from thresher.pairs.keeping import Added
from thresher.scale import CandidateEncoder, Rerank, fill, write

COUNT = 23


def texts() -> list[str]:
    draw = random.Random(0)
    return [" ".join(f"w{draw.randrange(5, 64)}" for _ in range(draw.randint(1, 12))) for _ in range(COUNT)]


ROWS = [(f"c{i:02}", text) for i, text in enumerate(texts())]
BATCH = {"id": np.array([name for name, _ in ROWS], object), "text": np.array([text for _, text in ROWS], object)}


@pytest.fixture(params=["mixencoder", "colbert"])
def saved(request: Any, tmp_path: Path) -> Path:
    made = scorer(request.param, lexical=4)
    made.lexical.count(made.candidate_rows(texts())[0])
    made.save(tmp_path / "scorer")
    return tmp_path / "scorer"


def whole(saved: Path, store: Path, size: int = 5) -> dict[str, Any]:
    """What one process puts into a store."""
    with Index.create(load(saved), store) as index:
        index.add(ROWS, batch=size)
    return content(saved, store)


def content(saved: Path, store: Path) -> dict[str, Any]:
    with Index.open(load(saved), store) as index:
        kept = index.store.read(list(index.store.ids()), stored=True)
        return {
            "ids": list(kept.ids),
            "vectors": kept.vectors.tobytes(),
            "lengths": None if kept.lengths is None else kept.lengths.tolist(),
            "terms": kept.extras["terms"].tolist(),
        }


def test_an_encoder_is_picklable_and_its_arrays_are_what_a_store_keeps(saved: Path, tmp_path: Path) -> None:
    encoder = CandidateEncoder(saved)
    first = encoder(BATCH)
    again = pickle.loads(pickle.dumps(encoder))
    assert again._scorer is None and len(pickle.dumps(encoder)) < 1000
    assert set(first) == {"id", "vectors", "cut", "terms"}
    assert all(isinstance(array, np.ndarray) and len(array) == COUNT for array in first.values())
    for a, b in zip(first["vectors"], again(BATCH)["vectors"], strict=True):
        assert np.array_equal(a, b) and a.dtype == np.float32 and a.ndim == 2
    with Index.create(load(saved), tmp_path / "store") as index:
        assert write(index, [encoder(BATCH)]) == Added(COUNT, 0, 0)
        assert write(index, [first]) == Added(0, COUNT, 0)
    assert content(saved, tmp_path / "store") == whole(saved, tmp_path / "whole", COUNT)


def test_an_empty_batch_gives_empty_arrays(saved: Path, tmp_path: Path) -> None:
    empty = {name: column[:0] for name, column in BATCH.items()}
    some, none = CandidateEncoder(saved)(BATCH), CandidateEncoder(saved)(empty)
    assert {name: (len(array), array.dtype, array.shape[1:]) for name, array in none.items()} == {
        name: (0, array.dtype, array.shape[1:]) for name, array in some.items()
    }
    with Index.create(load(saved), tmp_path / "store") as index:
        assert write(index, [none, some, none]) == Added(COUNT, 0, 0)
    asked = {"query": np.empty(0, object), "candidates": np.empty(0, object), "kept": np.arange(0)}
    for reranker, batch in (
        (Rerank(saved), asked),
        (Rerank(saved, tmp_path / "store"), {"query": np.empty(0, object), "kept": np.arange(0)}),
    ):
        found = reranker(batch)
        assert set(found) == {*batch, "ranked", "scores"} and all(len(array) == 0 for array in found.values())
        assert found["ranked"].dtype == found["scores"].dtype == object


@pytest.mark.slow
def test_a_plain_pool_of_processes(saved: Path) -> None:
    encoder, reranker = CandidateEncoder(saved, threads=1), Rerank(saved, k=3)
    batch = {"query": np.array(["w20 w21", "w9"], object), "candidates": np.empty(2, object), "kept": np.arange(2)}
    batch["candidates"][:] = [texts()[:4], texts()[4:6]]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        encoded, ranked = pool.submit(encoder, BATCH).result(), pool.submit(reranker, batch).result()
    for a, b in zip(encoded["vectors"], encoder(BATCH)["vectors"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    made = load(saved)
    for query, offered, names, scores in zip(
        batch["query"], batch["candidates"], ranked["ranked"], ranked["scores"], strict=True
    ):
        expected = made.rank(query, offered, 3)
        assert names.tolist() == [name for name, _ in expected]
        np.testing.assert_allclose(scores, [score for _, score in expected], rtol=1e-5)
    assert ranked["kept"].tolist() == [0, 1]


def test_reranking_from_a_store(saved: Path, tmp_path: Path) -> None:
    whole(saved, tmp_path / "store")
    reranker = pickle.loads(pickle.dumps(Rerank(saved, tmp_path / "store", 4)))
    found = reranker({"query": np.array(["w20 w21"], object)})
    with Index.open(load(saved), tmp_path / "store") as index:
        expected = index.rank("w20 w21", 4)
    assert list(zip(found["ranked"][0].tolist(), found["scores"][0].tolist(), strict=True)) == expected
    assert pickle.loads(pickle.dumps(reranker))._index is None


class Here:
    """A pool in this process, of which the numbers in `breaks` say which calls find it broken."""

    def __init__(self, encoder: CandidateEncoder, breaks: list[int]) -> None:
        self.encoder, self.breaks = encoder, breaks

    def submit(self, call: Any, batch: Any) -> Future[Any]:
        made: Future[Any] = Future()
        self.breaks[:] = [number - 1 for number in self.breaks]
        if 0 in self.breaks:
            made.set_exception(BrokenProcessPool())
        else:
            made.set_result(self.encoder(batch))
        return made

    def shutdown(self, **_: Any) -> None:
        pass


@pytest.mark.parametrize("breaks", [[], [1], [2, 5], [4, 9, 10]])
def test_batches_are_committed_in_order_whatever_breaks(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: list[int]
) -> None:
    monkeypatch.setattr(scale, "_pool", lambda workers, encoder: Here(encoder, breaks))
    done: list[int] = []
    with Index.create(load(saved), tmp_path / "store") as index:
        index.add(ROWS[:5], batch=5)
        assert fill(index, saved, ROWS, batch=5, on_done=done.append) == Added(COUNT - 5, 5, 0)
    assert sum(done) == COUNT
    assert content(saved, tmp_path / "store") == whole(saved, tmp_path / "whole")


def test_what_breaks_too_often_is_an_error(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "_pool", lambda workers, encoder: Here(encoder, list(range(3, 99))))
    with Index.create(load(saved), tmp_path / "store") as index:
        with pytest.raises(ThresherError, match="killed again and again"):
            fill(index, saved, ROWS, workers=1, batch=5, restarts=0)
        assert len(index) == 10  # the third batch found no worker


@pytest.mark.slow
def test_several_workers_fill_a_store_as_one_process_does(saved: Path, tmp_path: Path) -> None:
    done: list[int] = []
    with Index.create(load(saved), tmp_path / "store") as index:
        index.add(ROWS[:5], batch=5)
        added = fill(index, saved, ROWS, workers=2, batch=5, on_done=done.append)
    assert added == Added(COUNT - 5, 5, 0) and sum(done) == COUNT
    assert content(saved, tmp_path / "store") == whole(saved, tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_worker_is_replaced(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("w13" in text.split() for text in texts())
    monkeypatch.setattr(scale, "CandidateEncoder", killing.Killed)
    with Index.create(load(saved), tmp_path / "store") as index:
        assert fill(index, saved, ROWS, workers=2, batch=5).new == COUNT
    assert len(list(tmp_path.glob("died-*"))) == 1
    assert content(saved, tmp_path / "store") == whole(saved, tmp_path / "whole")


@pytest.mark.slow
def test_workers_that_keep_dying_are_an_error_and_the_rest_goes_on_later(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, Index.create(load(saved), tmp_path / "store") as index:
        patch.setattr(scale, "CandidateEncoder", killing.KilledAlways)
        with pytest.raises(ThresherError, match="killed again and again"):
            fill(index, saved, ROWS, workers=1, batch=5, restarts=1)
        before = len(index)
        assert before < COUNT and before % 5 == 0
    with Index.open(load(saved), tmp_path / "store") as index:
        assert fill(index, saved, ROWS, workers=1, batch=5) == Added(COUNT - before, before, 0)
    assert content(saved, tmp_path / "store") == whole(saved, tmp_path / "whole")


def test_what_they_cannot_take(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs the column 'text'"):
        CandidateEncoder(saved)({"id": np.array(["a"])})
    with pytest.raises(DataError, match="needs the column 'candidates'"):
        Rerank(saved)({"query": np.array(["a"])})
    with pytest.raises(OptionError, match="at least 1"):
        Rerank(saved, k=0)
    with Index.create(load(saved), tmp_path / "store") as index:
        with pytest.raises(OptionError, match="at least 1 worker"):
            fill(index, saved, ROWS, workers=0)
        with pytest.raises(DataError, match="'c00' is given twice"):
            fill(index, saved, ROWS[:1] * 2, workers=1)
        plain = scorer("dual")
        plain.save(tmp_path / "dual")
        with pytest.raises(StoreError, match="extra arrays of this store are: terms"):
            write(index, [CandidateEncoder(tmp_path / "dual")(BATCH)])


@pytest.mark.slow
def test_under_ray_data(saved: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed; run pip install 'thresher[ray]'")
    pytest.importorskip("ray.data", reason="ray.data is not installed; run pip install 'thresher[ray]'")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": list(BATCH["id"]), "text": list(BATCH["text"])}), tmp_path / "rows.parquet")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        rows = ray.data.read_parquet(str(tmp_path / "rows.parquet"))
        encoded = rows.map_batches(CandidateEncoder, fn_constructor_args=(saved,), concurrency=1, batch_size=COUNT)
        with Index.create(load(saved), tmp_path / "store") as index:
            assert write(index, encoded.iter_batches(batch_size=COUNT)).new == COUNT
    finally:
        ray.shutdown()
    one, other = content(saved, tmp_path / "store"), whole(saved, tmp_path / "whole", COUNT)
    assert sorted(one["ids"]) == other["ids"] and sorted(one["terms"]) == sorted(other["terms"])
