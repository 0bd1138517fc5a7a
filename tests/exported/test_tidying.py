"""A graph without its detours says what it said, bit by bit, in fewer nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import thresher
from helpers import make

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from thresher.exported.graph import write_graph  # noqa: E402
from thresher.exported.tidying import tidied  # noqa: E402

HEADS, SIZE = 3, 4


def constant(name: str, values: list[int]) -> Any:
    return numpy_helper.from_array(np.array(values, dtype=np.int64), name)


CONSTANTS = [
    constant("first", [0]),
    constant("split", [1, -1, HEADS, SIZE]),
    constant("joined", [1, -1, HEADS * SIZE]),
    constant("rows", [-1, HEADS, SIZE]),
    constant("copied", [0, 0, -1]),
]


def model_of(nodes: list[Any], constants: list[Any] = CONSTANTS) -> Any:
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("start", TensorProto.FLOAT, [1, "tokens", HEADS * SIZE])],
        [helper.make_tensor_value_info("end", TensorProto.FLOAT, None)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def said(model: Any, tokens: int = 5) -> np.ndarray:
    start = np.arange(tokens * HEADS * SIZE, dtype=np.float32).reshape(1, tokens, HEADS * SIZE)
    return np.asarray(ReferenceEvaluator(model).run(None, {"start": start})[0])


# What may follow on [1, T, HEADS * SIZE] ("flat"), [1, T, H, d] ("four"), [T, H, d] ("three"), and what it makes.
STEPS: dict[str, list[tuple[list[Any], str]]] = {
    "flat": [
        (["Reshape", "split"], "four"),
        (["Reshape", "rows"], "three"),
        (["Reshape", "joined"], "flat"),
        (["Reshape", "copied"], "flat"),
    ],
    "four": [
        (["Squeeze", "first"], "three"),
        (["Transpose", (0, 1, 2, 3)], "four"),
        (["Reshape", "joined"], "flat"),
    ],
    "three": [(["Unsqueeze", "first"], "four"), (["Reshape", "joined"], "flat"), (["Transpose", (1, 0, 2)], "turned")],
    "turned": [(["Transpose", (1, 0, 2)], "three"), (["Unsqueeze", "first"], "turned four")],
    "turned four": [(["Transpose", (0, 2, 1, 3)], "four"), (["Squeeze", "first"], "turned")],
}


@st.composite
def chains(draw: Any) -> list[Any]:
    state, name, nodes = "flat", "start", []
    for number in range(draw(st.integers(1, 12))):
        (kind, argument), state = draw(st.sampled_from(STEPS[state]))
        made = f"v{number}"
        if kind == "Transpose":
            nodes.append(helper.make_node(kind, [name], [made], perm=argument))
        else:
            nodes.append(helper.make_node(kind, [name, argument], [made]))
        name = made
    return [*nodes, helper.make_node("Identity", [name], ["end"])]


@settings(max_examples=200, deadline=None)
@given(nodes=chains(), tokens=st.integers(1, 4))
def test_a_tidied_chain_of_shapes_says_the_same(nodes: list[Any], tokens: int) -> None:
    before = said(model_of(nodes), tokens)
    model = tidied(model_of(nodes))
    after = said(model, tokens)
    assert after.shape == before.shape
    assert np.array_equal(after, before)
    assert len(model.graph.node) <= len(nodes)


def test_heads_that_are_split_and_joined_again_leave_nothing() -> None:
    nodes = [
        helper.make_node("Reshape", ["start", "split"], ["a"]),
        helper.make_node("Squeeze", ["a", "first"], ["b"]),
        helper.make_node("Transpose", ["b"], ["c"], perm=(1, 0, 2)),
        helper.make_node("Unsqueeze", ["c", "first"], ["d"]),
        helper.make_node("Transpose", ["d"], ["e"], perm=(0, 2, 1, 3)),
        helper.make_node("Reshape", ["e", "joined"], ["f"]),
        helper.make_node("Relu", ["f"], ["end"]),
    ]
    model = tidied(model_of(nodes))
    assert [node.op_type for node in model.graph.node] == ["Relu"]
    assert list(model.graph.node[0].input) == ["start"]
    assert not model.graph.initializer


def test_what_others_read_or_the_graph_gives_out_stays() -> None:
    nodes = [
        helper.make_node("Unsqueeze", ["start", "first"], ["a"]),
        helper.make_node("Squeeze", ["a", "first"], ["end"]),
    ]
    model = tidied(model_of(nodes))
    assert [node.output[0] for node in model.graph.node] == ["a", "end"]  # an output keeps its name
    assert np.array_equal(said(model), said(model_of(nodes)))


@pytest.mark.parametrize("asked", [[0, -1, HEADS, SIZE], [1, 0, HEADS, SIZE]])
def test_a_shape_that_copies_a_dimension_is_not_asked_of_another_value(asked: list[int]) -> None:
    nodes = [
        helper.make_node("Unsqueeze", ["start", "first"], ["a"]),  # [1, 1, T, D]
        helper.make_node("Transpose", ["a"], ["b"], perm=(2, 1, 0, 3)),  # [T, 1, 1, D]
        helper.make_node("Squeeze", ["b", "second"], ["c"]),  # [T, 1, D]
        helper.make_node("Reshape", ["c", "asked"], ["end"]),
    ]
    constants = [*CONSTANTS, constant("second", [1]), constant("asked", asked)]
    wanted = said(model_of(nodes, constants), tokens=1)
    assert np.array_equal(said(tidied(model_of(nodes, constants)), tokens=1), wanted)


def test_a_reshape_that_two_dimensions_leave_open_stays() -> None:
    """[1, T, D] as [1, D, T]: nothing tells here that T and D are not each other."""
    shape = helper.make_node("Shape", ["start"], ["s"])
    turned = helper.make_node("Gather", ["s", "order"], ["asked"], axis=0)
    nodes = [
        shape,
        turned,
        helper.make_node("Reshape", ["start", "asked"], ["a"]),
        helper.make_node("Relu", ["a"], ["end"]),
    ]
    constants = [*CONSTANTS, constant("order", [0, 2, 1])]
    model = tidied(model_of(nodes, constants))
    assert "Reshape" in {node.op_type for node in model.graph.node}
    assert said(model).shape == (1, HEADS * SIZE, 5)


def computed(parts: list[Any], of: str = "start") -> list[Any]:
    """Nodes that make "asked" of numbers, and of "N": how many tokens `of` has."""
    taken = helper.make_node("Unsqueeze", ["n", "first"], ["N"])
    nodes = [helper.make_node("Shape", [of], ["s"]), helper.make_node("Gather", ["s", "at"], ["n"], axis=0), taken]
    return [*nodes, helper.make_node("Concat", [str(part) for part in parts], ["asked"], axis=0)]


COMPUTED = [*CONSTANTS, numpy_helper.from_array(np.array(1, dtype=np.int64), "at")]
COMPUTED += [constant(str(number), [number]) for number in (1, -1, HEADS, SIZE, HEADS * SIZE)]


@pytest.mark.parametrize(
    "parts", [[1, "N", -1, SIZE], [1, "N", HEADS, -1], ["N", HEADS, SIZE], [-1, "N"], [1, HEADS, "N", SIZE]]
)
def test_a_computed_shape_of_which_one_dimension_varies_is_a_constant(parts: list[Any]) -> None:
    nodes = [*computed(parts), helper.make_node("Reshape", ["start", "asked"], ["end"])]
    model = tidied(model_of(nodes, COMPUTED))
    assert [node.op_type for node in model.graph.node] == ["Reshape"]
    for tokens in (1, 2, 5):
        assert np.array_equal(said(model, tokens), said(model_of(nodes, COMPUTED), tokens))


def test_a_split_row_loses_its_first_axis_in_the_same_step() -> None:
    nodes = [
        *computed([1, "N", -1, SIZE]),
        helper.make_node("Reshape", ["start", "asked"], ["a"]),
        helper.make_node("Squeeze", ["a", "first"], ["end"]),
    ]
    model = tidied(model_of(nodes, COMPUTED))
    assert [node.op_type for node in model.graph.node] == ["Reshape"]
    assert said(model).shape == (5, HEADS, SIZE)
    assert np.array_equal(said(model), said(model_of(nodes, COMPUTED)))


def test_a_computed_shape_of_which_two_dimensions_vary_stays() -> None:
    """[T, T, D] as [T * T, D] by T: how many rows there are is told by no constant but -1, which the asked one has taken."""
    nodes = [
        helper.make_node("Squeeze", ["start", "first"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "1"], ["tall"]),
        helper.make_node("Add", ["tall", "start"], ["square"]),
        *computed(["N", -1], of="square"),
        helper.make_node("Reshape", ["square", "asked"], ["end"]),
    ]
    model = tidied(model_of(nodes, COMPUTED))
    assert "Concat" in {node.op_type for node in model.graph.node}
    assert np.array_equal(said(model), said(model_of(nodes, COMPUTED)))


def test_what_a_product_reads_of_constants_is_stored_as_weights() -> None:
    weights = numpy_helper.from_array(np.arange(2.0 * HEADS * SIZE, dtype=np.float32).reshape(-1, 2), "")
    nodes = [
        helper.make_node("Constant", [], ["weights"], value=weights),
        helper.make_node("Constant", [], ["more"], value=numpy_helper.from_array(np.float32([1, 2]), "")),
        helper.make_node("MatMul", ["start", "weights"], ["a"]),
        helper.make_node("Add", ["a", "more"], ["end"]),
    ]
    model = tidied(model_of(nodes))
    assert [tensor.name for tensor in model.graph.initializer] == ["weights"]
    assert np.array_equal(said(model), said(model_of(nodes)))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_a_model_that_drops_nothing_has_no_detours_left(tmp_path: Path, family: str) -> None:
    model = make(family)
    thresher.attach(model)
    write_graph(model, tmp_path / "traced.onnx", fused=True)
    traced = onnx.load(tmp_path / "traced.onnx")
    before = len(traced.graph.node)
    nodes = tidied(traced).graph.node
    made = {name: node.op_type for node in nodes for name in node.output}
    pairs = [(node.op_type, made.get(node.input[0])) for node in nodes if node.input]
    assert len(nodes) < 0.6 * before
    assert ("Squeeze", "Unsqueeze") not in pairs
    assert ("Unsqueeze", "Squeeze") not in pairs
    assert not [pair for pair in pairs if pair[0] == "MultiHeadAttention" and pair[1] in ("Reshape", "Transpose")]
