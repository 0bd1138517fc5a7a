"""Killed writers and full disks: the last committed state stays."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairs import crashing
from pairs.storing import CHANGES, SETTINGS, constants, contents, filled, names, one_sentence
from thresher.errors import StoreError
from thresher.pairs.store import CandidateStore, writing
from thresher.pairs.store import manifest as manifests

SCRIPT = str(Path(crashing.__file__))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CandidateStore]:
    with filled(tmp_path / "store") as made:
        yield made


# Killed.


def test_a_writer_killed_at_any_step_leaves_the_last_committed_state(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "sweep", str(tmp_path)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60


@pytest.mark.parametrize("rounds", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_writer_killed_at_a_random_time_leaves_the_last_committed_state(tmp_path: Path, rounds: int) -> None:
    CandidateStore.create(tmp_path, fingerprint="f", strategy="S", k=1, dim=4, dtype="float32").close()
    chance = random.Random(0)
    done = 0
    for _ in range(rounds):
        writer = subprocess.Popen(
            [sys.executable, SCRIPT, "write", str(tmp_path), str(done)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        done = int(writer.stdout.readline())
        time.sleep(chance.random() * 0.2)
        writer.send_signal(signal.SIGKILL)
        done = max([done, *map(int, writer.stdout.read().split())])
        writer.wait()
        done = crashing.check(tmp_path, (done, done + 1))


def test_files_last_before_what_names_them(store: CandidateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that a loss of power needs: a file before its name, names before the manifest, that before what is removed."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("reads the names of open files from /proc")
    events: list[tuple[str, str]] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def name(path: Any) -> str:
        return Path(path).name

    def synced(handle: int) -> None:
        fsync(handle)
        events.append(("sync", name(os.readlink(f"/proc/self/fd/{handle}"))))

    def renamed(a: Any, b: Any) -> None:
        replace(a, b)
        events.append(("name", name(b)))

    def removed(path: Any) -> None:
        unlink(path)
        events.append(("remove", name(path)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(os, "unlink", removed)
    (before,) = (e.dead for e in store._state.manifest.segments if e.dead)
    store.update(["c1"], constants(1))
    number = int(before.name[5:13])
    first, second = f"dead-{number + 1:08}.rows", f"segment-{number + 2:08}.seg"
    manifest = manifests.MANIFEST
    assert events == [
        ("sync", f".tmp-{first}"),
        ("name", first),
        ("sync", f".tmp-{second}"),
        ("name", second),
        ("sync", "store"),
        ("sync", f".tmp-{manifest}"),
        ("name", manifest),
        ("sync", "store"),
        ("remove", before.name),
    ]


def test_the_next_writer_removes_what_was_left_lying_and_nothing_else(store: CandidateStore) -> None:
    store.close()
    before = contents(store.directory)
    for name in (".tmp-segment-00000009.seg", "segment-00000099.seg", "dead-00000099.rows", ".tmp-manifest.jsonl"):
        (store.directory / name).write_bytes(b"half")
    for name in ("notes.txt", "segment.seg", "my-segment-00000099.seg"):
        (store.directory / name).write_bytes(b"mine")
    reader = CandidateStore.open(store.directory)
    assert len(reader) == 28
    assert len(contents(store.directory)) == len(before) + 7
    with pytest.raises(StoreError):
        reader.delete(["nobody"])  # becomes the writer, and changes nothing
    assert set(contents(store.directory)) == {*before, "notes.txt", "segment.seg", "my-segment-00000099.seg"}
    assert before.items() <= contents(store.directory).items()


# A full disk.


def failing(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, at: int, code: int = errno.ENOSPC) -> None:
    """The at-th call, and every one after it, fails."""
    real: Callable[..., Any] = getattr(target, name)
    count = itertools.count(1)

    def call(*args: Any, **options: Any) -> Any:
        if next(count) >= at:
            raise OSError(code, os.strerror(code))
        return real(*args, **options)

    monkeypatch.setattr(target, name, call)


@pytest.mark.parametrize(("call", "at"), [("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1), ("replace", 2)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_full_disk_leaves_the_last_state(
    store: CandidateStore, monkeypatch: pytest.MonkeyPatch, change: str, call: str, at: int
) -> None:
    before, said = contents(store.directory), store.get(["c1", "c21"])
    version = store._state.manifest.version
    failing(monkeypatch, os, call, at)
    with pytest.raises(StoreError, match="No space left on device; it holds what it held before") as error:
        CHANGES[change](store)
    monkeypatch.undo()
    one_sentence(error)
    assert contents(store.directory) == before
    assert len(store) == 28 and store._state.manifest.version == version
    assert np.array_equal(store.get(["c1", "c21"]), said)
    CHANGES[change](store)
    store.verify()
    assert CandidateStore.open(store.directory)._state.manifest == store._state.manifest


def test_a_sync_that_fails_after_the_manifest_is_in_place(
    store: CandidateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too late to take it back: what is on the disk counts, for this handle too."""
    failing(monkeypatch, os, "fsync", 4, errno.EIO)
    with pytest.raises(StoreError):
        store.add(names(5, 50), constants(5))
    monkeypatch.undo()
    assert store.contains(names(5, 50)).all() == (len(store) == 33)
    assert CandidateStore.open(store.directory)._state.manifest == store._state.manifest
    store.delete(["c1"])
    store.verify()


def test_a_file_size_limit(store: CandidateStore) -> None:
    resource = pytest.importorskip("resource", reason="the limit is POSIX's")
    before = contents(store.directory)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        with pytest.raises(StoreError, match="File too large; it holds what it held before") as error:
            store.add(names(1000, 100), constants(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_sentence(error)
    assert contents(store.directory) == before
    store.add(names(1000, 100), constants(1000))
    assert len(store) == 1028


def test_no_room_for_tidying_up_does_not_fail_the_change(
    store: CandidateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "FAN", 2)
    monkeypatch.setattr(writing, "Merge", full)
    store.add(["x"], constants(1))
    store.add(["y"], constants(1))
    monkeypatch.undo()
    assert len(store._state.segments) == 4
    assert np.array_equal(store.get(["x", "y"]), constants(2))
    store.compact()
    store.verify()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_an_interrupt_leaves_the_last_state(
    store: CandidateStore, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before = contents(store.directory)

    def interrupted(*args: Any) -> None:
        raise error

    monkeypatch.setattr(manifests, "sync", interrupted)
    with pytest.raises(error):
        store.update(["c1"], constants(1))
    monkeypatch.undo()
    assert contents(store.directory) == before
    store.update(["c1"], constants(1))


def test_a_store_that_cannot_be_created_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, os, "replace", 1)
    with pytest.raises(StoreError, match="Could not create a store in .*No space left") as error:
        CandidateStore.create(tmp_path, **SETTINGS)
    monkeypatch.undo()
    one_sentence(error)
    assert contents(tmp_path) == {}
    with CandidateStore.create(tmp_path, **SETTINGS) as store:
        store.add(["a"], constants(1))
    reader = CandidateStore.open(tmp_path)
    failing(monkeypatch, os, "open", 1, errno.EROFS)
    with pytest.raises(StoreError, match="Could not lock .*Read-only") as error:
        reader.delete(["a"])
    monkeypatch.undo()
    one_sentence(error)
    assert "a" in reader
