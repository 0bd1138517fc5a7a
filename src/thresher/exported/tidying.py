"""A traced graph without the detours of its tracing: rows packed and unpacked around every module of a layer, heads split
and joined around an operator that does both itself. Each is one more operator to call, which weighs where rows are short."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

Shape = list[int | str | None]  # a dimension's size, its name, or nothing known of it

SMALL = 64  # numbers; larger constants are no shapes


def tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself, its graph with fewer nodes: every output keeps its name and, bit by bit, its value."""
    while _Pass(model).changes():
        pass
    _store_weights(model.graph)
    _take_away_unused(model.graph)
    return model


class _Pass:
    """One walk over the nodes, each looked at with what makes its first input."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import TensorProto, numpy_helper

        self.graph = model.graph
        self.maker = {name: node for node in self.graph.node for name in node.output}
        self.shapes = _shapes(model)
        self.outputs = {value.name for value in self.graph.output}
        tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        tensors |= {n.output[0]: n.attribute[0].t for n in self.graph.node if _holds_tensor(n)}
        self.numbers = {
            name: [int(x) for x in numpy_helper.to_array(tensor).reshape(-1)]
            for name, tensor in tensors.items()
            if tensor.data_type == TensorProto.INT64 and not _is_large(tensor)
        }
        self.same: dict[str, str] = {}  # what a value is called where it was made
        self.before: list[onnx.NodeProto] = []  # new nodes that the one at hand reads

    def changes(self) -> bool:
        """Walk; whether anything changed."""
        nodes, changed = [], False
        for node in self.graph.node:
            self.before = []
            for place, name in enumerate(node.input):
                node.input[place] = self.same.get(name, name)
            moved = self.moved(node)
            source = self.left_as_it_was(moved or node)
            if source is not None and node.output[0] not in self.outputs:
                self.same[node.output[0]] = source
                changed = True
                continue
            changed |= moved is not None
            nodes += [*self.before, moved or node]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        return changed

    def left_as_it_was(self, node: onnx.NodeProto) -> str | None:
        """The value that a node only hands on."""
        made = self.maker.get(node.input[0]) if node.input else None
        if node.op_type == "Transpose" and (order := _order(node)) == sorted(order):
            return str(node.input[0])
        if node.op_type == "Reshape" and _alike(self.shapes.get(node.input[0]), self.shapes.get(node.output[0])):
            return str(node.input[0])
        if made is not None and {node.op_type, made.op_type} == {"Squeeze", "Unsqueeze"}:
            return str(made.input[0]) if self.first_axis(node) and self.first_axis(made) else None
        return None

    def moved(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The same value made in fewer steps, or in an order in which steps meet that undo each other."""
        if node.op_type == "Reshape" and (asked := self.constant_shape(node)):
            return self.new("Reshape", [node.input[0], asked], node.output[0])
        made = self.maker.get(node.input[0]) if node.input else None
        if made is None:
            return None
        match node.op_type, made.op_type:
            case "Transpose", "Transpose":
                order = _order(made)
                return self.new("Transpose", [made.input[0]], node.output[0], [order[i] for i in _order(node)])
            case "Transpose", "Unsqueeze" if self.first_axis(made) and _order(node)[0] == 0:
                inner = self.between("Transpose", [made.input[0]], node, [i - 1 for i in _order(node)[1:]])
                return self.new("Unsqueeze", [inner, made.input[1]], node.output[0])
            case "Squeeze", "Transpose" if self.first_axis(node) and _order(made)[0] == 0:
                inner = self.between("Squeeze", [made.input[0], node.input[1]], node)
                return self.new("Transpose", [inner], node.output[0], [i - 1 for i in _order(made)[1:]])
            case "Squeeze", "Reshape" if self.first_axis(node) and self.begins_with_one(made.input[1]):
                return self.new(
                    "Reshape", [made.input[0], self.constant(self.numbers[made.input[1]][1:])], node.output[0]
                )
            case "Reshape", "Reshape" | "Squeeze" | "Unsqueeze" if self.says_all(node.input[1]):
                return self.new("Reshape", [made.input[0], node.input[1]], node.output[0])
        return None

    def constant_shape(self, node: onnx.NodeProto) -> str | None:
        """The name of what a Reshape asks for as a constant, where that was computed though only one dimension varies."""
        if node.input[1] in self.numbers:
            return None
        known = self.shapes.get(node.output[0])
        whole = known if known and sum(not isinstance(d, int) for d in known) == 1 else self.asked_for(node)
        return None if whole is None else self.constant([d if isinstance(d, int) else -1 for d in whole])

    def asked_for(self, node: onnx.NodeProto) -> Shape | None:
        """The shape that a Reshape makes, told from what its parts were taken from; None where more than one varies."""
        given, made = self.shapes.get(node.input[0]), self.maker.get(node.input[1])
        if given is None or made is None or made.op_type != "Concat":
            return None
        parts = [part for name in made.input for part in self.dimensions(name)]
        sizes, names = [d for d in parts if isinstance(d, int)], [d for d in parts if not isinstance(d, int)]
        if len(names) != 1 or names[0] is None or names != [d for d in given if not isinstance(d, int)]:
            return None
        if 0 in sizes or sizes.count(-1) > 1:
            return None
        rest = math.prod(d for d in given if isinstance(d, int)) // math.prod(d for d in sizes if d != -1)
        return [rest if d == -1 else d for d in parts]

    def dimensions(self, name: str) -> Shape:
        """A part of a shape: numbers, or one dimension of another value."""
        if name in self.numbers:
            return list(self.numbers[name])
        taken = self.maker.get(name)
        if taken is not None and taken.op_type == "Unsqueeze":
            taken = self.maker.get(taken.input[0])
        shape = self.maker.get(taken.input[0]) if taken is not None and taken.op_type == "Gather" else None
        if taken is None or shape is None or shape.op_type != "Shape" or shape.attribute:
            return [None]
        of, axis = self.shapes.get(shape.input[0]), self.numbers.get(taken.input[1], [])
        return [of[axis[0]]] if of is not None and len(axis) == 1 and -len(of) <= axis[0] < len(of) else [None]

    def constant(self, sizes: list[int]) -> str:
        from onnx import TensorProto, helper

        name = f"shape{sizes}"
        if name not in self.numbers:
            self.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(sizes)], sizes))
            self.numbers[name] = sizes
        return name

    def between(self, kind: str, inputs: list[str], node: onnx.NodeProto, order: list[int] | None = None) -> str:
        """A new value that `node` is to be made from."""
        made = self.new(kind, inputs, f"{node.output[0]}/{kind.lower()}", order)
        self.before.append(made)
        return str(made.output[0])

    def new(self, kind: str, inputs: list[str], output: str, order: list[int] | None = None) -> onnx.NodeProto:
        from onnx import helper

        node = helper.make_node(kind, inputs, [output], name=output)
        if order is not None:
            node.attribute.append(helper.make_attribute("perm", order))
        self.maker[output] = node
        return node

    def first_axis(self, node: onnx.NodeProto) -> bool:
        """Whether a Squeeze or Unsqueeze is of the first axis, and of no other."""
        return len(node.input) > 1 and self.numbers.get(node.input[1]) == [0]

    def begins_with_one(self, shape: str) -> bool:
        sizes = self.numbers.get(shape, [])
        return len(sizes) > 1 and sizes[0] == 1 and 0 not in sizes

    def says_all(self, shape: str) -> bool:
        """Whether a shape asked for refers to none of what is reshaped, as a 0 would."""
        if shape in self.numbers:
            return 0 not in self.numbers[shape]
        made = self.maker.get(shape)
        return (
            made is not None and made.op_type == "Concat" and all(0 not in self.numbers.get(n, ()) for n in made.input)
        )


def _holds_tensor(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and node.attribute[0].name == "value"


def _is_large(tensor: onnx.TensorProto) -> bool:
    return len(tensor.dims) > 1 or sum(tensor.dims) > SMALL


def _order(node: onnx.NodeProto) -> list[int]:
    return list(node.attribute[0].ints)


def _alike(one: Shape | None, other: Shape | None) -> bool:
    """Whether two shapes of as many numbers are surely the same: what one dimension has, the others tell."""
    if one is None or other is None or len(one) != len(other):
        return False
    apart = [(a, b) for a, b in zip(one, other, strict=True) if a is None or a != b]
    return not apart or (len(apart) == 1 and not all(isinstance(size, int) for size in apart[0]))


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """What is known of every value's shape, told without the weights, of which only the shapes matter."""
    import onnx

    found = onnx.shape_inference.infer_shapes(_without_weights(model), data_prop=True).graph
    shapes = {
        value.name: _dimensions(value)
        for value in (*found.value_info, *found.input, *found.output)
        if value.type.tensor_type.HasField("shape")
    }
    for node in model.graph.node:
        if node.op_type == "MultiHeadAttention" and node.input[0] in shapes:
            shapes[node.output[0]] = shapes[node.input[0]]
    return shapes


def _dimensions(value: onnx.ValueInfoProto) -> Shape:
    return [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in value.type.tensor_type.shape.dim]


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large constants as inputs, and of what it said of shapes only what nobody else can tell."""
    from onnx import helper

    graph = model.graph
    large = [tensor for tensor in graph.initializer if _is_large(tensor)]
    names = {tensor.name for tensor in large}
    foreign = {name for node in graph.node if node.domain for name in node.output}
    return helper.make_model(
        helper.make_graph(
            graph.node,
            graph.name,
            [*graph.input, *(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in large)],
            graph.output,
            [tensor for tensor in graph.initializer if tensor.name not in names],
            value_info=[value for value in graph.value_info if value.name in foreign],
        ),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        functions=model.functions,
    )


def _store_weights(graph: onnx.GraphProto) -> None:
    """What a product reads of constants becomes stored weights, which alone are made int8."""
    read = {name for node in graph.node if node.op_type == "MatMul" for name in node.input}
    for node in [n for n in graph.node if _holds_tensor(n) and n.output[0] in read]:
        tensor = graph.initializer.add()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        graph.node.remove(node)


def _take_away_unused(graph: onnx.GraphProto) -> None:
    """Nodes and constants that no output needs."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        kept.append(node)
        needed.update(node.input)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                needed.update(name for one in inner.node for name in one.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    unused = [tensor for tensor in graph.initializer if tensor.name not in needed]
    for tensor in unused:
        graph.initializer.remove(tensor)
    stale = {value.name for value in graph.value_info} - {name for node in graph.node for name in node.output}
    for value in [value for value in graph.value_info if value.name in stale]:
        graph.value_info.remove(value)


__all__ = ["tidied"]
