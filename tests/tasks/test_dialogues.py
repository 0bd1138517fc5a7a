"""Dialogues from every layout in one form, and one clear sentence for everything that can be wrong with them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thresher.errors import DataError, OptionError
from thresher.tasks import dialogues as reading
from thresher.tasks.dialogues import dialogues, load_dialogues, read_tsv

TSV = "1\thello\thow are you\tfine\n0\thello\thow are you\tblue\n0\twho\tme\n1\twho\tyou\n0\thello\tno\n"
READ = [
    {"context": ["hello", "how are you"], "candidates": ["fine", "blue"], "labels": [1, 0]},
    {"context": ["who"], "candidates": ["me", "you"], "labels": [0, 1]},
    {"context": ["hello"], "candidates": ["no"], "labels": [0]},
]


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THRESHER_DATA", raising=False)


def rows_of(*rows: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "candidates", "labels"),
    [
        ({"candidates": ["a", "b", "c"], "label": 1}, ["a", "b", "c"], [0, 1, 0]),
        ({"candidates": ["a", "b", "c"], "labels": [1, 0, 1]}, ["a", "b", "c"], [1, 0, 1]),
        ({"candidates": ["a", "b"], "labels": [0.0, 1.0]}, ["a", "b"], [0, 1]),
        ({"candidates": ["a", "b"], "labels": [True, False]}, ["a", "b"], [1, 0]),
        ({"candidates": ["a", "b"], "labels": [0, 0]}, ["a", "b"], [0, 0]),
        ({"candidates": ["a", None], "label": 0}, ["a", ""], [1, 0]),
        ({"positives": ["a", "b"], "adversarial": ["c"], "random": ["d", "e"]}, list("abcde"), [1, 1, 0, 0, 0]),
        ({"positives": ["a"], "random": ["d"]}, ["a", "d"], [1, 0]),
        ({"positives": ["a"], "adversarial": ["c"]}, ["a", "c"], [1, 0]),
    ],
)
def test_every_form_becomes_one(row: dict[str, Any], candidates: list[str], labels: list[int]) -> None:
    found = dialogues(rows_of({"id": "x", "context": ["hello", None], **row}).with_format("numpy"))
    assert found.to_list() == [{"context": ["hello", ""], "candidates": candidates, "labels": labels}]
    assert dialogues(found).to_list() == found.to_list()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": []}, "Row 2 has an empty context"),
        ({"context": None}, "Row 2 holds a null as its context, where a list of texts is expected"),
        ({"candidates": []}, "Row 2 has no candidates"),
        ({"candidates": [], "labels": []}, "Row 2 has no candidates"),
        ({"label": 2}, "Row 2 has the label 2, which is not the index of one of its 2 candidates"),
        ({"label": -1}, "Row 2 has the label -1"),
        ({"label": None}, "Row 2 has the label None"),
        ({"labels": [1]}, r"Row 2 has the labels \[1\], where 0 or 1 is expected for each of 2 candidates"),
        ({"labels": [1, 2]}, r"Row 2 has the labels \[1, 2\]"),
        ({"labels": [1, None]}, r"Row 2 has the labels \[1, None\]"),
        ({"labels": None}, "Row 2 has the labels None"),
    ],
)
def test_a_row_that_does_not_fit_is_named(row: dict[str, Any], message: str) -> None:
    fine: dict[str, Any] = {"context": ["hello"], "candidates": ["a", "b"]}
    fine |= {"labels": [1, 0]} if "labels" in row else {"label": 0}
    with pytest.raises(DataError, match=message):
        dialogues(rows_of(fine, {**fine, **row}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": "hello", "candidates": ["a"], "label": 0}, "Row 1 holds a text as its context, where a list"),
        ({"context": [1], "candidates": ["a"], "label": 0}, "Row 1 holds a number among its context, where a text"),
        ({"context": ["a"], "candidates": "a", "label": 0}, "Row 1 holds a text as its candidates"),
        ({"context": ["a"], "candidates": ["a"], "label": "a"}, "Row 1 has the label 'a'"),
        ({"context": ["a"], "candidates": ["a"], "label": False}, "Row 1 has the label False"),
        ({"context": ["a"], "positives": ["b"], "random": "c"}, "Row 1 holds a text as its random"),
        ({"context": ["a"], "candidates": ["a"]}, r"no dialogues \(there are context, candidates\): they need context"),
        ({"candidates": ["a"], "label": 0}, r"no dialogues \(there are candidates, label\)"),
        ({"context": ["a"], "positives": ["b"]}, "no dialogues"),
    ],
)
def test_columns_of_another_type(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dialogues(rows_of(row))


def test_no_rows() -> None:
    with pytest.raises(DataError, match="There are no dialogues"):
        dialogues(rows_of(READ[0]).select([]))


def test_a_row_is_named_by_its_own_number_in_a_later_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BATCH", 2)
    rows = [READ[0]] * 5
    assert dialogues(rows_of(*rows)).to_list() == rows
    with pytest.raises(DataError, match="Row 6 has an empty context"):
        dialogues(rows_of(*rows, {**READ[0], "context": []}))


# --- the tab-separated layout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", TSV),
        ("a.tsv", "\ufeff" + TSV.replace("\n", "\r\n")),
        ("a.txt.gz", "\n" + TSV.replace("\n", "\n\n")),
        ("a.TSV", TSV.rstrip("\n")),
    ],
)
def test_tsv(tmp_path: Path, name: str, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / name, content)
    assert read_tsv(path).to_list() == READ
    assert read_tsv(str(path)).features == dialogues(rows_of(READ[0])).features
    monkeypatch.setattr(reading, "_BATCH", 1)
    assert read_tsv(path).to_list() == READ


def test_tsv_texts_stay_as_they_are(tmp_path: Path) -> None:
    line = '0\t "quoted\x85 \u2028 a\rb\t\t 007 \n'
    (found,) = read_tsv(write(tmp_path / "a.txt", line)).to_list()
    assert found == {"context": [' "quoted\x85 \u2028 a\rb', ""], "candidates": [" 007 "], "labels": [0]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\ta\tb\n1\tb\n", r"a.txt, line 2: a label, utterances and a response .* this line has 2 of them"),
        ("1\ta\tb\n\nplain\n", "a.txt, line 3: .* this line has 1 of them"),
        ("label\tcontext\tresponse\n", "a.txt, line 1: the label is 'label', where 0 or 1 is expected"),
        ("1\ta\tb\n2\ta\tb\n", "a.txt, line 2: the label is '2'"),
        ("1\ta\tb\n1.0\ta\tb\n", "a.txt, line 2: the label is '1.0'"),
        ("1\ta\tb\n\t\t\n", "a.txt, line 2: the label is ''"),
        ("\n \n", "a.txt holds no dialogues"),
        (b"1\ta\tb\n1\ta\t\xff\n", "a.txt, line 2: the text is not UTF-8"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_tsv(write(tmp_path / "a.txt", content))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.txt cannot be read: .*No such file"):
        read_tsv(tmp_path / "none.txt")
    broken = tmp_path / "a.txt.gz"
    broken.write_bytes(gzip.compress(TSV.encode() * 99)[:-20])
    with pytest.raises(DataError, match=r"a.txt.gz cannot be read: "):
        read_tsv(broken)


TEXT = st.text(st.characters(blacklist_characters="\t\n\r", blacklist_categories=["Cs"]), max_size=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.lists(TEXT, min_size=1, max_size=3),
            st.lists(st.tuples(TEXT, st.integers(0, 1)), min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda dialogue: tuple(dialogue[0]),
    )
)
def test_what_is_written_is_read(tmp_path: Path, given: list[tuple[list[str], list[tuple[str, int]]]]) -> None:
    lines = ["\t".join([str(label), *context, text]) for context, responses in given for text, label in responses]
    found = read_tsv(write(tmp_path / "a.txt", "\n".join(lines))).to_list()
    for row, (context, responses) in zip(found, given, strict=True):
        assert row["context"] == context
        assert list(zip(row["candidates"], row["labels"], strict=True)) == responses


# --- sources ---------------------------------------------------------------------------------------------------------


def test_load_takes_what_load_rows_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in READ)
    write(folder / "train.jsonl.gz", lines)
    write(folder / "README.txt", "no data")
    assert load_dialogues(folder, split="train").to_list() == READ
    assert load_dialogues(folder).to_list() == READ
    assert load_dialogues(folder / "train.jsonl.gz").to_list() == READ
    monkeypatch.setenv("THRESHER_DATA", str(tmp_path))
    assert load_dialogues("mine", split="train").to_list() == READ
    with pytest.raises(DataError, match="no split 'test'"):
        load_dialogues("mine", split="test")


@pytest.mark.parametrize("name", ["valid.txt", "valid.tsv.gz"])
def test_load_a_folder_of_tab_separated_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / "ubuntu"
    folder.mkdir()
    write(folder / name, TSV)
    assert load_dialogues(folder).to_list() == READ
    write(folder / "train.txt", TSV.splitlines()[0])
    monkeypatch.setenv("THRESHER_DATA", str(tmp_path))
    assert load_dialogues("ubuntu", split="valid").to_list() == READ
    assert load_dialogues(f"ubuntu/{name}").to_list() == READ
    assert len(load_dialogues("ubuntu", split="train")) == 1
    with pytest.raises(DataError, match="holds the splits train, valid: name one"):
        load_dialogues("ubuntu")
    with pytest.raises(DataError, match="no split 'vaild'; did you mean 'valid'"):
        load_dialogues("ubuntu", split="vaild")
    with pytest.raises(DataError, match="one file, so there is no split 'train'"):
        load_dialogues(folder / name, split="train")


def test_load_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        load_dialogues(tmp_path / "empty")
    with pytest.raises(DataError, match="There is no file or directory"):
        load_dialogues(tmp_path / "none.txt")


def test_limit_and_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "".join(f"1\tu{i}\tr{i}\n0\tu{i}\tw{i}\n" for i in range(20)))
    assert load_dialogues(path, limit=2).to_list() == read_tsv(path).to_list()[:2]
    assert len(load_dialogues(path, limit=99)) == 20
    shuffled = load_dialogues(path, seed=1, limit=10)["context"][:]
    assert shuffled == load_dialogues(path, seed=1)["context"][:10]
    assert shuffled != load_dialogues(path, seed=2, limit=10)["context"][:]
    with pytest.raises(OptionError, match="at least 1, not 0"):
        load_dialogues(path, limit=0)


def test_columns_by_another_name(tmp_path: Path) -> None:
    row = {"turns": ["hi", "who?"], "options": ["me", "you"], "right": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    names = {"context": "turns", "candidates": "options", "label": "right"}
    wanted = [{"context": ["hi", "who?"], "candidates": ["me", "you"], "labels": [0, 1]}]
    assert load_dialogues(tmp_path / "a.jsonl", columns=names).to_list() == wanted
    assert load_dialogues(tmp_path / "a.jsonl", usual=names).to_list() == wanted
    with pytest.raises(DataError, match="There is no column 'talk'"):
        load_dialogues(tmp_path / "a.jsonl", columns={"context": "talk"})
