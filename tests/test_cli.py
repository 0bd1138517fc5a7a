"""The command line: every command on a tiny model, and every kind of bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from typer.testing import CliRunner

import thresher
from commands import call, fails, ok, synthetic, write_rows
from helpers import build, config_of, tokenizer
from thresher.cli.commands import app
from thresher.cli.gains import slower
from thresher.cli.options import convert, place_of
from thresher.errors import OptionError
from thresher.exits import FastBERT
from thresher.model import attachment_of
from thresher.training import stages

WEIGHTS = ("model.safetensors", "thresher.safetensors")

COMMANDS = (
    "fit",
    "compare",
    "calibrate",
    "search",
    "post-train",
    "quantize",
    "evaluate",
    "index",
    "rank",
    "bench",
    "predict",
    "explain",
    "export",
    "methods",
    "demo",
)
QUICK = ("--stage", "epochs=1", "--stage", "batch_size=32", "--precision", "float32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every kind, the rows they are used on, and one model that was fitted."""
    root = tmp_path_factory.mktemp("cli")
    heads = {"clf": ("sequence", 2), "value": ("sequence", 1), "base": ("base", 2), "tagger": ("token", 2)}
    for name, (head, labels) in heads.items():
        build(config_of("bert", 2, num_labels=labels), head).save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    decoder = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=1, n_positions=32, num_labels=2)
    transformers.GPT2ForSequenceClassification(decoder).save_pretrained(root / "gpt")
    tokenizer().save_pretrained(root / "gpt")
    write_rows(root / "rows.jsonl", synthetic())
    done = call("fit", root / "base", root / "rows.jsonl", "--out", root / "fitted", "--speedup", 1.3, *QUICK,
                "--method", "attention-mass", "--validation", root / "rows.jsonl", "--json")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    (root / "fitted.json").write_text(done.stdout)
    return root


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_no_words_give_help() -> None:
    text = call("--help").stdout
    assert all(name in text for name in COMMANDS)
    assert "Make a model faster" in call().output


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_an_example_and_json(name: str) -> None:
    text = call(name, "--help").stdout
    assert f"thresher {name}" in text
    assert "--json" in text


def test_version() -> None:
    assert call("--version").stdout.strip() == f"thresher {thresher.__version__}"


# --- fit -------------------------------------------------------------------------------------------------------------


def test_fit_reports_and_saves(place: Path) -> None:
    said = json.loads((place / "fitted.json").read_text())
    assert said["speedup"] == pytest.approx(1.3, rel=0.02)
    assert (said["rows"], said["validation_rows"], said["method"]) == (40, 40, "attention-mass")
    assert set(said["stock"]) == set(said["thresher"]) == {"accuracy", "f1", "matthews", "agreement"}
    model = thresher.load(place / "fitted")
    noted = attachment_of(model).notes["task"]
    assert noted == {"kind": "classification", "label_names": None, "num_labels": 2, "pair": False, "columns": {},
                     "max_length": None, "metric": "accuracy"}  # fmt: skip
    assert thresher.policy_of(model).config.strength == said["strength"]
    assert not (place / "fitted" / "training").exists()
    assert transformers.AutoModelForSequenceClassification.from_pretrained(place / "fitted").num_labels == 2


def test_fit_with_other_columns_and_named_labels(place: Path, tmp_path: Path) -> None:
    rows = [{**row, "verdict": ("even", "odd")[row.pop("label")]} for row in synthetic(text="words")]
    data = write_rows(tmp_path / "train.jsonl", rows)
    out = tmp_path / "out"
    done = call("fit", place / "base", data, "--out", out, "--column", "text=words", "--column", "label=verdict",
                "--set", "threshold=.05", "--metric", "f1", "--max-length", 16, "--limit", 30, *QUICK)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "3 of the 30 rows are held out" in done.stderr
    assert "were cut" in done.stderr
    assert "stage fine-tune" in done.stderr
    assert f"thresher bench {out}" in done.stdout
    model = thresher.load(out)
    assert model.config.id2label == {0: "even", 1: "odd"}
    assert attachment_of(model).notes["task"]["columns"] == {"text": "words", "label": "verdict"}
    assert thresher.policy_of(model).config.threshold == 0.05
    # Later commands need no options, and answer with names.
    assert ok("evaluate", out, data)["rows"] == 40
    assert ok("predict", out, "--text", "w5 w6")["predictions"][0]["label"] in ("even", "odd")


def test_stock_is_the_fine_tuned_model_that_drops_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the untrained one, whose head is noise, nor the one that has learned to drop."""
    data = write_rows(tmp_path / "r.jsonl", [{**row, "label": row["label"] + 0.5} for row in synthetic()])
    real, tuned = stages.run_stage, tmp_path / "tuned"

    def keeping(model: Any, stage: Any, rows: Any, tokens: Any, directory: Path, **options: Any) -> Any:
        if stage.name != "fine-tune":
            shutil.copytree(directory.parent / "1-fine-tune" / "done", tuned)
            tokens.save_pretrained(tuned)
        return real(model, stage, rows, tokens, directory, **options)

    monkeypatch.setattr(import_module("thresher.training.recipe"), "run_stage", keeping)
    said = ok("fit", place / "base", data, "--validation", data, "--fine-tune", "--method", "first", "--speedup", 1.3,
              "--stage", "learning_rate=1e-2", "--out", tmp_path / "o", *QUICK)  # fmt: skip
    error = {name: ok("evaluate", name, data)["stock"]["mse"] for name in (tuned, tmp_path / "o")}
    assert said["stock"]["mse"] == pytest.approx(error[tuned], rel=1e-3)
    assert said["stock"]["mse"] != pytest.approx(error[tmp_path / "o"], rel=0.02)
    monkeypatch.undo()
    untrained = ok("fit", place / "base", data, "--validation", data, "--no-fine-tune", "--method", "first",
                   "--out", tmp_path / "u", *QUICK, "--stage", "distil.epochs=0.1")["stock"]["mse"]  # fmt: skip
    assert said["stock"]["mse"] != pytest.approx(untrained, rel=0.02)


def test_fit_without_labels(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in synthetic()])
    said = ok("fit", place / "clf", data, "--no-labels", "--method", "random", "--max-loss", 0.9,
              "--out", tmp_path / "o", *QUICK)  # fmt: skip
    assert set(said["thresher"]) == {"agreement"}
    assert said["metric"] == "agreement"


@pytest.mark.parametrize("method", ["adapler", "ltp"])
def test_without_labels_it_learns_from_none(place: Path, tmp_path: Path, method: str) -> None:
    """Rows with labels, with wrong ones and with none train the same model."""
    rows, weights = synthetic(), []
    names = sorted({row["label"] for row in rows})
    turned = [{**row, "label": names[1 - names.index(row["label"])]} for row in rows]
    for number, given in enumerate((rows, turned, [{"text": row["text"]} for row in rows])):
        data = write_rows(tmp_path / f"{number}.jsonl", given)
        words = ("--no-labels", "--method", method, "--stage", "epochs=2", "--precision", "float32")
        ok("fit", place / "clf", data, "--validation", data, *words, "--out", tmp_path / f"o{number}")
        weights.append([(tmp_path / f"o{number}" / name).read_bytes() for name in WEIGHTS])
    assert weights[0] == weights[1] == weights[2]


def test_a_method_that_needs_labels_says_so_before_it_trains(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", synthetic())
    fails("fit", place / "clf", data, "--no-labels", "--method", "tr-bert", "--out", tmp_path / "o",
          match="--no-labels: the method 'tr-bert' learns from labels")  # fmt: skip
    assert not (tmp_path / "o").exists()


def test_fit_a_regression_of_pairs(place: Path, tmp_path: Path) -> None:
    rows = [{"sentence1": r["text"], "sentence2": "w7 w8", "score": i % 5 + 0.5} for i, r in enumerate(synthetic())]
    said = ok("fit", place / "value", write_rows(tmp_path / "p.jsonl", rows), "--method", "first", "--speedup", 1.2,
              "--out", tmp_path / "o", *QUICK)  # fmt: skip
    assert said["task"]["pair"] is True
    assert set(said["thresher"]) == {"pearson", "spearman", "mse"}
    (answer,) = ok("predict", tmp_path / "o", "--text", "w5 w6", "--pair", "w7")["predictions"]
    assert list(answer) == ["value"]


def test_fit_and_use_an_embedder(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    data, out = place / "rows.jsonl", tmp_path / "o"
    said = ok("fit", place / "base", data, "--task", "embedding", "--method", "attention-mass", "--speedup", 1.3,
              "--out", out, *QUICK)  # fmt: skip
    assert 0 < said["thresher"]["cosine"] <= said["stock"]["cosine"] == pytest.approx(1.0)
    assert set(ok("evaluate", out, "python-docs:test", "--limit", 20)["thresher"]) == {
        "cosine", "mrr", "recall_at_1", "recall_at_10",
    }  # fmt: skip
    assert len(ok("predict", out, "--text", "w5 w6")["predictions"][0]["embedding"]) == 32
    assert ok("calibrate", out, data, "--speedup", 1.2)["speedup"] == pytest.approx(1.2, rel=0.02)
    assert ok("bench", out, data, "--batch-size", 4, "--rounds", 1, "--limit", 8)["flops"] > 1.1
    assert ok("explain", out, "--text", "w5 w6 w7")["maps"][0]["note"] == ""


def test_an_interrupted_fit_says_how_to_go_on_and_does(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("fit", place / "clf", place / "rows.jsonl", "--out", tmp_path / "o", *QUICK)
    trained: list[str] = []
    real = stages.run_stage

    def interrupted(model: Any, stage: Any, *args: Any, **options: Any) -> Any:
        if stage.name == "hard" and not trained.count("hard"):
            trained.append("hard")
            raise KeyboardInterrupt
        trained.append(stage.name)
        return real(model, stage, *args, **options)

    monkeypatch.setattr(import_module("thresher.training.recipe"), "run_stage", interrupted)
    done = call(*words)
    assert (done.exit_code, done.stdout) == (130, "")
    assert str(tmp_path / "o" / "training") in done.stderr
    assert "the same command goes on from there" in done.stderr
    fails(*words, "--seed", 5, match=r"unfinished run with other settings \(seed\)")
    fails(*words, "--precision", "bfloat16", match=r"unfinished run with other settings \(precision\)")
    again = call(*words)
    assert again.exit_code == 0, again.stderr
    assert "Going on with the unfinished run" in again.stderr
    assert trained == ["soft", "hard", "hard"]


# --- calibrate, evaluate, bench --------------------------------------------------------------------------------------


def test_calibrate_in_place(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "fitted", tmp_path / "m")
    said = ok("calibrate", tmp_path / "m", place / "rows.jsonl", "--speedup", 1.6)
    assert said["speedup"] == pytest.approx(1.6, rel=0.02)
    assert thresher.policy_of(thresher.load(tmp_path / "m")).config.strength == said["strength"]
    assert ok("evaluate", tmp_path / "m", place / "rows.jsonl")["speedup"] == pytest.approx(said["speedup"])


def test_calibrate_a_plain_checkpoint_without_training(place: Path, tmp_path: Path) -> None:
    words = ("calibrate", place / "clf", place / "rows.jsonl", "--max-loss", 0.3)
    said = ok(*words, "--method", "cascade-top-k", "--set", "keep_rate=.5", "--out", tmp_path / "o")
    assert said["stock"]["accuracy"] - said["thresher"]["accuracy"] <= 0.3 + 1e-9
    assert ok("predict", tmp_path / "o", "--text", "w5")["predictions"]
    pairs = write_rows(
        tmp_path / "pairs.jsonl", [{"q": r["text"], "a": "w7", "label": r["label"]} for r in synthetic()]
    )
    columns = ("--column", "text=q", "--column", "text_pair=a")
    ok("calibrate", place / "clf", pairs, *columns, "--speedup", 1.2, "--method", "first", "--out", tmp_path / "p")
    assert ok("evaluate", tmp_path / "p", pairs)["speedup"] == pytest.approx(1.2, rel=0.02)
    fails(*words, match="--method attention-mass --out DIR")
    fails(*words, "--method", "first", match="give --out")
    fails(*words, "--set", "keep_rate=.5", match="--set needs --method")


def test_evaluate_a_plain_checkpoint(place: Path) -> None:
    done = call("evaluate", place / "clf", place / "rows.jsonl")
    assert done.exit_code == 0
    assert "is a plain checkpoint: it runs packed and drops nothing" in done.stderr
    assert "accuracy" in done.stdout
    assert ok("evaluate", place / "clf", place / "rows.jsonl")["speedup"] == 1.0


def test_evaluate_without_labels(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "t.jsonl", [{"text": row["text"]} for row in synthetic()])
    assert set(ok("evaluate", place / "fitted", data)["thresher"]) == {"agreement"}


def test_bench(place: Path) -> None:
    words = ("bench", place / "fitted", place / "rows.jsonl", "--batch-size", "1,8", "--rounds", 2, "--limit", 16)
    said = ok(*words)
    assert [one["batch_size"] for one in said["batch_sizes"]] == [1, 8]
    assert set(said["batch_sizes"][0]["measured"]) == {"median", "low", "high"}
    assert said["rows"] == 16
    assert said["flops"] > 1.1
    shown = call(*words).stdout
    assert "padding only" in shown
    assert "stock, sorted" in shown


@pytest.mark.parametrize("name", ["tagger", "base"])
def test_bench_and_explain_take_any_head(place: Path, name: str) -> None:
    assert ok("bench", place / name, place / "rows.jsonl", "--batch-size", 8, "--rounds", 1)["flops"] == 1.0
    assert ok("explain", place / name, "--text", "w5", "--pair", "w6 w7")["maps"][0]["kept"] == 6


# --- predict, explain ------------------------------------------------------------------------------------------------


def test_predict_a_file_keeps_the_order(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    assert ok("predict", place / "fitted", place / "rows.jsonl", "--out", out)["rows"] == 40
    written = [json.loads(line) for line in out.read_text().splitlines()]
    texts = [row["text"] for row in synthetic()]
    alone = [ok("predict", place / "fitted", "--text", text)["predictions"][0] for text in texts[:3]]
    assert [one["label"] for one in written[:3]] == [one["label"] for one in alone]
    assert [one["probability"] for one in written[:3]] == pytest.approx([one["probability"] for one in alone], abs=1e-4)


def test_predict_shows_a_table(place: Path) -> None:
    done = call("predict", place / "fitted", "--text", "w5 w6", "--text", "")
    assert "2 answers" in done.stdout
    assert "1 text is empty" in done.stderr


def test_a_text_that_is_too_long_is_cut_and_said(place: Path) -> None:
    done = call("predict", place / "fitted", "--text", "w5 " * 500)
    assert done.exit_code == 0
    assert "1 of 1 texts was longer than 48 tokens and was cut" in done.stderr


def test_explain(place: Path, tmp_path: Path) -> None:
    words = ("explain", place / "fitted", "--text", "w5 w6 w7 w8 w9 w10 w11 w12 w13")
    plain = call(*words, "--html", tmp_path / "m.html")
    assert re.search(r"\[[12]:.*w\d", plain.stdout)
    assert "tokens read to the end" in plain.stdout
    assert "\x1b" not in plain.stdout
    assert "<html" in (tmp_path / "m.html").read_text()
    (found,) = ok(*words)["maps"]
    assert "".join(found["tokens"]).startswith("[CLS] w5 w6")
    assert set(found["dropped_at"]) - {None} <= {1, 2}


def test_explain_says_what_was_cut(place: Path) -> None:
    assert "1 of 1 texts was longer" in call("explain", place / "fitted", "--text", "w5 " * 500).stderr
    assert "1 text is empty" in call("explain", place / "fitted", "--text", "").stderr


# --- where the model runs --------------------------------------------------------------------------------------------

RUN_A_MODEL = {
    "fit": ("clf", "rows.jsonl", "--out", "o"),
    "calibrate": ("fitted", "rows.jsonl", "--speedup", "1.2"),
    "search": ("fitted", "rows.jsonl"),
    "evaluate": ("fitted", "rows.jsonl"),
    "bench": ("fitted", "rows.jsonl"),
    "predict": ("fitted", "--text", "w5"),
    "explain": ("fitted", "--text", "w5"),
    "demo": ("--out", "o"),
}


@pytest.mark.parametrize("name", RUN_A_MODEL)
def test_a_gpu_that_is_not_there(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    words = [str(place / word) if (place / word).exists() else word for word in RUN_A_MODEL[name]]
    fails(name, *words, "--device", "cuda", match="--device cuda: torch finds no GPU here")
    assert not list(tmp_path.iterdir())


def test_the_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, found in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert (place_of("auto"), place_of("cpu")) == (found, "cpu")


def test_models_of_every_kind_go_to_the_device(place: Path) -> None:
    """Meta stands for a GPU: a device other than the one that models load to by themselves."""
    from thresher.cli.models import open_model
    from thresher.cli.starting import open_start

    opened = [open_model(str(place / name), "meta").model for name in ("fitted", "clf", "base")]
    rows = datasets.Dataset.from_list(synthetic(4))
    options: dict[str, Any] = {"metric": None, "columns": {}, "max_length": None, "seed": 0}
    opened += [open_start(str(place / name), rows, "meta", kind=None, **options)[0].model for name in ("clf", "base")]
    assert [model.device.type for model in opened] == ["meta"] * 5
    assert {parameter.device.type for parameter in opened[0].parameters()} == {"meta"}


def test_training_stays_on_the_cpu_when_told_so(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    recipe = import_module("thresher.training.recipe")
    monkeypatch.setattr(recipe, "run_stage", lambda *args, **options: found.append(options["use_cpu"]))
    ok("fit", place / "clf", place / "rows.jsonl", "--method", "first", "--device", "cpu", "--out", tmp_path / "o")
    assert found == [True]


# --- methods, demo, the process itself -------------------------------------------------------------------------------


def test_methods() -> None:
    said = {one["name"]: one for one in ok("methods")["methods"]}
    assert said["ltp"]["needs_training"]
    assert not said["attention-mass"]["needs_training"]
    assert said["cascade-top-k"]["settings"]["keep_rate"] == 0.2
    assert "cascade-top-k" in call("methods").stdout


def test_demo_calls_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import thresher.demo as library

    def pretend(
        out: Path,
        *,
        seed: int,
        device: str,
        on_step: Callable[[str], object],
        on_progress: Callable[[float], object],
    ) -> library.DemoResult:
        assert device == "cpu"
        on_step("Embedding")
        on_progress(0.5)
        print("a library prints")
        scores = {"mrr": 0.5, "recall_at_1": 0.4, "cosine": 0.9}
        spent = {library.PADDED: 3.0, library.PLAIN: 2.5, library.PACKED: 2.0, library.THRESHER: 1.0}
        return library.DemoResult(seed, 3, 2, 7.0, scores, scores, scores, flops_ratio=2.0, seconds=spent)

    monkeypatch.setattr(library, "run_demo", pretend)
    said = ok("demo", "--out", tmp_path, "--seed", 4, "--device", "cpu")
    assert (said["seed"], said["flops_ratio"]) == (4, 2.0)
    done = call("demo", "--out", tmp_path, "--device", "cpu")
    assert "2.00x" in done.stdout
    assert "Embedding" in done.stderr
    assert "%" not in done.stderr
    words = ["demo", "--out", str(tmp_path), "--device", "cpu"]
    on_a_terminal = CliRunner().invoke(app, words, env={"FORCE_COLOR": "1", "COLUMNS": "200"})
    assert "50%" in on_a_terminal.stderr
    assert "left" in on_a_terminal.stderr


def test_the_share_of_the_demo_that_is_done() -> None:
    from thresher.demo import _Progress

    said: list[str] = []
    shares: list[float] = []
    progress = _Progress((1.0, 2.0, 1.0), said.append, shares.append)
    for text in ("read", "learn", "save"):
        progress.step(text)
        progress.within(0.5)
    progress.within(1.0)
    assert said == ["1/3 read", "2/3 learn", "3/3 save"]
    assert shares == [0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0]


def test_the_process(place: Path) -> None:
    words = [sys.executable, "-m", "thresher", "evaluate", place / "clf", place / "rows.jsonl", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["rows"] == 40


@pytest.mark.parametrize("missing", ["typer", "rich", "datasets"])
def test_without_the_extra_the_console_script_says_what_to_install(missing: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; from thresher.cli import main; main()"
    words = [sys.executable, "-c", script, "evaluate", "nowhere", "python-docs"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f'Error: The command line needs {missing}; run pip install "thresher[cli]".\n'


def test_the_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THRESHER_DEBUG", "1")
    assert isinstance(call("explain", "nowhere").exception, OptionError)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_fit_says_which_epoch_it_kept(place: Path, tmp_path: Path) -> None:
    done = call("fit", place / "clf", place / "rows.jsonl", "--out", tmp_path / "o", "--method", "adapler",
                *QUICK[2:], "--stage", "epochs=3")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert re.search(r"Kept the model of epoch [123] of the stage hard\.", done.stdout)


@pytest.mark.parametrize(("model", "label", "said"), [("clf", 1, "label"), ("value", 0.5, "value")])
def test_one_answer_for_all_teaches_nothing(place: Path, tmp_path: Path, model: str, label: float, said: str) -> None:
    rows = write_rows(tmp_path / "same.jsonl", [{"text": f"w{i} w{i + 1}", "label": label} for i in range(12)])
    fails(
        "fit",
        place / model,
        rows,
        "--out",
        tmp_path / "o",
        *QUICK,
        match=f"Every row of .*same.jsonl has the same {said}",
    )
    assert not (tmp_path / "o").exists()


def test_bad_data(place: Path, tmp_path: Path) -> None:
    model = place / "fitted"
    fails("evaluate", model, tmp_path / "none.jsonl", match="There is no file or directory")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "w5", "label": 0}\n{"text": \n')
    fails("evaluate", model, bad, match=r"bad\.jsonl, line 2: this is not valid JSON")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    fails("predict", model, empty, match="is empty")
    fails(
        "evaluate", model, place / "rows.jsonl", "--column", "text=txet", match="no column 'txet'.*did you mean 'text'"
    )
    fails("evaluate", model, place / "rows.jsonl", "--column", "text", match="--column takes NAME=VALUE")
    fails("evaluate", model, f"{place / 'rows.jsonl'}:train", match="no split 'train'")
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"sentence1": "w5", "sentence2": "w6"}])
    fails("predict", model, pairs, match="one text a row")
    outside = write_rows(tmp_path / "outside.jsonl", [{"text": "w5", "label": 0}, {"text": "w6", "label": 7}])
    fails("evaluate", model, outside, match="Row 2 has the label 7, but class numbers are 0 to 1")
    fails("fit", place / "clf", outside, "--out", tmp_path / "o", match="Row [12] has the label 7")
    one = write_rows(tmp_path / "one.jsonl", synthetic(1))
    fails("fit", place / "clf", one, "--out", tmp_path / "o", match="give --validation")
    assert not (tmp_path / "o").exists()


def test_bad_options(place: Path, tmp_path: Path) -> None:
    fit = ("fit", place / "clf", place / "rows.jsonl", "--out", tmp_path / "o")
    fails(*fit, "--method", "ltq", match="no method 'ltq'; did you mean 'ltp'")
    fails(*fit, "--set", "treshold=1", match="no setting 'treshold'; did you mean 'threshold'")
    fails(*fit, "--set", "threshold=high", match="threshold takes a number, not 'high'")
    fails(*fit, "--set", "threshold=7", match="threshold must lie between 0 and 1")
    fails(*fit, "--stage", "epoch=2", match="no setting 'epoch'; did you mean 'epochs'")
    fails(*fit, "--stage", "sotf.epochs=2", match="no stage 'sotf'; did you mean 'soft'")
    fails(*fit, "--method", "first", "--set", "retention=.5", match="retention has 1 fractions but the model has 2")
    fails(*fit, "--speedup", 2, "--max-loss", 0.1, match="one target")
    fails(*fit, "--speedup", 0.5, match="at least 1")
    fails(*fit, "--metric", "acuracy", match="no metric 'acuracy'.*did you mean 'accuracy'")
    fails(*fit, "--max-length", 600, match="600 is more than the 48 tokens the model can read")
    fails(*fit, "--max-length", 2, match="no room for text")
    fails(*fit, "--limit", 0, match="at least 1")
    fails(*fit, "--task", "regression", match="2 outputs, which is classification, not regression")
    fails("calibrate", place / "fitted", place / "rows.jsonl", match="Give a target")
    fails("bench", place / "fitted", place / "rows.jsonl", "--batch-size", "1,x", match="not '1,x'")
    fails("predict", place / "fitted", match="either DATA or --text")
    fails("explain", place / "fitted", match="Give a text")
    fails("explain", place / "fitted", "--text", "w5", "--pair", "a", "--pair", "b", match="one --pair for each")
    wrong = call(*fit, "--task", "clasification")
    assert wrong.exit_code == 2
    assert "classification" in wrong.stderr
    assert not (tmp_path / "o" / "thresher.json").exists()


def test_bad_models(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = place / "rows.jsonl"
    fails("evaluate", tmp_path / "none", data, match="There is no directory")
    fails("evaluate", data, data, match="is a file")
    fails("evaluate", tmp_path, data, match=r"no config\.json")
    fails("evaluate", place / "gpt", data, match="'gpt2'.* is not supported")
    fails("fit", place / "gpt", data, "--out", tmp_path / "o", match="'gpt2'.* is not supported")
    fails(
        "fit",
        place / "tagger",
        data,
        "--out",
        tmp_path / "o",
        match="BertForTokenClassification, which has no head for",
    )
    fails("evaluate", place / "tagger", data, match="neither a classifier")
    fails("fit", place / "base", data, "--no-labels", "--out", tmp_path / "o", match="no trained head")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("predict", "no-such/model-anywhere", "--text", "w5", match="no local directory, and the hub did not")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda settings: "{", "is corrupted"),
        (lambda settings: json.dumps({**settings, "method": "ltpp"}), "is corrupted"),
        (lambda settings: json.dumps({**settings, "weights_sha256": "0"}), "checksum differs"),
        (
            lambda settings: json.dumps({**settings, "notes": {"task": {"kind": "classification"}}}),
            "fit the model again",
        ),
    ],
)
def test_damaged_settings(place: Path, tmp_path: Path, damage: Callable[[Any], str], match: str) -> None:
    shutil.copytree(place / "fitted", tmp_path / "m")
    file = tmp_path / "m" / "thresher.json"
    file.write_text(damage(json.loads(file.read_text())))
    fails("predict", tmp_path / "m", "--text", "w5", match=match)


def test_outputs_that_cannot_be_written(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    rows = place / "rows.jsonl"
    fails("fit", place / "clf", rows, "--out", file, match="is a file; give a directory")
    fails("fit", place / "clf", rows, "--out", file / "deeper", match="Cannot use .*Not a directory")
    fails("predict", place / "fitted", rows, "--out", tmp_path, match="is a directory; give a file")
    fails("explain", place / "fitted", "--text", "w5", "--html", file / "x.html", match="is a file; give a directory")
    fails("calibrate", place / "fitted", rows, "--speedup", 1.2, "--out", file, match="is a file")


def test_a_target_that_cannot_be_met(place: Path, tmp_path: Path) -> None:
    before = (place / "fitted" / "thresher.json").read_text()
    fails("calibrate", place / "fitted", place / "rows.jsonl", "--speedup", 500, match=r"this method reaches \d\.\d\dx")
    assert (place / "fitted" / "thresher.json").read_text() == before
    fit = ("fit", place / "clf", place / "rows.jsonl", *QUICK)
    fails(*fit, "--method", "last", "--out", tmp_path / "o", "--speedup", 500, match=r"reaches \d\.\d\dx at most\.$")
    assert not (tmp_path / "o").exists()
    # Learned thresholds train before anything has to drop, and those stages serve the next target.
    ltp = (*fit, "--out", tmp_path / "p")
    fails(*ltp, "--speedup", 500, match=r"trained stages are kept .* another target")
    again = call(*ltp, "--speedup", 1.2)
    assert again.exit_code == 0, again.stderr
    assert "stage hard" in again.stderr
    assert "stage soft" not in again.stderr


def test_ctrl_c(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("thresher.measure.run.run", stop)
    done = call("predict", place / "fitted", "--text", "w5")
    assert (done.exit_code, done.stdout) == (130, "")
    assert "Interrupted; nothing was written" in done.stderr


def test_a_split_is_named_after_a_colon(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "films").mkdir()
    for split in ("train", "test"):
        shutil.copy(place / "rows.jsonl", tmp_path / "films" / f"{split}.jsonl")
    monkeypatch.setenv("THRESHER_DATA", str(tmp_path))
    assert ok("evaluate", place / "fitted", "films:test", "--limit", 10)["rows"] == 10
    fails("evaluate", place / "fitted", "films:dev", match="no split 'dev'; it has test, train")


# --- values from words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hint", "expected"),
    [
        ("3", int, 3),
        ("1e-4", float, 1e-4),
        ("none", tuple[float, ...] | None, None),
        (".8,.6", tuple[float, ...] | None, (0.8, 0.6)),
        ("(101, 102)", tuple[int, ...], (101, 102)),
        ("yes", bool, True),
        ("word", str, "word"),
    ],
)
def test_convert(text: str, hint: Any, expected: Any) -> None:
    assert convert("setting", text, hint) == expected


@pytest.mark.parametrize(("text", "hint"), [("x", int), ("1,x", tuple[float, ...]), ("maybe", bool)])
def test_convert_refuses(text: str, hint: Any) -> None:
    with pytest.raises(OptionError, match="setting takes"):
        convert("setting", text, hint)


# --- nothing gained ---------------------------------------------------------------------------------------------------


def test_where_nothing_is_gained_it_is_said_and_what_to_do() -> None:
    assert slower("m", 12, 1.0) is None
    assert slower("m", 12, 1.5, {1: 1.2, 8: 0.996}) is None  # which is shown as 1.00x
    more = slower("m", 12, 0.93, {1: 0.8})
    assert more is not None and "more FLOPs than the model before (0.93x): on rows of 12 tokens" in more
    assert "thresher calibrate m DATA" in more
    less = slower("m", 40, 1.5, {1: 0.9, 8: 1.2, 32: 0.95})
    assert less is not None and "slower here than the model before (0.90x at batch 1, 0.95x at batch 32)" in less
    assert "a FLOPs speedup of 1.50x does not pay" in less
    graph = slower("m", 12, 0.93, graph=True)
    assert graph is not None and "export it again" in graph and "calibrate m" not in graph


def test_evaluate_and_bench_say_where_nothing_is_gained(place: Path, tmp_path: Path) -> None:
    """An exit by which nobody leaves costs what its branches take."""
    model = thresher.attach(build(config_of("bert", 2, num_labels=2)), exit=FastBERT(threshold=0.0))
    model.save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    assert ok("evaluate", tmp_path / "m", place / "rows.jsonl")["speedup"] < 0.99
    assert "more FLOPs than the model before (0." in call("evaluate", tmp_path / "m", place / "rows.jsonl").stdout
    assert "the model before (" not in call("evaluate", place / "clf", place / "rows.jsonl").stdout
    assert "the model before (" not in call("evaluate", place / "fitted", place / "rows.jsonl").stdout
    words = ("bench", place / "clf", place / "rows.jsonl", "--batch-size", 8, "--rounds", 1)
    assert "the model before (" not in call(*words).stdout  # nothing drops there, so nothing is to be gained


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_a_bad_row_has_the_number_it_has_in_the_file(place: Path, tmp_path: Path, command: str) -> None:
    """Also where rows are held out or drawn."""
    rows = synthetic()
    rows[len(rows) - 4] = {**rows[len(rows) - 4], "label": None}
    data = write_rows(tmp_path / "bad.jsonl", rows)
    says = f"Row {len(rows) - 3} "
    fails(command, place / "base", data, "--out", tmp_path / "o", match=says)
    fails(command, place / "base", data, "--limit", len(rows) - 1, "--seed", 1, "--out", tmp_path / "o", match=says)
    fails(command, place / "base", data, "--validation", data, "--out", tmp_path / "o", match=says)


@pytest.mark.parametrize("bad", [0, 3, 5])
def test_so_has_a_bad_row_among_neighbours_that_are_held_out(place: Path, tmp_path: Path, bad: int) -> None:
    """One row in ten: with six the one that is held out, or those before or after it, follow each other in the file."""
    rows = [{"tokens": ["w5", "w6"], "tags": ["O", "B-high"]} for _ in range(6)]
    rows[bad] = {"tokens": ["w5", "w6"], "tags": ["O", "high"]}
    data = write_rows(tmp_path / "bad.jsonl", rows)
    for seed in range(6):
        options = ("--task", "tagging", "--seed", seed, "--out", tmp_path / "o")
        fails("fit", place / "base", data, *options, match=f"Row {bad + 1} has the tag 'high'")
