"""Workers that take and give dicts of arrays: pickled, in processes of their own, killed, and under Ray."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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
    assert set(first) == {"id", "vectors", "cut", "made_by", "terms"}
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
@pytest.mark.skipif(os.name != "posix", reason="a terminal's signal to a group of processes")
def test_ctrl_c_while_workers_start_is_one_sentence(saved: Path, tmp_path: Path) -> None:
    """The terminal interrupts every process of a command: the one that was asked answers, and its workers say nothing."""
    words = _indexing(saved, tmp_path)
    run = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (workers := _spawned(run.pid)) and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.02)
    assert workers, "no worker was started"
    time.sleep(0.3)  # they are importing
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 130 and "Interrupted" in said and "Traceback" not in said, said
    with Index.open(load(saved), tmp_path / "store") as index:
        fill(index, saved, ROWS, workers=1)
    assert content(saved, tmp_path / "store") == whole(saved, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="looks for processes with ps")
def test_workers_end_with_a_process_that_is_killed(saved: Path, tmp_path: Path) -> None:
    words = _indexing(saved, tmp_path)
    run = subprocess.Popen([*words, "--batch", "1"], start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "store").glob("segment-*")) and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.02)
    workers = _spawned(run.pid)
    assert workers, "no worker was at work"
    run.kill()
    run.wait()
    while any(_runs(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_runs(worker) for worker in workers)


def _indexing(saved: Path, folder: Path) -> list[str]:
    """The command line that fills `folder`/store with ROWS by two workers."""
    file = folder / "passages.jsonl"
    file.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in ROWS))
    words = ["-m", "thresher", "index", file, "--model", saved, "--store", folder / "store", "--workers", 2]
    return [sys.executable, *map(str, words)]


def _runs(process: int) -> bool:
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
    return bool(found.strip()) and not found.startswith("Z")


def _spawned(parent: int) -> list[int]:
    """The workers that a process has spawned, without the tracker of its shared resources."""
    found = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()[
        1:
    ]
    lines = (line.split(None, 2) for line in found)
    return [int(pid) for pid, ppid, words in lines if int(ppid) == parent and "spawn_main" in words]


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
        for settings in ({"workers": 0}, {"workers": 1.5}, {"batch": 0}, {"batch": "9"}):
            with pytest.raises(OptionError, match=f"whole number of {next(iter(settings))}, at least 1"):
                fill(index, saved, ROWS, **settings)
        with pytest.raises(DataError, match="'c00' is given twice"):
            fill(index, saved, ROWS[:1] * 2, workers=1)
        plain = scorer("dual")
        plain.save(tmp_path / "dual")
        with pytest.raises(StoreError, match="is of another scorer than these candidates were encoded by"):
            write(index, [CandidateEncoder(tmp_path / "dual")(BATCH)])
        for rows, says in (
            ([("a",)], "an id with its text"),
            (["ab"], "an id with its text"),
            ([("", "w5")], "empty id"),
        ):
            with pytest.raises(DataError, match=says):
                fill(index, saved, rows, workers=1)
        with pytest.raises(DataError, match="needs the column 'vectors'"):
            write(index, [{"id": np.array(["z"])}])
        assert len(index) == 0
    with pytest.raises(DataError, match="2 queries do not go with the candidates of 1"):
        Rerank(saved)({"query": np.array(["w5", "w6"]), "candidates": np.array([["w5"]])})


def test_another_scorers_vectors_never_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same kind, shape and settings, but of other weights."""
    own, other = scorer("dual"), scorer("dual")
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    own.save(tmp_path / "own")
    other.save(tmp_path / "other")
    monkeypatch.setattr(scale, "_pool", lambda workers, encoder: Here(encoder, []))
    with Index.create(load(tmp_path / "own"), tmp_path / "store") as index:
        for way in (
            lambda: fill(index, tmp_path / "other", ROWS, workers=1),
            lambda: write(index, [CandidateEncoder(tmp_path / "other")(BATCH)]),
        ):
            with pytest.raises(StoreError, match="as it is now"):
                way()
        assert len(index) == 0
        assert fill(index, tmp_path / "own", ROWS, workers=1).new == len(ROWS)


def test_an_id_is_given_once_wherever_batches_end(saved: Path, tmp_path: Path) -> None:
    encoder = CandidateEncoder(saved)
    assert encoder({"id": np.array([7]), "text": np.array(["w5"], object)})["id"].tolist() == ["7"]
    for name in (None, float("nan"), 1.5, True, "", ["a"]):
        names = np.empty(1, object)
        names[0] = name
        with pytest.raises(DataError, match="a text or a whole number is expected"):
            encoder({"id": names, "text": np.array(["w5"], object)})
    one, two = (encoder({"id": np.array(["a"], object), "text": np.array([text], object)}) for text in ("w5", "w6"))
    with Index.create(load(saved), tmp_path / "store") as index:
        with pytest.raises(DataError, match="'a' is given twice"):
            write(index, [one, two])
        with pytest.raises(DataError, match="'a' is given twice"):  # the first of them is there by now
            write(index, [one, two])
        assert write(index, [two]) == Added(0, 1, 0)


def test_a_handle_that_is_behind_sees_what_others_added(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "_pool", lambda workers, encoder: Here(encoder, []))
    for name, way in (("fill", lambda index: fill(index, saved, ROWS, workers=1)),
                      ("write", lambda index: write(index, [CandidateEncoder(saved)(BATCH)]))):  # fmt: skip
        with Index.create(load(saved), tmp_path / name) as index:
            index.add(ROWS[:3])
        behind = Index.open(load(saved), tmp_path / name)
        with Index.open(load(saved), tmp_path / name) as ahead:
            ahead.add(ROWS[3:5])
        with behind:
            assert way(behind) == Added(COUNT - 5, 5, 0)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_under_ray_data(saved: Path, tmp_path: Path, suffix: str) -> None:
    """Two workers, of which one is killed in the middle: the store is the one that a single process fills."""
    ray = pytest.importorskip("ray", reason="ray is not installed; run pip install 'thresher[ray]'")
    pytest.importorskip("ray.data", reason="ray.data is not installed; run pip install 'thresher[ray]'")
    import pyarrow as pa
    import pyarrow.json as paj
    import pyarrow.parquet as pq

    rows = [{"id": name, "text": text} for name, text in ROWS]
    file, died = tmp_path / f"rows.{suffix}", tmp_path / "died"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert paj.read_json(file).num_rows == COUNT

    class Dying(CandidateEncoder):
        def __call__(self, batch: Any) -> Any:
            if not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        read = ray.data.read_parquet if suffix == "parquet" else ray.data.read_json
        encoded = read(str(file)).map_batches(Dying, fn_constructor_args=(saved,), concurrency=2, batch_size=6)
        with Index.create(load(saved), tmp_path / "store") as index:
            assert write(index, encoded.iter_batches(batch_size=6)).new == COUNT
    finally:
        ray.shutdown()
    assert died.exists()
    (one, mine), (other, theirs) = (by_id(saved, tmp_path / "store"), by_id(saved, whole_at(saved, tmp_path / "whole")))
    assert one == other
    for name in one:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-5)


def whole_at(saved: Path, place: Path) -> Path:
    whole(saved, place, COUNT)
    return place


def by_id(saved: Path, place: Path) -> tuple[list[str], dict[str, Any]]:
    """The ids of a store, sorted, and the vectors of each."""
    with Index.open(load(saved), place) as index:
        names = sorted(index.store.ids())
        return names, {name: index.store.read([name]).vectors for name in names}
