"""A candidate store against a dict: any order of changes, reads, reopenings and compactions says the same."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from thresher.errors import StoreError
from thresher.pairs.store import CandidateStore, coding, lance, segment, view, writing
from thresher.pairs.store.lance import LanceStore

IDS = st.sampled_from([f"c{i}" for i in range(12)] + ["ä", "\x00"])
SOME = st.lists(IDS, unique=True, max_size=6)
K, DIM = 3, 2


def weak(names: Any) -> np.ndarray:
    return np.array([sum(name) % 4 for name in names], "<u8")


class Model(RuleBasedStateMachine):
    """`held` is what the writer has, `seen` what the reader saw when it last looked: by id, the vectors and the extra."""

    kind: Any = CandidateStore

    def __init__(self) -> None:
        super().__init__()
        self.patched = pytest.MonkeyPatch()
        # No loss of power here; merges, steps and blocks as often as can be.
        self.patched.setattr(os, "fsync", lambda handle: None)
        self.patched.setattr(writing, "FAN", 3)
        self.patched.setattr(segment, "STEP", 16)
        self.patched.setattr(coding, "BLOCK", 2)
        self.patched.setattr(lance, "FAN", 3)
        self.directory = Path(tempfile.mkdtemp(prefix="thresher-store-"))
        self.number = 0
        self.held: dict[str, tuple[np.ndarray, int]] = {}
        self.seen: dict[str, tuple[np.ndarray, int]] = {}

    @initialize(dtype=st.sampled_from(["float32", "float16", "int8"]), ragged=st.booleans(), collide=st.booleans())
    def create(self, dtype: str, ragged: bool, collide: bool) -> None:
        if collide:
            self.patched.setattr(segment, "hashed", weak)
            self.patched.setattr(view, "hashed", weak)
        self.ragged = ragged
        self.store = self.kind.create(
            self.directory,
            fingerprint="f",
            strategy="S",
            k=K,
            dim=DIM,
            dtype=dtype,
            ragged=ragged,
            extras={"n": ((), "int64")},
        )
        self.reader = self.kind.open(self.directory)

    def made(self, ids: list[str]) -> dict[str, tuple[np.ndarray, int]]:
        """New content for each id, exact in every dtype (the scale of int8 is 1)."""
        new = {}
        for name in ids:
            self.number += 1
            count = 1 + self.number % K if self.ragged else K
            new[name] = (np.full((count, DIM), [127, self.number % 128], np.float32), self.number)
        return new

    def arguments(self, new: dict[str, tuple[np.ndarray, int]]) -> tuple[list[str], Any, dict[str, Any]]:
        pieces = [vectors for vectors, _ in new.values()]
        return (
            list(new),
            pieces if self.ragged else np.reshape(pieces, (-1, K, DIM)),
            {"n": [n for _, n in new.values()] or np.empty(0, int)},
        )

    @rule(ids=SOME)
    def add(self, ids: list[str]) -> None:
        new = self.made(ids)
        names, vectors, extras = self.arguments(new)
        if self.held.keys() & new.keys():
            with pytest.raises(StoreError, match="already"):
                self.store.add(names, vectors, extras=extras)
        else:
            self.store.add(names, vectors, extras=extras)
            self.held |= new

    @rule(ids=SOME)
    def update(self, ids: list[str]) -> None:
        new = self.made(ids)
        names, vectors, extras = self.arguments(new)
        if new.keys() <= self.held.keys():
            self.store.update(names, vectors, extras=extras)
            self.held |= new
        else:
            with pytest.raises(StoreError, match="not in"):
                self.store.update(names, vectors, extras=extras)

    @rule(ids=SOME)
    def delete(self, ids: list[str]) -> None:
        if set(ids) <= self.held.keys():
            self.store.delete(ids)
            for name in ids:
                del self.held[name]
        else:
            with pytest.raises(StoreError, match="not in"):
                self.store.delete(ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def change_some_that_are_there(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True, min_size=1))
        (self.delete if data.draw(st.booleans()) else self.update)(ids)

    @rule()
    def compact(self) -> None:
        self.store.compact()
        self.compacted()

    def compacted(self) -> None:
        assert len(self.store._state.segments) <= 1

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.kind.open(self.directory)

    @rule()
    def refresh(self) -> None:
        assert self.reader.refresh() or self.seen.keys() == self.held.keys()
        self.seen = dict(self.held)

    @rule(ids=st.lists(IDS, max_size=6), stored=st.booleans())
    def read(self, ids: list[str], stored: bool) -> None:
        for store, held in ((self.store, self.held), (self.reader, self.seen)):
            assert store.contains(ids).tolist() == [name in held for name in ids]
            if set(ids) <= held.keys():
                self.same(
                    store.read(ids, stored=stored), {i: held[name] for i, name in enumerate(ids)}, range(len(ids))
                )
            else:
                with pytest.raises(StoreError, match="not in"):
                    store.read(ids)

    @rule(size=st.integers(1, 9), data=st.data())
    def chunks(self, size: int, data: st.DataObject) -> None:
        for store, held in ((self.store, self.held), (self.reader, self.seen)):
            parts = list(store.chunks(size))
            assert all(len(part) == size for part in parts[:-1])
            assert [name for part in parts for name in part.ids] == list(store.ids())
            for part in parts:
                self.same(part, held, part.ids)
            if held:
                ids = data.draw(st.lists(st.sampled_from(sorted(held))))
                for start, part in zip(range(0, len(ids), size), store.chunks(size, ids=ids), strict=True):
                    assert list(part.ids) == ids[start : start + size]
                    self.same(part, held, part.ids)

    def same(self, found: Any, held: Any, order: Any) -> None:
        expected = [held[name] for name in order]
        vectors = found.vectors.astype(np.float32) * (found.scales["vectors"][..., None] if found.scales else 1)
        assert np.array_equal(vectors.reshape(-1, DIM), np.concatenate([np.empty((0, DIM)), *(v for v, _ in expected)]))
        assert found.extras["n"].tolist() == [n for _, n in expected]
        assert (found.lengths is not None) == self.ragged
        if self.ragged:
            assert found.lengths.tolist() == [len(v) for v, _ in expected]

    @invariant()
    def the_same_ids(self) -> None:
        if not hasattr(self, "reader"):
            return
        for store, held in ((self.store, self.held), (self.reader, self.seen)):
            ids = list(store.ids())
            assert len(ids) == len(set(ids)) == len(store) == len(held)
            assert set(ids) == held.keys()
        assert not [p for p in self.directory.iterdir() if p.name.startswith(".")]

    def teardown(self) -> None:
        try:
            self.store.verify()
            self.reader.verify()
            self.store.close()
            again = self.kind.open(self.directory)
            assert again.contains(list(self.held)).all() and len(again) == len(self.held)
        finally:
            self.patched.undo()
            shutil.rmtree(self.directory)


class LanceModel(Model):
    kind = LanceStore

    def compacted(self) -> None:
        assert len(self.store._data.get_fragments()) <= 1


TestModel = Model.TestCase
TestModel.settings = hypothesis.settings(max_examples=40, stateful_step_count=40)
TestLanceModel = LanceModel.TestCase
TestLanceModel.settings = hypothesis.settings(max_examples=10, stateful_step_count=30, deadline=None)
