"""The command line on extractive question answering: from questions about passages to answers by a model that reads less."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import DataCollatorWithPadding

import thresher
from commands import WORDS, call, fails, ok, write_rows
from helpers import build, config_of, decided, make, tokenizer
from thresher.cli.data import hold_out
from thresher.errors import DataError
from thresher.model import attachment_of, find_encoder, policy_of
from thresher.tasks.answering import QuestionTask
from thresher.training.stages import _ForThePolicy

QUICK = ("--stage", "epochs=1", "--stage", "batch_size=16", "--precision", "float32")
QUESTION, PASSAGE = "w9 w5", "w7 w8 w9 w10. w11 w12"


def questions(count: int, seed: int = 0, *, empty: int = 0, **more: Any) -> list[dict[str, Any]]:
    """The answer is the word after the one that the question names; the first `empty` ask for what is not there."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = draw.sample(WORDS, k=draw.randint(8, 40))
        place = draw.randrange(len(words) - 1)
        answers: dict[str, Any] = {"text": [words[place + 1]], "answer_start": [len(" ".join(words[: place + 1])) + 1]}
        if number < empty:
            answers = {"text": [], "answer_start": []}
        asked = {"id": f"q{seed}-{number}", "question": words[place], "context": " ".join(words), "answers": answers}
        rows.append({**asked, **more})
    return rows


def squad(rows: list[dict[str, Any]]) -> dict[str, Any]:
    paragraphs = []
    for row in rows:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        qa = {"id": row["id"], "question": row["question"], "answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": row["context"], "qas": [qa]})
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("questions")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build(config_of("bert", 2, attention_probs_dropout_prob=0.1), "base").save_pretrained(root / "base")
        build(config_of("bert", 2), "sequence").save_pretrained(root / "clf")
        build(config_of("bert", 2, num_labels=2), "question-answering").save_pretrained(root / "plain")
        build(config_of("distilbert", 2), "base").save_pretrained(root / "distil")
    for name in ("base", "clf", "plain", "distil"):
        tokenizer().save_pretrained(root / name)
    write_rows(root / "train.jsonl", questions(60))
    write_rows(root / "valid.jsonl", questions(16, 1))
    (root / "two.json").write_text(json.dumps(squad(questions(16, 2, empty=6))))
    data = (root / "train.jsonl", "--validation", root / "valid.jsonl", "--out", root / "qa")
    words = ("--task", "qa", "--method", "attention-mass", "--speedup", 1.3)
    (root / "found.json").write_text(json.dumps(ok("fit", root / "base", *data, *words, *QUICK)))
    return root


def test_one_command_fine_tunes_distils_and_meets_the_target(place: Path) -> None:
    found = json.loads((place / "found.json").read_text())
    assert found["metric"] == "f1"
    assert 1.3 <= found["speedup"] < 1.4
    assert set(found["thresher"]) == {"f1", "exact_match", "agreement"}
    assert found["stock"]["agreement"] == 1.0
    task = {"stride": 128, "longest": 30, "threshold": None, "open": False}
    assert found["task"]["question"] == task and found["task"]["kind"] == "qa"
    model = thresher.load(place / "qa")
    assert type(model).__name__ == "BertForQuestionAnswering"
    assert policy_of(model).config.protect_segments == (0,)
    assert find_encoder(model).config.attention_probs_dropout_prob == 0.0
    assert attachment_of(model).notes["task"]["max_length"] == 48


def test_the_saved_model_scores_as_it_was_fitted(place: Path) -> None:
    found = json.loads((place / "found.json").read_text())
    again = ok("evaluate", place / "qa", place / "valid.jsonl")
    assert again["metric"] == "f1"
    scores = {name: found["thresher"][name] for name in ("f1", "exact_match")}  # agreement is with another model here
    assert again["thresher"] == pytest.approx(scores | {"agreement": again["thresher"]["agreement"]})
    assert again["speedup"] == pytest.approx(found["speedup"])
    (place / "valid.json").write_text(json.dumps(squad(questions(16, 1)), indent=1))
    assert ok("evaluate", place / "qa", place / "valid.json")["thresher"] == pytest.approx(again["thresher"])


def test_rows_with_answers_are_taken_for_questions(place: Path, tmp_path: Path) -> None:
    data = (place / "train.jsonl", "--validation", place / "valid.jsonl", "--out", tmp_path / "out")
    found = ok("fit", place / "base", *data, "--method", "ltp", "--metric", "exact_match", *QUICK)
    assert (found["task"]["kind"], found["metric"]) == ("qa", "exact_match")


@pytest.mark.parametrize("typed", [False, True])
def test_the_question_is_kept_without_token_types(place: Path, tmp_path: Path, typed: bool) -> None:
    """typed: the tokenizer gives types, as BERT's does, and the model takes none."""
    names = json.loads((place / "distil" / "tokenizer_config.json").read_text())
    names["model_input_names"] = ["input_ids", *(["token_type_ids"] if typed else []), "attention_mask"]
    (place / "distil" / "tokenizer_config.json").write_text(json.dumps(names))
    data = (place / "train.jsonl", "--validation", place / "valid.jsonl", "--out", tmp_path / "out")
    ok("fit", place / "distil", *data, "--task", "qa", "--method", "attention-mass", "--speedup", 1.2, *QUICK)
    config = policy_of(thresher.load(tmp_path / "out")).config
    assert (config.protect_segments, config.segment_end) == ((0,), tokenizer().sep_token_id)
    (found,) = ok("explain", tmp_path / "out", "--text", QUESTION, "--pair", PASSAGE)["maps"]
    assert found["dropped_at"][:4] == [None] * 4


def test_answers_stand_where_they_say(place: Path, tmp_path: Path) -> None:
    rows = questions(5, 3)
    found = ok("predict", place / "qa", write_rows(tmp_path / "a.jsonl", rows))["predictions"]
    for row, answer in zip(rows, found, strict=True):
        assert answer["id"] == row["id"]
        assert row["context"][answer["start"] : answer["end"]] == answer["answer"] != ""
        best = answer["n_best"]
        assert len(best) == 20
        assert [one["score"] for one in best] == sorted((one["score"] for one in best), reverse=True)
        assert sum(one["probability"] for one in best) == pytest.approx(1.0)
        assert best[0]["answer"] == answer["answer"] and best[0]["probability"] == answer["probability"]
    for row in rows:
        row["answers"] = {"text": ["not there"], "answer_start": [3]}  # answers are left unread
    again = ok("predict", place / "qa", write_rows(tmp_path / "b.jsonl", rows))["predictions"]
    assert again == found
    alone = ok("predict", place / "qa", "--text", rows[0]["question"], "--pair", rows[0]["context"])["predictions"]
    assert alone[0]["answer"] == found[0]["answer"]
    ok("predict", place / "qa", tmp_path / "a.jsonl", "--out", tmp_path / "said.jsonl")
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [one["answer"] for one in said] == [one["answer"] for one in found]
    shown = call("predict", place / "qa", "--text", QUESTION, "--pair", PASSAGE)
    assert shown.exit_code == 0 and "probability" in shown.stdout and "n_best" not in shown.stdout


def test_passages_longer_than_the_model_reads(place: Path, tmp_path: Path) -> None:
    words = " ".join(WORDS * 4)
    row = {
        "id": "long",
        "question": "w9",
        "context": words,
        "answers": {"text": ["w60"], "answer_start": [words.rindex("w60")]},
    }
    file = write_rows(tmp_path / "long.jsonl", [row])
    (found,) = ok("predict", place / "qa", file)["predictions"]
    assert words[found["start"] : found["end"]] == found["answer"]
    assert ok("evaluate", place / "qa", file)["rows"] > 5  # windows
    maps = ok("explain", place / "qa", "--text", "w9", "--pair", words)["maps"]
    assert len(maps) == ok("evaluate", place / "qa", file)["rows"]
    assert all(len(one["tokens"]) <= 48 for one in maps)


def test_questions_without_an_answer(place: Path, tmp_path: Path) -> None:
    data = (place / "two.json", "--validation", place / "two.json", "--out", tmp_path / "out")
    found = ok("fit", place / "base", *data, "--task", "qa", "--method", "attention-mass", "--speedup", 1.2, *QUICK)
    assert found["task"]["question"]["threshold"] == 0.0
    scores = {"f1", "exact_match", "has_answer_f1", "has_answer_exact_match", "no_answer", "agreement"}
    assert set(found["thresher"]) == scores
    answers = ok("predict", tmp_path / "out", place / "two.json")["predictions"]
    for answer in answers:
        (null,) = (one for one in answer["n_best"] if one["start"] is None)
        best = max((one for one in answer["n_best"] if one["start"] is not None), key=lambda one: one["score"])
        assert answer["answer"] == ("" if null["score"] > best["score"] else best["answer"])
    plain = ok("evaluate", place / "plain", place / "two.json")
    assert set(plain["thresher"]) == scores
    assert "no_answer" not in ok("evaluate", place / "plain", place / "valid.jsonl")["thresher"]
    said = call("evaluate", tmp_path / "out", place / "two.json").stdout
    best = float(said.partition("--no-answer ")[2].split()[0])
    share = float(said.partition("is best, ")[2].split()[0])
    tuned = ok("evaluate", tmp_path / "out", place / "two.json", "--no-answer", best)["thresher"]
    assert 100 * tuned["f1"] == pytest.approx(share, abs=0.06)
    assert tuned["f1"] >= ok("evaluate", tmp_path / "out", place / "two.json")["thresher"]["f1"]
    never = ok("predict", tmp_path / "out", place / "two.json", "--no-answer", 1e9)["predictions"]
    always = ok("predict", tmp_path / "out", place / "two.json", "--no-answer", -1e9)["predictions"]
    assert all(one["answer"] for one in never) and not any(one["answer"] for one in always)
    fails("evaluate", tmp_path / "out", place / "two.json", "--no-answer", "nan", match="a finite score, not nan")
    fails("evaluate", place / "clf", place / "two.json", "--no-answer", 1, match="--no-answer is for questions")


def test_a_calibration_and_a_search(place: Path, tmp_path: Path) -> None:
    found = ok("calibrate", place / "qa", place / "valid.jsonl", "--max-loss", 0.9, "--out", tmp_path / "c")
    assert found["metric"] == "f1" and found["speedup"] > 1.0
    assert found["thresher"]["f1"] >= found["stock"]["f1"] - 0.9
    more = ("--method", "attention-mass", "--speedup", 1.2, "--out", tmp_path / "d")
    assert ok("calibrate", place / "plain", place / "two.json", *more)["speedup"] >= 1.2
    assert policy_of(thresher.load(tmp_path / "d")).config.protect_segments == (0,)
    assert ok("evaluate", tmp_path / "d", place / "two.json")["thresher"].keys() >= {"no_answer"}
    more = ("--evaluations", 8, "--sampler", "random", "--out", tmp_path / "s")
    assert ok("search", place / "qa", place / "valid.jsonl", *more)["metric"] == "f1"


def test_a_bench(place: Path) -> None:
    found = ok("bench", place / "qa", place / "valid.jsonl", "--rounds", 1, "--batch-size", 4, "--profile")
    assert found["flops"] >= 1.2
    assert found["profile"]


def test_an_explanation_marks_the_answer(place: Path, tmp_path: Path) -> None:
    html = tmp_path / "map.html"
    (found,) = ok("explain", place / "qa", "--text", QUESTION, "--pair", PASSAGE, "--html", html)["maps"]
    first, end = found["answer"]
    assert "".join(found["tokens"][first:end]).strip() == found["note"]
    (answer,) = ok("predict", place / "qa", "--text", QUESTION, "--pair", PASSAGE)["predictions"]
    assert answer["answer"] == found["note"]
    assert 'class="run kept answer"' in html.read_text() or 'class="run answer"' in html.read_text()
    assert found["dropped_at"][:4] == [None] * 4  # [CLS], the question and its separator
    assert "«" in call("explain", place / "qa", "--text", QUESTION, "--pair", PASSAGE).stdout


def test_an_explanation_shows_the_blocks_that_were_skimmed_and_the_answer(place: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = thresher.attach(make("bert", "question-answering"), thresher.BlockSkim(block=4, threshold=0.5))
    rows = datasets.Dataset.from_list(questions(16, 1))
    thresher.calibrate(decided(model), QuestionTask(48).encode(rows, tokenizer()).rows, speedup=1.2, tolerance=0.1)
    thresher.save(model, tmp_path / "skim")
    tokenizer().save_pretrained(tmp_path / "skim")
    asked = [word for row in questions(4, 1) for word in ("--text", QUESTION, "--pair", row["context"])]
    html = tmp_path / "map.html"
    maps = ok("explain", tmp_path / "skim", *asked, "--html", html)["maps"]
    page, plain = html.read_text(), " ".join(call("explain", tmp_path / "skim", *asked).stdout.split())
    mixed = 0
    for found in maps:
        dropped = found["dropped_at"]
        blocks = [dropped[start : start + 4] for start in range(0, len(dropped), 4)]
        assert all(len(set(block)) == 1 for block in blocks)
        assert blocks[0] == [None] * 4  # [CLS], the question and its separator
        assert all(f'data-dropped="{layer}"' in page and f"[{layer}:" in plain for layer in dropped if layer)
        if found["answer"] is not None:  # else the whole passage was skimmed
            first, end = found["answer"]
            assert dropped[first] is dropped[end - 1] is None  # though what stands between may be skimmed
            assert set(dropped[first:end]) != {None} or f"«{found['note']}»" in plain
            mixed += len(set(dropped)) > 1
    assert mixed
    assert '<span class="answer">the answer</span>' in page


def test_an_exported_graph_answers_as_the_model(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    ok("export", place / "qa", tmp_path / "graph", place / "valid.jsonl", "--limit", 4)
    wanted, found = (ok("predict", one, place / "valid.jsonl") for one in (place / "qa", tmp_path / "graph"))
    for ours, theirs in zip(found["predictions"], wanted["predictions"], strict=True):
        assert ours["answer"] == theirs["answer"]
        assert ours["n_best"][0]["score"] == pytest.approx(theirs["n_best"][0]["score"], abs=1e-3)
    scores = ok("evaluate", tmp_path / "graph", place / "valid.jsonl")["thresher"]
    assert set(scores) == {"f1", "exact_match"}


def test_evidence_survives_training(place: Path, tmp_path: Path) -> None:
    rows = questions(20, 5)
    for row in rows:
        row["evidence"] = [[0, len(row["context"]) // 2]]
    file = write_rows(tmp_path / "facts.jsonl", rows)
    data = (file, "--validation", file, "--out", tmp_path / "out")
    assert ok("fit", place / "base", *data, "--method", "attention-mass", "--speedup", 1.2, *QUICK)["speedup"] >= 1.2


def test_what_is_wrong_is_one_sentence(place: Path, tmp_path: Path) -> None:
    data = (place / "train.jsonl", "--validation", place / "valid.jsonl", "--out", tmp_path / "out")
    qa = ("--task", "qa", "--method", "attention-mass")
    fails("fit", place / "clf", *data, *qa, match="BertForSequenceClassification, whose head finds no answers")
    fails("fit", place / "base", *data, *qa, "--metric", "bleu", match="no metric 'bleu' for qa; known are")
    bare = [{name: row[name] for name in ("id", "question", "context")} for row in questions(8)]
    file = write_rows(tmp_path / "bare.jsonl", bare)
    fails("fit", place / "base", file, *data[1:], *qa, match="need question and context and answers")
    moved = questions(4)
    moved[2]["answers"]["answer_start"][0] += 1
    file = write_rows(tmp_path / "moved.jsonl", moved)
    fails("evaluate", place / "qa", file, match="line 3: the question 'q0-2' says that its answer")
    fails("predict", place / "qa", "--text", "w9", match="give one --pair for each --text")
    fails("predict", place / "qa", "--text", "w9", "--pair", " ", match="empty context")
    fails("evaluate", place / "qa", place / "valid.jsonl", "--max-length", 4, match="no room")
    assert not (tmp_path / "out").exists()
    assert "qa" in call("fit", "--help").stdout


def test_a_passage_is_held_out_with_all_its_questions() -> None:
    rows = datasets.Dataset.from_list([{**row, "id": f"{row['id']}-{i}"} for row in questions(20) for i in range(3)])
    train, held = hold_out(rows, 0)
    assert not set(train["context"]) & set(held["context"])
    assert (len(train), len(held)) == (54, 6)
    assert hold_out(rows, 0)[1]["id"][:] == held["id"][:] != hold_out(rows, 1)[1]["id"][:]
    two = rows.select(range(6))
    assert sorted(map(len, hold_out(two, 0))) == [3, 3]
    with pytest.raises(DataError, match="about one passage"):
        hold_out(rows.select(range(3)), 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_evidence_is_padded_with_its_row(side: str) -> None:
    words = tokenizer()
    words.padding_side = side
    rows = [{"input_ids": [2] * n, "attention_mask": [1] * n, "evidence": [1] * n} for n in (3, 5, 1)]
    batch = _ForThePolicy(DataCollatorWithPadding(words), side)(rows)
    assert torch.equal(batch["evidence"], batch["attention_mask"])
    assert rows[0]["evidence"] == [1, 1, 1]


def test_without_labels(place: Path, tmp_path: Path) -> None:
    bare = [{name: row[name] for name in ("id", "question", "context")} for row in questions(8)]
    file = write_rows(tmp_path / "bare.jsonl", bare)
    assert set(ok("evaluate", place / "qa", file)["thresher"]) == {"agreement"}
    more = ("--task", "qa", "--method", "attention-mass", "--speedup", 1.2, "--no-labels", "--out", tmp_path / "out")
    found = ok("fit", place / "plain", file, "--validation", file, *more, *QUICK)
    assert found["metric"] == "agreement"


def spoilt(count: int) -> list[dict[str, Any]]:
    """Questions of which three are bad: an answer that stands elsewhere, no passage, an id that was there before."""
    rows = questions(count, 7)
    rows[1]["answers"]["answer_start"][0] += 1
    rows[3]["context"] = " "
    rows[5]["id"] = rows[0]["id"]
    return rows


def notes(stderr: str) -> list[str]:
    return [line.removeprefix("Note: ") for line in stderr.splitlines() if line.startswith("Note: ")]


def test_bad_rows_are_named_counted_and_skipped_only_when_asked(place: Path, tmp_path: Path) -> None:
    rows = spoilt(12)
    good = [row for number, row in enumerate(rows) if number not in (1, 3, 5)]
    file, clean = write_rows(tmp_path / "bad.jsonl", rows), write_rows(tmp_path / "clean.jsonl", good)
    fails("evaluate", place / "qa", file, match="line 2: the question 'q7-1' says that its answer")
    done = call("evaluate", place / "qa", file, "--skip-bad", "--json")
    assert done.exit_code == 0, done.stderr
    found, wanted = json.loads(done.stdout), ok("evaluate", place / "qa", clean)
    assert (found["rows"], found["thresher"]) == (wanted["rows"], wanted["thresher"])
    said = notes(done.stderr)
    assert [line.split(":")[0] for line in said[:3]] == ["Skipped q7-1", "Skipped q7-3", "Skipped q7-0"]
    assert "says that its answer" in said[0] and "has an empty context" in said[1] and "id of an earlier" in said[2]
    assert said[3:] == ["3 bad questions were skipped."]
    assert not notes(call("evaluate", place / "qa", clean, "--skip-bad").stderr)
    answered = ok("predict", place / "qa", file, "--skip-bad")["predictions"]  # whatever their answers say
    assert [one["id"] for one in answered] == [row["id"] for n, row in enumerate(rows) if n not in (3, 5)]


def test_every_command_that_reads_questions_can_skip(place: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "bad.jsonl", spoilt(24))
    more = ("--method", "attention-mass", "--speedup", 1.2)
    data = (file, "--validation", file, "--skip-bad", "--out", tmp_path / "out")
    done = call("fit", place / "base", *data, *more, *QUICK)  # taken for questions by their columns
    assert done.exit_code == 0, done.stderr
    assert notes(done.stderr).count("3 bad questions were skipped.") == 2
    ok("calibrate", place / "plain", file, *more, "--skip-bad", "--out", tmp_path / "c")
    ok("search", place / "qa", file, "--skip-bad", "--evaluations", 2, "--sampler", "random", "--out", tmp_path / "s")
    ok("bench", place / "qa", file, "--skip-bad", "--rounds", 1, "--batch-size", 4)


def test_what_cannot_be_skipped(place: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "texts.jsonl", [{"text": "w5 w6", "label": 1}, {"text": "w7", "label": 0}])
    fails("evaluate", place / "clf", file, "--skip-bad", match="for questions about passages .* this is classification")
    data = (file, "--validation", file, "--skip-bad", "--out", tmp_path / "out")
    fails("fit", place / "base", *data, match="say that these are such with --task qa")
    fails("predict", place / "qa", "--text", "w9", "--pair", "w9 w5", "--skip-bad", match="needs DATA")
    row = {**questions(1)[0], "context": ""}
    said = fails("evaluate", place / "qa", write_rows(tmp_path / "e.jsonl", [row]), "--skip-bad", match="no questions")
    assert "Note: 1 bad question was skipped." in said


def test_columns_by_another_name(place: Path, tmp_path: Path) -> None:
    """In rows and in SQuAD's layout; and later commands need not be told again."""
    names = ("--column", "question=query", "--column", "context=passage")
    train, rows = questions(24), questions(8, 1)

    def other(found: Any) -> Any:
        text = json.dumps(found).replace('"question": ', '"query": ').replace('"context": ', '"passage": ')
        return json.loads(text)

    flat = write_rows(tmp_path / "rows.jsonl", other(rows))
    nested, nested_train = tmp_path / "rows.json", tmp_path / "train.json"
    nested.write_text(json.dumps(other(squad(rows))))
    nested_train.write_text(json.dumps(other(squad(train))))
    plain = ok("evaluate", place / "qa", write_rows(tmp_path / "plain.jsonl", rows))
    for data in (flat, nested):
        assert ok("evaluate", place / "qa", data, *names)["thresher"] == plain["thresher"]
    assert len(ok("predict", place / "qa", nested, *names)["predictions"]) == 8
    assert ok("bench", place / "qa", flat, *names, "--batch-size", 8, "--rounds", 1)["rows"] == 8
    assert ok("export", place / "qa", tmp_path / "graph", nested, *names)["rows"] == 8
    fails("evaluate", place / "qa", flat, match="no context")
    wrong = ("--column", "question=asked", "--column", "context=passage")
    fails("evaluate", place / "qa", nested, *wrong, match="has no field 'asked'")
    found = ok("fit", place / "base", nested_train, "--validation", nested, "--task", "qa", *names, "--method", "random",
               "--speedup", 1.2, "--out", tmp_path / "out", *QUICK)  # fmt: skip
    assert found["validation_rows"] == 8
    again = ok("evaluate", tmp_path / "out", nested)
    assert again["rows"] == ok("evaluate", tmp_path / "out", tmp_path / "plain.jsonl")["rows"] == 8


def test_questions_about_a_passage_stay_together_by_whatever_name() -> None:
    rows = [{"query": "w5", "passage": f"p{i // 4}", "gold": {"text": [], "answer_start": []}} for i in range(40)]
    made = datasets.Dataset.from_list(rows)
    kept, held = hold_out(made, 0, {"question": "query", "context": "passage", "answers": "gold"})
    assert not set(kept["passage"]) & set(held["passage"])
    assert len(held) == 4


def test_a_layout_of_questions_without_the_task_is_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps(squad(questions(8))))
    fails("fit", place / "base", tmp_path / "squad.json", "--method", "random", "--speedup", 1.2, "--out", tmp_path / "out",
          match="holds 'data', as files of questions about passages do; say that these are such with --task qa")  # fmt: skip
    assert not (tmp_path / "out").exists()
