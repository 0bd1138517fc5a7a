"""The command line on response selection: Algorithm 1 of ASE in one command, and every speedup from what it saves."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import thresher
from commands import WORDS, call, fails, ok, write_rows
from helpers import build, config_of, tokenizer
from thresher.frontier import Frontier, Point
from thresher.model import attachment_of, policy_of

QUICK = ("--stage", "epochs=1", "--stage", "batch_size=16", "--precision", "float32", "--evaluations", "24")


def dialogues(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The right response repeats a word of the last utterance."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        context = [" ".join(draw.choices(WORDS, k=draw.randint(2, 5))) for _ in range(draw.randint(1, 4))]
        candidates = [" ".join(draw.choices(WORDS, k=4)) for _ in range(4)]
        label = draw.randrange(4)
        candidates[label] = context[-1]
        rows.append({"context": context, "candidates": candidates, "label": label})
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("responses")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build(config_of("bert", 2), "base").save_pretrained(root / "base")
        build(config_of("bert", 2, num_labels=2), "sequence").save_pretrained(root / "clf")
    for name in ("base", "clf"):
        tokenizer().save_pretrained(root / name)
    write_rows(root / "train.jsonl", dialogues(40))
    write_rows(root / "valid.jsonl", dialogues(12, seed=1))
    data = ("--validation", root / "valid.jsonl", "--out", root / "ase")
    found = ok("fit", root / "base", root / "train.jsonl", *data, "--method", "ase", "--speedup", "1.2", *QUICK)
    (root / "found.json").write_text(json.dumps(found))
    return root


def test_one_command_fine_tunes_searches_distils_and_picks(place: Path) -> None:
    found = json.loads((place / "found.json").read_text())
    assert found["method"] == "ase"
    assert found["metric"] == "R@1"
    assert found["speedup"] >= 1.2
    assert {"R4@1", "R4@2", "MAP", "MRR", "P@1", "agreement"} <= set(found["thresher"])
    model = thresher.load(place / "ase")
    words = json.loads((place / "ase" / "tokenizer.json").read_text())["added_tokens"]
    eos = next(word["id"] for word in words if word["content"] == "[EOS]")
    assert eos in policy_of(model).config.protect_ids
    assert attachment_of(model).notes["frontier"]
    assert attachment_of(model).notes["task"]["kind"] == "response"


def test_one_saved_model_serves_every_point(place: Path) -> None:
    frontier = attachment_of(thresher.load(place / "ase")).notes["frontier"]
    for point in frontier:
        found = ok("evaluate", place / "ase", place / "valid.jsonl", "--speedup", point["speedup"])
        assert found["thresher"]["R4@1"] == pytest.approx(point["quality"])
        assert found["speedup"] == pytest.approx(point["speedup"])
    fails("evaluate", place / "ase", place / "valid.jsonl", "--speedup", 99, match="nearest", status=2)


def test_a_point_is_explained_and_exported(place: Path, tmp_path: Path) -> None:
    model = thresher.load(place / "ase")
    notes = attachment_of(model).notes
    layers = len(notes["frontier"][0]["retention"])
    points = (Point((1.0,) * layers, 1.0, 1.0), Point((0.5,) * layers, 2.0, 0.5))
    notes["frontier"] = Frontier(points).to_list()
    model.save_pretrained(tmp_path / "two")
    for file in (place / "ase").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "two")
    text = ("--text", "\n".join(" ".join(WORDS[i : i + 6]) for i in range(4)), "--pair", " ".join(WORDS[:6]))
    whole, half = (ok("explain", tmp_path / "two", *text, "--speedup", x)["maps"][0]["kept"] for x in (1, 2))
    assert half < whole
    found = [ok("export", tmp_path / "two", tmp_path / f"graph-{x}", "--speedup", x) for x in (1, 2)]
    rows = [ok("evaluate", one["directory"], place / "valid.jsonl")["speedup"] for one in found]
    assert rows[0] == pytest.approx(1.0, abs=0.05)
    assert rows[1] > rows[0]


def test_a_profile_by_stage(place: Path) -> None:
    found = ok("bench", place / "ase", place / "valid.jsonl", "--profile", "--rounds", 1, "--batch-size", 4)
    (stages,) = found["profile"]
    assert stages["seconds"]["thresher"]["tokenise"] > 0


def test_candidates_are_answered_in_their_order(place: Path, tmp_path: Path) -> None:
    rows = dialogues(3, seed=2)
    labelled = ok("predict", place / "ase", write_rows(tmp_path / "a.jsonl", rows))["predictions"]
    for row in rows:
        del row["label"]
    unlabelled = ok("predict", place / "ase", write_rows(tmp_path / "b.jsonl", rows))["predictions"]
    assert unlabelled == labelled
    assert len(labelled) == 12
    assert all(0.0 <= answer["probability"] <= 1.0 for answer in labelled)
    first = rows[0]
    pair = ("--text", "\n".join(first["context"]), "--pair", first["candidates"][2])
    (alone,) = ok("predict", place / "ase", *pair)["predictions"]
    assert alone["probability"] == pytest.approx(labelled[2]["probability"], abs=1e-5)


def test_tab_separated_dialogues_are_read_when_the_task_is_known(place: Path, tmp_path: Path) -> None:
    lines = [
        "\t".join(["1" if i == row["label"] else "0", *row["context"], candidate])
        for row in dialogues(12, seed=1)
        for i, candidate in enumerate(row["candidates"])
    ]
    file = tmp_path / "test.txt"
    file.write_text("\n".join(lines) + "\n")
    same = [ok("evaluate", place / "ase", data)["thresher"] for data in (file, place / "valid.jsonl")]
    assert same[0] == pytest.approx(same[1])


def test_a_search_and_a_calibration_alone(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "searched"
    found = ok(
        "search", place / "ase", place / "valid.jsonl", "--evaluations", 24, "--sampler", "evolutionary", "--out", out
    )
    assert found["metric"] == "R@1"
    assert ok("evaluate", out, place / "valid.jsonl", "--speedup", found["frontier"][-1]["speedup"])["speedup"] > 1.0
    calibrated = ok("calibrate", place / "ase", place / "valid.jsonl", "--speedup", 1.3, "--out", tmp_path / "c")
    assert calibrated["speedup"] >= 1.3


def test_an_encoder_is_post_trained_before_it_is_fitted(place: Path, tmp_path: Path) -> None:
    turns = write_rows(
        tmp_path / "turns.jsonl", [{"turns": [*row["context"], "w6 w7"]} for row in dialogues(20, seed=3)]
    )
    words = ("--max-length", 40, "--batch-size", 8, "--precision", "float32")
    found = ok("post-train", place / "base", turns, "--out", tmp_path / "post", *words)
    assert found["dialogues"] == 20
    assert 0.0 <= found["relevance_accuracy"] <= 1.0
    data = (place / "train.jsonl", "--validation", place / "valid.jsonl", "--out", tmp_path / "out")
    assert ok("fit", tmp_path / "post", *data, "--method", "ltp", *QUICK[:-2])["task"]["kind"] == "response"
    fails("post-train", place / "base", place / "nothing.jsonl", "--out", tmp_path / "x", match="no file")
    fails("post-train", place / "base", turns, "--out", tmp_path / "x", "--max-length", 3, match="length|room")
    assert not (tmp_path / "x").exists()


def test_what_does_not_go_together(place: Path, tmp_path: Path) -> None:
    data = (place / "train.jsonl", "--validation", place / "valid.jsonl", "--out", tmp_path / "out")
    fails("fit", place / "clf", *data, "--method", "ase", match="no probability of a response")
    fails("fit", place / "base", *data, "--method", "ltp", "--evaluations", 5, match="'ltp' searches no")
    fails(
        "fit", place / "base", *data, "--method", "ase", "--metric", "accuracy", match="R@1, MAP|no metric 'accuracy'"
    )
    one = write_rows(tmp_path / "one.jsonl", [{"context": [], "candidates": ["w5"], "label": 0}])
    fails("fit", place / "base", one, *data[1:], "--method", "ase", match="[Rr]ow 1")
    assert call("fit", "--help").stdout.count("response") >= 1
