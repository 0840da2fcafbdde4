"""One index of a graph: the producer and the consumers of each value, and the stored tensors.

The index describes the graph at the time when it was built. Code that changes the graph builds a new index.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, TensorProto


@dataclass(frozen=True, slots=True)
class Consumption:
    """One use of a value. node: its consumer, or None if the value is an output of the graph; slot: the index among the
    node's inputs; nested: whether the node, or the output, is in a subgraph such as a branch of an If."""

    node: NodeProto | None
    slot: int
    nested: bool


class Index:
    """Producers, consumers and stored tensors of a graph by the names of values, subgraphs included."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.producers: dict[str, NodeProto] = {name: node for node in graph.node for name in node.output if name}
        self.outputs: frozenset[str] = frozenset(value.name for value in graph.output)
        self._consumptions: defaultdict[str, list[Consumption]] = defaultdict(list)
        self._nested: set[str] = set()  # values that subgraphs define
        self._collect(graph.node, nested=False)
        for name in self.outputs:
            self._consumptions[name].append(Consumption(None, -1, nested=False))
        self.values: frozenset[str] = frozenset(
            [*self.initializers, *self.producers, *self._consumptions, *self._nested]
            + [value.name for value in graph.input]
        )

    def _collect(self, nodes: Iterable[NodeProto], *, nested: bool) -> None:
        for node in nodes:
            for slot, name in enumerate(node.input):
                if name:  # an optional input that is left out has an empty name
                    self._consumptions[name].append(Consumption(node, slot, nested))
            for item in node.attribute:
                for graph in [item.g] if item.HasField("g") else item.graphs:
                    self._nested.update(item.name for item in (*graph.input, *graph.initializer))
                    self._nested.update(name for inner in graph.node for name in inner.output if name)
                    self._collect(graph.node, nested=True)
                    for value in graph.output:
                        self._consumptions[value.name].append(Consumption(node, -1, nested=True))

    def consumptions(self, name: str) -> list[Consumption]:
        """Return all uses of the value: inputs of nodes (subgraphs included) and outputs of graphs."""
        return self._consumptions.get(name, [])

    def consumers(self, name: str) -> list[NodeProto]:
        """Return the nodes of the graph itself that read the value, once for each input that does."""
        return [item.node for item in self.consumptions(name) if item.node is not None and not item.nested]

    def is_consumed(self, name: str) -> bool:
        return name in self._consumptions

    def only_consumer(self, name: str) -> NodeProto | None:
        """Return the only consumer of the value, which reads it through one input. Return None if other nodes, a
        subgraph or the graph's output also read it."""
        found = self.consumptions(name)
        return found[0].node if len(found) == 1 and not found[0].nested else None


def element_types(model: ModelProto) -> dict[str, int]:
    """Return the element type, as ONNX's number, of every value whose type ONNX can infer."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    found: dict[str, int] = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        found.setdefault(value.name, value.type.tensor_type.elem_type)
    return found
