"""The command line on exported directories, and int8: what is written, what answers, and every kind of bad input."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import thresher
from commands import call, fails, ok, synthetic, write_rows
from helpers import build, config_of, tokenizer
from thresher.errors import OptionError
from thresher.exported.directory import DIGEST, MANIFEST, _digest
from thresher.measure import run as running
from thresher.model import attachment_of

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

HEADS = {"clf": ("sequence", 2), "value": ("sequence", 1), "tagger": ("token", 2)}
POLICY = thresher.AttentionMass(retention=(0.7, 0.4))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain checkpoints, a saved model that drops and knows its task, and its graph."""
    root = tmp_path_factory.mktemp("export")
    for name, (head, labels) in HEADS.items():
        build(config_of("bert", 2, num_labels=labels), head).save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    write_rows(root / "rows.jsonl", synthetic())
    ok("calibrate", root / "clf", root / "rows.jsonl", "--method", "attention-mass", "--set", "retention=.7,.4",
       "--speedup", 1.3, "--out", root / "saved")  # fmt: skip
    made = ok("export", root / "saved", root / "graph", root / "rows.jsonl", "--limit", 16)
    (root / "made.json").write_text(json.dumps(made))
    return root


def texts(place: Path, count: int = 5) -> list[object]:
    return [word for row in synthetic(count) for word in ("--text", row["text"])]


def copy(place: Path, name: str, tmp_path: Path) -> Path:
    return shutil.copytree(place / name, tmp_path / "copy")


# --- export ----------------------------------------------------------------------------------------------------------


def test_export_says_what_was_checked(place: Path) -> None:
    made = json.loads((place / "made.json").read_text())
    assert (made["runtime"], made["int8"], made["method"], made["rows"]) == ("onnx", False, "attention-mass", 16)
    assert made["max_length"] == 48
    assert 0 <= made["difference"] <= 1e-4
    assert made["ties"] <= 0.1
    assert "int8_difference" not in made
    files = [file for file in (place / "graph").iterdir() if file.is_file()]
    assert made["bytes"] == sum(file.stat().st_size for file in files)


def test_export_in_int8_shows_a_table(place: Path, tmp_path: Path) -> None:
    done = call("export", place / "saved", tmp_path / "g", place / "rows.jsonl", "--int8", "--limit", 16)
    assert done.exit_code == 0, done.stderr
    shown = " ".join(done.stdout.split())  # however wide the directory's name makes the title
    for words in (
        "onnx, int8, attention-mass",
        "difference in float32",
        "rows with ties",
        "same answers in int8",
        "kB",
    ):
        assert words in shown
    assert f"Next: thresher bench {tmp_path / 'g'} {place / 'rows.jsonl'}" in done.stdout
    assert "checking it on 16 rows" in done.stderr
    assert thresher.Runner(tmp_path / "g").manifest.int8


def test_a_quantized_model_exports_in_int8_unless_told_otherwise(place: Path, tmp_path: Path) -> None:
    ok("quantize", place / "saved", tmp_path / "q", place / "rows.jsonl")
    assert ok("export", tmp_path / "q", tmp_path / "a")["int8"] is True
    exact = ok("export", tmp_path / "q", tmp_path / "b", "--no-int8")
    assert exact["int8"] is False
    assert exact["rows"] is None


def test_export_for_openvino(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    assert ok("export", place / "saved", tmp_path / "g", "--runtime", "openvino")["runtime"] == "openvino"
    expected = ok("predict", place / "graph", *texts(place))["predictions"]
    got = ok("predict", tmp_path / "g", *texts(place))["predictions"]
    assert [one["probability"] for one in got] == pytest.approx([one["probability"] for one in expected], abs=1e-4)


def test_a_shorter_graph_cuts_and_says_so(place: Path, tmp_path: Path) -> None:
    assert ok("export", place / "saved", tmp_path / "g", "--max-length", 12)["max_length"] == 12
    words = ("predict", tmp_path / "g", "--text", "w5 " * 30)
    assert "1 of 1 texts was longer than 12 tokens and was cut" in call(*words).stderr
    assert "longer than 8 tokens" in call(*words, "--max-length", 8).stderr
    fails(*words, "--max-length", 20, match="was exported for 12 tokens, not 20; export the model again")


def test_a_model_saved_in_bfloat16_is_exported_and_quantized_in_float32(place: Path, tmp_path: Path) -> None:
    build(config_of("bert", 2, num_labels=2)).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer().save_pretrained(tmp_path / "half")
    for words in (("export", tmp_path / "half", tmp_path / "g"),
                  ("quantize", tmp_path / "half", tmp_path / "q", place / "rows.jsonl")):  # fmt: skip
        done = call(*words)
        assert done.exit_code == 0, done.stderr
        assert "was saved in bfloat16 and is computed in float32 here" in done.stderr


# --- predict, evaluate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [(), ("--workers", 1), ("--workers", 3)])
def test_an_exported_directory_answers_as_its_model(place: Path, tmp_path: Path, workers: tuple[object, ...]) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("saved", "graph")}
    said = {
        name: ok("predict", place / name, place / "rows.jsonl", "--out", file, *(workers if name == "graph" else ()))
        for name, file in files.items()
    }
    assert said["graph"]["rows"] == 40
    assert said["graph"]["speedup"] == pytest.approx(said["saved"]["speedup"])
    model, graph = ([json.loads(line) for line in file.read_text().splitlines()] for file in files.values())
    assert [one["label"] for one in graph] == [one["label"] for one in model]
    assert [one["probability"] for one in graph] == pytest.approx([one["probability"] for one in model], abs=1e-4)


def test_one_text_and_one_that_is_cut(place: Path) -> None:
    done = call("predict", place / "graph", "--text", "w5 " * 500, "--text", "")
    assert "2 answers" in done.stdout
    assert "1 of 2 texts was longer than 48 tokens and was cut; 1 text is empty" in done.stderr


def test_evaluate_scores_the_graph_as_the_model(place: Path, tmp_path: Path) -> None:
    graph = ok("evaluate", place / "graph", place / "rows.jsonl")
    model = ok("evaluate", place / "saved", place / "rows.jsonl")
    model["thresher"].pop("agreement")
    assert graph["thresher"] == pytest.approx(model["thresher"])
    assert graph["speedup"] == pytest.approx(model["speedup"])
    assert graph["checked"] == {name: json.loads((place / "made.json").read_text())[name] for name in graph["checked"]}
    assert (graph["metric"], graph["runtime"]) == ("accuracy", "onnx")
    done = call("evaluate", place / "graph", place / "rows.jsonl")
    assert "Checked when it was exported" in done.stdout
    assert "FLOPs speedup" in done.stdout
    unlabelled = write_rows(tmp_path / "t.jsonl", [{"text": row["text"]} for row in synthetic()])
    done = call("evaluate", place / "graph", unlabelled, "--json")
    assert "nothing to score an exported graph by" in done.stderr
    assert (json.loads(done.stdout)["thresher"], json.loads(done.stdout)["metric"]) == ({}, None)


def test_a_plain_regressor_takes_texts_and_pairs(place: Path, tmp_path: Path) -> None:
    """Its rows decide which, as they do before it is exported."""
    ok("export", place / "value", tmp_path / "g")
    for words in (("--text", "w5 w6"), ("--text", "w5 w6", "--pair", "w7")):
        (graph,), (model,) = (ok("predict", name, *words)["predictions"] for name in (tmp_path / "g", place / "value"))
        assert graph["value"] == pytest.approx(model["value"], abs=1e-4)
    rows = [{"q": row["text"], "a": "w7 w8", "stars": i + 0.5} for i, row in enumerate(synthetic(12))]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    columns = [word for name in ("text=q", "text_pair=a") for word in ("--column", name)]
    ok("export", place / "value", tmp_path / "p", pairs, *columns)
    # The graph has noted the columns it was exported with.
    scores = ok("evaluate", tmp_path / "p", pairs)["thresher"]
    assert set(scores) == {"pearson", "spearman", "mse"}
    fails("predict", tmp_path / "p", "--text", "w5", match="two texts a row, but these rows have one")


def test_an_embedder(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    ok("fit", place / "clf", place / "rows.jsonl", "--task", "embedding", "--method", "first", "--no-labels",
       "--stage", "epochs=0.5", "--precision", "float32", "--out", tmp_path / "e")  # fmt: skip
    ok("export", tmp_path / "e", tmp_path / "g", place / "rows.jsonl", "--limit", 8)
    (graph,), (model,) = (ok("predict", tmp_path / name, "--text", "w5 w6 w7")["predictions"] for name in "ge")
    assert graph["embedding"] == pytest.approx(model["embedding"], abs=1e-4)
    words = ("python-docs:test", "--limit", 12)
    retrieval = {name: ok("evaluate", tmp_path / name, *words)["thresher"] for name in "ge"}
    retrieval["e"].pop("cosine")
    assert retrieval["g"] == pytest.approx(retrieval["e"])
    assert ok("quantize", tmp_path / "e", tmp_path / "q", *words)["alike"]["cosine"] > 0.9


def test_a_cross_encoder_gives_what_its_predict_gives(place: Path, tmp_path: Path) -> None:
    transformers_of = pytest.importorskip("sentence_transformers")
    model = thresher.attach(transformers_of.CrossEncoder(str(place / "value"), device="cpu"), POLICY)
    thresher.save(model, tmp_path / "c")
    ok("export", tmp_path / "c", tmp_path / "g")
    pairs = [("w5 w6 w7 w8", "w9 w10 w11"), ("w12", "w13 w14 w15 w16")]
    words = [word for pair in pairs for word in ("--text", pair[0], "--pair", pair[1])]
    expected = np.asarray(model.predict(pairs)).tolist()
    for name in "cg":
        assert [one["value"] for one in ok("predict", tmp_path / name, *words)["predictions"]] == pytest.approx(
            expected, abs=1e-4
        )


def test_graphs_that_python_exported_without_notes(place: Path, tmp_path: Path) -> None:
    """What they are for shows in their answers."""
    for name, answer in (("clf", "label"), ("value", "value")):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(place / name)
        thresher.export(thresher.attach(model.float(), POLICY), tmp_path / name, tokenizer=tokenizer())
        for pair in ((), ("--pair", "w7")):
            assert answer in ok("predict", tmp_path / name, "--text", "w5 w6", *pair)["predictions"][0]
    tagger = thresher.attach(build(config_of("bert", 2), "token"), POLICY)
    thresher.export(tagger, tmp_path / "tagger", tokenizer=tokenizer())
    fails("predict", tmp_path / "tagger", "--text", "w5", match="neither a classifier.*thresher bench takes it")
    thresher.export(tagger, tmp_path / "untold")
    fails("predict", tmp_path / "untold", "--text", "w5", match="exported without a tokenizer")


def test_a_graph_names_its_classes(place: Path, tmp_path: Path) -> None:
    model = build(config_of("bert", 2, num_labels=2, id2label={0: "dull", 1: "fine"}))
    thresher.export(thresher.attach(model, POLICY), tmp_path, tokenizer=tokenizer())
    assert ok("predict", tmp_path, "--text", "w5")["predictions"][0]["label"] in ("dull", "fine")


# --- bench -----------------------------------------------------------------------------------------------------------


def test_bench_an_exported_directory(place: Path) -> None:
    words = ("bench", place / "graph", place / "rows.jsonl", "--rounds", 2, "--limit", 8, "--workers", 2)
    said = ok(*words)
    assert (said["rows"], said["rounds"], said["workers"], said["runtime"]) == (8, 2, 2, "onnx")
    assert said["flops"] > 1.1
    assert said["rows_per_second"]["low"] <= said["rows_per_second"]["median"] <= said["rows_per_second"]["high"]
    assert 0 < said["request_seconds"]["median"] <= said["request_seconds"]["p95"]
    assert "against" not in said
    shown = call(*words).stdout
    assert "rows a second" in shown
    assert "95% within" in shown


def test_bench_one_exported_directory_against_another(place: Path, tmp_path: Path) -> None:
    ok("export", place / "tagger", tmp_path / "dense")
    words = ("bench", place / "graph", place / "rows.jsonl", "--rounds", 1, "--limit", 4)
    said = ok(*words, "--against", tmp_path / "dense")
    assert said["against"]["directory"] == str(tmp_path / "dense")
    assert (said["against"]["flops"], said["against"]["method"]) == (1.0, None)
    assert set(said["over_against"]) == {"rows_per_second", "request"}
    assert said["over_against"]["rows_per_second"]["median"] == pytest.approx(
        said["rows_per_second"]["median"] / said["against"]["rows_per_second"]["median"]
    )
    assert ok(*words, "--against", place / "graph")["against"]["flops"] == said["flops"]  # itself
    assert f"as fast as {tmp_path / 'dense'} on many rows" in call(*words, "--against", tmp_path / "dense").stdout
    assert ok("bench", tmp_path / "dense", place / "rows.jsonl", "--rounds", 1, "--limit", 4)["flops"] == 1.0


def test_a_profile_by_stage(place: Path) -> None:
    words = ("bench", place / "saved", place / "rows.jsonl", "--rounds", 1, "--limit", 8, "--profile")
    (times,) = ok(*words, "--batch-size", 4)["profile"]
    assert times["batch_size"] == 4
    for way in ("packed", "thresher"):
        assert {"tokenise", "linear", "attention", "head"} <= set(times["seconds"][way])
        assert times["seconds"][way]["tokenise"] > 0
    assert times["seconds"]["packed"]["select"] == 0 < times["seconds"]["thresher"]["select"]
    shown = call(*words).stdout
    assert "in batches of 4,096 tokens" in shown
    assert "tokenise" in shown
    assert "100.0%" in shown
    assert "profile" not in ok(*words[:-1], "--batch-size", 4)


def test_a_profile_is_not_taken_on_a_gpu(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta stands for a GPU."""
    monkeypatch.setattr("thresher.cli.graphs.place_of", lambda device: "meta")
    fails("bench", place / "saved", place / "rows.jsonl", "--profile", match="on a GPU use torch.profiler")


# --- quantize --------------------------------------------------------------------------------------------------------


def test_quantize_measures_and_saves(place: Path, tmp_path: Path) -> None:
    said = ok("quantize", place / "saved", tmp_path / "q", place / "rows.jsonl")
    assert said["rows"] == 40
    assert set(said["float32"]) == set(said["int8"]) == {"accuracy", "f1", "matthews"}
    assert 0.5 < said["alike"]["agreement"] <= 1
    assert said["speedup"]["float32"] > 1.2
    model = thresher.load(tmp_path / "q")
    assert attachment_of(model).engine.precision == "int8"
    assert thresher.policy_of(model).config == thresher.policy_of(thresher.load(place / "saved")).config
    assert attachment_of(model).notes["task"]["kind"] == "classification"
    # What was measured is what the saved model gives, and quantizing again in place is the same.
    assert ok("evaluate", tmp_path / "q", place / "rows.jsonl")["thresher"]["accuracy"] == said["int8"]["accuracy"]
    again = ok("quantize", tmp_path / "q", tmp_path / "q", place / "rows.jsonl")
    assert {**again, "directory": ""} == {**said, "directory": ""}


def test_quantize_shows_the_difference(place: Path, tmp_path: Path) -> None:
    rows = [{"sentence1": row["text"], "sentence2": "w7", "score": i + 0.5} for i, row in enumerate(synthetic())]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    done = call("quantize", place / "value", tmp_path / "q", data)
    assert done.exit_code == 0, done.stderr
    for words in ("float32", "int8", "points", "spearman", "pearson with float32"):
        assert words in done.stdout
    assert f"Saved to {tmp_path / 'q'}" in done.stdout
    unlabelled = write_rows(tmp_path / "t.jsonl", [{"text": row["text"]} for row in synthetic()])
    said = ok("quantize", place / "value", tmp_path / "q", unlabelled)
    assert (said["float32"], set(said["alike"])) == ({}, {"pearson"})


def test_a_processor_without_int8_instructions_is_said_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thresher.linears.has_int8_instructions", lambda: False)
    done = call("quantize", place / "saved", tmp_path / "q", place / "rows.jsonl")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("Note: This processor has no int8 dot-product instructions") == 1
    assert "Warning" not in done.stderr
    assert "Note: This processor has no int8" in call("predict", tmp_path / "q", "--text", "w5").stderr
    again = call("quantize", tmp_path / "q", tmp_path / "q", place / "rows.jsonl")
    assert again.stderr.count("This processor") == 1


def test_without_int8_kernels_nothing_is_written(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OptionError("This build of torch has no int8 kernels for the CPU; leave int8 out.")

    monkeypatch.setattr("thresher.model.check_int8", refuse)
    fails("quantize", place / "saved", tmp_path / "q", place / "rows.jsonl", match="no int8 kernels")
    assert not (tmp_path / "q").exists()


# --- rows run at a time, methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("predict",), ("evaluate",), ("calibrate", "--speedup", 1.2, "--out", "o")])
def test_rows_run_in_batches_by_tokens_unless_told_otherwise(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...]
) -> None:
    asked: list[int | None] = []
    real = running.batches

    def spy(rows: Any, size: int | None = None, tokens: int = running.TOKENS) -> list[list[int]]:
        asked.append(size)
        return real(rows, size, tokens)

    monkeypatch.setattr(running, "batches", spy)
    monkeypatch.chdir(tmp_path)
    name, *options = words
    ok(name, place / "saved", place / "rows.jsonl", *options)
    assert set(asked) == {None}
    asked.clear()
    ok(name, place / "saved", place / "rows.jsonl", *options, "--batch-size", 7)
    assert set(asked) == {7}
    assert "4,096 tokens" in call(name, "--help").stdout


def test_methods_say_which_export() -> None:
    exports = {one["name"]: one["exports"] for one in ok("methods")["methods"]}
    assert exports["ltp"] is True
    assert exports["random"] is False
    assert "exports" in call("methods").stdout


# --- bad input -------------------------------------------------------------------------------------------------------


def test_what_needs_the_saved_model_says_so(place: Path, tmp_path: Path) -> None:
    rows, match = place / "rows.jsonl", "is an exported graph.*give the saved model that it was exported from"
    fails("fit", place / "graph", rows, "--out", tmp_path / "o", match=match)
    fails("calibrate", place / "graph", rows, "--speedup", 2, "--out", tmp_path / "o", match=match)
    fails("explain", place / "graph", "--text", "w5", match=match)
    fails("quantize", place / "graph", tmp_path / "o", rows, match=match)
    fails("export", place / "graph", tmp_path / "o", match=match)
    fails("bench", place / "graph", rows, "--profile", match="has no stages; profile the saved model")
    assert not (tmp_path / "o").exists()


def test_options_of_the_other_kind(place: Path, tmp_path: Path) -> None:
    rows = place / "rows.jsonl"
    for name in ("predict", "evaluate", "bench"):
        fails(name, place / "saved", rows, "--workers", 2, match="--workers is for an exported directory")
        fails(name, place / "graph", rows, "--workers", 0, match="workers must be a whole number of at least 1, not 0")
        fails(name, place / "graph", rows, "--batch-size", 4, match="runs one row at a time; leave --batch-size out")
        fails(name, place / "graph", rows, "--device", "cuda", match="runs on the CPU; leave --device out")
    fails(
        "bench", place / "graph", rows, "--against", place / "saved", match=r"two exported directories, and .* is none"
    )
    fails(
        "bench", place / "saved", rows, "--against", place / "graph", match=r"two exported directories, and .* is none"
    )
    fails("export", place / "saved", tmp_path / "o", "--column", "text=a", match="--column needs DATA")


def test_what_cannot_be_exported_leaves_nothing(place: Path, tmp_path: Path) -> None:
    rows, out = place / "rows.jsonl", tmp_path / "deep" / "out"
    ok("calibrate", place / "clf", rows, "--method", "random", "--speedup", 1.2, "--out", tmp_path / "r")
    fails("export", tmp_path / "r", out, match="'random' cannot be written as a graph; these can: .*ltp")
    fails("export", place / "saved", out, "--max-length", 600, match="600 is more than the 48 tokens")
    fails("export", place / "saved", out, "--max-length", 2, match="from 3 to the 48 tokens")
    fails("export", place / "saved", out, tmp_path / "none.jsonl", match="There is no file or directory")
    fails("export", tmp_path / "none", out, match="There is no directory")
    fails("quantize", place / "saved", out, tmp_path / "none.jsonl", match="There is no file or directory")
    fails("quantize", place / "tagger", out, rows, match="neither a classifier")
    assert not out.parent.exists()


@pytest.mark.parametrize(("runtime", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_runtime_that_is_not_installed(
    runtime: str, package: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    match = rf'{package} is not installed; run pip install "thresher\[{runtime}\]"'
    writing = match.replace("onnx\\]", "export\\]")
    fails("export", place / "saved", tmp_path / "o", "--runtime", runtime, match=writing)
    assert not (tmp_path / "o").exists()
    if runtime == "onnx":
        fails("predict", place / "graph", "--text", "w5", match=match)
        fails("bench", place / "graph", place / "rows.jsonl", match=match)


def test_a_directory_holds_a_model_or_a_graph(place: Path, tmp_path: Path) -> None:
    rows, graph = place / "rows.jsonl", copy(place, "graph", tmp_path)
    before = {file.name: file.read_bytes() for file in graph.iterdir()}
    fails("fit", place / "clf", rows, "--out", graph, match="holds an exported graph; give another directory")
    fails("calibrate", place / "saved", rows, "--speedup", 2, "--out", graph, match="holds an exported graph")
    fails("quantize", place / "saved", graph, rows, match="holds an exported graph")
    fails("export", place / "saved", place / "saved", match="holds a saved model; give another directory")
    fails("export", place / "saved", place / "rows.jsonl", match="is a file; give a directory")
    assert {file.name: file.read_bytes() for file in graph.iterdir()} == before
    assert ok("export", place / "saved", graph, "--max-length", 20)["max_length"] == 20  # a graph may be written anew


def change(directory: Path, **changes: Any) -> None:
    """exported.json with other values, as if it had been written so."""
    file = directory / MANIFEST
    values = {name: value for name, value in {**json.loads(file.read_text()), **changes}.items() if name != DIGEST}
    file.write_text(json.dumps({**values, DIGEST: _digest(values)}))


def test_damaged_exported_directories(place: Path, tmp_path: Path) -> None:
    words: Iterable[Any] = ("--text", "w5")
    graph = copy(place, "graph", tmp_path)
    change(graph, notes={"task": {"kind": "classification"}})
    fails("predict", graph, *words, match="task noted in exported.json is not readable.*export the model again")
    with (graph / "model.onnx").open("ab") as file:
        file.write(b"x")
    fails("predict", graph, *words, match=r"model\.onnx has changed since it was exported; export the model again")
    fails("bench", place / "graph", place / "rows.jsonl", "--against", graph, match="has changed since it was exported")
    (graph / "tokenizer.json").unlink()
    fails("evaluate", graph, place / "rows.jsonl", match=r"lacks tokenizer\.json|has changed")
    change(graph, format=99)
    fails("predict", graph, *words, match="has format 99")
    (graph / MANIFEST).write_text("{")
    fails("predict", graph, *words, match=r"exported\.json is corrupted")


def test_words_that_are_missing(place: Path, tmp_path: Path) -> None:
    for words, missing in (
        (("quantize", place / "saved", tmp_path / "o"), "DATA"),
        (("export", place / "saved"), "OUT"),
    ):
        done = call(*words)
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"Missing argument '{missing}'" in done.stderr
    wrong = call("export", place / "saved", tmp_path / "o", "--runtime", "onxn")
    assert wrong.exit_code == 2
    assert "openvino" in wrong.stderr
    assert not (tmp_path / "o").exists()
