"""The command line on candidates: encode them once, rank them for a query."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from commands import call, fails, ok, write_rows
from pairs.scoring import scorer
from thresher.pairs import load
from thresher.pairs.keeping import Index
from thresher.pairs.store import open_store

WORDS = ["w9 w10", "w11", "w12 w13 w14", "w20 w9", "w21 w22 w23", "w30"]
ROWS = [{"id": f"p{i}", "text": text} for i, text in enumerate(WORDS)]
QUERY = "w9 w11 w30"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairing")
    for kind in ("mixencoder", "cross"):
        scorer(kind).save(root / kind)
    write_rows(root / "rows.jsonl", ROWS)
    return root


def words(place: Path, store: Path | str, *more: object, file: Any = "rows.jsonl") -> tuple[object, ...]:
    return ("index", place / file, "--model", place / "mixencoder", "--store", store, *more)


def ranked(place: Path, store: Path, *more: object, query: str = QUERY) -> Any:
    return ok("rank", query, "--model", place / "mixencoder", "--store", store, *more)


def expected(place: Path) -> list[dict[str, Any]]:
    found = load(place / "mixencoder").rank(QUERY, WORDS)
    return [{"id": f"p{number}", "score": score} for number, score in found]


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-2), ("float32", 1e-5), ("int8", 0.2)])
def test_index_and_rank(place: Path, tmp_path: Path, dtype: str | None, tolerance: float) -> None:
    store = tmp_path / "store"
    said = ok(*words(place, store, *(("--dtype", dtype) if dtype else ()), "--batch", 4))
    assert said["bytes"] > 0
    del said["bytes"]
    assert said == {"store": str(store), "candidates": 6, "new": 6, "there": 0, "cut": 0, "dtype": dtype or "float16",
                    "vectors": 2, "dim": 32, "ragged": False}  # fmt: skip
    found, exact = ranked(place, store), expected(place)
    assert found["candidates"] == 6
    scores = {one["id"]: one["score"] for one in exact}
    assert [one["score"] for one in found["ranked"]] == sorted((one["score"] for one in found["ranked"]), reverse=True)
    assert all(one["score"] == pytest.approx(scores[one["id"]], abs=tolerance) for one in found["ranked"])
    if dtype == "float32":
        assert [one["id"] for one in found["ranked"]] == [one["id"] for one in exact]


def test_a_lance_table_is_a_store(place: Path, tmp_path: Path) -> None:
    for store in (str(tmp_path / "one.lance"), f"file://{tmp_path}/two"):
        said = ok(*words(place, store, "--dtype", "float32", "--batch", 4))
        assert (said["store"], said["candidates"], said["new"]) == (store, 6, 6)
        assert said["bytes"] > 0
        again = ok(*words(place, store))
        assert (again["new"], again["there"]) == (0, 6)
        found = ok("rank", QUERY, "--store", store)
        assert [one["id"] for one in found["ranked"]] == [one["id"] for one in expected(place)]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["one.lance", "two"]
    fails("rank", QUERY, "--store", f"file://{tmp_path}/three", match="holds no candidate store")


def test_what_people_see(place: Path, tmp_path: Path) -> None:
    done = call(*words(place, tmp_path / "s"))
    assert done.exit_code == 0, done.stderr
    assert "2 x 32 in float16" in done.stdout
    assert f"--store {tmp_path / 's'}" in done.stdout
    shown = call("rank", QUERY, "--model", place / "mixencoder", "--store", tmp_path / "s", "-k", 2)
    assert shown.exit_code == 0, shown.stderr
    assert f"2 of 6 candidates in {tmp_path / 's'}." in shown.stdout
    assert len(re.findall(r"\bp\d\b", shown.stdout)) == 2


def test_some_of_the_candidates(place: Path, tmp_path: Path) -> None:
    ok(*words(place, tmp_path / "s"))
    some = tmp_path / "some.txt"
    some.write_bytes(b"p3\r\np1\n\np5")
    found = ranked(place, tmp_path / "s", "--ids", some, "-k", 2)
    every = [one["id"] for one in ranked(place, tmp_path / "s")["ranked"]]
    assert found["candidates"] == 3
    assert [one["id"] for one in found["ranked"]] == [name for name in every if name in ("p1", "p3", "p5")][:2]
    rank = ("rank", QUERY, "--model", place / "mixencoder", "--store", tmp_path / "s", "--ids")
    fails(*rank, tmp_path / "none.txt", match="Cannot use .*none.txt")
    for content, says in ((b"\n", "holds no ids"), (b"\xff\xfe", "not UTF-8"), (b"p1\np1", "given twice"),
                          (b"p9", "'p9' is not in")):  # fmt: skip
        some.write_bytes(content)
        fails(*rank, some, match=says)


def test_a_dialogue_is_a_query_of_several_texts(place: Path, tmp_path: Path) -> None:
    ok(*words(place, tmp_path / "s", "--dtype", "float32"))
    found = ok("rank", "w9 w10", "w12", "--model", place / "mixencoder", "--store", tmp_path / "s")["ranked"]
    made = load(place / "mixencoder")
    scores = dict(made.rank(["w9 w10", "w12"], WORDS))
    assert all(one["score"] == pytest.approx(scores[int(one["id"][1:])], abs=1e-5) for one in found)


def test_an_interrupted_index_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, kept = Index._keep, []

    def interrupted(self: Index, *given: Any) -> int:
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(1)
        return real(self, *given)

    monkeypatch.setattr(Index, "_keep", interrupted)
    done = call(*words(place, tmp_path / "s", "--batch", 2))
    assert (done.exit_code, done.stdout) == (130, "")
    assert "4 candidates were added" in done.stderr
    assert "the same command goes on from there" in done.stderr
    monkeypatch.undo()
    again = call(*words(place, tmp_path / "s", "--batch", 2, "--json"))
    assert again.exit_code == 0, again.stderr
    assert f"{tmp_path / 's'} holds 4 candidates" in again.stderr
    said = json.loads(again.stdout)
    assert (said["candidates"], said["new"], said["there"]) == (6, 2, 4)
    ok(*words(place, tmp_path / "whole", "--batch", 2))
    assert ranked(place, tmp_path / "s") == {**ranked(place, tmp_path / "whole"), "store": str(tmp_path / "s")}


@pytest.mark.slow
def test_several_workers_index_the_same(place: Path, tmp_path: Path) -> None:
    said = ok(*words(place, tmp_path / "s", "--batch", 2, "--workers", 2))
    assert said == {**ok(*words(place, tmp_path / "one", "--batch", 2)), "store": str(tmp_path / "s")}
    assert ranked(place, tmp_path / "s") == {**ranked(place, tmp_path / "one"), "store": str(tmp_path / "s")}


def test_other_files_and_columns(place: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,passage\n" + "".join(f"{i},{text}\n" for i, text in enumerate(WORDS[:4])))
    pq.write_table(pa.table({"id": ["x", "y"], "text": WORDS[4:]}), tmp_path / "rows.parquet")
    store = tmp_path / "s"
    ok(*words(place, store, "--column", "text=passage", file=tmp_path / "rows.csv"))
    assert ok(*words(place, store, file=tmp_path / "rows.parquet"))["candidates"] == 6
    assert {one["id"] for one in ranked(place, store)["ranked"]} == {"0", "1", "2", "3", "x", "y"}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"id": "a", "text": "w9"}, {"id": "", "text": "w9"}], "Row 2 has no id"),
        ([{"id": None, "text": "w9"}], "Row 1 has no id"),
        ([{"id": 1.5, "text": "w9"}], "Row 1 has the id 1.5"),
        ([{"id": "a", "text": "w9"}, {"id": "a", "text": "w10"}], "'a' is given twice"),
        ([{"id": "a", "text": None}], "Row 1 has no text"),
        ([{"id": "a", "text": 5}], "Row 1 has the text 5"),
        ([{"id": "a", "words": "w9"}], r"need a column 'text' \(there are id, words\)"),
        ([{"name": "a", "text": "w9"}], "need a column 'id'"),
        ([{"id": "a", "text": ["w9"]}, {"id": "b", "text": []}], r"Row 2 has no text that can be read: .*, not \[\]"),
        ([{"id": "a", "text": ["w9", None]}], "Row 1 has no text that can be read"),
        (
            [{"id": "a", "text": [5, 6]}, {"id": "b", "text": [5, 64]}],
            "Row 2 .* from 0 to 63, and 64 is not among them",
        ),
    ],
)
def test_bad_rows(place: Path, tmp_path: Path, rows: list[dict[str, Any]], says: str) -> None:
    fails(*words(place, tmp_path / "s", file=write_rows(tmp_path / "bad.jsonl", rows)), match=says)
    assert not (tmp_path / "s").exists()


def test_what_does_not_go_together(place: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    fails("rank", QUERY, "--model", place / "mixencoder", "--store", store, match="holds no candidate store")
    fails(*words(place, store, file="none.jsonl"), match="no file")
    assert not store.exists()
    ok(*words(place, store))
    fails(*words(place, store, "--dtype", "int8"), match="dtype 'float16', not dtype 'int8'")
    other = scorer("mixencoder", seed=1)
    other.save(tmp_path / "other")
    fails("rank", QUERY, "--model", tmp_path / "other", "--store", store, match="was made with fingerprint")
    fails(
        "index", place / "rows.jsonl", "--model", place / "cross", "--store", tmp_path / "c", match="computes nothing"
    )
    fails(
        "index",
        place / "rows.jsonl",
        "--model",
        tmp_path,
        "--store",
        tmp_path / "c",
        match=r"no scorer\.json|no scorer",
    )


def test_what_is_no_place_for_a_store(place: Path, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("mine")
    fails(
        *words(place, tmp_path), match="holds files, and none of them is a store's manifest.jsonl; give a new directory"
    )
    fails(*words(place, note), match="note.txt is a file; give a directory")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"] and note.read_text() == "mine"
    store = tmp_path / "killed"
    store.mkdir()
    for name in ("lock", ".tmp-manifest.jsonl"):
        (store / name).touch()
    assert ok(*words(place, store))["candidates"] == 6
    (store / "manifest.jsonl").unlink()
    before = sorted(store.glob("segment-*"))
    fails(*words(place, store), match="none of them is a store's")
    assert before and sorted(store.glob("segment-*")) == before


def test_a_store_knows_its_scorer(place: Path, tmp_path: Path) -> None:
    store, moved = tmp_path / "s", tmp_path / "scorer"
    shutil.copytree(place / "mixencoder", moved)
    said = call("index", place / "rows.jsonl", "--model", moved, "--store", store)
    assert f'thresher rank "…" --store {store}' in " ".join(said.stdout.split())
    assert ok("rank", QUERY, "--store", store) == ranked(place, store)
    moved.rename(tmp_path / "elsewhere")
    fails("rank", QUERY, "--store", store, match="its scorer was .*, where nothing is now; give --model DIR")
    (store / "scorer.txt").unlink()
    fails("rank", QUERY, "--store", store, match="does not say where its scorer is; give --model DIR")
    fails("rank", QUERY, "--store", tmp_path / "none", match="holds no candidate store")


def test_nothing_is_added_to_a_damaged_store(place: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    ok(*words(place, store))
    (segment,) = store.glob("segment-*")
    content = segment.read_bytes()
    segment.write_bytes(bytes([content[0] ^ 64]) + content[1:])
    before = sorted((file.name, file.stat().st_size) for file in store.iterdir())
    fails(*words(place, store), match="is damaged")
    assert sorted((file.name, file.stat().st_size) for file in store.iterdir()) == before
    segment.write_bytes(content)
    assert ok(*words(place, store))["there"] == 6


def test_queries_that_are_empty_or_too_long(place: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    ok(*words(place, store))
    rank = ("rank", "--model", place / "mixencoder", "--store", store)
    for query in (("",), (" ",), ("", " ")):
        fails(*rank, *query, match="The query is empty")
    said = call(*rank, " ".join(["w9"] * 99), "-k", 100)
    assert said.exit_code == 0 and "longer than 22 tokens and was cut" in said.stderr
    assert "6 of 6 candidates" in said.stdout
    assert call(*rank, QUERY, "-k", 0).exit_code == 2


def test_a_damaged_store_is_not_ranked(place: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    ok(*words(place, store))
    (segment,) = store.glob("segment-*")
    content = segment.read_bytes()
    rank = ("rank", QUERY, "--model", place / "mixencoder", "--store", store)
    some = tmp_path / "some"
    some.write_text("0\n")
    for at in (8, len(content) // 2, len(content) - 2):  # where ids are looked up, and in the vectors
        segment.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
        fails(*rank, match="is damaged .* restore it from a copy, or remove the store and index its candidates anew")
        fails(*rank, "--ids", some, match="is damaged")
    segment.write_bytes(content[:-1])
    fails(*rank, match="is damaged")
    segment.unlink()
    fails(*rank, match="is missing")


def test_a_refused_writer_leaves_the_store_as_it_is(place: Path, tmp_path: Path) -> None:
    store, copy = tmp_path / "s", tmp_path / "copy"
    ok(*words(place, store))
    shutil.copytree(place / "mixencoder", copy)
    file, *rest = words(place, store)[1:]
    with open_store(store) as writer:
        writer.hold()
        fails(
            "index", file, *(copy if word == place / "mixencoder" else word for word in rest), match="is being written"
        )
    shutil.rmtree(copy)
    assert ok("rank", QUERY, "--store", store)["ranked"]  # by the scorer that it was filled by


@pytest.mark.parametrize("content", [b"\xe1", b""])
def test_a_store_that_does_not_say_its_scorer_asks_for_it(place: Path, tmp_path: Path, content: bytes) -> None:
    ok(*words(place, tmp_path / "s"))
    (tmp_path / "s" / "scorer.txt").write_bytes(content)
    fails("rank", QUERY, "--store", tmp_path / "s", match="does not say where its scorer is; give --model DIR")


def test_help_has_an_example_and_json() -> None:
    for name in ("index", "rank"):
        text = call(name, "--help").stdout
        assert f"thresher {name}" in text and "--json" in text
