"""One writer, many readers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pairs import crashing
from pairs.storing import CHANGES, SETTINGS, constants, filled, names, one_sentence
from thresher.errors import StoreError
from thresher.pairs.store import CandidateStore, files

SCRIPT = str(Path(crashing.__file__))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CandidateStore]:
    with filled(tmp_path / "store") as made:
        yield made


def test_a_second_writer_is_refused_at_once(store: CandidateStore) -> None:
    with CandidateStore.open(store.directory) as second:
        for change in CHANGES.values():
            with pytest.raises(StoreError, match=f"being written by another one .process {os.getpid()}.") as error:
                change(second)
            one_sentence(error)
        with pytest.raises(StoreError, match="being written"):
            CandidateStore.create(store.directory, **SETTINGS)
        assert len(second) == 28
        store.delete(["c1"])
        store.close()
        second.delete(["c2"])  # sees what the first one did before it changes anything
        assert len(second) == 26
        assert second.contains(["c1", "c2"]).tolist() == [False, False]


def test_a_handle_that_is_dropped_holds_no_lock(store: CandidateStore) -> None:
    store.close()
    dropped = CandidateStore.open(store.directory)
    dropped.delete(["c1"])
    del dropped
    with CandidateStore.open(store.directory) as other:
        other.delete(["c2"])


def test_a_killed_writer_holds_no_lock(tmp_path: Path) -> None:
    CandidateStore.create(tmp_path, fingerprint="f", strategy="S", k=1, dim=4, dtype="float32").close()
    writer = subprocess.Popen([sys.executable, SCRIPT, "write", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    writer.stdout.readline()
    with pytest.raises(StoreError, match=f"process {writer.pid}"):
        CandidateStore.open(tmp_path).add(["x"], crashing.vectors(1)[:1])
    writer.kill()
    writer.wait()
    with CandidateStore.open(tmp_path) as store:
        store.add(["x"], crashing.vectors(1)[:1])


FORKED = """
import os, sys
from thresher.pairs.store import CandidateStore
from thresher.errors import StoreError
store = CandidateStore.create(sys.argv[1], fingerprint="f", strategy="S", k=1, dim=1)
store.add(["a"], [[[1.0]]])
go, went = os.pipe()
child = os.fork()
if child == 0:
    assert store.get(["a"]).item() == 1.0
    try:
        store.delete(["a"])
        os._exit(1)
    except StoreError as error:
        assert "being written" in str(error)
    os.close(went)
    os.read(go, 1)  # until the parent closed the store: the child does not keep the lock, and may have it now
    store.delete(["a"])
    os._exit(0)
store.delete([])
store.close()
os.close(went)
print(os.waitpid(child, 0)[1], "a" in CandidateStore.open(sys.argv[1]))
"""


def test_a_forked_child_reads_and_is_no_second_writer(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORKED, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "False"], done.stderr


def test_readers_keep_their_state_until_they_refresh(store: CandidateStore) -> None:
    reader = CandidateStore.open(store.directory)
    said = reader.get(["c1", "c21"])
    store.update(["c1"], constants(1, 7.0))
    store.delete(["c21"])
    store.compact()
    assert np.array_equal(reader.get(["c1", "c21"]), said)
    assert len(list(reader.ids())) == 28
    reader.verify()  # of the files it maps, which have no name any more
    assert reader.refresh()
    assert not reader.refresh()
    assert np.array_equal(reader.get(["c1"]), constants(1, 7.0))
    assert "c21" not in reader


def test_a_store_that_was_replaced(store: CandidateStore) -> None:
    reader = CandidateStore.open(store.directory)
    store.close()
    shutil.rmtree(store.directory)
    with pytest.raises(StoreError, match="holds no candidate store"):
        reader.refresh()
    CandidateStore.create(store.directory, **{**SETTINGS, "fingerprint": "model-b"}).close()
    with pytest.raises(StoreError, match="store of another kind") as error:
        reader.add(["x"], constants(1))
    one_sentence(error)
    assert len(reader) == 28
    CandidateStore.open(store.directory, "model-b").add(["x"], constants(1))


READING = """
import sys, time
from thresher.pairs.store import CandidateStore
end = time.monotonic() + 60
seen, store = set(), None
while "last" not in (store or ()):
    assert time.monotonic() < end
    if len(seen) % 2 or store is None:
        store = CandidateStore.open(sys.argv[1])
    else:
        store.refresh()
    values = {float(v) for part in store.chunks(7) for v in part.vectors[:, 0, 0]}
    assert len(values) == 1, values  # every commit changes all of them
    assert values == set(store.get(list(store.ids()))[:, 0, 0].tolist())
    seen |= values
print(len(seen))
"""


def test_readers_never_see_half_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda handle: None)  # more changes a second
    store = CandidateStore.create(tmp_path, fingerprint="f", strategy="S", k=1, dim=1, dtype="float32")
    store.add(names(50), np.zeros((50, 1, 1)))
    readers = [
        subprocess.Popen([sys.executable, "-c", READING, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)
    ]
    end = time.monotonic() + 3
    number = 0
    while time.monotonic() < end:
        number += 1
        store.update(names(50), np.full((50, 1, 1), number))
        if number % 3 == 0:
            store.compact()
    store.add(["last"], np.full((1, 1, 1), number))
    for reader in readers:
        said, _ = reader.communicate(timeout=60)
        assert reader.returncode == 0
        assert int(said) > 1
