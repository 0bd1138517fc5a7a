"""Files that are cut, missing or have a flipped bit are named, and what to do is said."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairs.storing import SETTINGS, filled, names, one_sentence
from thresher.errors import StoreError
from thresher.pairs.store import CandidateStore, view
from thresher.pairs.store import manifest as manifests


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CandidateStore]:
    with filled(tmp_path / "store") as made:
        yield made


def test_a_file_of_another_size_is_refused_at_opening(store: CandidateStore) -> None:
    for path in sorted(store.directory.glob("*-*")):
        content = path.read_bytes()
        for changed in (content[:-1], b"", content + b"\0"):
            path.write_bytes(changed)
            with pytest.raises(StoreError, match="is damaged .it has") as error:
                CandidateStore.open(store.directory)
            assert path.name in one_sentence(error)
        path.write_bytes(content)
    CandidateStore.open(store.directory).verify()


def test_a_missing_file_is_refused_at_opening(store: CandidateStore) -> None:
    paths = sorted(store.directory.glob("*-*"))
    assert len(paths) == 3
    for path in paths:
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(StoreError, match="is missing") as error:
            CandidateStore.open(store.directory)
        assert path.name in one_sentence(error)
        path.write_bytes(content)


def test_any_bit_of_the_manifest(store: CandidateStore) -> None:
    path = store.directory / manifests.MANIFEST
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        with pytest.raises(StoreError, match="damaged") as error:
            CandidateStore.open(store.directory)
        assert manifests.MANIFEST in one_sentence(error)
    for cut in range(0, len(content), 7):
        path.write_bytes(content[:cut])
        with pytest.raises(StoreError, match="damaged"):
            CandidateStore.open(store.directory)


@pytest.mark.parametrize(
    "state",
    [
        "[]",
        "null",
        "{}",
        '{"format": 1}',
        '{"format": 1, "segments": 5}',
        "x",
        '{"format": 1, "segments": [], "schema": {}}',
    ],
)
def test_a_manifest_that_says_nothing(store: CandidateStore, state: str) -> None:
    sign(store.directory, state)
    with pytest.raises(StoreError, match="damaged") as error:
        CandidateStore.open(store.directory)
    one_sentence(error)


def test_a_manifest_of_another_format_or_that_names_other_files(store: CandidateStore) -> None:
    line = (store.directory / manifests.MANIFEST).read_text().splitlines()[0]
    sign(store.directory, line.replace('"format": 1', '"format": 2'))
    with pytest.raises(StoreError, match="has format 2, this version reads 1") as error:
        CandidateStore.open(store.directory)
    one_sentence(error)
    sign(store.directory, line.replace("segment-00000001.seg", "../segment-00000001.seg"))
    with pytest.raises(StoreError, match="damaged"):
        CandidateStore.open(store.directory)
    sign(store.directory, line.replace('"rows": 20', '"rows": 20000'))
    with pytest.raises(StoreError, match="damaged"):
        CandidateStore.open(store.directory)


def sign(directory: Path, state: str) -> None:
    line = state.encode() + b"\n"
    (directory / manifests.MANIFEST).write_bytes(line + b'{"checksum": "%s"}\n' % manifests._checksum(line).encode())


@pytest.mark.parametrize("ragged", [False, True])
def test_a_flipped_bit_is_found_and_breaks_nothing_else(tmp_path: Path, ragged: bool) -> None:
    lengths: dict[str, Any] = {"lengths": np.full(20, 2)} if ragged else {}
    values = np.ones((40, 4)) if ragged else np.ones((20, 2, 4))
    with CandidateStore.create(tmp_path, **SETTINGS, ragged=ragged, dtype="int8") as made:
        made.add(names(20), values, **lengths)
        made.delete(["c3", "c4"])
    chance = random.Random(0)
    for path in tmp_path.glob("*-*"):
        content = path.read_bytes()
        size = len(content)
        for at in range(size) if size < 100 else sorted(chance.sample(range(size), 150)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
            store = CandidateStore.open(tmp_path)
            with pytest.raises(StoreError, match="checksum differs") as error:
                store.verify()
            assert path.name in one_sentence(error)
            for use in (
                lambda s: s.read(names(20, 5)[:15]),
                lambda s: list(s.chunks(3, ids=["c7", "c8"])),
                lambda s: list(s.ids()),
                lambda s: s.contains(names(20)),
            ):
                with contextlib.suppress(StoreError):
                    use(store)
            with pytest.raises(StoreError, match=f"{path.name} .*checksum differs"):
                list(store.chunks(7))
            with pytest.raises(StoreError, match="checksum differs"):
                store.compact()  # which would give what is damaged a good checksum
            store.close()
        path.write_bytes(content)
    with CandidateStore.open(tmp_path) as store:
        store.verify()
        store.compact()


def test_checksums_are_compared_once_for_every_file(store: CandidateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    before = view.checked

    def watched(directory: Path, entry: Any, mapping: Any) -> None:
        seen.append(entry.name)
        before(directory, entry, mapping)

    monkeypatch.setattr(view, "checked", watched)
    files = {path.name for path in store.directory.glob("*-*")}
    for _ in range(2):
        list(store.chunks(7))
        assert sorted(seen) == sorted(files)
    store.refresh()
    list(store.chunks(7))
    assert sorted(seen) == sorted(files)


def test_a_damaged_list_of_dead_rows_gets_no_fresh_checksum(store: CandidateStore) -> None:
    store.close()
    (path,) = store.directory.glob("dead-*")
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 8]) + content[1:])
    with CandidateStore.open(store.directory) as again:
        with pytest.raises(StoreError, match="checksum differs"):
            again.delete(["c12"])
        assert len(again) == 28
    path.write_bytes(content)
    CandidateStore.open(store.directory).verify()
