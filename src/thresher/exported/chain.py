"""A traced graph cut into a chain: one graph for the layers up to each place where a row may leave, and one for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from thresher.errors import ThresherError
from thresher.exported.directory import Link

if TYPE_CHECKING:
    import onnx


def cut(model: onnx.ModelProto, ends: Sequence[tuple[int, tuple[str, ...]]]) -> list[tuple[Link, onnx.ModelProto]]:
    """The links of the chain, in their order, each with its graph.

    ends: for each link the layer after which a row may leave (0: the last link) and the outputs of `model` that it ends with.
    A link computes what these need and no earlier link has computed. What crosses from link to link is found by itself, and is
    an output of the one and an input of the other. What is made of weights alone stands in every link that reads it.
    Raises ThresherError where the type of something that crosses cannot be told.
    """
    import onnx

    graph = model.graph
    outputs = {value.name: value for value in graph.output}
    sources = _Sources(graph)
    nodes = [sources.nodes_for(names) for _, names in ends]
    before: set[int] = set()
    for own in nodes:
        own -= before
        before |= own
    reads = [sources.read_by(own) for own in nodes]
    types = {v.name: v for v in onnx.shape_inference.infer_shapes(model).graph.value_info} | outputs
    types |= {v.name: v for v in graph.input}
    links = []
    for number, ((layer, names), own) in enumerate(zip(ends, nodes, strict=True)):
        made = {name for index in own for name in graph.node[index].output}
        later = set().union(*reads[number + 1 :])
        given = sorted(reads[number] - made)
        ended = [*names, *sorted((made & later) - set(names))]
        unknown = [name for name in (*given, *ended) if name not in types]
        if unknown:
            raise ThresherError(f"The graph could not be cut after layer {layer}: the type of {unknown[0]} is unknown.")
        links.append((Link(layer, tuple(given), tuple(ended)), _part(model, sources, own, given, ended, types)))
    return links


class _Sources:
    """Where each value of a graph comes from."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.maker = {name: index for index, node in enumerate(graph.node) for name in node.output}
        self.fixed = {tensor.name for tensor in graph.initializer}  # and what is made of nothing else
        self.repeated: set[int] = set()
        for index, node in enumerate(graph.node):
            if all(name in self.fixed for name in _reads(node)):
                self.repeated.add(index)
                self.fixed.update(node.output)

    def nodes_for(self, names: Sequence[str]) -> set[int]:
        """The nodes that the values need, without those made of weights alone."""
        found: set[int] = set()
        open_ = list(names)
        while open_:
            index = self.maker.get(open_.pop())
            if index is not None and index not in found and index not in self.repeated:
                found.add(index)
                open_ += _reads(self.graph.node[index])
        return found

    def read_by(self, nodes: set[int]) -> set[str]:
        """Values that the nodes read, of those that depend on the input."""
        return {name for index in nodes for name in _reads(self.graph.node[index])} - self.fixed

    def constants_for(self, nodes: set[int]) -> tuple[set[int], set[str]]:
        """The nodes made of weights alone that the nodes read, and the weights that both read."""
        constant: set[int] = set()
        open_ = [name for index in nodes for name in _reads(self.graph.node[index])]
        weights: set[str] = set()
        while open_:
            name = open_.pop()
            index = self.maker.get(name)
            if index is None:
                weights.add(name)
            elif index in self.repeated and index not in constant:
                constant.add(index)
                open_ += _reads(self.graph.node[index])
        return constant, weights


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, the graphs inside it included."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            made = {name for one in inner.node for name in one.output} | {t.name for t in inner.initializer}
            yield from (name for one in inner.node for name in _reads(one) if name not in made)


def _part(
    model: onnx.ModelProto, sources: _Sources, own: set[int], given: list[str], ended: list[str], types: dict[str, Any]
) -> onnx.ModelProto:
    """One link as a model of its own."""
    import onnx

    graph = model.graph
    constant, weights = sources.constants_for(own)
    part = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node for index, node in enumerate(graph.node) if index in own | constant],
            graph.name,
            [types[name] for name in given],
            [types[name] for name in ended],
            [tensor for tensor in graph.initializer if tensor.name in weights],
        ),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        functions=model.functions,
    )
    return part


__all__ = ["cut"]
