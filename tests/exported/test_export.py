"""The exported graph says what the torch engine says: every family and head, every method that exports."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import thresher
from helpers import FAMILIES, HEADS, VOCABULARY, alone, batch, dataset, decided, make, settings, tokenizer
from thresher.errors import CheckpointError, DataError, OptionError, ThresherError
from thresher.exported.directory import MANIFEST
from thresher.exported.graph import exportable_methods
from thresher.exported.sessions import SLOWER_WHEN_FUSED
from thresher.measure.flops import speedup
from thresher.methods import CONFIGS
from thresher.model import policy_of

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

CLOSE = 1e-4
LONG = (9, 1, 14, 5, 40, 27)


def rows_of(inputs: dict[str, torch.Tensor]) -> list[dict[str, list[int]]]:
    rows = [alone(inputs, i) for i in range(len(inputs["input_ids"]))]
    return [{k: v[0].tolist() for k, v in row.items() if k != "attention_mask"} for row in rows]


def said_by_torch(model: Any, inputs: dict[str, torch.Tensor], row: int) -> tuple[np.ndarray, np.ndarray]:
    """The answer and the dropping layers of one row alone, from the torch engine."""
    with torch.no_grad(), thresher.tracing(record=True) as traces:
        outputs = model(**alone(inputs, row))
    if "start_logits" in outputs:
        answer = torch.stack([outputs["start_logits"], outputs["end_logits"]], -1)[0]
    else:
        answer = outputs[0][0]
    return answer.numpy(), traces[-1].dropped_at()[0].numpy()


def agrees(model: Any, family: str, where: Path) -> None:
    inputs = batch(family, LONG, seed=3)
    runner = thresher.Runner(where)
    for row, output in enumerate(runner.run(rows_of(inputs))):
        answer, dropped_at = said_by_torch(model, inputs, row)
        np.testing.assert_array_equal(output.dropped_at, dropped_at)
        np.testing.assert_allclose(output.answer, answer, atol=CLOSE)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_head(family: str, head: str, tmp_path: Path) -> None:
    model = thresher.attach(make(family, head), settings(CONFIGS["ltp"]))
    assert thresher.export(model, tmp_path).difference <= CLOSE
    agrees(model, family, tmp_path)


@pytest.mark.parametrize("method", exportable_methods())
def test_every_method(method: str, tmp_path: Path) -> None:
    model = decided(thresher.attach(make("bert"), settings(CONFIGS[method])))
    thresher.export(model, tmp_path)
    agrees(model, "bert", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", exportable_methods())
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["base", "token", "question-answering"])
def test_every_method_on_every_family_and_head(method: str, family: str, head: str, tmp_path: Path) -> None:
    model = decided(thresher.attach(make(family, head), settings(CONFIGS[method])))
    thresher.export(model, tmp_path)
    agrees(model, family, tmp_path)


def test_protected_tokens_stay_in_the_graph_too(tmp_path: Path) -> None:
    policy = thresher.AttentionMass(retention=(0.5, 0.3, 0.2), protect_ids=(3,), protect_segments=(0,), min_tokens=3)
    model = thresher.attach(make("bert", "token"), policy)
    thresher.export(model, tmp_path)
    agrees(model, "bert", tmp_path)


def test_nothing_attached_but_packing_exports_too(tmp_path: Path) -> None:
    model = thresher.attach(make("bert"))
    thresher.export(model, tmp_path)
    agrees(model, "bert", tmp_path)
    (output,) = thresher.Runner(tmp_path).run([{"input_ids": [2, 7, 3]}])
    assert output.dropped_at.tolist() == [0, 0, 0]


@pytest.mark.parametrize("training", [False, True])
def test_exporting_leaves_the_model_as_it_was(training: bool, tmp_path: Path) -> None:
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"])).train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    thresher.export(model, tmp_path)
    assert model.training is training
    assert model.bert.training is training
    assert all(p.requires_grad for p in policy_of(model).parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    (model(**batch("bert")).logits.sum()).backward()


def test_many_workers_keep_the_order_and_the_answers(tmp_path: Path) -> None:
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    thresher.export(model, tmp_path)
    rows = [{"input_ids": ids} for ids in dataset(60)["input_ids"]]
    done: list[int] = []
    one, three = thresher.Runner(tmp_path, workers=1), thresher.Runner(tmp_path, workers=3)
    several = three.answers(rows, on_done=done.append)
    assert sum(done) == 60
    assert several.shape == (60, 3)
    np.testing.assert_allclose(several, one.answers(rows), atol=1e-6)


def test_the_runner_counts_flops_as_the_engine_does(tmp_path: Path) -> None:
    for name, family in (("ltp", "bert"), ("attention-mass", "modernbert")):
        model = thresher.attach(make(family), settings(CONFIGS[name]))
        thresher.export(model, tmp_path / family)
        inputs = batch(family, LONG)
        with torch.no_grad(), thresher.tracing() as traces:
            model(**inputs)
        runner = thresher.Runner(tmp_path / family)
        expected = speedup(traces, policy_of(model).geometry, policy_of(model))
        assert expected > 1.05
        assert runner.speedup(runner.run(rows_of(inputs))) == pytest.approx(expected)


def test_int8_is_measured_saved_and_close(tmp_path: Path) -> None:
    model = thresher.quantize(thresher.attach(make("bert"), settings(CONFIGS["ltp"])))
    made = thresher.export(model, tmp_path)
    assert made.int8_difference is not None
    assert 0 < made.int8_difference < 2.0  # random weights are wide; a trained model differs far less
    assert made.difference <= CLOSE
    runner = thresher.Runner(tmp_path)
    assert runner.manifest.int8
    assert runner.manifest.checked["int8_difference"] == made.int8_difference


def test_texts_go_through_the_same_tokenizer(tmp_path: Path) -> None:
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    words = tokenizer()
    thresher.export(model, tmp_path, tokenizer=words, max_length=12)
    texts = ["w7 w9 w11", ("w5 w6", "w8 w9 w10"), "", "w7 " * 40]
    runner = thresher.Runner(tmp_path)
    for text, row in zip(texts, runner.encode(texts), strict=True):
        pair = text if isinstance(text, tuple) else (text,)
        expected = words(*pair, truncation=True, max_length=12)
        assert row["input_ids"] == expected["input_ids"]
        assert row["token_type_ids"] == expected["token_type_ids"]
    expected = [model(**words(t, return_tensors="pt")).logits[0].detach().numpy() for t in texts[:1]]
    np.testing.assert_allclose(runner.predict(texts[:1]), expected, atol=CLOSE)


def test_the_runner_needs_no_torch(tmp_path: Path) -> None:
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    thresher.export(model, tmp_path, tokenizer=tokenizer())
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'datasets', 'safetensors'): sys.modules[name] = None\n"
        "import thresher\n"
        f"runner = thresher.Runner({str(tmp_path)!r})\n"
        "print(runner.predict(['w7 w9 w11 w12 w13']).tolist())\n"
        "print(runner.speedup(runner.run(runner.encode(['w7 ' * 20]))) > 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, faster = done.stdout.splitlines()
    features = tokenizer()("w7 w9 w11 w12 w13", return_tensors="pt")
    np.testing.assert_allclose(json.loads(answer), model(**features).logits.tolist(), atol=CLOSE)
    assert faster == "True"


@pytest.mark.parametrize("method", ["ltp", "attention-mass"])
def test_openvino_says_the_same(method: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = thresher.attach(make("bert", "question-answering"), settings(CONFIGS[method]))
    thresher.export(model, tmp_path, runtime="openvino")
    agrees(model, "bert", tmp_path)
    assert not (tmp_path / "model.onnx").exists()


def test_a_second_export_takes_the_place_of_the_first(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    thresher.export(model, tmp_path)
    thresher.export(model, tmp_path, runtime="openvino")
    assert not (tmp_path / "model.onnx").exists()
    thresher.export(model, tmp_path)
    assert not (tmp_path / "model.xml").exists()
    agrees(model, "bert", tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("exported") / "model"
    thresher.export(thresher.attach(make("bert"), settings(CONFIGS["ltp"])), where)
    return where


def spoiled(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def test_a_changed_graph_is_refused(exported: Path, tmp_path: Path) -> None:
    copy = spoiled(exported, tmp_path)
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"model\.onnx has changed since it was exported"):
        thresher.Runner(copy)


def test_a_missing_graph_another_format_and_a_broken_manifest_are_refused(exported: Path, tmp_path: Path) -> None:
    copy = spoiled(exported, tmp_path)
    (copy / "model.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.onnx"):
        thresher.Runner(copy)
    values = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        thresher.Runner(copy)
    for text in ("{", "[]", "{}"):
        (copy / MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match="corrupted"):
            thresher.Runner(copy)
    for changes in ({"runtime": "tea"}, {"files": {}}, {"max_length": 10_000}, {"int8": True}, {"geometry": {}}):
        (copy / MANIFEST).write_text(json.dumps({**values, **changes}))
        with pytest.raises(CheckpointError, match=r"exported\.json has changed since it was exported"):
            thresher.Runner(copy)
    with pytest.raises(CheckpointError, match="no exported.json"):
        thresher.Runner(tmp_path)


def test_bad_rows_are_named(exported: Path) -> None:
    runner = thresher.Runner(exported)
    for row, message in (
        ({}, "Row 1 has no input_ids"),
        ({"input_ids": []}, "Row 1 must have 1 to 48 tokens"),
        ({"input_ids": [5] * 49}, "it has 49"),
        ({"input_ids": [5, 6], "token_type_ids": [0]}, "it has 1 and 2"),
        ({"input_ids": [5, VOCABULARY]}, f"Row 1 has {VOCABULARY} among its input_ids, where this model knows 0 to"),
        ({"input_ids": [5, -1]}, "Row 1 has -1 among its input_ids"),
        ({"input_ids": [5, 6], "token_type_ids": [0, 2]}, "Row 1 has 2 among its token_type_ids, where .* 0 to 1"),
        ({"input_ids": [5.0, 6.5]}, "no whole numbers"),
        ({"input_ids": [[5], [6, 7]]}, "no whole numbers"),
        ({"input_ids": "w5 w6"}, "no whole numbers"),
    ):
        with pytest.raises(DataError, match=message):
            runner.answers([row])
    with pytest.raises(OptionError, match="without a tokenizer"):
        runner.predict(["a"])
    for texts, message in (("w5", "not one text"), (None, "not None"), ([3], "but int")):
        with pytest.raises(DataError, match=message):
            runner.predict(texts)  # type: ignore[arg-type]
    for workers in (0, "2"):
        with pytest.raises(OptionError, match="workers must be a whole number of at least 1"):
            thresher.Runner(exported, workers=workers)  # type: ignore[arg-type]


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    where = tmp_path / "out"
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (thresher.attach(make("bert"), "random"), {}, "'random' cannot be written as a graph; these can: .*ltp"),
        (thresher.attach(make("bert"), "ltp"), {"runtime": "tea"}, "runtime is one of onnx, openvino"),
        (thresher.attach(make("bert"), "ltp"), {"max_length": 9000}, "3 to the 48 tokens"),
        (thresher.attach(make("bert"), "ltp"), {"max_length": "9"}, "3 to the 48 tokens"),
        (thresher.attach(make("bert"), "ltp"), {"rows": []}, "are empty"),
        (thresher.attach(make("bert"), "ltp"), {"runtime": "openvino", "int8": True}, "calibrated on rows like those"),
        (thresher.attach(make("bert").to(torch.bfloat16), "ltp"), {}, "float32 model on the CPU"),
        (make("bert"), {}, "nothing attached"),
    ]
    soft = thresher.attach(make("bert"), "ltp")
    policy_of(soft).mode = "soft"
    cases.append((soft, {}, "soft training mode"))
    for model, options, message in cases:
        with pytest.raises(OptionError, match=message):
            thresher.export(model, where, **options)
        assert not where.exists()
    rows: Any
    for rows, message in (
        (["w5"], "has no input_ids"),
        ([{"input_ids": [5, 9999]}], "9999 among its input_ids"),
        ([{"input_ids": "abc"}], "no whole numbers"),
    ):
        with pytest.raises(DataError, match=message):
            thresher.export(thresher.attach(make("bert"), "ltp"), where, rows=rows)
        assert not where.exists()


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        ("flags\t\t: fpu avx2 fma", True),
        ("flags\t\t: fpu avx512_vnni", False),
        ("flags : avx_vnni", False),
        ("Features\t: fp asimddp", False),
        ("nothing told", False),
        (None, False),
    ],
)
def test_an_int8_graph_says_where_the_processor_is_not_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, warns: bool
) -> None:
    thresher.export(thresher.attach(make("bert", layers=1)), tmp_path / "int8", int8=True)
    thresher.export(thresher.attach(make("bert", layers=1)), tmp_path / "float")
    told = tmp_path / "cpuinfo"
    if flags is not None:
        told.write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr("thresher.exported.sessions.PROCESSOR", told)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        thresher.Runner(tmp_path / "int8").answers([{"input_ids": [2, 5, 3]}])
        seen = len(said)
        thresher.Runner(tmp_path / "float")
    assert len(said) == seen == warns


def test_int8_where_the_processor_is_not_made_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.linears.has_int8_instructions", lambda: False)
    with pytest.warns(UserWarning, match="no int8 dot-product instructions"):
        thresher.export(thresher.attach(make("bert"), "ltp"), tmp_path / "out", int8=True)


@pytest.mark.parametrize(
    ("package", "extra"), [("onnx", "export"), ("onnxruntime", "export"), ("openvino", "openvino")]
)
def test_a_package_that_is_missing_names_the_extra_that_exports(
    package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    runtime: Any = "openvino" if package == "openvino" else "onnx"
    with pytest.raises(ThresherError, match=rf'{package} .*run pip install "thresher\[{extra}\]"'):
        thresher.export(thresher.attach(make("bert"), "ltp"), tmp_path / "out", runtime=runtime)
    assert not (tmp_path / "out").exists()


def test_a_runner_without_tokenizers_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thresher.export(thresher.attach(make("bert"), "ltp"), tmp_path / "out", tokenizer=tokenizer())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ThresherError, match=r'tokenizers is not installed; run pip install "thresher\[onnx\]"'):
        thresher.Runner(tmp_path / "out").predict(["w5"])


def test_a_graph_that_answers_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    import thresher.exported.writing as writing

    by_torch = writing._by_torch
    monkeypatch.setattr(
        writing, "_by_torch", lambda m, r: dataclasses.replace(by_torch(m, r), answer=by_torch(m, r).answer + 1)
    )
    with pytest.raises(ThresherError, match="does not answer as the torch engine does"):
        thresher.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_runtime_still_knows_the_optimiser_that_is_switched_off(tmp_path: Path) -> None:
    """ONNX Runtime passes over names of optimisers that it does not know."""
    import onnx

    thresher.export(thresher.attach(make("bert")), tmp_path, int8=True)
    found = {}
    for off in ([], [*SLOWER_WHEN_FUSED]):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, disabled_optimizers=off)
        nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
        found[bool(off)] = "SkipLayerNormalization" in {node.op_type for node in nodes}
    assert found == {False: True, True: False}
