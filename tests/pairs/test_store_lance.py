"""A candidate store in a Lance table: what the embedded store does, and several writers at once."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch

from pairs.scoring import QUERY, scorer
from pairs.storing import SETTINGS, names, one_sentence, vectors
from pairs.test_keeping import BATCH, COUNT, IDS, KINDS, ROWS, STORAGES, cached
from pairs.test_store_refusals import REFUSED
from thresher.errors import StoreError
from thresher.pairs.keeping import Added, Index
from thresher.pairs.store import CandidateStore, create, holds_store, open_store
from thresher.pairs.store import lance as backend
from thresher.pairs.store.lance import LanceStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LanceStore]:
    with LanceStore.create(tmp_path / "store.lance", **SETTINGS, dtype="float32") as made:
        yield made


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_scores_and_ranks_as_a_cache_does(kind: str, storage: str, tmp_path: Path) -> None:
    made = scorer(kind)
    cache = cached(made, storage)
    with Index.create(made, tmp_path / "it.lance", dtype=storage) as index:
        assert isinstance(index.store, LanceStore)
        assert index.add(ROWS, batch=BATCH) == Added(COUNT, 0, 0)
        assert index.add(ROWS, batch=BATCH) == Added(0, COUNT, 0)
    with Index.open(made, tmp_path / "it.lance", dtype=storage) as index:
        index.store.verify()
        for size in (None, 1, 5, COUNT):
            assert torch.equal(index.score(QUERY, chunk=size), made.score(QUERY, cache, chunk=size))
            assert index.rank(QUERY, 6, chunk=size) == made.rank(QUERY, cache, 6, chunk=size)
        subset = [IDS[7], IDS[2], IDS[19]]
        assert index.rank(QUERY, 3, subset, chunk=2) == made.rank(QUERY, cache.select(subset), 3, chunk=2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("ragged", [False, True])
def test_it_keeps_bit_for_bit_what_the_embedded_store_keeps(tmp_path: Path, dtype: str, ragged: bool) -> None:
    extras = {"context": ((3, 5), "float16"), "n": ((), "int64"), "small": ((2,), "int8")}
    settings = {**SETTINGS, "dtype": dtype, "ragged": ragged, "extras": extras}
    lengths = np.arange(50) % 2 + 1 if ragged else None
    values = vectors(int(lengths.sum()), 4) if lengths is not None else vectors(50)
    given = {"context": vectors(50, 3, 5), "n": np.arange(50) << 40, "small": vectors(50, 2)}
    found = []
    for kind, place in ((CandidateStore, "files"), (LanceStore, "table.lance")):
        with kind.create(tmp_path / place, **settings) as made:
            made.add(names(50), values, lengths=lengths, extras=given)
            found.append(made.read([f"c{i}" for i in (7, 3, 3, 49)], stored=True))
    one, other = found
    assert one.ids == list(other.ids)
    assert one.vectors.dtype == other.vectors.dtype
    assert np.array_equal(one.vectors, other.vectors)
    assert (one.lengths is None) == (other.lengths is None) == (not ragged)
    if one.lengths is not None and other.lengths is not None:
        assert np.array_equal(one.lengths, other.lengths)
    for kept, theirs in ((one.extras, other.extras), (one.scales, other.scales)):
        assert kept.keys() == theirs.keys()
        for name in kept:
            assert kept[name].dtype == theirs[name].dtype
            assert np.array_equal(kept[name], theirs[name])


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_go_in_changes_nothing(store: LanceStore, what: str) -> None:
    ids, values, message = REFUSED[what]
    store.add(names(5), vectors(5))
    before = lance.dataset(store.directory).version
    with pytest.raises(StoreError, match=message) as error:
        store.add(ids, values)
    one_sentence(error)
    if "there" not in what:
        with pytest.raises(StoreError) as error:
            store.update(ids, values)
        one_sentence(error)
    assert lance.dataset(store.directory).version == before
    store.add(["new"], vectors(1))


@pytest.mark.parametrize("method", ["get", "read", "delete", "update", "chunks"])
def test_ids_that_are_not_there(store: LanceStore, method: str) -> None:
    store.add(names(3), vectors(3))
    asked = ["c1", "nobody's", "c2", "no one"]
    arguments: dict[str, tuple[Any, ...]] = {"update": (asked, vectors(4)), "chunks": (2, asked)}
    with pytest.raises(StoreError, match="\"nobody's\", 'no one' are not in") as error:
        getattr(store, method)(*arguments.get(method, (asked,)))
    one_sentence(error)
    assert len(store) == 3


# Several writers, many readers.


def test_others_see_a_change_when_they_look(store: LanceStore) -> None:
    reader = LanceStore.open(store.directory)
    store.add(names(4), vectors(4))
    assert len(reader) == 0
    chunks = store.chunks(3)
    store.delete(["c1"])
    assert [len(one) for one in chunks] == [3, 1]  # of the version that the chunks were asked of
    assert reader.refresh() and not reader.refresh()
    assert list(reader.ids()) == ["c0", "c2", "c3"]


@pytest.mark.parametrize("change", ["add", "update", "delete"])
def test_a_change_that_comes_second_is_checked_again(
    store: LanceStore, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer's change lands after the ids were looked up and before this one is committed."""
    store.add(names(5), vectors(5))
    other = LanceStore.open(store.directory)
    meant = {
        "add": lambda s, i: s.add([f"new{i}"], vectors(1, seed=i)),
        "update": lambda s, i: s.update([f"c{i}"], vectors(1, seed=9)),
        "delete": lambda s, i: s.delete([f"c{i}"]),
    }[change]
    looked = LanceStore.contains
    came_between: list[int] = [1, 2]

    def interrupted(self: LanceStore, ids: Any) -> Any:
        found = looked(self, ids)
        if self is store and came_between:
            meant(other, came_between.pop())  # first the same id, then a different one
        return found

    monkeypatch.setattr(LanceStore, "contains", interrupted)
    if change == "update":
        meant(store, 2)
        assert np.array_equal(store.get(["c2"]), vectors(1, seed=9))
        return
    with pytest.raises(StoreError, match="already" if change == "add" else "not in"):
        meant(store, 2)
    meant(store, 3)
    there = set(store.ids())
    assert there == ({*names(5), "new1", "new2", "new3"} if change == "add" else {"c0", "c4"})
    store.verify()


def _add_many(directory: str, numbers: range) -> None:
    with LanceStore.open(directory) as store:
        for start in numbers[::5]:
            store.add(names(5, start), vectors(5, seed=start))


def test_processes_add_at_once(store: LanceStore) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_add_many, args=(store.directory, range(at, at + 50))) for at in (0, 50)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    store.refresh()
    assert sorted(store.ids()) == sorted(names(100))
    assert np.array_equal(store.get(names(5, 70)), vectors(5, seed=70))


def _add_for_ever(directory: str) -> None:
    with LanceStore.open(directory) as store:
        for start in range(0, 10**6, 100):
            store.add(names(100, start), vectors(100))


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_killed_writer_leaves_the_last_committed_state(store: LanceStore) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_add_for_ever, args=(store.directory,))
    process.start()
    while len(store) < 300:
        assert process.is_alive()
        store.refresh()
    assert process.pid is not None
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with LanceStore.open(store.directory) as back:
        back.verify()
        assert len(back) % 100 == 0
        assert len(list(back.ids())) == len(back) >= 300
        back.add(["new"], vectors(1))


# Upkeep, and damage.


def test_fragments_are_merged_as_they_come(store: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FAN", 4)
    for at in range(20):
        store.add(names(2, 2 * at), vectors(2, seed=at))
    assert len(store._data.get_fragments()) < 10
    assert list(store.ids()) == names(40)
    assert np.array_equal(store.get(names(2, 24)), vectors(2, seed=12))
    bytes_before = store.nbytes
    store.delete(names(30))
    store.compact()
    assert 0 < store.nbytes < bytes_before
    assert list(store.ids()) == names(10, 30)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("cut", [False, True])
def test_damage_is_found_and_said(store: LanceStore, fraction: float, cut: bool) -> None:
    store.add(names(500), vectors(500))
    (file,) = (Path(store.directory) / "data").iterdir()
    content = bytearray(file.read_bytes())
    at = int(fraction * len(content))
    if cut:
        del content[at:]
    else:
        content[at] ^= 0x10
    file.write_bytes(content)
    with LanceStore.open(store.directory) as back, pytest.raises(StoreError) as error:
        back.verify()
    one_sentence(error)


@pytest.mark.parametrize(
    "expected", [{"fingerprint": "model-b"}, {"strategy": "C"}, {"k": 3}, {"dim": 5}, {"dtype": "int8"}]
)
def test_a_store_of_another_model_is_refused(store: LanceStore, expected: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="was made with") as error:
        LanceStore.open(store.directory, **{**SETTINGS, "dtype": "float32", **expected})
    one_sentence(error)
    LanceStore.open(store.directory, **SETTINGS, dtype="float32")


def test_places_that_hold_no_store(tmp_path: Path) -> None:
    empty = tmp_path / "empty.lance"
    with pytest.raises(StoreError, match="holds no candidate store") as error:
        open_store(empty)
    one_sentence(error)
    assert not holds_store(empty)
    foreign = tmp_path / "foreign.lance"
    lance.write_dataset(pa.table({"a": [1]}), foreign)
    for call in (open_store, holds_store):
        with pytest.raises(StoreError, match="no candidate store; give that of a store") as error:
            call(foreign)
        one_sentence(error)
    for place in (foreign, tmp_path / "mine.lance"):
        if place != foreign:
            place.write_text("mine")
        with pytest.raises(StoreError, match="give a new directory") as error:
            create(place, **SETTINGS)
        one_sentence(error)
    assert (tmp_path / "mine.lance").read_text() == "mine"


@pytest.mark.parametrize("about", [b"[]", b"{", b'{"format": 1}', b'{"format": 9}'])
def test_what_a_table_says_of_itself_is_checked(store: LanceStore, about: bytes) -> None:
    lance.dataset(store.directory).replace_schema_metadata({"thresher": about.decode()})
    with pytest.raises(StoreError, match="is damaged|has format 9") as error:
        LanceStore.open(store.directory)
    one_sentence(error)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "thresher.pairs.store.lance", None)
    with pytest.raises(StoreError, match=r"pip install 'thresher\[lance\]'") as error:
        create("s3://bucket/store", **SETTINGS)
    assert "\n" not in str(error.value)
    assert isinstance(create(tmp_path / "files", **SETTINGS), CandidateStore)


def test_a_closed_handle_and_one_that_travels(store: LanceStore) -> None:
    store.add(names(3), vectors(3))
    store.remember_origin("/somewhere")
    back = pickle.loads(pickle.dumps(store))
    assert np.array_equal(back.get(names(3)), vectors(3))
    assert back.origin == "/somewhere"
    assert "3 candidates of [2, 4] float32" in repr(back)
    back.close()
    for call in (len, lambda s: s.get(["c1"]), lambda s: s.delete(["c1"]), lambda s: list(s.ids())):
        with pytest.raises(StoreError, match="was closed") as error:
            call(back)
        one_sentence(error)
    assert "closed" in repr(back)


# --- several writers from the beginning, and what a killed one leaves ---------------------------------------------------


def test_of_several_that_create_a_table_one_does(tmp_path: Path) -> None:
    """And what it commits at once is there afterwards: no other creation comes over it."""
    for number in range(10):
        place, together = tmp_path / f"{number}.lance", threading.Barrier(4)

        def make(own: int, place: Path = place, together: threading.Barrier = together) -> str:
            together.wait()
            try:
                with create(place, **SETTINGS) as made:
                    made.add([str(own)], vectors(1))
            except StoreError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(4) as pool:
            said = list(pool.map(make, range(4)))
        refused = [text for text in said if text]
        assert len(refused) == 3 and all(re.search("holds (a table|files) already; ", text) for text in refused), said
        with open_store(place) as left:
            assert list(left.ids()) == [str(said.index(""))]


def test_what_a_killed_creation_leaves_is_no_obstacle(tmp_path: Path) -> None:
    place = tmp_path / "it.lance"
    for name in ("_versions", "_transactions"):
        (place / name).mkdir(parents=True)
    (place / "_transactions" / "0-1.txn").touch()
    assert not holds_store(place)
    with create(place, **SETTINGS) as made:
        made.add(names(2), vectors(2))
    assert holds_store(place)
    with pytest.raises(StoreError, match="holds files already"):
        create(place, **SETTINGS)


def test_a_file_is_no_place_for_a_table(tmp_path: Path) -> None:
    (tmp_path / "it.lance").write_text("mine")
    for what in (lambda p: create(p, **SETTINGS), open_store, holds_store):
        with pytest.raises(StoreError, match=r"it\.lance is a file; give a new directory"):
            what(tmp_path / "it.lance")


def test_what_another_writer_indexes_meanwhile_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scorer("colbert", lexical=4)
    made.lexical.count(made.candidate_rows([text for _, text in ROWS])[0])
    with Index.create(made, tmp_path / "it.lance") as one, Index.open(made, tmp_path / "it.lance") as other:
        keep = other.scorer.encode_candidates

        def late(*given: Any, **settings: Any) -> Any:
            """While the other one encodes, the first commits some of the same."""
            monkeypatch.undo()
            one.add(ROWS[1:3])
            return keep(*given, **settings)

        monkeypatch.setattr(other.scorer, "encode_candidates", late)
        assert other.add(ROWS[:5]) == Added(3, 2, 0)
        with Index.create(made, tmp_path / "alone.lance") as alone:
            alone.add(ROWS[:5])
            for query in (QUERY, "w30"):
                assert other.rank(query) == alone.rank(query)


def test_several_remember_where_the_scorer_lies(tmp_path: Path) -> None:
    place = tmp_path / "it.lance"
    create(place, **SETTINGS).close()

    def tell(number: int) -> None:
        with open_store(place) as handle:
            handle.remember_origin(f"/scorers/{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(tell, range(4)))
    with open_store(place) as handle:
        assert handle.origin in {f"/scorers/{number}" for number in range(4)}
