"""The command line on tagging: from words with BIO tags to entities found by a model that reads less."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import thresher
from commands import WORDS, call, fails, ok, write_rows
from helpers import build, config_of, tokenizer
from thresher.model import attachment_of, find_encoder, policy_of

QUICK = ("--stage", "epochs=1", "--stage", "batch_size=16", "--precision", "float32")
NAMES = ["O", "B-high", "I-high", "B-low", "I-low"]
TASK = ("--task", "tagging", "--method", "attention-mass")


ENTITIES = {("w60", "w61"): "high", ("w60",): "high", ("w5", "w6"): "low", ("w5", "w6", "w6"): "low"}


def tagged(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Entities among other words."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words: list[str] = []
        tags: list[str] = []
        for _ in range(draw.randint(2, 8)):
            words.append(draw.choice(WORDS[2:-4]))
            tags.append("O")
            if draw.random() < 0.5:
                one = draw.choice(list(ENTITIES))
                words += one
                tags += [f"{'I' if i else 'B'}-{ENTITIES[one]}" for i in range(len(one))]
        rows.append({"tokens": words, "tags": tags})
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tags")
    named = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build(config_of("bert", 2, attention_probs_dropout_prob=0.1), "base").save_pretrained(root / "base")
        build(config_of("bert", 2), "sequence").save_pretrained(root / "clf")
        build(config_of("bert", 2), "token").save_pretrained(root / "unnamed")
        build(config_of("bert", 2, num_labels=5, **named), "token").save_pretrained(root / "plain")
    for name in ("base", "clf", "unnamed", "plain"):
        tokenizer().save_pretrained(root / name)
    write_rows(root / "train.jsonl", tagged(120))
    write_rows(root / "valid.jsonl", tagged(24, 1))
    data = (root / "train.jsonl", "--validation", root / "valid.jsonl", "--out", root / "fitted")
    rate = ("--stage", "fine-tune.learning_rate=3e-3", "--stage", "fine-tune.epochs=6")
    (root / "found.json").write_text(
        json.dumps(ok("fit", root / "base", *data, *TASK, "--speedup", 1.3, *QUICK, *rate))
    )
    return root


def test_one_command_fine_tunes_and_meets_the_target(place: Path) -> None:
    found = json.loads((place / "found.json").read_text())
    assert found["metric"] == "f1"
    assert 1.3 <= found["speedup"] < 1.4
    assert set(found["thresher"]) == {"f1", "precision", "recall", "f1 of high", "f1 of low", "agreement"}
    assert found["stock"]["agreement"] == 1.0 and found["stock"]["f1"] > 0.4  # untrained: under 0.1
    assert (found["task"]["kind"], found["task"]["label_names"]) == ("tagging", NAMES)
    model = thresher.load(place / "fitted")
    assert type(model).__name__ == "BertForTokenClassification"
    config = find_encoder(model).config
    assert config.id2label == dict(enumerate(NAMES)) and config.attention_probs_dropout_prob == 0.0


def test_the_saved_model_scores_as_it_was_fitted(place: Path) -> None:
    found = json.loads((place / "found.json").read_text())
    again = ok("evaluate", place / "fitted", place / "valid.jsonl")
    assert again["metric"] == "f1" and again["speedup"] == pytest.approx(found["speedup"])
    scores = {name: value for name, value in found["thresher"].items() if name != "agreement"}
    assert again["thresher"] == pytest.approx(scores | {"agreement": again["thresher"]["agreement"]})


def test_rows_with_tags_are_taken_for_tagging(place: Path, tmp_path: Path) -> None:
    renamed = [{"words": row["tokens"], "ner_tags": row["tags"]} for row in tagged(40)]
    file = write_rows(tmp_path / "renamed.jsonl", renamed)
    column = ("--column", "tokens=words", "--column", "tags=ner_tags", "--metric", "recall")
    found = ok("fit", place / "base", file, "--method", "ltp", "--out", tmp_path / "b", *column, *QUICK)
    assert (found["metric"], found["task"]["kind"]) == ("recall", "tagging")
    assert ok("evaluate", tmp_path / "b", file)["metric"] == "recall"


def test_answers_are_tags_of_words_and_entities(place: Path, tmp_path: Path) -> None:
    rows = [*tagged(6, 3), {"tokens": [], "tags": []}, {"tokens": ["w5"] * 60, "tags": ["O"] * 60}]
    said = call("predict", place / "fitted", write_rows(tmp_path / "rows.jsonl", rows), "--json")
    assert "1 of 8 rows was longer than 48 tokens, with 14 words cut off, which get the tag O" in said.stderr
    assert "1 row is empty" in said.stderr
    found = json.loads(said.stdout)["predictions"]
    for row, answer in zip(rows, found, strict=True):
        assert len(answer["tags"]) == len(row["tokens"])
        for one in answer["entities"]:
            assert one["text"] == " ".join(row["tokens"][one["start"] : one["end"]])
            own = answer["tags"][one["start"] : one["end"]]
            assert {tag[2:] for tag in own} == {one["type"]} and own[0] != "O"
    assert found[-2] == {"entities": [], "tags": []}
    assert found[-1]["tags"][46:] == ["O"] * 14
    assert "(0)" not in call("predict", place / "fitted", tmp_path / "rows.jsonl").stdout  # no entities: an empty cell
    assert any(answer["entities"] for answer in found[:6])
    for row in rows:
        row["tags"] = ["?"]  # left unread
    assert ok("predict", place / "fitted", write_rows(tmp_path / "b.jsonl", rows))["predictions"] == found
    alone = ok("predict", place / "fitted", "--text", " ".join(rows[0]["tokens"]))["predictions"]
    assert alone == found[:1]
    shown = call("predict", place / "fitted", "--text", "w60 w61 w30")
    assert shown.exit_code == 0 and "w60" in shown.stdout and "tags" not in shown.stdout


def test_long_rows_are_read_whole_in_windows(place: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["w5"] * 57 + ["w60", "w61", "w30"], "tags": ["O"] * 57 + ["B-high", "I-high", "O"]}]
    file = write_rows(tmp_path / "long.jsonl", [*rows, *tagged(3, 5)])
    cut, whole = (call("predict", place / "fitted", file, "--json", *more) for more in ((), ("--windows", 8)))
    assert "1 of 4 rows is longer than 48 tokens and read in 2 windows" in whole.stderr
    before, found = (json.loads(said.stdout)["predictions"] for said in (cut, whole))
    assert found[1:] == before[1:] and len(found) == 4
    assert before[0]["tags"][46:] == ["O"] * 14
    assert {"type": "high", "text": "w60 w61", "start": 57, "end": 59} in found[0]["entities"]
    assert ok("evaluate", place / "fitted", file, "--windows", 8)["rows"] == 5
    text = " ".join(rows[0]["tokens"])
    maps = ok("explain", place / "fitted", "--text", text, "--windows", 8)["maps"]
    shown = [[piece.strip() for piece in one["tokens"]] for one in maps]
    assert len(shown) == 2 and "w60" not in shown[0] and "w60" in shown[1]


def test_a_tagger_that_was_fitted_in_windows_reads_windows(place: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    drawn = [draw.sample(tagged(80, 6), 6) for _ in range(30)]
    rows = [{name: [one for part in parts for one in part[name]] for name in ("tokens", "tags")} for parts in drawn]
    long = write_rows(tmp_path / "long.jsonl", rows)
    more = (*TASK, "--windows", 8, "--speedup", 1.2, "--max-length", 24, "--out", tmp_path / "out", *QUICK)
    found = ok("fit", place / "fitted", long, "--validation", long, *more)
    assert found["task"]["windows"] == 8 and found["validation_rows"] > 2 * len(rows)
    again = ok("evaluate", tmp_path / "out", long)
    assert again["rows"] == found["validation_rows"]
    scores = {name: value for name, value in found["thresher"].items() if name != "agreement"}
    assert again["thresher"] == pytest.approx(scores | {"agreement": again["thresher"]["agreement"]})
    answers = ok("predict", tmp_path / "out", long)["predictions"]
    assert [len(answer["tags"]) for answer in answers] == [len(row["tokens"]) for row in rows]


def test_without_tags(place: Path, tmp_path: Path) -> None:
    bare = write_rows(tmp_path / "bare.jsonl", [{"tokens": row["tokens"]} for row in tagged(20, 4)])
    assert set(ok("evaluate", place / "fitted", bare)["thresher"]) == {"agreement"}
    more = (*TASK, "--speedup", 1.2, "--no-labels", "--out", tmp_path / "out")
    found = ok("fit", place / "plain", bare, "--validation", bare, *more, *QUICK)
    assert found["metric"] == "agreement" and found["task"]["label_names"] == NAMES


def test_a_calibration_is_about_f1(place: Path, tmp_path: Path) -> None:
    found = ok("calibrate", place / "fitted", place / "valid.jsonl", "--max-loss", 0.5, "--out", tmp_path / "c")
    assert found["metric"] == "f1" and found["speedup"] > 1.0
    assert found["thresher"]["f1"] >= found["stock"]["f1"] - 0.5
    more = ("--method", "attention-mass", "--speedup", 1.2, "--out", tmp_path / "d")
    assert ok("calibrate", place / "plain", place / "valid.jsonl", *more)["speedup"] >= 1.2
    assert attachment_of(thresher.load(tmp_path / "d")).notes["task"]["kind"] == "tagging"
    assert policy_of(thresher.load(tmp_path / "d")).config.method == "attention-mass"


def test_a_bench_and_an_explanation(place: Path) -> None:
    found = ok("bench", place / "fitted", place / "valid.jsonl", "--rounds", 1, "--batch-size", 4, "--profile")
    assert found["flops"] >= 1.2 and found["profile"]
    (shown,) = ok("explain", place / "fitted", "--text", "w60 w61 w30 w31")["maps"]
    assert "w60 B-high" in shown["note"]
    assert [piece.strip() for piece in shown["tokens"]][1:5] == ["w60", "w61", "w30", "w31"]


def test_an_exported_graph_answers_as_the_model(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    ok("export", place / "fitted", tmp_path / "graph", place / "valid.jsonl", "--limit", 4)
    wanted, found = (ok("predict", one, place / "valid.jsonl") for one in (place / "fitted", tmp_path / "graph"))
    assert found["predictions"] == wanted["predictions"]
    scores = ok("evaluate", tmp_path / "graph", place / "valid.jsonl")["thresher"]
    assert set(scores) == {"f1", "precision", "recall", "f1 of high", "f1 of low"}


def test_what_is_wrong_is_one_sentence(place: Path, tmp_path: Path) -> None:
    data = (place / "train.jsonl", "--validation", place / "valid.jsonl", "--out", tmp_path / "out")
    fails("fit", place / "clf", *data, *TASK, match="BertForSequenceClassification, whose head gives no BIO tags")
    fails("fit", place / "unnamed", *data, *TASK, match="BertForTokenClassification, whose head gives no BIO tags")
    fails("fit", place / "base", *data, *TASK, "--metric", "bleu", match="no metric 'bleu' for tagging; known are")
    fails("fit", place / "base", *data, *TASK, "--no-labels", match="no trained head to learn from")
    rows = tagged(4)
    rows[2]["tags"][0] = "high"
    file = write_rows(tmp_path / "bad.jsonl", rows)
    fails("evaluate", place / "fitted", file, match="Row 3 has the tag 'high', which is not BIO")
    rows[2]["tags"][0] = "B-hihg"
    fails("evaluate", place / "fitted", write_rows(file, rows), match="'B-hihg'.*did you mean 'B-high'")
    plain = write_rows(tmp_path / "plain.jsonl", [{**row, "tags": ["O"] * len(row["tags"])} for row in tagged(12)])
    fails("fit", place / "fitted", plain, *data[1:], *TASK, match="Every word of .* has the same tag")
    rows[2]["tags"] = ["O"]
    fails("evaluate", place / "fitted", write_rows(file, rows), match="Row 3 has 1 tags for")
    fails("predict", place / "fitted", "--text", "w5", "--pair", "w6", match="leave --pair out")
    fails("evaluate", place / "fitted", place / "valid.jsonl", "--windows", 46, match="share 0 to 45 of them, not 46")
    assert not (tmp_path / "out").exists()
