"""What cannot go into a candidate store, or come out of it, is refused in one sentence and changes nothing."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairs.storing import SETTINGS, contents, names, one_sentence, vectors
from thresher.errors import StoreError
from thresher.pairs.store import CandidateStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CandidateStore]:
    with CandidateStore.create(tmp_path / "store", **SETTINGS, dtype="float32") as made:
        yield made


# Refusals. Nothing changes.

REFUSED: dict[str, tuple[Any, Any, str]] = {
    "twice": (["a", "b", "a"], vectors(3), "'a' given more than once"),
    "empty id": (["a", ""], vectors(2), "must not be empty; number 2"),
    "no text": (["a", 5], vectors(2), "number 2 is 5"),
    "bytes": ([b"a"], vectors(1), "must be a text"),
    "one text": ("abc", vectors(3), "not the one text 'abc'"),
    "no list": (5, vectors(3), "list of texts"),
    "half a character": (["\ud800"], vectors(1), "UTF-8"),
    "there": (["a", "c1"], vectors(2), "'c1' is in .* already; use update"),
    "all there": (names(5), vectors(5), "'c0', 'c1', 'c2' and 2 more are in"),
    "too few": (["a", "b"], vectors(1), r"\[2, 2, 4\], not \[1, 2, 4\]"),
    "none": (["a"], [], r"\[1, 2, 4\], not \[0\]"),
    "no ids": ([], vectors(1), r"\[0, 2, 4\], not \[1, 2, 4\]"),
    "another k": (["a"], vectors(1, 3, 4), r"not \[1, 3, 4\]"),
    "another dim": (["a"], vectors(1, 2, 5), r"not \[1, 2, 5\]"),
    "no k": (["a"], vectors(1, 4), r"not \[1, 4\]"),
    "uneven": (["a", "b"], [[[1.0] * 4] * 2, [[1.0] * 4]], "not an array of numbers"),
    "words": (["a"], [[["x"] * 4] * 2], "cannot be made of"),
    "objects": (["a"], [[[None] * 4] * 2], "cannot be made of object"),
    "complex": (["a"], vectors(1) + 1j, "cannot be made of complex"),
    "NaN": (["a", "b"], vectors(2) * [[[1.0]], [[np.nan]]], "vectors of id 'b' holds NaN"),
    "infinite": (["a", "b"], vectors(2) * [[[np.inf]], [[1.0]]], "vectors of id 'a' holds NaN or an infinite"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_what_cannot_go_in_changes_nothing(tmp_path: Path, what: str, dtype: str) -> None:
    ids, values, message = REFUSED[what]
    with CandidateStore.create(tmp_path, **SETTINGS, dtype=dtype) as store:
        store.add(names(5), vectors(5))
        before, said = contents(tmp_path), store.get(names(5))
        with pytest.raises(StoreError, match=message) as error:
            store.add(ids, values)
        one_sentence(error)
        if "there" not in what:
            with pytest.raises(StoreError) as error:
                store.update(ids, values)
            one_sentence(error)
        assert contents(tmp_path) == before
        assert np.array_equal(store.get(names(5)), said)
        store.add(["new"], vectors(1))


@pytest.mark.parametrize("method", ["get", "read", "delete", "update", "chunks"])
def test_ids_that_are_not_there(store: CandidateStore, method: str) -> None:
    store.add(names(3), vectors(3))
    before = contents(store.directory)
    asked = ["c1", "nobody", "c2", "no one"]
    arguments: dict[str, tuple[Any, ...]] = {"update": (asked, vectors(4)), "chunks": (2, asked)}
    with pytest.raises(StoreError, match="'nobody', 'no one' are not in") as error:
        getattr(store, method)(*arguments.get(method, (asked,)))
    one_sentence(error)
    assert contents(store.directory) == before


def test_ids_given_twice_are_not_deleted(store: CandidateStore) -> None:
    store.add(names(3), vectors(3))
    with pytest.raises(StoreError, match="'c1' given more than once"):
        store.delete(["c1", "c1"])
    assert len(store) == 3


def test_numbers_that_a_dtype_cannot_hold(tmp_path: Path) -> None:
    store = CandidateStore.create(tmp_path / "half", **SETTINGS, dtype="float16", extras={"n": ((), "int32")})
    with pytest.raises(StoreError, match="vectors of id 'b' holds a number that does not fit float16") as error:
        store.add(["a", "b"], [vectors(1)[0], vectors(1)[0] * 1e6], extras={"n": [1, 2]})
    one_sentence(error)
    with pytest.raises(StoreError, match="n of id 'a' holds a number that does not fit int32"):
        store.add(["a"], vectors(1), extras={"n": [2**40]})
    with pytest.raises(StoreError, match="cannot be made of float"):
        store.add(["a"], vectors(1), extras={"n": [1.5]})
    single = CandidateStore.create(tmp_path / "single", **SETTINGS, dtype="float32")
    with pytest.raises(StoreError, match="does not fit float32"):
        single.add(["a"], vectors(1).astype(np.float64) * 1e300)


@pytest.mark.parametrize(
    ("values", "lengths", "message"),
    [
        ([np.ones((3, 4)), np.ones((0, 4))], None, "'b' has 0 vectors; this store takes 1 to 3"),
        ([np.ones((4, 4)), np.ones((1, 4))], None, "'a' has 4 vectors"),
        ([np.ones((3, 4))], None, "2 ids need as many lengths"),
        ([np.ones((3, 4)), np.ones((1, 5))], None, "takes a list of arrays"),
        ([np.ones((3, 5)), np.ones((1, 5))], None, r"\[4, 4\], not \[4, 5\]"),
        ([1.0, 2.0], None, "takes a list of arrays"),
        (np.ones((4, 4)), [3, 2], r"\[5, 4\], not \[4, 4\]"),
        (np.ones((4, 4)), [3, -1], "'b' has -1"),
        (np.ones((4, 4)), [3.0, 1.0], "whole number"),
        (np.ones((4, 4)), [4], "as many lengths"),
        (np.ones((4, 4)) * [[1], [1], [1], [np.nan]], [3, 1], "of id 'b' holds NaN"),
        (np.ones((4, 4)) * [[1], [1], [np.nan], [1]], [3, 1], "of id 'a' holds NaN"),
    ],
)
def test_ragged_vectors_that_cannot_go_in(tmp_path: Path, values: Any, lengths: Any, message: str) -> None:
    store = CandidateStore.create(tmp_path, fingerprint="f", strategy="c", k=3, dim=4, ragged=True)
    with pytest.raises(StoreError, match=message) as error:
        store.add(["a", "b"], values, lengths=lengths)
    one_sentence(error)
    assert len(store) == 0


def test_extras_are_all_given_or_none(tmp_path: Path) -> None:
    store = CandidateStore.create(tmp_path / "a", **SETTINGS, extras={"context": ((3,), "float32")})
    for extras in (None, {}, {"other": vectors(1, 3)}, {"context": vectors(1, 3), "other": vectors(1, 3)}):
        with pytest.raises(StoreError, match="are: context; given were") as error:
            store.add(["a"], vectors(1), extras=extras)
        one_sentence(error)
    with pytest.raises(StoreError, match=r"context of 1 ids must have the shape \[1, 3\]"):
        store.add(["a"], vectors(1), extras={"context": vectors(1, 4)})
    with pytest.raises(StoreError, match="lengths belong to a ragged store"):
        store.add(["a"], vectors(1), lengths=[2], extras={"context": vectors(1, 3)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": ""}, "fingerprint"),
        ({"strategy": None}, "strategy"),
        ({"k": 0}, "k must be"),
        ({"dim": 2.5}, "dim must be"),
        ({"k": True}, "k must be"),
        ({"dtype": "bfloat16"}, "float32, float16, int8"),
        ({"ragged": 1}, "ragged"),
        ({"extras": {"vectors": ((1,), "int8")}}, "cannot name"),
        ({"extras": {"a.b": ((1,), "int8")}}, "cannot name"),
        *(({"extras": {name: ((1,), "int8")}}, "cannot name") for name in ("ids", "id", "hashes", "order", "Order")),
        ({"extras": {"a": (1,)}}, "needs .shape, dtype."),
        ({"extras": {"a": (4, "int8")}}, "needs .shape, dtype."),
        ({"extras": {"a": ((4,), "text")}}, "one of float32"),
        ({"extras": {"a": ((0,), "int8")}}, "cannot have the shape"),
        ({"extras": {"a": ((), "int8")}}, "cannot have the shape"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message) as error:
        CandidateStore.create(tmp_path / "new", **{**SETTINGS, **changes})
    one_sentence(error)
    assert not (tmp_path / "new").exists()


# Another model, no store, closed.


@pytest.mark.parametrize(
    "expected",
    [{"fingerprint": "model-b"}, {"strategy": "C"}, {"k": 3}, {"dim": 5}, {"dtype": "int8"}, {"k": 1, "dtype": "int8"}],
)
def test_a_store_of_another_model_is_refused(store: CandidateStore, expected: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="was made with") as error:
        CandidateStore.open(store.directory, **{**SETTINGS, "dtype": "float32", **expected})
    text = one_sentence(error)
    for name, value in expected.items():
        assert f"{name} {value!r}" in text
        assert f"{name} {getattr(store.schema, name)!r}" in text
    CandidateStore.open(store.directory, **SETTINGS, dtype="float32")


def test_no_store_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(StoreError, match="holds no candidate store") as error:
            CandidateStore.open(path)
        one_sentence(error)
    with pytest.raises(StoreError, match="is a file; give a directory") as error:
        CandidateStore.create(tmp_path / "file", **SETTINGS)
    one_sentence(error)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_store_is_there_already(store: CandidateStore) -> None:
    store.add(names(3), vectors(3))
    store.close()
    before = contents(store.directory)
    with pytest.raises(StoreError, match="already; open it") as error:
        CandidateStore.create(store.directory, **SETTINGS)
    one_sentence(error)
    assert contents(store.directory) == before
    with CandidateStore.open(store.directory) as again:
        again.add(["d"], vectors(1))


def test_a_closed_handle(store: CandidateStore) -> None:
    store.add(names(3), vectors(3))
    (kept,) = store.chunks(10, stored=True)
    store.close()
    store.close()
    assert np.array_equal(kept.vectors, vectors(3))
    for call in (len, lambda s: s.get(["c1"]), lambda s: s.delete(["c1"]), lambda s: s.ids(), lambda s: s.refresh()):
        with pytest.raises(StoreError, match="was closed") as error:
            call(store)
        one_sentence(error)
    assert "closed" in repr(store)


def test_a_handle_travels_to_another_process(store: CandidateStore) -> None:
    store.add(names(3), vectors(3))
    back = pickle.loads(pickle.dumps(store))
    assert np.array_equal(back.get(names(3)), vectors(3))
    assert "3 candidates of [2, 4] float32" in repr(back)
