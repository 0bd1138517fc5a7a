"""Rows from every kind of source, and one clear sentence for everything that can be wrong with it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

from thresher.errors import DataError, OptionError
from thresher.tasks.data import load_rows, map_columns

ROWS = [{"text": "a good film", "label": 1}, {"text": "a bad, bad film", "label": 0}, {"text": "", "label": 1}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, split: str | None = None) -> None:
        raise ConnectionError("the hub is out of reach\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.delenv("THRESHER_DATA", raising=False)


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("rows.jsonl.gz", LINES),
        ("rows.jsonl", "\ufeff\n" + LINES.replace("\n", "\r\n")),
        ("rows.json", json.dumps(ROWS, indent=1)),
        ("rows.json.gz", "\ufeff" + json.dumps(ROWS)),
        ("rows.json", LINES),
        ("rows.csv", 'text,label\r\na good film,1\r\n\r\n"a bad, bad film",0\r\n"",1\r\n'),
        ("rows.csv.gz", 'text,label\na good film,1\n"a bad, bad film",0\n,1\n'),
        ("rows.tsv", "text\tlabel\na good film\t1\na bad, bad film\t0\n\t1\n"),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    assert load_rows(write(tmp_path / name, content)).to_list() == ROWS


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    assert load_rows(str(path)).to_list() == ROWS


def test_csv_values_become_numbers_only_where_nothing_is_lost(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f"name,long,count,share,mixed,none\n007,{10**20},1,0.5,1,\n12,2,,2,x,\n")
    first, second = load_rows(path).to_list()
    assert first == {"name": "007", "long": str(10**20), "count": 1, "share": 0.5, "mixed": "1", "none": ""}
    assert second == {"name": "12", "long": "2", "count": None, "share": 2.0, "mixed": "x", "none": ""}


def test_ids_of_a_csv_file_are_names(tmp_path: Path) -> None:
    assert load_rows(write(tmp_path / "a.csv", "id,relevant\n1,1\n2.5,2.5\n")).to_list() == [
        {"id": "1", "relevant": 1.0},
        {"id": "2.5", "relevant": 2.5},
    ]
    assert load_rows(write(tmp_path / "b.csv", "id\n1\n2\n"))["id"][:] == [1, 2]


def test_numbers_that_are_no_ids_may_be_whole_or_not(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "a.jsonl", '{"a": 1, "relevant": 1}\n{"a": 2.5, "relevant": 0.5}\n'))
    assert rows.to_list() == [{"a": 1.0, "relevant": 1.0}, {"a": 2.5, "relevant": 0.5}]


def test_csv_fields_may_hold_line_breaks_and_tsv_fields_stray_quotes(tmp_path: Path) -> None:
    assert load_rows(write(tmp_path / "a.csv", 'text,label\n"one\ntwo",1\n'))["text"][0] == "one\ntwo"
    assert load_rows(write(tmp_path / "a.tsv", 'text\tlabel\n"He said\t1\n'))["text"][0] == '"He said'


def test_a_field_longer_than_the_csv_default_is_read(tmp_path: Path) -> None:
    assert len(load_rows(write(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\n"))["text"][0]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl.gz", " \n", "a.jsonl.gz is empty"),
        ("a.json", "[]", "a.json holds no rows"),
        ("a.csv", "text,label\n", "a.csv holds a header but no rows"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', r"a.jsonl, line 3: this is not valid JSON \(Expecting value"),
        ("a.json", '[{"text": "x"},\n{"text" 1}]', r"a.json: this is not valid JSON .* at line 2, column"),
        ("a.jsonl", "[" * 100_000, "line 1: this is not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n["y"]\n', "a.jsonl, line 2: a row must be an object, and this is a list"),
        ("a.json", '[{"text": "x"}, 3]', "a.json, row 2: a row must be an object, and this is a number"),
        ("a.jsonl", '{"a": 1, "b": 2}\n{"a": 1}\n', "line 2: the field 'b', which line 1 has, is missing"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": 2}\n', "line 1: the field 'b', which line 2 has, is missing"),
        ("a.jsonl", "{}\n{}\n", "line 1: the rows have no fields"),
        (
            "a.jsonl",
            '{"a": null}\n{"a": 1}\n{"a": "x"}\n',
            "line 3: the field 'a' is of type str, but in line 2 .* int",
        ),
        ("a.jsonl", '{"a": 1}\n{"a": 2.5}\n{"a": "x"}\n', "line 3: the field 'a' is of type str, but in line 1 .* int"),
        (
            "a.jsonl",
            '{"a": 1}\n\n{"a": 99999999999999999999999}\n',
            "a.jsonl, line 3: the field 'a' has a whole number that does not fit into 64 bits; write .* as texts",
        ),
        (
            "a.jsonl",
            '{"a": 2.5}\n{"a": 99999999999999999999999}\n',
            "line 2: the field 'a' has a whole number that does",
        ),
        (
            "a.json",
            '[{"a": [0.5]}, {"a": [0.5, 99999999999999999999999]}]',
            "row 2: the field 'a' cannot be made a column",
        ),
        (
            "a.jsonl",
            '{"a": "x"}\n{"a": "x\\ud800 y"}\n',
            r"line 2: the field 'a' has half a character \(a lone surrogate\), at 1; write",
        ),
        ("a.json", '[{"a": ["x"]}, {"a": ["x", "\\udc00"]}]', "a.json, row 2: the field 'a' has half a character"),
        ("a.jsonl", '{"a": 1, "b\\ud800": 1}\n', r"line 1: the name of the field 'b\\ud800' has half a character"),
        ("a.jsonl", '{"a": [1]}\n{"a": [2]}\n{"a": ["x"]}\n', "line 3: the field 'a' cannot be made a column"),
        (
            "a.jsonl",
            '{"id": null}\n{"id": 1}\n{"id": 2.5}\n',
            "line 3: the field 'id' is 2.5, and in line 2 it is 1; ids are whole numbers, or all of them texts",
        ),
        ("a.json", '[{"id": 2.5}, {"id": 1}]', "row 1: the field 'id' is 2.5, and in row 2 it is 1;"),
        (
            "a.jsonl",
            '{"relevant": [1]}\n{"relevant": [2, 2.5]}\n',
            "line 2: the field 'relevant' is 2.5, and in line 1 it is 1;",
        ),
        ("a.jsonl", b'{"a": "x"}\n{"a": "\xff"}\n', "line 2: the text is not UTF-8"),
        ("a.csv", b"a,b\n1,2\n3,\xff\n", "line 3: the text is not UTF-8"),
        ("a.csv", 'a,b\n1,"2\n2"\n3\n', r"a.csv, line 4: 1 fields, but the header has 2 \(a, b\)"),
        ("a.tsv", "a\tb\n1\t2\t3\n", "a.tsv, line 2: 3 fields, but the header has 2"),
        ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', "a.csv, line 3: this is not a valid row"),
        ("a.csv", "a,a\n1,2\n", "a.csv, line 1: a column name stands twice"),
        ("a.parquet", "no parquet", "a.parquet cannot be read as parquet"),
        ("a.txt", "hello", "a.txt has an ending that is not known; known are .jsonl"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / name, content))


def test_unreadable_gzip(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(DataError, match="a.jsonl.gz cannot be read: Not a gzipped file"):
        load_rows(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-12])
    with pytest.raises(DataError, match="b.jsonl.gz cannot be read"):
        load_rows(tmp_path / "b.jsonl.gz")


def test_parquet_without_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds no rows"):
        load_rows(tmp_path / "a.parquet")


def test_a_missing_file_suggests_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "reviews.jsonl", LINES)
    with pytest.raises(DataError, match=r"no file or directory .*revews.jsonl; did you mean 'reviews.jsonl'\?"):
        load_rows(str(tmp_path / "revews.jsonl"))
    with pytest.raises(DataError, match=r"zzz.csv\.$"):
        load_rows(tmp_path / "zzz.csv")
    with pytest.raises(DataError, match="its directory .*nowhere is not there either"):
        load_rows(tmp_path / "nowhere" / "a.csv")


def test_a_directory_of_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    with pytest.raises(DataError, match="films holds no data file"):
        load_rows(folder)
    write(folder / "train.jsonl.gz", LINES)
    assert len(load_rows(folder)) == 3, "one split needs no name"
    write(folder / "test.csv", "text,label\nx,1\n")
    assert load_rows(folder, split="test").to_list() == [{"text": "x", "label": 1}]
    with pytest.raises(DataError, match="no split 'dev'; it has test, train"):
        load_rows(folder, split="dev")
    with pytest.raises(DataError, match="holds the splits test, train: name one"):
        load_rows(folder)
    with pytest.raises(DataError, match="one file, so there is no split 'train'"):
        load_rows(folder / "test.csv", split="train")

    monkeypatch.setenv("THRESHER_DATA", str(tmp_path))
    assert len(load_rows("films", split="train")) == 3
    assert len(load_rows("films/train.jsonl.gz")) == 3
    with pytest.raises(DataError, match=r"did you mean 'test.csv'"):
        load_rows("films/tst.csv")
    with pytest.raises(DataError, match=r"THRESHER_DATA names; did you mean 'films'\?\), and the hub"):
        load_rows("film", split="train")


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"'some/name' is no local file or directory, and the hub did not .* data set: the hub is out of reach\.$"
    with pytest.raises(DataError, match=message):
        load_rows("some/name", split="train")

    rows = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": rows, "test": rows.select([0])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split=None: splits[split] if split else splits)
    assert len(load_rows("some/name", split="test")) == 1
    with pytest.raises(DataError, match="has the splits train, test: name one"):
        load_rows("some/name")
    del splits["test"]
    assert len(load_rows("some/name")) == 3


def test_limit_and_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"n": n}) + "\n" for n in range(50)))
    assert load_rows(path, limit=4)["n"][:] == [0, 1, 2, 3]
    assert len(load_rows(path, limit=1000)) == 50
    first = load_rows(path, limit=10, seed=3)["n"][:]
    assert first == load_rows(path, limit=10, seed=3)["n"][:]
    assert first == load_rows(path, seed=3)["n"][:10], "a limit takes the head of the same shuffle"
    assert first != load_rows(path, limit=10, seed=4)["n"][:]
    with pytest.raises(OptionError, match="at least 1, not 0"):
        load_rows(path, limit=0)


def test_map_columns() -> None:
    rows = datasets.Dataset.from_dict({"title": ["t"], "text": ["x"], "review": ["r"], "stars": [3]})
    mapped = map_columns(rows, {"text": "review", "label": "stars"})
    assert mapped.to_list() == [{"title": "t", "text": "r", "label": 3}]
    swapped = map_columns(rows, {"text": "title", "title": "text"})
    assert swapped[0]["text"] == "t" and swapped[0]["title"] == "x"
    assert map_columns(rows, {}).column_names == rows.column_names
    with pytest.raises(
        DataError, match=r"no column 'star' \(there are title, text, review, stars\); did you mean 'stars'"
    ):
        map_columns(rows, {"label": "star"})
    with pytest.raises(DataError, match="uses a column twice"):
        map_columns(rows, {"text": "review", "text_pair": "review"})
