"""Simplify a graph: compute values that depend on no input once, fold operators that scale or shift into the weights of
their neighbours, remove operators without effect, store equal tensors once.

    Conv -> BatchNormalization                    Conv
    MatMul, Gemm, LayerNormalization -> Mul c     the same with scaled weights
    Gemm, LayerNormalization -> Add c             the same with another bias
    Mul c -> MatMul, Gemm                         the same with scaled rows
    Add c -> Add d, Mul c -> Mul d                one of them

The pass folds nothing that makes the file larger. If a weight has several consumers, it is never changed for one of
them, and its Transpose is never stored as a copy: tied weights stay tied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper, shape_inference

from edgekit.errors import EdgekitError
from edgekit.graph.index import Index
from edgekit.graph.model import attribute, eliminate_dead_nodes, name_nodes, unique_name, value_names
from edgekit.graph.shapes import RANDOM, evaluated
from edgekit.graph.simplify import normalization
from edgekit.passes.base import Change, Context, GraphCandidate, Level, Pass

Array = npt.NDArray[Any]
VARYING = RANDOM | {"Dropout"}  # in training mode, Dropout draws random numbers too


@dataclass(frozen=True, slots=True)
class Fold(Pass[GraphCandidate]):
    """The pass has no parameters: every rule keeps the function of the graph, up to rounding."""

    name: ClassVar[str] = "fold"
    summary: ClassVar[str] = "fold constants and scaling operators into weights, store equal tensors once"
    level: ClassVar[Level] = Level.GRAPH
    prepares: ClassVar[bool] = True  # kept for later passes if it loses nothing

    def plan(self, candidate: GraphCandidate) -> list[Change]:
        return _folded(candidate)[1]

    def apply(self, candidate: GraphCandidate, context: Context) -> GraphCandidate:
        return GraphCandidate(_folded(candidate)[0])


def _folded(candidate: GraphCandidate) -> tuple[ModelProto, list[Change]]:
    """Apply every rule until none applies. Return the graph and the list of changes."""
    model = candidate.copy_model()
    if any(item.HasField("g") or item.graphs for node in model.graph.node for item in node.attribute):
        raise EdgekitError(
            "fold: the graph has branches or loops, which this pass does not support; leave this pass out"
        )
    name_nodes(model)
    changes: list[Change] = []
    parts = len(model.graph.node) + len(model.graph.initializer)
    eliminate_dead_nodes(model)
    if unread := parts - len(model.graph.node) - len(model.graph.initializer):
        changes.append(Change("graph", f"{unread} nodes and tensors without consumers", "removed"))
    widths, refused = _widths(model), set[str]()
    while True:
        graph = _Graph(model, widths, refused)
        found = next((done for node in model.graph.node for rule in RULES if (done := rule(graph, node))), None)
        if found is None:
            break
        changes.append(found)
        eliminate_dead_nodes(model)
    changes += [Change(name, "separate tensor", f"merged with {first}") for name, first in graph.merge_equal()]
    eliminate_dead_nodes(model)
    if not changes:
        raise EdgekitError("fold: there is nothing to fold in this graph; leave this pass out")
    model.graph.ClearField("value_info")  # it describes values that no longer exist
    return model, changes


def _widths(model: ModelProto) -> dict[str, int]:
    """Return the length of each value's last axis, if ONNX can infer it."""
    inferred = shape_inference.infer_shapes(model).graph
    axes = {value.name: value.type.tensor_type.shape.dim for value in (*inferred.value_info, *inferred.input)}
    return {name: axis[-1].dim_value for name, axis in axes.items() if len(axis) and axis[-1].dim_value}


class _Graph:
    """A graph with the queries and changes that the rules need."""

    def __init__(self, model: ModelProto, widths: Mapping[str, int], refused: set[str]) -> None:
        self.model, self.widths = model, widths
        # nodes whose result would make the file larger: they are not computed again in every round
        self.refused = refused
        self.index = Index(model)
        self.stored, self.producers, self.outputs = self.index.initializers, self.index.producers, self.index.outputs

    def count_consumptions(self, name: str) -> int:
        """Return how many inputs of nodes (subgraphs included) and outputs of the graph read a value."""
        return len(self.index.consumptions(name))

    def array(self, name: str) -> Array | None:
        """Return a stored float32 tensor."""
        tensor = self.stored.get(name)
        return numpy_helper.to_array(tensor) if tensor is not None and tensor.data_type == TensorProto.FLOAT else None

    def own(self, name: str) -> Array | None:
        """Return a stored float32 tensor that a rule may change because it has a single consumer. A vector may have
        several: normalizations often share one, so the rule stores a new vector."""
        found = self.array(name)
        return found if found is not None and (self.count_consumptions(name) == 1 or found.ndim < 2) else None

    def store(self, near: str, array: Array) -> str:
        """Store a new tensor, with a name derived from the one that it replaces."""
        name = unique_name(f"{near}.folded", value_names(self.model)) if near in value_names(self.model) else near
        self.model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def only_consumer(self, name: str) -> NodeProto | None:
        """Return the only consumer of a value; None if it has others or is an output of the graph."""
        return self.index.only_consumer(name)

    def absorb(self, node: NodeProto, before: NodeProto) -> None:
        """Remove a node after the node before it has taken over its work."""
        self.model.graph.node.remove(node)
        before.output[0] = node.output[0]

    def bypass(self, node: NodeProto) -> bool:
        """Remove a node whose output is its input; return False if names of the graph's inputs and outputs forbid
        it."""
        source, target = node.input[0], node.output[0]
        if target in self.outputs:
            producer = self.producers.get(source)
            if producer is None or source in self.outputs:
                return False
            producer.output[list(producer.output).index(source)] = target
            source, target = target, source
        self.model.graph.node.remove(node)
        for other in self.model.graph.node:
            other.input[:] = [source if name == target else name for name in other.input]
        return True

    def merge_equal(self) -> list[tuple[str, str]]:
        """Give the consumers of equal tensors the first of them; return pairs of names."""
        seen: dict[tuple[int, tuple[int, ...], bytes], str] = {}
        same: dict[str, str] = {}
        for name, tensor in self.stored.items():
            key = (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
            if name not in self.outputs and seen.setdefault(key, name) != name:
                same[name] = seen[key]
        for node in self.model.graph.node:
            node.input[:] = [same.get(name, name) for name in node.input]
        return [(name, first) for name, first in same.items() if np.prod(self.stored[name].dims) > 1]


def _constant(graph: _Graph, node: NodeProto) -> Change | None:
    """Compute a node that reads stored tensors only, if its result takes no more bytes than the node and the tensors
    that it alone reads."""
    reads = [name for name in node.input if name]
    given = node.op_type == "Constant"  # the node holds its result
    if not given and not _computable(graph, node, reads):
        return None
    if graph.outputs & set(node.output):
        return None
    values = evaluated(graph.model, node, {name: numpy_helper.to_array(graph.stored[name]) for name in reads})
    freed = sum(
        graph.stored[name].ByteSize() for name in set(reads) if graph.count_consumptions(name) == reads.count(name)
    )
    if not given and sum(value.nbytes for value in values.values()) > freed + node.ByteSize():
        graph.refused.add(node.name)
        return None
    graph.model.graph.node.remove(node)
    graph.model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    return Change(node.name, node.op_type, "computed once")


def _computable(graph: _Graph, node: NodeProto, reads: list[str]) -> bool:
    """Return whether a node computes the same from stored tensors in every call."""
    if node.op_type in VARYING or node.domain not in ("", "ai.onnx") or not reads or node.name in graph.refused:
        return False
    if node.op_type == "Transpose" and graph.count_consumptions(reads[0]) != 1:
        return False  # the tensor stays for its other consumers, so the result would be a second copy
    return all(name in graph.stored for name in reads)


def _common_subexpression(graph: _Graph, node: NodeProto) -> Change | None:
    """Merge a Transpose of a stored tensor with an equal earlier one."""
    if node.op_type != "Transpose" or node.input[0] not in graph.stored or node.output[0] in graph.outputs:
        return None
    for other in graph.model.graph.node:
        if other.name == node.name:
            return None
        same = other.op_type == "Transpose" and other.input[0] == node.input[0]
        if same and list(attribute(other, "perm", [])) == list(attribute(node, "perm", [])):
            graph.model.graph.node.remove(node)
            for consumer in graph.model.graph.node:
                consumer.input[:] = [other.output[0] if name == node.output[0] else name for name in consumer.input]
            return Change(node.name, "Transpose", f"merged with {other.name}")
    return None


def _without_effect(graph: _Graph, node: NodeProto) -> Change | None:
    """Remove Identity, and Dropout outside training."""
    training = node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]
    mask = len(node.output) > 1 and bool(graph.count_consumptions(node.output[1]))
    if node.op_type not in ("Identity", "Dropout") or training or mask or not graph.bypass(node):
        return None
    return Change(node.name, node.op_type, "removed")


def _batch_normalization(graph: _Graph, node: NodeProto) -> Change | None:
    """Fold a BatchNormalization into its Conv: y = (w x + b - mean) gamma / sqrt(variance + epsilon) + beta."""
    after = graph.only_consumer(node.output[0]) if node.op_type == "Conv" else None
    if after is None or after.op_type != "BatchNormalization" or after.input[0] != node.output[0]:
        return None
    weight = graph.own(node.input[1])
    parameters = [graph.array(name) for name in after.input[1:5]]
    bias = graph.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros((), np.float32)
    if weight is None or bias is None or any(item is None for item in parameters):
        return None
    if len(after.output) > 1 or attribute(after, "training_mode", 0):
        return None
    numbers = [item.astype(np.float64) for item in parameters if item is not None]
    factor, shift = normalization(numbers, attribute(after, "epsilon", 1e-5))
    shape = (-1, *[1] * (weight.ndim - 1))
    _reads(graph, node, 1, weight * factor.reshape(shape))
    _reads(graph, node, 2, bias * factor + shift, f"{node.name}.bias")
    graph.absorb(after, node)
    return Change(after.name, "BatchNormalization", f"folded into {node.name}")


def _scaled_after(graph: _Graph, node: NodeProto) -> Change | None:
    """Fold a Mul or Add with a constant per feature into the product or normalization before it."""
    if node.op_type not in ("MatMul", "Gemm", "LayerNormalization") or len(node.output) > 1:
        return None
    after = graph.only_consumer(node.output[0])
    if after is None or after.op_type not in ("Mul", "Add"):
        return None
    weight = graph.own(node.input[1])
    constant = graph.array(after.input[1] if after.input[0] == node.output[0] else after.input[0])
    if weight is None or constant is None or (node.op_type == "MatMul" and weight.ndim != 2):
        return None
    if node.op_type == "LayerNormalization":
        features, output = weight.size, weight.ndim == 1 and attribute(node, "axis", -1) == -1
        rank = 1
    else:
        transposed = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
        features, output, rank = weight.shape[0 if transposed else 1], True, 2 if node.op_type == "Gemm" else 1
    vector = _per_feature(constant, features, rank)
    if vector is None or not output or (node.op_type == "Gemm" and not _plain(node)):
        return None
    bias = graph.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(features, np.float32)
    if bias is None or bias.shape != (features,):
        return None
    if after.op_type == "Add":
        if node.op_type == "MatMul":
            return None  # the node has no bias
        _reads(graph, node, 2, bias + vector, f"{node.name}.bias")
    else:
        transposed = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
        _reads(graph, node, 1, weight * (vector[:, None] if transposed else vector))
        if len(node.input) > 2:
            _reads(graph, node, 2, bias * vector)
    graph.absorb(after, node)
    return Change(after.name, after.op_type, f"folded into {node.name}")


def _scaled_before(graph: _Graph, node: NodeProto) -> Change | None:
    """Fold a Mul with a constant per feature into the product that is its only consumer."""
    after = graph.only_consumer(node.output[0]) if node.op_type == "Mul" else None
    if after is None or after.op_type not in ("MatMul", "Gemm") or after.input[0] != node.output[0]:
        return None
    constant = graph.array(node.input[1])
    slot = 0 if constant is not None else 1
    constant = constant if constant is not None else graph.array(node.input[0])
    weight = graph.own(after.input[1])
    if weight is None or constant is None or weight.ndim != 2 or attribute(after, "transA", 0):
        return None
    transposed = after.op_type == "Gemm" and bool(attribute(after, "transB", 0))
    vector = _per_feature(constant, weight.shape[1 if transposed else 0], 2 if after.op_type == "Gemm" else 1)
    if vector is None or graph.widths.get(node.input[slot]) != len(vector):  # it might broadcast a value of width 1
        return None
    _reads(graph, after, 1, weight * (vector if transposed else vector[:, None]))
    after.input[0] = node.input[slot]
    graph.model.graph.node.remove(node)
    return Change(node.name, "Mul", f"folded into {after.name}")


def _repeated(graph: _Graph, node: NodeProto) -> Change | None:
    """Merge Add and Add, or Mul and Mul, with constants of one shape."""
    after = graph.only_consumer(node.output[0]) if node.op_type in ("Add", "Mul") else None
    if after is None or after.op_type != node.op_type:
        return None
    first = next((name for name in node.input if graph.array(name) is not None), None)
    second = next((name for name in after.input if graph.array(name) is not None), None)
    if first is None or second is None:
        return None
    one, other = graph.array(first), graph.array(second)
    assert one is not None
    assert other is not None
    if one.shape != other.shape and 1 not in (one.size, other.size):
        return None
    both = one.astype(np.float64) + other if node.op_type == "Add" else one.astype(np.float64) * other
    _reads(graph, node, list(node.input).index(first), both)
    graph.absorb(after, node)
    return Change(after.name, after.op_type, f"folded into {node.name}")


def _plain(node: NodeProto) -> bool:
    return all(attribute(node, key, 1.0) == 1 for key in ("alpha", "beta")) and not attribute(node, "transA", 0)


def _factors(graph: _Graph, node: NodeProto) -> Change | None:
    """Fold alpha and beta of a Gemm into its weights."""
    if node.op_type != "Gemm" or all(attribute(node, key, 1.0) == 1 for key in ("alpha", "beta")):
        return None
    weight = graph.own(node.input[1])
    bias = graph.own(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(0, np.float32)
    if weight is None or bias is None:
        return None
    _reads(graph, node, 1, weight * attribute(node, "alpha", 1.0))
    if bias.size:
        _reads(graph, node, 2, bias * attribute(node, "beta", 1.0))
    for item in [item for item in node.attribute if item.name in ("alpha", "beta")]:
        node.attribute.remove(item)
    return Change(node.name, "Gemm with alpha or beta", "folded into its weights")


def _per_feature(constant: Array, features: int, rank: int) -> Array | None:
    """Return a constant that broadcasts along the last axis only, as (features,) float64. Return None for any other
    shape, and if it may have more axes than the result."""
    if constant.ndim > rank or constant.size not in (1, features) or constant.shape[-1:] not in ((), (1,), (features,)):
        return None
    return np.broadcast_to(constant.reshape(-1).astype(np.float64), (features,))


def _reads(graph: _Graph, node: NodeProto, slot: int, array: Array, name: str | None = None) -> None:
    """Give a node a new float32 tensor as its input; the old one is removed if it has no other consumer."""
    near = name or node.input[slot]
    while len(node.input) <= slot:
        node.input.append("")
    node.input[slot] = graph.store(near, array.astype(np.float32))


RULES: tuple[Callable[[_Graph, NodeProto], Change | None], ...] = (
    _without_effect,
    _common_subexpression,
    _constant,
    _batch_normalization,
    _factors,
    _scaled_after,
    _scaled_before,
    _repeated,
)
