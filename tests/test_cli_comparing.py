"""thresher compare: one command from a model and rows to a report and a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import thresher
from commands import call, fails, ok, synthetic, write_rows
from helpers import build, config_of, tokenizer
from thresher.cli.comparing import _drawn, _each
from thresher.cli.tagging_work import TaggingWork
from thresher.cli.truth import Truth
from thresher.cli.work import ResponseWork, TextWork
from thresher.comparing import Part
from thresher.tasks.long_texts import EncodedLongTexts
from thresher.tasks.ranking import ranking_metrics
from thresher.tasks.tagging import TaggingTask
from thresher.tasks.text import TextTask

QUICK = ("--passes", 16, "--stage", "batch_size=8", "--precision", "float32", "--speedups", "1.3", "--rounds", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a head, one without, rows, and a comparison that was made."""
    root = tmp_path_factory.mktemp("compare")
    for name, head in (("clf", "sequence"), ("base", "base")):
        build(config_of("bert", 2, num_labels=2), head).save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    rows = synthetic(48)
    write_rows(root / "train.jsonl", rows[:24])
    write_rows(root / "check.jsonl", rows[24:])
    done = call(*command(root), "--json")
    assert done.exit_code == 0, done.stderr
    (root / "said.json").write_text(done.stdout)
    (root / "notices").write_text(done.stderr)
    return root


def command(root: Path, *more: object) -> tuple[object, ...]:
    return (
        "compare", root / "base", root / "train.jsonl", "--validation", root / "check.jsonl", "--out", root / "out",
        "--methods", "attention-mass,ase,random", "--speedup", 1.4, *QUICK, *more,
    )  # fmt: skip


def test_compare_reports_and_saves(place: Path) -> None:
    said = json.loads((place / "said.json").read_text())
    assert said["metric"] == "accuracy"
    assert said["target"] == {"speedup": 1.4}
    assert "one half of" in said["parts"]["chosen"]["what"]
    assert (said["parts"]["chosen"]["rows"], said["parts"]["judged"]["rows"]) == (12, 12)
    assert said["passes"] == {"attention-mass": 16, "random": 0}
    assert "two texts" in said["left_out"]["ase"]
    assert said["settings"]["fine_tune"]  # the head is new
    assert said["pick"]["chosen"]["speedup"] >= 1.4
    assert all(one["error"] is not None for one in said["points"])
    out = place / "out"
    assert {"comparison.json", "comparison.html", "frontier.svg"} <= {file.name for file in out.iterdir()}
    model = thresher.load(said["best"])
    assert thresher.policy_of(model).config.method == said["pick"]["contestant"]
    # Later commands need no options.
    assert ok("evaluate", said["best"], place / "check.jsonl")["rows"] == 24
    assert "2/4 attention-mass" in (place / "notices").read_text()


def test_the_same_command_goes_on_and_shows_a_table(place: Path) -> None:
    done = call(*command(place))
    assert done.exit_code == 0, done.stderr
    assert "Going on with the comparison in" in done.stderr
    for words in ("The frontier", "FLOPs speedup", "± standard error", "Left out", "needs rows of two texts",
                  "Leaving out padding alone gains", "the pick is", f"thresher bench {place / 'out' / 'best'}"):  # fmt: skip
        assert words in done.stdout
    said = json.loads((place / "said.json").read_text())
    assert json.loads((place / "out" / "comparison.json").read_text())["points"] == said["points"]


def test_a_target_that_nobody_meets_is_said_and_no_error(place: Path) -> None:
    words = [word for word in command(place) if word not in ("--speedup", 1.4)]
    done = call(*words, "--speedup", 500, "--trained-at", 1.4)
    assert done.exit_code == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "Nothing meets a FLOPs speedup of at least 500x; of what the methods were set to, the nearest is" in shown
    assert not (place / "out" / "best").exists()
    assert call(*command(place)).exit_code == 0  # and back
    assert (place / "out" / "best").is_dir()


def test_rows_of_a_test_split_judge(place: Path, tmp_path: Path) -> None:
    said = ok("compare", place / "clf", place / "train.jsonl", "--test", place / "check.jsonl", "--test-limit", 10,
              "--out", tmp_path / "out", "--methods", "random", "--max-loss", 1, *QUICK, "--rounds", 0)  # fmt: skip
    assert said["parts"]["judged"] == {"what": str(place / "check.jsonl"), "rows": 10}
    assert "held-out rows" in said["parts"]["chosen"]["what"]
    assert not said["settings"]["fine_tune"]
    assert said["frontier"][0]["measured"] is None


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--methods", "ltq"), "There is no method 'ltq'; did you mean 'ltp'"),
        (("--passes", 20), r"comparison with other settings \(start_passes, passes\)"),
        (("--speedups", "fast"), "--speedups takes numbers"),
        (("--max-loss", 0.1), "Give one target"),
        (("--stage", "epochs=2"), "leave out epochs"),
        (("--methods", "ase"), "No method can be trained on these rows"),
        (("--seed", 5), "comparison with other settings"),
    ],
)
def test_bad_input_is_one_sentence(place: Path, words: tuple[object, ...], match: str) -> None:
    before = (place / "out" / "run.json").read_text()
    fails(*command(place, *words), match=match)
    assert (place / "out" / "run.json").read_text() == before


def test_answers_to_questions_are_judged_question_by_question(place: Path, tmp_path: Path) -> None:
    """Questions about one passage stay together, and methods are those of such heads."""
    build(config_of("bert", 3, num_labels=2), "question-answering").save_pretrained(tmp_path / "qa")
    tokenizer().save_pretrained(tmp_path / "qa")
    rows = []
    for number in range(24):
        words = [f"w{5 + (number // 2 * 7 + i * 5) % 50}" for i in range(12)]
        answer = {"text": [words[number % 9]], "answer_start": [len(" ".join([*words[: number % 9], ""]))]}
        rows.append({"id": str(number), "question": words[2], "context": " ".join(words), "answers": answer})
    data, check = write_rows(tmp_path / "t.jsonl", rows[:12]), write_rows(tmp_path / "v.jsonl", rows[12:])
    said = ok("compare", tmp_path / "qa", data, "--validation", check, "--out", tmp_path / "out", "--speedup", 1.2,
              "--methods", "random,settled-span,block-skim,deebert", *QUICK, "--rounds", 0)  # fmt: skip
    assert said["metric"] == "f1"
    assert set(said["passes"]) == {"random", "settled-span", "block-skim"}
    assert "serves heads of two or more classes" in said["left_out"]["deebert"]
    assert said["settings"]["methods"][0]["settings"]["protect_segments"] == [0]
    assert said["parts"]["judged"]["rows"] == said["parts"]["chosen"]["rows"] == 6
    assert {one["contestant"] for one in said["points"]} | set(said["missed"]) == set(said["passes"])
    assert all(one["error"] is not None for one in said["points"])


def test_a_budget_below_a_batch_is_one_sentence(place: Path, tmp_path: Path) -> None:
    fails("compare", place / "clf", place / "train.jsonl", "--validation", place / "check.jsonl", "--out", tmp_path / "o",
          *QUICK, "--methods", "ltp", "--passes", 15, match=r"of ltp; give at least 16")  # fmt: skip
    assert not (tmp_path / "o").exists()


def test_one_validation_row_cannot_choose_and_judge(place: Path, tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", synthetic(1))
    fails("compare", place / "clf", place / "train.jsonl", "--validation", one, "--out", tmp_path / "out", *QUICK,
          match="One validation row cannot be divided")  # fmt: skip
    assert not (tmp_path / "out").exists()


def refused(place: Path, tmp_path: Path, *words: object, match: str) -> None:
    """A comparison that one sentence refuses before anything is written."""
    fails("compare", place / "clf", "--out", tmp_path / "o", "--methods", "random", *QUICK, *words, match=match)
    assert not (tmp_path / "o").exists()


def test_bad_rows_are_one_sentence(place: Path, tmp_path: Path) -> None:
    data = place / "train.jsonl"
    (tmp_path / "empty.jsonl").write_text("")
    refused(place, tmp_path, tmp_path / "nowhere.jsonl", match="There is no file or directory")
    refused(place, tmp_path, tmp_path / "empty.jsonl", match="empty.jsonl is empty")
    refused(place, tmp_path, data, "--validation", tmp_path / "empty.jsonl", match="empty.jsonl is empty")
    refused(place, tmp_path, data, "--test", tmp_path / "nowhere.jsonl", match="There is no file or directory")
    unlabelled = write_rows(tmp_path / "bare.jsonl", [{"text": row["text"]} for row in synthetic(24)])
    refused(place, tmp_path, unlabelled, match="no column known to be the label")
    one_class = write_rows(tmp_path / "same.jsonl", [{**row, "label": 1} for row in synthetic(24)])
    refused(place, tmp_path, one_class, "--validation", data, match="the same label, so nothing can be learned or lost")
    refused(
        place,
        tmp_path,
        data,
        "--validation",
        data,
        "--test",
        one_class,
        match="Every row of .*same.jsonl has the same label",
    )
    few = write_rows(tmp_path / "few.jsonl", synthetic(6))
    refused(place, tmp_path, few, match="One validation row cannot be divided.*give at least two, or test rows")
    refused(place, tmp_path, write_rows(tmp_path / "one.jsonl", synthetic(1)), match="One row cannot be divided")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--test-limit", 5), "--test-limit is of the rows of --test; give that too"),
        (("--validation-limit", 5), "--validation-limit is of the rows of --validation"),
        (("--trained-at", 0.5), "must be above 1, not 0.5"),
        (("--speedups", "nan"), "speedups must be above 1, not nan"),
        (("--speedups", ""), "--speedups takes numbers"),
        (("--speedup", 1), "speedup must be a number above 1, not 1"),
        (("--speedup", "inf"), "--speedup must be at least 1"),
        (("--max-loss", -1), "--max-loss must be at least 0"),
        (("--limit", 0), "limit on rows must be at least 1"),
        (("--stage", "batch_size"), "--stage takes NAME=VALUE"),
        (("--max-length", 0), "leaves no room for text"),
        (("--column", "text=review"), "There is no column 'review'"),
        (("--metric", "bleu"), "There is no metric 'bleu'"),
        (("--task", "qa"), "line 1 has no context"),
    ],
)
def test_bad_options_are_one_sentence(place: Path, tmp_path: Path, words: tuple[object, ...], match: str) -> None:
    refused(place, tmp_path, place / "train.jsonl", *words, match=match)


@pytest.mark.parametrize(
    "words",
    [("--passes", 0), ("--passes", -3), ("--passes", "many"), ("--seed", -1), ("--rounds", -1), ("--evaluations", 0)],
)
def test_numbers_out_of_range_are_refused_by_their_option(
    place: Path, tmp_path: Path, words: tuple[object, ...]
) -> None:
    done = call("compare", place / "clf", place / "train.jsonl", "--out", tmp_path / "o", *words)
    assert done.exit_code == 2 and str(words[0]) in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_names_of_methods_are_checked_first(place: Path, tmp_path: Path) -> None:
    words = ("compare", tmp_path / "no-model", tmp_path / "no-data", "--out", tmp_path / "o", "--methods")
    fails(*words, ",", match="needs at least one method")
    fails(*words, "ltp,ltp", match="'ltp' is given twice")
    fails(*words, "ltp+adapler", match="one method and one exit")


def test_a_place_that_cannot_be_written_to(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    words = ("compare", place / "clf", place / "train.jsonl", "--methods", "random", *QUICK, "--out")
    fails(*words, tmp_path / "file", match="is a file; give a directory")
    fails(*words, tmp_path / "file" / "o", match="Not a directory")
    fails(*words, place / "clf", match="holds a saved model")
    (tmp_path / "o" / "best").mkdir(parents=True)
    fails(*words, tmp_path / "o", match="holds best but no run.json of a comparison")
    assert (tmp_path / "file").read_text() == "x"


def test_a_directory_of_another_comparison_is_left_as_it_is(place: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (place / "out").rglob("*")}
    other = [place / "check.jsonl" if word == place / "train.jsonl" else word for word in command(place)]
    fails(*other, match=r"holds a comparison with other settings \(rows\); remove it, or give another directory")
    assert {file: file.stat().st_mtime_ns for file in (place / "out").rglob("*")} == before


# --- the metric of every row ---------------------------------------------------------------------------------------------


def test_where_the_metric_is_a_mean_each_row_has_its_part() -> None:
    draw = np.random.default_rng(0)
    classes, logits = draw.integers(2, size=30), draw.normal(size=(30, 2))
    values, said = draw.normal(size=30), draw.normal(size=(30, 1))
    cases: list[tuple[Any, Truth, np.ndarray]] = [
        (TextWork(text=TextTask("classification", 2)), Truth(list(classes)), logits),
        (TextWork(text=TextTask("regression", 1, metric="mse")), Truth(list(values)), said),
        (ResponseWork(measure="MRR"), Truth([1, 0, 0] * 10, [i // 3 for i in range(30)]), said),
    ]
    for work, truth, answers in cases:
        each, quality = _each(work, truth), work.quality(truth, np.zeros(0))
        assert each is not None
        assert each(answers).mean() == pytest.approx(quality(answers))
    assert len(_each(*cases[2][:2])(said)) == 10  # type: ignore[misc]
    assert (
        ranking_metrics(said, cases[2][1].labels, cases[2][1].groups)["MRR"]
        == pytest.approx(  # type: ignore[arg-type]
            _each(*cases[2][:2])(said).mean()  # type: ignore[misc]
        )
    )


@pytest.mark.parametrize("metric", ["f1", "matthews"])
def test_other_metrics_are_taken_of_the_rows_drawn(metric: str) -> None:
    draw = np.random.default_rng(0)
    labels, logits = draw.integers(2, size=20), draw.normal(size=(20, 2))
    work, truth = TextWork(text=TextTask("classification", 2, metric=metric)), Truth(list(labels))  # type: ignore[arg-type]
    assert _each(work, truth) is None
    index = np.array([3, 3, 7, 11, 0, 1])
    expected = work.text.score(logits[index], labels[index])
    assert _drawn(work, truth)(logits, [index[:2], index[2:]]) == pytest.approx(expected)


def test_windows_of_a_text_are_judged_and_drawn_together() -> None:
    """A mean over texts is one over texts, and a text that is drawn brings all its windows."""
    texts = ["w5 w6 " * (3 * i) for i in range(8)]
    labels = [i % 2 for i in range(8)]
    task = TextTask("classification", 2, windows=2)
    encoded = task.encode(datasets.Dataset.from_dict({"text": texts, "label": labels}), tokenizer(), 12)
    assert isinstance(encoded, EncodedLongTexts) and len(encoded.rows) > len(texts)
    said = np.random.default_rng(0).normal(size=(len(encoded.rows), 2))
    truth = Truth.of(encoded)
    assert truth is not None and truth.owners == encoded.owners
    part = Part(encoded.rows, owners=truth.owners)
    units = part._units
    right = encoded.averaged(said).argmax(-1) == labels
    each = _each(TextWork(text=task), truth)
    assert each is not None and each(said).tolist() == right.tolist()
    work = TextWork(text=replace(task, metric="f1"))
    assert _each(work, truth) is None and len(units) == len(texts)
    drawn = [3, 3, 7, 0, 4]
    wanted = task.metrics(encoded.averaged(said)[drawn], [labels[i] for i in drawn])["f1"]
    assert _drawn(work, truth)(said, [units[i] for i in drawn]) == pytest.approx(wanted)


@pytest.mark.parametrize("windows", [None, 1])
def test_tags_are_judged_against_those_of_the_rows_drawn(windows: int | None) -> None:
    """A perfect tagger is perfect on every draw of rows; of windows, those of a row are drawn together."""
    rows = [
        {"tokens": [f"w{i}", "w5", "w6"], "tags": ["O", *(("B-x", "I-x") if i % 3 else ("O", "B-x"))]}
        for i in range(7, 20)
    ]
    task = TaggingTask(("O", "B-x", "I-x"), windows)
    encoded = task.encode(datasets.Dataset.from_list(rows), tokenizer(), None if windows is None else 4)
    assert len(encoded.rows) == len(rows) * (1 if windows is None else 2)
    perfect = np.eye(3)[np.maximum(np.array(encoded.rows["labels"][:]), 0)]
    work, truth = TaggingWork(tagging=task), Truth.of(encoded)
    assert truth is not None and work.quality(truth, np.zeros(0))(perfect) == 1.0
    every = Part(encoded.rows, owners=truth.owners)._units
    draw = np.random.default_rng(0)
    for _ in range(5):
        units = [every[row] for row in draw.integers(len(rows), size=len(rows))]
        assert _drawn(work, truth)(perfect, units) == 1.0
        index = np.concatenate(units)
        wrong = perfect[:, :, [1, 2, 0]]
        assert _drawn(work, truth)(wrong, units) == encoded.select(index).metrics(wrong[index])[work.measure]
