"""The command line on scorers: trained, saved, and scored by what they rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from commands import call, fails, ok, write_rows
from helpers import make, tokenizer
from pairs.scoring import scorer, toy
from thresher.pairs import evaluate, load
from thresher.pairs.scorer import Scorer

WORDS = [f"w{20 + i} w{10 + i}" for i in range(8)]
LIMITS = ("--set", "max_query=22", "--set", "max_candidate=18")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scorers")
    make("bert", "base").save_pretrained(root / "encoder")
    tokenizer().save_pretrained(root / "encoder")
    scorer("mixencoder").save(root / "mixencoder")
    write_rows(root / "rows.jsonl", list(toy(12)))
    write_rows(root / "corpus.jsonl", [{"id": i, "text": text} for i, text in enumerate(WORDS)])
    write_rows(root / "asked.jsonl", [{"query": f"w{20 + i}", "relevant": [i]} for i in range(4)])
    return root


def test_evaluate_own_candidates(place: Path) -> None:
    said = ok("evaluate", place / "mixencoder", place / "rows.jsonl")
    expected = evaluate(load(place / "mixencoder"), toy(12))
    assert (said["scorer"], said["queries"], said["left_out"]) == ("mixencoder", 12, 0)
    assert said["metrics"] == pytest.approx(expected.metrics) and set(said["metrics"]) >= {"R4@1", "MAP", "MRR", "P@1"}


def test_evaluate_a_corpus_from_a_file_and_from_a_store(place: Path, tmp_path: Path) -> None:
    file = ok("evaluate", place / "mixencoder", place / "asked.jsonl", "--candidates", place / "corpus.jsonl")
    assert (file["candidates"], file["queries"]) == (8, 4)
    store = ("--store", tmp_path / "store")
    ok("index", place / "corpus.jsonl", "--model", place / "mixencoder", *store, "--dtype", "float32")
    kept = ok("evaluate", place / "mixencoder", place / "asked.jsonl", *store)
    assert kept["metrics"] == pytest.approx(file["metrics"])
    shown = call("evaluate", place / "mixencoder", place / "asked.jsonl", *store)
    assert shown.exit_code == 0 and "MRR" in shown.stdout


def test_what_does_not_go_together(place: Path, tmp_path: Path) -> None:
    asked = ("evaluate", place / "mixencoder", place / "asked.jsonl")
    fails(*asked, match="need their corpus; give --candidates")
    fails(*asked, "--candidates", place / "corpus.jsonl", "--store", tmp_path, match="not both")
    fails(*asked, "--speedup", 2, match="--speedup is not for a scorer")
    fails(*asked, "--tau", 0.5, match="--tau is not for a scorer")
    fails(*asked, "--skip-bad", match="--skip-bad is not for a scorer")
    fails("evaluate", place / "encoder", place / "rows.jsonl", "--store", tmp_path, match="are for a scorer")
    fails("evaluate", place / "mixencoder", place / "corpus.jsonl", match="are no pairs")


def test_fit_save_evaluate_and_index(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "scorer"
    words: tuple[Any, ...] = ("fit-scorer", place / "encoder", place / "rows.jsonl", "--out", out, *LIMITS,
                              "--set", "strategy=M", "--set", "start=dual", "--set", "layers=-2,-1", "--set", "lexical=4",
                              "--set", "similarity=cosine", "--loss", "temperature=.05", "--policy", "attention-mass",
                              "--batch-size", 6, "--epochs", 2, "--device", "cpu", "--precision", "float32")  # fmt: skip
    said = ok(*words, "--validation", place / "rows.jsonl")
    made = load(out)
    assert (made.config.strategy, made.config.layers, made.config.lexical) == ("M", (-2, -1), 4)
    assert said["metrics"] == pytest.approx(evaluate(made, toy(12)).metrics)
    assert made.lexical.weight != 0 and said["loss"] > 0
    assert not (out / "training").exists()
    assert ok("evaluate", out, place / "rows.jsonl")["metrics"] == pytest.approx(said["metrics"])


def test_help_has_an_example_and_json() -> None:
    text = call("fit-scorer", "--help").stdout
    assert "thresher fit-scorer minilm" in text and "--json" in text


@pytest.mark.parametrize(
    ("kind", "settings", "following"),
    [
        ("poly", (), "thresher index FILE --model"),
        ("cross", (), "thresher evaluate"),
        ("mixencoder", ("--set", "classes=2"), None),
    ],
)
def test_the_seed_is_that_of_new_weights_and_the_next_step_can_be_taken(
    place: Path, tmp_path: Path, kind: str, settings: tuple[str, ...], following: str | None
) -> None:
    rows = write_rows(
        tmp_path / "pairs.jsonl", [{"sentence1": f"w{9 + i}", "sentence2": "w8", "label": i % 2} for i in range(8)]
    )
    data = rows if settings else place / "rows.jsonl"
    limits = (
        *LIMITS,
        *settings,
        "--scorer",
        kind,
        "--learning-rate",
        1e-12,
        "--device",
        "cpu",
        "--precision",
        "float32",
    )
    found = []
    for number in range(2):
        torch.rand(number)  # whatever ran before
        said = call("fit-scorer", place / "encoder", data, "--out", tmp_path / str(number), *limits)
        assert said.exit_code == 0, said.stderr
        found.append(load(tmp_path / str(number)).state_dict())
        assert ("Next:" in said.stdout) == (following is not None) and (following or "Saved to") in said.stdout
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_fit_errors(place: Path, tmp_path: Path) -> None:
    words = ("fit-scorer", place / "encoder", place / "rows.jsonl", "--out", tmp_path / "out", *LIMITS)
    fails(*words, "--scorer", "mixencode", match="did you mean 'mixencoder'")
    fails(*words, "--set", "kk=2", match="--set has no 'kk'")
    fails(*words, "--loss", "temperature=0", match="temperature")
    fails(*words, "--loss", "distil_weight=1", match="needs a teacher")
    for value in (0, -1, "nan", "inf"):
        fails(*words, "--epochs", value, match=f"epochs must be a number above 0, not {value}")
        fails(*words, "--learning-rate", value, match=f"learning_rate must be a number above 0, not {value}")
    assert not (tmp_path / "out").exists()


def test_limits_that_nobody_typed_fit_the_encoder(place: Path, tmp_path: Path) -> None:
    words = ("fit-scorer", place / "encoder", place / "rows.jsonl", "--out", tmp_path / "out", "--scorer", "dual")
    ok(*words, "--device", "cpu", "--precision", "float32")
    assert load(tmp_path / "out").config.max_query == 48
    fails(*words, "--set", "max_query=49", match="max_query=49 is more than the 48 tokens")


def test_what_fit_refuses_before_it_trains(place: Path, tmp_path: Path) -> None:
    words = ("fit-scorer", place / "encoder", place / "rows.jsonl", "--out", tmp_path / "out", *LIMITS)
    for setting in ("temperature=inf", "label_weight=inf", "label_weight=nan"):
        fails(*words, "--loss", setting, match="Training cannot have")
    fails(*words, "--loss", "label_weight=0", match="nothing is learned")
    fails(*words, "--teacher", place / "mixencoder", match="add --loss distil_weight=1")
    fails(*words, "--policy", "ltp", match="'ltp' knows nothing before it is trained.*attention-mass")
    wrong = write_rows(tmp_path / "wrong.jsonl", [{"query": "w9", "candidates": ["w10", "w11"], "labels": [0, 0]}])
    fails(*words, "--validation", wrong, match="No query has a right candidate")
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"sentence1": "w9", "sentence2": "w10", "label": 1}])
    fails(*words, "--validation", pairs, match="are not ranked")
    fails(*words, "--set", "classes=2", "--validation", place / "rows.jsonl", match="classes does not rank")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"query": "w9", "relevant": "p1"}, "Row 1 has 'p1' as relevant, where a list of ids is expected"),
        ({"query": "w9", "relevant": 1}, "Row 1 has 1 as relevant"),
        ({"query": None, "relevant": [1]}, "Row 1 has no text that can be read"),
        ({"query": [], "relevant": [1]}, "Row 1 has no text that can be read"),
        ({"query": "w9", "relevant": [77]}, "Row 1 names the relevant id 77"),
        ({"query": "w9", "relevant": []}, "No query has a right candidate"),
    ],
)
def test_bad_queries_of_a_corpus(place: Path, tmp_path: Path, row: dict[str, Any], says: str) -> None:
    file = write_rows(tmp_path / "asked.jsonl", [row])
    fails("evaluate", place / "mixencoder", file, "--candidates", place / "corpus.jsonl", match=says)


def test_columns_go_to_the_file_they_are_for(place: Path, tmp_path: Path) -> None:
    words = ("evaluate", place / "mixencoder")
    expected = ok(*words, place / "asked.jsonl", "--candidates", place / "corpus.jsonl")
    bodies = write_rows(tmp_path / "bodies.jsonl", [{"key": i, "body": text} for i, text in enumerate(WORDS)])
    named = ("--candidates", bodies, "--column", "id=key", "--column", "text=body")
    assert ok(*words, place / "asked.jsonl", *named)["metrics"] == expected["metrics"]
    asked = write_rows(tmp_path / "asked.jsonl", [{"text": f"w{20 + i}", "id": [i]} for i in range(4)])
    named = (*named, "--column", "query=text", "--column", "relevant=id")
    assert ok(*words, asked, *named)["metrics"] == expected["metrics"]
    fails(*words, asked, *named[:4], "--column", "text=bodi", match=r"no column 'bodi' \(there are key, body\)")


def test_a_corpus_is_encoded_after_its_queries_are_checked(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoded(*_: Any, **__: Any) -> None:
        raise AssertionError("encoded in vain")

    scorer("dual", classes=2).save(tmp_path / "classes")
    monkeypatch.setattr(Scorer, "encode_candidates", encoded)
    corpus = ("--candidates", place / "corpus.jsonl")
    fails("evaluate", tmp_path / "classes", place / "asked.jsonl", *corpus, match="2 classes does not rank")
    for row, says in (
        ({"query": "w9"}, "'relevant' is not there"),
        ({"query": "w9", "relevant": [77]}, "Row 1 names the relevant id 77"),
        ({"query": 3, "relevant": [1]}, "Row 1 has no text that can be read"),
        ({"query": "w9", "relevant": []}, "No query has a right candidate"),
    ):
        fails("evaluate", place / "mixencoder", write_rows(tmp_path / "asked.jsonl", [row]), *corpus, match=says)


def test_drawn_rows_are_called_by_their_number_in_the_file(place: Path, tmp_path: Path) -> None:
    words = ("evaluate", place / "mixencoder")
    rows = [{"query": f"w{20 + i % 8}", "relevant": [99 if i == 10 else i % 8]} for i in range(20)]
    file = write_rows(tmp_path / "asked.jsonl", rows)
    corpus = ("--candidates", place / "corpus.jsonl")
    drawn = ("--limit", 20, "--seed", 3)
    fails(*words, file, *corpus, *drawn, match="Row 11 names the relevant id 99")
    ok("index", place / "corpus.jsonl", "--model", place / "mixencoder", "--store", tmp_path / "store")
    fails(*words, file, "--store", tmp_path / "store", *drawn, match="Row 11 names the relevant id 99")
    # The candidates are not drawn: what is said of their rows stands.
    bad = write_rows(tmp_path / "bad.jsonl", [{"id": i, "text": None if i == 5 else "w9"} for i in range(8)])
    fails(*words, file, "--candidates", bad, "--limit", 3, match="Row 6 has no text")

    own = [{"query": "w9", "candidates": ["w10", "w11"], "labels": [1] if i == 10 else [0, 1]} for i in range(20)]
    file = write_rows(tmp_path / "own.jsonl", own)
    fails(*words, file, *drawn, match="Row 11 has the labels")
    fit = ("fit-scorer", place / "encoder", file, "--out", tmp_path / "out", *LIMITS, "--device", "cpu")
    fails(*fit, *drawn, match="Row 11 has the labels")
