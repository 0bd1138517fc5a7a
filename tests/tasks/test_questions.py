"""Questions about passages in one form: every layout, and one clear sentence for whatever is wrong with a row."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import DataError, OptionError
from thresher.tasks.question_files import NOWHERE
from thresher.tasks.questions import load_questions, questions

MILL = "The mill at Orrin burned in 1802. Its owner, Ada Quill, rebuilt it of stone. 🌾 It stands today."
BOAT = "Café-Boote fahren täglich; the ferry 渡し船 leaves at nine."


def asked(name: str, context: str, *answers: str) -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {
        "id": name,
        "title": "made up",
        "context": context,
        "question": f"What about {name}?",
        "answers": {"text": list(answers), "answer_start": starts},
    }


ROWS = [
    asked("m1", MILL, "1802", "in 1802"),
    asked("m2", MILL, "Ada Quill"),
    asked("b1", BOAT, "渡し船"),
]
WANTED = [{name: value for name, value in row.items() if name != "title"} for row in ROWS]


def squad(rows: list[dict[str, Any]], *, two: bool = False) -> dict[str, Any]:
    """Rows in SQuAD's own layout, one article, a paragraph for each passage."""
    paragraphs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        qa = {"id": row["id"], "question": row["question"]}
        qa["answers"] = [{"text": text, "answer_start": start} for text, start in pairs]
        if two:
            qa["is_impossible"] = not qa["answers"]
        paragraphs.setdefault(row["context"], []).append(qa)
    made = [{"context": context, "qas": qas} for context, qas in paragraphs.items()]
    return {"version": "v2.0" if two else "1.1", "data": [{"title": "t", "paragraphs": made}]}


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def put(file: Path, text: str) -> Path:
    data = text.encode()
    file.write_bytes(gzip.compress(data) if file.name.endswith(".gz") else data)
    return file


def table(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl.gz", lines(ROWS)),
        ("a.json", lines(ROWS)),
        ("a.json", json.dumps(ROWS)),
        ("a.json.gz", json.dumps(ROWS, indent=2)),
        ("squad.json", json.dumps(squad(ROWS))),
        ("squad.json.gz", json.dumps(squad(ROWS), indent=1)),
        ("bom.jsonl", "\ufeff" + lines(ROWS) + "\n\n"),
    ],
)
def test_every_layout_gives_the_same_rows(tmp_path: Path, name: str, text: str) -> None:
    found = load_questions(put(tmp_path / name, text))
    assert found.column_names == ["id", "question", "context", "answers"]
    assert found.to_list() == WANTED


def test_parquet_and_rows_of_ones_own(tmp_path: Path) -> None:
    table(ROWS).to_parquet(tmp_path / "a.parquet")
    assert load_questions(tmp_path / "a.parquet").to_list() == WANTED
    assert questions(table(ROWS)).to_list() == WANTED
    assert questions(questions(table(ROWS))).to_list() == WANTED


def test_a_folder_with_splits_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    put(tmp_path / "own" / "train.jsonl.gz", lines(ROWS))
    put(tmp_path / "own" / "dev.json", json.dumps(squad(ROWS[:1])))
    monkeypatch.setenv("THRESHER_DATA", str(tmp_path))
    assert len(load_questions("own", split="train")) == 3
    assert len(load_questions("own", split="dev")) == 1
    with pytest.raises(DataError, match="splits dev, train"):
        load_questions("own")


def test_a_limit_draws_by_seed(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", lines(ROWS))
    assert load_questions(file, limit=2)["id"][:] == ["m1", "m2"]
    drawn = [load_questions(file, limit=2, seed=seed)["id"][:] for seed in (5, 5)]
    assert drawn[0] == drawn[1]
    with pytest.raises(OptionError, match="at least 1"):
        load_questions(file, limit=0)


def test_squad_2_has_questions_without_an_answer(tmp_path: Path) -> None:
    rows = [*ROWS, asked("none", BOAT)]
    article = squad(rows, two=True)
    article["data"][0]["paragraphs"][1]["qas"][-1]["plausible_answers"] = [{"text": "nine", "answer_start": 52}]
    found = load_questions(put(tmp_path / "two.json", json.dumps(article)))
    assert found[3]["answers"] == {"text": [], "answer_start": []}
    assert found.to_list()[:3] == WANTED


def test_mrqa(tmp_path: Path) -> None:
    start = MILL.index("Ada")
    detected = [
        {"text": "ada quill", "char_spans": [[start, start + len("Ada Quill") - 1]], "token_spans": [[9, 10]]},
    ]
    qas = [
        {"qid": "x", "question": "Who?", "answers": ["ada quill", "Mrs Quill"], "detected_answers": detected},
        {"qid": "y", "question": "When?", "answers": ["long ago"], "detected_answers": []},
    ]
    text = lines([{"header": {"dataset": "own", "split": "dev"}}, {"id": "p", "context": MILL, "qas": qas}])
    found = load_questions(put(tmp_path / "mrqa.jsonl.gz", text))
    assert found["id"][:] == ["x", "y"]
    # The end of a span is included, the passage's own words are the answer, and what is nowhere is still right.
    wanted = {"text": ["Ada Quill", "ada quill", "Mrs Quill"], "answer_start": [start, NOWHERE, NOWHERE]}
    assert found[0]["answers"] == wanted
    assert found[1]["answers"] == {"text": ["long ago"], "answer_start": [NOWHERE]}


def hotpot(answer: str, **changes: Any) -> dict[str, Any]:
    return {
        "_id": "h1",
        "question": "In what year did the mill of Ada Quill burn?",
        "answer": answer,
        "context": [
            ["Ada Quill", ["Ada Quill owned a mill.", " She was born in 1771."]],
            ["Orrin", ["Orrin is a town.", " Its mill burned in 1802.", " In 1771 it had a fair."]],
        ],
        "supporting_facts": [["Ada Quill", 0], ["Orrin", 1], ["Orrin", 9]],
        **changes,
    }


def test_hotpot(tmp_path: Path) -> None:
    (row,) = load_questions(put(tmp_path / "h.json", json.dumps([hotpot("1802")])))
    assert row["context"] == (
        "Ada Quill: Ada Quill owned a mill. She was born in 1771.\n"
        "Orrin: Orrin is a town. Its mill burned in 1802. In 1771 it had a fair."
    )
    facts = [row["context"][start:end] for start, end in row["evidence"]]
    assert facts == ["Ada Quill owned a mill.", " Its mill burned in 1802."]
    (start,) = row["answers"]["answer_start"]
    assert row["context"][start : start + 4] == "1802"


def test_hotpot_answers_are_words_of_the_evidence_first(tmp_path: Path) -> None:
    def place(answer: str, **changes: Any) -> int:
        row = hotpot(answer, **changes)
        made = {"title": [title for title, _ in row["context"]], "sentences": [text for _, text in row["context"]]}
        facts = {
            "title": [one for one, _ in row["supporting_facts"]],
            "sent_id": [n for _, n in row["supporting_facts"]],
        }
        text = lines([{**row, "context": made, "supporting_facts": facts}])  # as the hub writes it
        return int(load_questions(put(tmp_path / "h.jsonl", text))[0]["answers"]["answer_start"][0])

    whole = "Ada Quill: Ada Quill owned a mill. She was born in 1771.\nOrrin: Orrin is a town. Its mill"
    assert place("Ada Quill") == len("Ada Quill: ")
    assert place("1771", supporting_facts=[["Orrin", 2]]) > len(whole)
    assert place("1771") == whole.index("1771")
    assert place("yes") == place("ill") == NOWHERE


def test_hotpot_without_supporting_facts_as_its_test_set_is(tmp_path: Path) -> None:
    bare = {name: value for name, value in hotpot("").items() if name not in ("answer", "supporting_facts")}
    for row in (bare, {**bare, "answer": None, "supporting_facts": None}):
        (found,) = load_questions(put(tmp_path / "h.json", json.dumps([row])), labelled=None)
        assert found["context"].startswith("Ada Quill: Ada Quill owned") and "answers" not in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"supporting_facts": [["Nobody", 0]]}, r"of which its context has none, such as \['Nobody', 0\]"),
        ({"supporting_facts": [3]}, "titles with numbers of sentences"),
        ({"context": [["Ada Quill"]]}, "no context of titles and sentences"),
        ({"answer": 1802}, "a number as its answer"),
    ],
)
def test_hotpot_that_is_none(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        load_questions(put(tmp_path / "h.json", json.dumps([{**hotpot("1802"), **changes}])))


# --- labels ----------------------------------------------------------------------------------------------------------


def test_answers_required_taken_or_left() -> None:
    bare = [{name: row[name] for name in ("id", "question", "context")} for row in ROWS]
    wrong = table([{**ROWS[0], "answers": {"text": ["nonsense"], "answer_start": [3]}}])
    assert questions(table(ROWS), labelled=None).to_list() == WANTED
    assert questions(table(bare), labelled=None).to_list() == bare
    assert questions(wrong, labelled=False).to_list() == bare[:1]
    for labelled, rows in ((True, table(bare)), (None, wrong)):
        with pytest.raises(DataError):
            questions(rows, labelled=labelled)


def test_ids_are_numbers_where_there_are_none() -> None:
    rows = [{name: row[name] for name in ("question", "context", "answers")} for row in ROWS]
    assert questions(table(rows))["id"][:] == ["1", "2", "3"]


def test_evidence_of_ones_own() -> None:
    rows = [{**ROWS[0], "evidence": [[0, 33], [76, 80]]}, {**ROWS[1], "evidence": []}]
    assert questions(table(rows))["evidence"][:] == [[[0, 33], [76, 80]], []]


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=3), st.data())
def test_every_piece_of_any_text_is_an_answer_where_it_stands(words: list[str], data: st.DataObject) -> None:
    context = "".join(words)
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, len(context)))
    answer = context[start:end]
    row = {"id": "a", "question": "?", "context": context, "answers": {"text": [answer], "answer_start": [start]}}
    if answer.strip():
        assert questions(table([row])).to_list() == [row]
    moved = {**row, "answers": {"text": [answer], "answer_start": [start + 1]}}
    if context[start + 1 : end + 1] != answer:
        with pytest.raises(DataError, match="'a'"):
            questions(table([moved]))


# --- what is wrong ---------------------------------------------------------------------------------------------------

BAD = {
    "answer elsewhere": ({"answers": {"text": ["1802"], "answer_start": [5]}}, "'1802' stands at character 5"),
    "answer beyond": ({"answers": {"text": ["1802"], "answer_start": [500]}}, "at character 500"),
    "negative start": ({"answers": {"text": ["1802"], "answer_start": [-2]}}, "starts at -2"),
    "start no number": ({"answers": {"text": ["1802"], "answer_start": ["28"]}}, "starts at '28'"),
    "empty answer": ({"answers": {"text": [" "], "answer_start": [3]}}, "empty answer"),
    "answer no text": ({"answers": {"text": [5], "answer_start": [3]}}, "number as its answer"),
    "uneven answers": ({"answers": {"text": ["1802"], "answer_start": []}}, "answers that are neither"),
    "answers no lists": ({"answers": "1802"}, "answers that are neither"),
    "no answers": ({"answers": None}, "nothing of answers"),
    "no context": ({"context": None}, "no context"),
    "empty context": ({"context": ""}, "empty context"),
    "blank context": ({"context": " \n\t\u3000"}, "empty context"),
    "context no text": ({"context": ["a"]}, "list as its context"),
    "no question": ({"question": None}, "no question"),
    "half a character": ({"context": MILL + "\ud800"}, "lone surrogate"),
    "evidence outside": ({"evidence": [[0, 5000]]}, r"\[0, 5000\]"),
    "evidence backwards": ({"evidence": [[7, 7]]}, r"\[7, 7\]"),
    "evidence no span": ({"evidence": [3]}, "evidence 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named(tmp_path: Path, name: str) -> None:
    change, match = BAD[name]
    bad = {**ROWS[1], **change}
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], bad, ROWS[2])))
    with pytest.raises(DataError, match=match) as error:
        load_questions(file)
    assert "line 2: the question 'm2' " in str(error.value)
    assert str(error.value).count(".") <= str(file).count(".") + str(error.value).count("1802.") + 1


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_skipped_only_when_asked_and_never_silently(tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], {**ROWS[1], **BAD[name][0]}, ROWS[2])))
    with pytest.warns(UserWarning, match=r"^1 bad question is left out \(m2\); the first ") as said:
        found = load_questions(file, skip_bad=True)
    assert len(said) == 1
    assert found["id"][:] == ["m1", "b1"]


def test_nothing_is_said_where_nothing_is_skipped() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(questions(table(ROWS), skip_bad=True)) == 3


def test_many_bad_rows_are_counted_and_the_first_named() -> None:
    rows = [{**ROWS[0], "id": f"r{i}", "context": " " if i % 2 else MILL} for i in range(40)]
    with pytest.warns(UserWarning, match=r"20 bad questions are left out \(r1, r3, r5, r7, r9, \.\.\.\)"):
        assert len(questions(table(rows), skip_bad=True)) == 20
    with pytest.raises(DataError, match="no questions"), pytest.warns(UserWarning, match="1 bad question "):
        questions(table([{**ROWS[0], "context": ""}]), skip_bad=True)


def test_who_wants_to_know_of_each_bad_row_is_told_and_nothing_is_warned_of(tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[1], "context": ""}, {"question": "?", "answers": None}]
    told: list[tuple[str, str]] = []
    file = put(tmp_path / "a.jsonl", lines(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_questions(file, skip_bad=True, on_bad=lambda name, error: told.append((name, error)))
        assert found["id"][:] == ["m1"]
        assert [name for name, _ in told] == ["m2", "line 3"]
        assert "empty context" in told[0][1]
        told.clear()
        columns = table([*ROWS[:1], {**ROWS[1], "context": ""}])
        assert len(questions(columns, skip_bad=True, on_bad=lambda name, error: told.append((name, error)))) == 1
    assert [name for name, _ in told] == ["m2"]
    with pytest.raises(DataError, match="'m2'"):
        load_questions(file, on_bad=lambda name, error: told.append((name, error)))
    assert len(told) == 1


def test_an_id_stands_once() -> None:
    rows = table([ROWS[0], {**ROWS[1], "id": "m1"}])
    with pytest.raises(DataError, match="Row 2: the question 'm1' has the id of an earlier question"):
        questions(rows)
    with pytest.warns(UserWarning, match="1 bad question "):
        assert questions(rows, skip_bad=True).to_list() == WANTED[:1]


def test_columns_that_are_no_questions() -> None:
    with pytest.raises(DataError, match="no questions about passages"):
        questions(table([{"text": "a", "label": 1}]))
    with pytest.raises(DataError, match="and answers"):
        questions(table([{"question": "a", "context": "b"}]))


def test_rows_of_two_kinds(tmp_path: Path) -> None:
    bare = {name: ROWS[1][name] for name in ("id", "question", "context")}
    file = put(tmp_path / "a.jsonl", lines([ROWS[0], bare]))
    with pytest.raises(DataError, match="line 2: the question 'm2' says nothing of answers"):
        load_questions(file, labelled=None)
    file = put(tmp_path / "a.jsonl", lines([bare, ROWS[0]]))
    with pytest.raises(DataError, match="line 1: the question 'm2' says nothing of answers"):
        load_questions(file, labelled=None)
    with pytest.warns(UserWarning, match="1 bad question is left out"):
        assert load_questions(file, labelled=None, skip_bad=True)["id"][:] == ["m1"]


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("empty.json", b" \n", "is empty"),
        ("empty.jsonl", b"", "holds no questions"),
        ("cut.json", json.dumps(squad(ROWS)).encode()[:-20], r"not valid JSON .*is the file whole"),
        ("cut.jsonl", lines(ROWS).encode()[:-20], r"line 3 is not valid JSON"),
        ("cut.jsonl.gz", gzip.compress(lines(ROWS).encode())[:-12], "cannot be read"),
        ("cut.json.gz", gzip.compress(json.dumps(ROWS).encode())[:-12], "cannot be read"),
        ("no.json.gz", b"not gzip", "cannot be read"),
        ("latin.jsonl", lines(ROWS).encode("utf-16"), "not UTF-8"),
        ("number.json", b"5", "holds a number"),
        ("list.jsonl", b"[1]\n", "line 1 is a list"),
        ("deep.json", b"[" * 100_000, "nested too deep|not valid JSON"),
        ("data.json", b'{"data": 5}', "has no list 'data'"),
        ("paragraphs.json", b'{"data": [{"title": "x"}]}', "article 1 has no list 'paragraphs', which SQuAD"),
        ("qas.json", b'{"data": [{"paragraphs": [{"context": "a"}]}]}', "article 1, paragraph 1 has no list 'qas'"),
        ("qa.json", b'{"data": [{"paragraphs": [{"context": "a", "qas": [5]}]}]}', "question 1 is no object"),
        (
            "mrqa.jsonl",
            b'{"context": "a", "qas": [{"qid": "q", "question": "?", "detected_answers": [5]}]}',
            "'q' has det",
        ),
        ("mrqa.jsonl", b'{"context": "a", "qas": 5}', "no object"),
        (
            "hotpot.json",
            b'[{"_id": "h", "question": "?", "supporting_facts": [], "context": 5}]',
            "'h' has no context of",
        ),
    ],
)
def test_a_file_that_is_malformed(tmp_path: Path, name: str, data: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=match):
        load_questions(tmp_path / name)


def test_questions_without_an_id_get_one_that_nobody_has(tmp_path: Path) -> None:
    qas = [{"question": row["question"], "answers": [], "detected_answers": []} for row in ROWS[:2]]
    nameless = {"context": "It turns.", "qas": qas}
    (tmp_path / "mrqa.jsonl").write_text(lines([nameless, nameless]))
    assert load_questions(tmp_path / "mrqa.jsonl")["id"] == ["1", "2", "3", "4"]
    articles = [{"title": "t", "paragraphs": [{"context": "It turns.", "qas": qas}]}] * 2
    (tmp_path / "articles.jsonl").write_text(lines(articles))
    assert load_questions(tmp_path / "articles.jsonl", labelled=False)["id"] == ["1", "2", "3", "4"]
    rows = [{"context": "It turns.", "question": "What?", "id": name} for name in ("a", "3", None, "*")]
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    assert load_questions(tmp_path / "rows.jsonl", labelled=False)["id"] == ["a", "3", "3*", "*"]


def test_a_malformed_part_of_a_squad_file_can_be_left_out(tmp_path: Path) -> None:
    found = squad(ROWS)
    good = found["data"][0]["paragraphs"]
    bad = [5, {"qas": []}, {"context": "a", "qas": {}}, {"context": "a"}]
    found["data"] = ["x", {"title": "y"}, {"title": "z", "paragraphs": None}, {"paragraphs": [*bad, *good]}]
    (tmp_path / "whole.json").write_text(json.dumps(found))
    (tmp_path / "lines.jsonl").write_text(lines(found["data"]))
    with pytest.raises(DataError, match=r"whole\.json, article 1 is a text, where an object is expected\.$"):
        load_questions(tmp_path / "whole.json")
    told: list[tuple[str, str]] = []
    kept = load_questions(tmp_path / "whole.json", skip_bad=True, on_bad=lambda *one: told.append(one))
    (tmp_path / "good.json").write_text(json.dumps(squad(ROWS)))
    assert kept.to_list() == load_questions(tmp_path / "good.json").to_list()
    assert [name for name, _ in told] == [
        "article 1", "article 2", "article 3", *(f"article 4, paragraph {n}" for n in (1, 2, 3, 4))
    ]  # fmt: skip
    assert "no 'context'" in told[4][1] and "no list 'qas'" in told[5][1] and "no list 'qas'" in told[6][1]
    told.clear()
    assert (
        load_questions(tmp_path / "lines.jsonl", skip_bad=True, on_bad=lambda *one: told.append(one)).to_list()
        == kept.to_list()
    )
    assert [name for name, _ in told][:4] == ["line 1", "line 2", "line 3, article 1", "line 4, article 1, paragraph 1"]


def test_a_file_that_is_cut_short_is_never_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "cut.jsonl.gz"
    file.write_bytes(gzip.compress(lines(ROWS).encode())[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        load_questions(file, skip_bad=True)
    with pytest.raises(DataError, match="no file or directory"):
        load_questions(tmp_path / "nothing.jsonl")


# --- fields by another name ---------------------------------------------------------------------------------------------

OTHER = {"question": "query", "context": "passage", "answers": "gold", "id": "nr"}


def renamed(found: Any, names: dict[str, str]) -> Any:
    """The same nested lists and objects with the fields called otherwise."""
    if isinstance(found, list):
        return [renamed(one, names) for one in found]
    if isinstance(found, dict):
        return {names.get(name, name): renamed(value, names) for name, value in found.items()}
    return found


def mrqa(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"header": {"dataset": "made up"}}]
    for row in rows:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        spans = [{"text": text, "char_spans": [[start, start + len(text) - 1]]} for text, start in pairs]
        qa = {"qid": row["id"], "question": row["question"], "detected_answers": spans, "answers": []}
        made.append({"context": row["context"], "qas": [qa]})
    return made


@pytest.mark.parametrize("usual", [False, True])
@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("a.jsonl", lambda: lines(renamed(ROWS, OTHER))),
        ("a.json", lambda: json.dumps(renamed(ROWS, OTHER))),
        ("squad.json", lambda: json.dumps(renamed(squad(ROWS), OTHER))),
        ("squad2.json", lambda: json.dumps(renamed(squad(ROWS, two=True), OTHER))),
    ],
)
def test_fields_by_another_name_in_every_layout(tmp_path: Path, name: str, made: Any, usual: bool) -> None:
    (tmp_path / name).write_text(made())
    with pytest.raises(DataError):
        load_questions(tmp_path / name)
    found = load_questions(tmp_path / name, **{"usual" if usual else "columns": OTHER})
    assert found.to_list() == WANTED


def test_fields_by_another_name_in_mrqa_and_in_a_table(tmp_path: Path) -> None:
    names = {"question": "query", "context": "passage"}
    (tmp_path / "m.jsonl").write_text(lines(renamed(mrqa(ROWS), names)))
    assert load_questions(tmp_path / "m.jsonl", columns=names)["question"][:] == [row["question"] for row in WANTED]
    datasets.Dataset.from_list(renamed(ROWS, OTHER)).to_parquet(tmp_path / "a.parquet")
    assert load_questions(tmp_path / "a.parquet", columns=OTHER).to_list() == WANTED


def test_usual_names_hold_only_where_they_are_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    assert load_questions(tmp_path / "a.jsonl", usual=OTHER).to_list() == WANTED
    swapped = [row | {"question": row["id"], "id": row["question"], "query": "not this"} for row in ROWS]
    (tmp_path / "b.jsonl").write_text(lines(swapped))
    columns = {"question": "id", "id": "question"}
    assert load_questions(tmp_path / "b.jsonl", columns=columns, usual=OTHER).to_list() == WANTED


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", lines(ROWS)), ("squad.json", json.dumps(squad(ROWS))), ("m.jsonl", lines(mrqa(ROWS)))],
)
def test_a_field_that_is_not_there_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"has no field 'query' \(there are .*question.*\)\.$"):
        load_questions(tmp_path / name, columns={"question": "query"})


def test_a_number_of_too_many_digits_is_bad_json(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", lines([ROWS[0]]) + '{"id": ' + "1" * 5000 + "}\n")
    with pytest.raises(DataError, match="line 2.*a number has too many digits"):
        load_questions(file)
    with pytest.warns(UserWarning, match="1 bad question is left out"):
        assert len(load_questions(file, skip_bad=True)) == 1
