"""An exported early exit: a chain of graphs that says, drops and leaves as the torch engine does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import thresher
from helpers import FAMILIES, alone, batch, make, settings
from leaving import CONFIGS, ROWS, attached
from thresher.errors import CheckpointError, OptionError
from thresher.exits import EXIT_CONFIGS
from thresher.measure.flops import speedup
from thresher.methods import CONFIGS as METHODS
from thresher.model import attachment_of, exit_of, policy_of

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

CLOSE = 1e-4
POLICIES = {"none": None, "ltp": thresher.LTP(threshold=0.2), "attention-mass": thresher.AttentionMass()}


def rows_of(inputs: dict[str, torch.Tensor]) -> list[dict[str, list[int]]]:
    rows = [alone(inputs, i) for i in range(len(inputs["input_ids"]))]
    return [{k: v[0].tolist() for k, v in row.items() if k != "attention_mask"} for row in rows]


def agrees(model: Any, family: str, where: Path) -> list[int]:
    """Row by row with the torch engine; the layers after which the rows left."""
    inputs = batch(family, ROWS)
    found = thresher.Runner(where).run(rows_of(inputs))
    for row, output in enumerate(found):
        with torch.no_grad(), thresher.tracing(record=True) as traces:
            said = model(**alone(inputs, row))
        answer = torch.stack([said.start_logits, said.end_logits], -1) if "start_logits" in said else said.logits
        assert output.exited_at == traces[0].exited_at[0]
        np.testing.assert_array_equal(output.dropped_at, traces[0].dropped_at()[0])
        np.testing.assert_allclose(output.answer, answer[0], atol=CLOSE)
    return [output.exited_at for output in found]


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_exit(name: str, policy: str, tmp_path: Path) -> None:
    model = attached("bert", name, POLICIES[policy])
    assert thresher.export(model, tmp_path).difference <= CLOSE
    assert len(set(agrees(model, "bert", tmp_path))) > 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_exit_on_every_family(name: str, family: str, tmp_path: Path) -> None:
    model = attached(family, name, POLICIES["ltp"])
    thresher.export(model, tmp_path)
    agrees(model, family, tmp_path)


@pytest.mark.parametrize("name", ["fastbert", "settled-span"])
def test_openvino_leaves_alike(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = attached("bert", name, POLICIES["ltp"])
    thresher.export(model, tmp_path, runtime="openvino")
    assert len(set(agrees(model, "bert", tmp_path))) > 1


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_int8(runtime: Any, tmp_path: Path) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
        pytest.importorskip("nncf")
    model = thresher.quantize(attached("bert", "fastbert", POLICIES["ltp"]))
    made = thresher.export(model, tmp_path, runtime=runtime, rows=rows_of(batch("bert", range(1, 41))))
    assert made.int8_difference is not None
    assert made.int8_agreement is not None
    assert made.int8_difference > 0
    assert made.int8_agreement > 0.6
    runner = thresher.Runner(tmp_path)
    assert len({output.exited_at for output in runner.run(rows_of(batch("bert", ROWS)))}) > 1


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_each_weight_of_a_layer_stands_in_one_graph(family: str, tmp_path: Path) -> None:
    model = attached(family, "fastbert")
    thresher.export(model, tmp_path)
    runner = thresher.Runner(tmp_path)
    assert len(runner.manifest.graphs) == 4
    sizes = []
    for file in runner.manifest.graphs:
        graph = onnx.load(tmp_path / file).graph
        sizes.append(sum(int(np.prod(tensor.dims)) for tensor in graph.initializer))
        assert all(value.type.tensor_type.elem_type for value in graph.input)
    whole = sum(p.numel() for p in model.parameters()) + sum(p.numel() for p in exit_of(model).parameters())
    # ALBERT's one layer stands in each.
    assert sum(sizes) <= whole * (1.05 if family == "bert" else 4)


@pytest.mark.parametrize("name", ["fastbert", "pabee"])
def test_layers_after_which_nobody_may_leave_end_no_graph(name: str, tmp_path: Path) -> None:
    model = attached("bert", name)
    thresher.set_exit(model, after=(1, 3))
    thresher.export(model, tmp_path)
    agrees(model, "bert", tmp_path)
    runner = thresher.Runner(tmp_path)
    layers = [link.layer for link in runner.manifest.chain]
    assert layers == (
        [1, 3, 0] if name == "fastbert" else [3, 0]
    )  # with patience nobody leaves where it is asked first
    with thresher.tracing() as traces:
        for row in range(len(ROWS)):
            model(**alone(batch("bert", ROWS), row))
    attachment = attachment_of(model)
    spent = speedup(traces, attachment.engine.entrance.geometry, None, attachment.exit)
    assert runner.speedup(runner.run(rows_of(batch("bert", ROWS)))) == pytest.approx(spent, rel=1e-9)


def test_int8_is_what_branches_read_of_every_token_too(tmp_path: Path) -> None:
    thresher.export(attached("bert", "fastbert"), tmp_path, int8=True)
    first = onnx.load(tmp_path / "model.onnx").graph
    made = {node.output[0]: node.op_type for node in first.node}
    (narrowed,) = (
        node for node in first.node if node.op_type == "Tanh" and _from(node, made, first) == "MatMulInteger"
    )
    assert narrowed


def _from(node: Any, made: dict[str, str], graph: Any) -> str:
    """The first product on the way back from a node."""
    maker = {name: n for n in graph.node for name in n.output}
    while made.get(node.input[0]) not in (None, "MatMulInteger", "MatMul", "Gemm"):
        # A bias is an addition's first input: the product comes by the second.
        inputs = [name for name in node.input if name in maker and maker[name].op_type != "Constant"]
        node = maker[inputs[0]]
    return made.get(node.input[0], "")


def test_a_row_that_leaves_runs_no_more_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached("bert", "fastbert")
    thresher.export(model, tmp_path)
    ran: list[str] = []
    from thresher.exported import runner as module

    open_session = module.open_session

    def counted(runtime: Any, graph: Path, *given: Any, **options: Any) -> Any:
        session = open_session(runtime, graph, *given, **options)

        def run(feed: Any) -> Any:
            ran.append(graph.name)
            return session(feed)

        return run

    monkeypatch.setattr(module, "open_session", counted)
    runner = thresher.Runner(tmp_path, workers=1)
    for row in rows_of(batch("bert", ROWS)):
        ran.clear()
        (output,) = runner.run([row])
        assert ran == runner.manifest.graphs[: output.exited_at]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_flops_are_counted_as_the_engine_counts_them(name: str, tmp_path: Path) -> None:
    model = attached("bert", name, POLICIES["ltp"])
    thresher.export(model, tmp_path)
    inputs = batch("bert", ROWS)
    with torch.no_grad(), thresher.tracing() as traces:
        model(**inputs)
    runner = thresher.Runner(tmp_path)
    expected = speedup(traces, policy_of(model).geometry, policy_of(model), exit_of(model))
    assert expected > 1.05
    assert runner.speedup(runner.run(rows_of(inputs))) == pytest.approx(expected)


def test_an_exit_that_lets_nobody_leave_is_one_graph(tmp_path: Path) -> None:
    model = attached("bert", "fastbert", POLICIES["ltp"])
    thresher.set_exit(model, strength=0.0)
    thresher.export(model, tmp_path)
    manifest = thresher.Runner(tmp_path).manifest
    assert manifest.graphs == ["model.onnx"]
    assert manifest.exit is None
    assert set(agrees(model, "bert", tmp_path)) == {4}


def test_a_second_export_leaves_no_graph_of_the_first(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = attached("bert", "fastbert")
    thresher.export(model, tmp_path, runtime="openvino")
    thresher.export(model, tmp_path)
    assert not [f.name for f in tmp_path.iterdir() if f.suffix in (".xml", ".bin")]
    thresher.export(thresher.attach(make("bert"), settings(METHODS["ltp"])), tmp_path)
    assert [f.name for f in tmp_path.iterdir() if f.suffix == ".onnx"] == ["model.onnx"]


def test_exporting_leaves_the_exit_as_it_was(tmp_path: Path) -> None:
    model = attached("bert", "fastbert", POLICIES["ltp"])
    thresher.export(model, tmp_path)
    exit = attachment_of(model).exit
    assert exit.mode == "leave"
    assert all(p.requires_grad for p in exit.parameters())


def test_the_runner_needs_no_torch(tmp_path: Path) -> None:
    model = attached("bert", "pabee", POLICIES["ltp"])
    thresher.export(model, tmp_path)
    rows = rows_of(batch("bert", ROWS))
    code = (
        "import json, sys\n"
        "for name in ('torch', 'transformers', 'onnx'): sys.modules[name] = None\n"
        "import thresher\n"
        f"found = thresher.Runner({str(tmp_path)!r}).run(json.loads({json.dumps(rows)!r}))\n"
        "print([output.exited_at for output in found])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == agrees(model, "bert", tmp_path)


def test_a_missing_link_is_refused(tmp_path: Path) -> None:
    thresher.export(attached("bert", "fastbert"), tmp_path)
    (tmp_path / "model-3.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-3\.onnx"):
        thresher.Runner(tmp_path)


def test_what_no_graph_can_hold_is_refused(tmp_path: Path) -> None:
    model = thresher.attach(make("bert", "token"), exit="tokee")
    with pytest.raises(OptionError, match="'tokee' cannot be written as graphs; these can: .*fastbert.*sentee"):
        thresher.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert {name for name, config in EXIT_CONFIGS.items() if config.exports} == set(CONFIGS)
