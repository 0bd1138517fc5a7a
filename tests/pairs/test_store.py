"""What goes into a candidate store comes out of it, and what cannot go in is refused and changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairs.storing import SETTINGS, contents, names, one_sentence, vectors
from thresher.errors import StoreError
from thresher.pairs.store import CandidateStore, coding, segment, view, writing


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CandidateStore]:
    with CandidateStore.create(tmp_path / "store", **SETTINGS, dtype="float32") as made:
        yield made


# Round trips.


@pytest.mark.parametrize(("dtype", "worst"), [("float32", 0.0), ("float16", 2e-3), ("int8", 0.02)])
@pytest.mark.parametrize("given", [np.float16, np.float32, np.float64, list])
def test_vectors_come_back(tmp_path: Path, dtype: str, worst: float, given: Any) -> None:
    # In float16 already, so that every way of giving them gives the same numbers.
    values = vectors(50).astype(np.float16).astype(np.float32)
    with CandidateStore.create(tmp_path, **SETTINGS, dtype=dtype) as store:
        store.add(names(50), values.tolist() if given is list else values.astype(given))
    back = CandidateStore.open(tmp_path, "model-a")
    assert len(back) == 50
    order = np.random.default_rng(1).permutation(50).tolist()
    found = back.get([f"c{i}" for i in order])
    assert found.dtype == np.float32
    assert found.shape == (50, 2, 4)
    assert np.abs(found - values[order]).max() <= worst
    assert list(back.ids()) == names(50)
    back.verify()


def test_int8_has_one_scale_for_each_vector(tmp_path: Path) -> None:
    values = vectors(20) * np.float32(10.0) ** np.arange(-10, 10, dtype=np.float32)[:, None, None]
    values[3] = 0
    values[4, 0] = np.float32(1e-45)  # too small for a scale
    store = CandidateStore.create(tmp_path, **SETTINGS, dtype="int8")
    store.add(names(20), values)
    kept = store.read(names(20), stored=True)
    assert kept.vectors.dtype == np.int8
    assert kept.scales["vectors"].shape == (20, 2)
    assert np.array_equal(store.get(names(20), stored=True), kept.vectors)
    back = store.get(names(20))
    assert np.array_equal(back, kept.vectors * kept.scales["vectors"][..., None])
    largest = np.abs(values).max(axis=-1, keepdims=True)
    assert (np.abs(back - values) <= largest * 0.501 / 127 + 1e-44).all()
    assert not back[3].any()
    assert np.abs(kept.vectors[:3]).max(axis=-1).min() == 127


@pytest.mark.parametrize("seed", range(3))
def test_int8_read_back_is_kept_as_the_same(tmp_path: Path, seed: int) -> None:
    values = vectors(500, seed=seed) * np.float32(10.0) ** np.linspace(-38, 37, 500, dtype=np.float32)[:, None, None]
    values[7] = 0
    values[8] = np.finfo(np.float32).max
    values[9, :, 1:] = np.finfo(np.float32).tiny
    with CandidateStore.create(tmp_path / "a", **SETTINGS, dtype="int8") as first:
        first.add(names(500), values)
    with CandidateStore.create(tmp_path / "b", **SETTINGS, dtype="int8") as second:
        second.add(names(500), first_back := CandidateStore.open(tmp_path / "a").get(names(500)))
        assert np.isfinite(first_back).all()
        ones, others = (CandidateStore.open(tmp_path / x).read(names(500), stored=True) for x in "ab")
        assert np.array_equal(ones.vectors, others.vectors)
        # What is kept as zeros has no scale of its own.
        kept = ones.vectors.any(-1)
        assert np.array_equal(ones.scales["vectors"][kept], others.scales["vectors"][kept])


def test_stored_dtype(tmp_path: Path) -> None:
    store = CandidateStore.create(tmp_path, **SETTINGS)
    store.add(names(3), vectors(3))
    assert store.get(names(3), stored=True).dtype == np.float16
    assert not store.read(names(3), stored=True).scales
    assert [c.vectors.dtype for c in store.chunks(2, stored=True)] == [np.float16, np.float16]
    assert [c.vectors.dtype for c in store.chunks(2)] == [np.float32, np.float32]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_ragged_vectors_and_extras(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    pieces = [rng.integers(-127, 128, (n, 4)).astype(np.float32) for n in rng.integers(1, 6, 40)]
    for piece in pieces:
        piece[:, 0] = 127  # the scale of int8 is 1 then
    context = vectors(40, 3, 5).astype(np.float16)
    extras = {"context": ((3, 5), "float16"), "length": ((), "int32"), "small": ((2,), "int8")}
    store = CandidateStore.create(
        tmp_path, fingerprint="f", strategy="colbert", k=5, dim=4, dtype=dtype, ragged=True, extras=extras
    )

    def given(start: int, stop: int) -> dict[str, Any]:
        small = np.tile(np.float32([127, -3]), (stop - start, 1))
        return {"extras": {"context": context[start:stop], "length": np.arange(start, stop), "small": small}}

    store.add(names(15), pieces[:15], **given(0, 15))
    flat, lengths = np.concatenate(pieces[15:]), [len(p) for p in pieces[15:]]
    store.add(names(25, 15), flat, lengths=lengths, **given(15, 40))
    for back in (store, CandidateStore.open(tmp_path)):
        order = rng.permutation(40).tolist()
        found = back.read([f"c{i}" for i in order])
        assert found.lengths is not None
        assert found.lengths.tolist() == [len(pieces[i]) for i in order]
        assert np.array_equal(found.vectors, np.concatenate([pieces[i] for i in order]))
        assert found.extras["length"].tolist() == order
        assert found.extras["length"].dtype == np.int32
        assert found.extras["context"].dtype == np.float32
        assert np.array_equal(found.extras["context"], context[order])
        assert (found.extras["small"] == [127, -3]).all()
        for part in back.chunks(7):
            assert part.lengths is not None
            ends = np.cumsum(part.lengths)
            for name, end, n in zip(part.ids, ends, part.lengths, strict=True):
                assert np.array_equal(part.vectors[end - n : end], pieces[int(name[1:])])
        with pytest.raises(StoreError, match="use read") as error:
            back.get(["c1"])
        one_sentence(error)
    raw = store.read(["c3"], stored=True)
    assert set(raw.scales) == ({"vectors", "small"} if dtype == "int8" else {"small"})


def test_nothing_is_defined_too(store: CandidateStore) -> None:
    assert len(store) == 0
    assert list(store.ids()) == list(store.chunks(5)) == []
    assert store.get([]).shape == (0, 2, 4)
    assert "x" not in store
    assert store.contains([]).shape == (0,)
    version = store._state.manifest.version
    store.add([], np.empty((0, 2, 4)))
    store.update([], np.empty((0, 2, 4)))
    store.delete([])
    store.compact()
    store.verify()
    assert store._state.manifest.version == version


def test_a_ragged_store_takes_nothing_too(tmp_path: Path) -> None:
    store = CandidateStore.create(tmp_path, **SETTINGS, ragged=True)
    store.add([], [])
    found = store.read([])
    assert found.vectors.shape == (0, 4)
    assert found.lengths is not None and found.lengths.shape == (0,)


def test_ids_of_any_text(store: CandidateStore) -> None:
    odd = ["ä", "a\x00", "a", " ", "\n", "x" * 100_000, "日本語", "🌾", "A"]
    store.add(odd, vectors(len(odd)))
    assert np.array_equal(store.get(odd[::-1]), vectors(len(odd))[::-1])
    assert list(store.ids()) == odd
    assert all(name in store for name in odd)
    assert "" not in store and 3 not in store and "a\x00\x00" not in store


def test_update_replaces_and_delete_removes(store: CandidateStore) -> None:
    store.add(names(10), vectors(10))
    store.update(["c3", "c7"], vectors(2, seed=5))
    store.delete(["c0", "c9"])
    assert len(store) == 8
    assert store.contains(names(10)).tolist() == [False, *[True] * 8, False]
    assert np.array_equal(store.get(["c7", "c3", "c1"])[:2], vectors(2, seed=5)[::-1])
    store.add(["c0"], vectors(1, seed=6))
    for _ in range(2):
        assert np.array_equal(store.get(["c0"]), vectors(1, seed=6))
        assert sorted(store.ids()) == names(9)
        store.compact()
    store.delete(names(9))
    assert len(store) == 0
    assert sorted(contents(store.directory)) == ["manifest.jsonl"]


def test_get_may_ask_twice(store: CandidateStore) -> None:
    store.add(names(3), vectors(3))
    assert np.array_equal(store.get(["c2", "c0", "c2"]), vectors(3)[[2, 0, 2]])


# Chunks.


@pytest.mark.parametrize("size", [1, 3, 10, 64, 1000])
def test_chunks_are_of_one_size_whatever_the_segments(
    store: CandidateStore, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "FAN", 100)
    values = vectors(60)
    for start in range(0, 60, 12):
        store.add(names(12, start), values[start : start + 12])
    gone = {5, 6, 7, 20, *range(25, 35), 59}
    store.delete([f"c{i}" for i in gone])
    left = [i for i in range(60) if i not in gone]
    parts = list(store.chunks(size))
    assert [len(p) for p in parts[:-1]] == [size] * (len(parts) - 1)
    assert [name for part in parts for name in part.ids] == [f"c{i}" for i in left]
    assert np.array_equal(np.concatenate([p.vectors for p in parts]), values[left])
    assert list(store.ids()) == [f"c{i}" for i in left]


def test_ids_of_a_chunk_are_a_sequence(store: CandidateStore) -> None:
    store.add(names(5), vectors(5))
    store.add(names(5, 5), vectors(5))
    store.delete(["c1"])
    (part,) = store.chunks(100)
    left = ["c0", *names(8, 2)]
    assert [part.ids[i] for i in range(-9, 9)] == left + left
    assert part.ids[2:6:2] == left[2:6:2]
    assert list(part.ids) == left
    assert len(part) == len(part.ids) == 9
    assert repr(part.ids) == repr(left)
    with pytest.raises(IndexError):
        part.ids[9]


def test_chunks_of_some_ids(store: CandidateStore) -> None:
    for start in range(0, 60, 20):
        store.add(names(20, start), vectors(60)[start : start + 20])
    wanted = [f"c{i}" for i in (50, 3, 22, 21, 4, 59, 3)]
    parts = list(store.chunks(3, ids=iter(wanted)))
    assert [list(p.ids) for p in parts] == [wanted[:3], wanted[3:6], wanted[6:]]
    assert np.array_equal(np.concatenate([p.vectors for p in parts]), store.get(wanted))
    assert list(store.chunks(3, ids=[])) == []
    with pytest.raises(StoreError, match="'nobody' is not in"):
        store.chunks(3, ids=["c1", "nobody"])


@pytest.mark.parametrize("size", [0, -1, 2.0, None])
def test_chunks_of_no_size(store: CandidateStore, size: Any) -> None:
    with pytest.raises(StoreError, match="at least 1") as error:
        store.chunks(size)
    one_sentence(error)


def test_chunks_are_of_the_state_they_began_with(store: CandidateStore) -> None:
    store.add(names(10), vectors(10))
    parts, chosen = store.chunks(4), store.chunks(2, ids=["c1", "c2", "c3"])
    next(chosen)
    store.delete(names(5))
    store.compact()
    store.update(["c9"], vectors(1, seed=3))
    assert np.array_equal(np.concatenate([p.vectors for p in parts]), vectors(10))
    assert np.array_equal(next(chosen).vectors, vectors(10)[[3]])
    assert len(store) == 5


# Size.


def test_small_batches_do_not_pile_up(store: CandidateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # 600 commits are slow on some disks
    for i in range(300):
        store.add([f"c{i}"], vectors(1, seed=i))
    assert len(store._state.segments) <= 7 * 3 + 1
    assert len(store) == 300
    assert np.array_equal(store.get(["c7", "c299"])[:, None], [vectors(1, seed=7), vectors(1, seed=299)])
    for i in range(300):
        store.update(["c7"], vectors(1, seed=i))
    assert len(store._state.segments) <= 7 * 3 + 1
    assert store.nbytes < 300 * 32 * 4


def test_a_segment_that_is_mostly_dead_is_rewritten(store: CandidateStore) -> None:
    store.add(names(1000), vectors(1000))
    whole = store.nbytes
    store.delete(names(400))
    assert store.nbytes > whole
    store.delete(names(200, 400))
    assert store.nbytes < whole / 2
    assert list(store.ids()) == names(400, 600)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_hundred_thousand_in_bounded_memory(tmp_path: Path, dtype: str) -> None:
    n = 100_000
    values = np.repeat(np.arange(1, n + 1, dtype=np.float32)[:, None, None] / n, 8, axis=2)
    with CandidateStore.create(tmp_path, fingerprint="f", strategy="S", k=1, dim=8, dtype=dtype) as made:
        for start in range(0, n, 20_000):
            made.add(names(20_000, start), values[start : start + 20_000])
    tracemalloc.start()
    try:
        store = CandidateStore.open(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 200_000  # nothing of the candidates was read
        tracemalloc.reset_peak()
        total, seen = 0.0, 0
        for part in store.chunks(1000):
            total += float(part.vectors[:, 0, 0].sum())
            seen += len(part)
        assert tracemalloc.get_traced_memory()[1] < 500_000  # a chunk has 32 kB
    finally:
        tracemalloc.stop()
    assert seen == len(store) == n
    assert total == pytest.approx((n + 1) / 2, rel=1e-2)
    assert store.get(["c99999", "c0"])[:, 0, 3] == pytest.approx([1, 1 / n], rel=1e-2)
    assert sum(1 for _ in store.ids()) == n


SCAN = """
import sys
from thresher.pairs.store import CandidateStore
def memory():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024
store = CandidateStore.open(sys.argv[1])
before = memory()
seen = sum(len(part) for part in store.chunks(4096))
print(seen, memory() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_a_million_in_bounded_memory(tmp_path: Path) -> None:
    """Resident memory, pages of the mapped file included: what MADV_DONTNEED is for."""
    n, step = 1_000_000, 100_000
    with CandidateStore.create(tmp_path, fingerprint="f", strategy="S", k=1, dim=384) as store:
        for start in range(0, n, step):
            values = np.random.default_rng(start).standard_normal((step, 1, 384), dtype=np.float32)
            store.add(names(step, start), values)
        store.verify()
        assert np.array_equal(store.get(["c999999"])[0], values[-1].astype(np.float16))
    done = subprocess.run(
        [sys.executable, "-c", SCAN, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    seen, grown = map(int, done.stdout.split())
    assert seen == n
    assert grown < 64 * 2**20  # of 768 MB; a chunk has 6 MB in float32


def test_blocks_and_steps_of_any_size_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "BLOCK", 3)
    monkeypatch.setattr(segment, "STEP", 40)
    store = CandidateStore.create(tmp_path, **SETTINGS, dtype="float32")
    store.add(names(11), vectors(11))
    store.delete(["c0", "c5", "c6"])
    store.compact()
    assert np.array_equal(store.get(names(4, 7)), vectors(11)[7:])
    with pytest.raises(StoreError, match="of id 'n7' holds NaN"):
        store.add([f"n{i}" for i in range(8)], np.where(np.arange(8)[:, None, None] == 7, np.nan, vectors(8)))


def test_ids_with_the_same_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(all_names: Any) -> np.ndarray:
        return np.array([len(name) % 2 for name in all_names], "<u8")

    monkeypatch.setattr(segment, "hashed", weak)
    monkeypatch.setattr(view, "hashed", weak)
    store = CandidateStore.create(tmp_path, **SETTINGS, dtype="float32")
    store.add(names(30), vectors(30))
    store.delete(["c4", "c11"])
    store.add(["c4"], vectors(1, seed=4))
    store.compact()
    left = [f"c{i}" for i in range(30) if i != 11]
    assert np.array_equal(store.get(["c29", "c4", "c10"])[1], vectors(1, seed=4)[0])
    assert store.contains([*left, "c11", "c30", "zz"]).tolist() == [True] * 29 + [False] * 3


def test_the_store_needs_no_torch() -> None:
    code = "import sys, thresher.pairs.store; print([m for m in ('torch', 'transformers', 'safetensors') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
