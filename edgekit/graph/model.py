"""Describe and edit ONNX graphs: the form of a model after it is lowered."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.format import KEY, Bundle, model_key
from edgekit.bundle.onnx_file import PLAIN, to_array
from edgekit.errors import EdgekitError, missing_extra

try:
    from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "onnx", "onnx", "reading an ONNX graph") from None

from edgekit.graph.index import Index  # this module imports onnx

Array = npt.NDArray[Any]


def stored_graph(bundle: Bundle) -> ModelProto:
    """Return the graph that the bundle holds, with the bundle's model key in its metadata."""
    model = bundle.graph()
    others = {item.key: item.value for item in model.metadata_props if item.key != KEY}
    helper.set_model_props(model, {**others, KEY: model_key(bundle)})
    return model


def normalized(model: ModelProto) -> ModelProto:
    """Return a copy in which every node has a unique name, which passes use, and all tensors store their numbers in the
    same way: Constant nodes of the graph itself become stored tensors, because converters such as Paddle's write the
    weights into them. Metadata of exporters is dropped."""
    result = ModelProto()
    result.CopyFrom(model)
    _store_constants(result)
    name_nodes(result)
    for tensor in result.graph.initializer:
        if tensor.data_type in PLAIN and not tensor.raw_data:
            tensor.CopyFrom(numpy_helper.from_array(to_array(tensor), tensor.name))
    for item in (result, result.graph, *result.graph.node, *result.graph.initializer):
        item.ClearField("doc_string")
        del item.metadata_props[:]
    return result


def _store_constants(model: ModelProto) -> None:
    """Replace Constant nodes that hold a tensor by stored tensors of the same name."""
    outputs = {value.name for value in model.graph.output}
    kept = []
    for node in model.graph.node:
        tensor = attribute(node, "value", None)
        if node.op_type != "Constant" or not isinstance(tensor, TensorProto) or node.output[0] in outputs:
            kept.append(node)
            continue
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
    model.graph.ClearField("node")
    model.graph.node.extend(kept)


@dataclass(frozen=True, slots=True)
class Use:
    """A product with a stored weight. `axis`: the axis of the stored weight that the product sums over."""

    node: NodeProto
    axis: int
    transposed: bool  # the product reads the weight through a Transpose

    @property
    def activation(self) -> str:
        """Return the value that the product multiplies with the weight."""
        name: str = self.node.input[0]
        return name


@dataclass(frozen=True, slots=True)
class Weight:
    """A float32 tensor of the file and all its consumers: products, which read it directly or (last) through a
    Transpose, and names of others. A tied weight is one tensor with several consumers; a pass that made a copy for each
    would undo the tying."""

    tensor: TensorProto
    uses: tuple[Use, ...]
    others: tuple[str, ...]

    @property
    def name(self) -> str:
        name: str = self.tensor.name
        return name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.dims)

    @property
    def axes(self) -> frozenset[int]:
        """Return the axes that products sum over: both, if a matrix is used plain and transposed."""
        return frozenset(use.axis for use in self.uses)

    @property
    def consumers(self) -> str:
        """Return all consumers as text, for a plan or an error."""
        return ", ".join([use.node.name + " (transposed)" * use.transposed for use in self.uses] + list(self.others))


def weights(model: ModelProto) -> list[Weight]:
    """Return every float32 tensor of two or more dimensions that a MatMul, Gemm or Conv reads as its second input,
    directly or through the Transpose of a matrix."""
    index = Index(model)
    result = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) >= 2:
            uses, others = _uses(tensor.name, len(tensor.dims), index)
            if uses:
                result.append(Weight(tensor, tuple(sorted(uses, key=lambda use: use.transposed)), tuple(others)))
    return result


def _uses(name: str, rank: int, index: Index, transposed: bool = False) -> tuple[list[Use], list[str]]:
    uses: list[Use] = []
    others: list[str] = []
    for item in index.consumptions(name):
        node = item.node
        if node is None:
            others.append("an output of the graph")
        elif not item.nested and item.slot == 1 and (axis := _summed_axis(node, rank)) is not None:
            uses.append(Use(node, axis ^ transposed, transposed))
        elif not item.nested and node.op_type == "Transpose" and rank == 2 and _swaps(node):
            through = _uses(node.output[0], rank, index, not transposed)
            uses += through[0]
            others += through[1]
        else:
            others.append(node.name or node.op_type)
    return uses, others


def _summed_axis(node: NodeProto, rank: int) -> int | None:
    """Return the axis of a node's second input that it sums over; None if the node is not a product that passes
    support."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "MatMul":
        return rank - 2
    if node.op_type == "Gemm" and not attribute(node, "transA", 0):
        return 1 if attribute(node, "transB", 0) else 0
    return 1 if node.op_type == "Conv" else None


def _swaps(node: NodeProto) -> bool:
    """Return whether a Transpose of a matrix really swaps its axes."""
    return list(attribute(node, "perm", [1, 0])) == [1, 0]


def stored_values(model: ModelProto) -> set[str]:
    """Return the names of the values that depend on no input: stored tensors, and results of nodes that read only such
    values."""
    known = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.input and all(name in known for name in node.input if name):
            known.update(node.output)
    return known


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Return the value of a node's attribute."""
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def opset(model: ModelProto) -> int:
    """Return the version of the standard operators in the graph."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def name_nodes(model: ModelProto) -> None:
    """Give every node a unique name: passes select nodes by name, and exporters may leave it empty."""
    taken: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = unique_name(f"{node.name or node.op_type}_{number}", taken)
        taken.add(node.name)


def unique_name(name: str, taken: Iterable[str]) -> str:
    """Return the name, with a number if it is taken."""
    taken = set(taken)
    return (
        name if name not in taken else next(new for n in range(len(taken) + 1) if (new := f"{name}_{n}") not in taken)
    )


def value_names(model: ModelProto) -> set[str]:
    """Return the names of all values of the graph and its subgraphs."""
    return set(Index(model).values)


def replace_tensor(model: ModelProto, name: str, tensors: Sequence[TensorProto], nodes: Sequence[NodeProto]) -> None:
    """Replace a stored tensor by nodes that compute it from other stored tensors. Its consumers still read it by its
    name, so tied weights stay tied."""
    graph = model.graph
    for field in (graph.initializer, graph.input):  # old graphs also list stored tensors among their inputs
        for index in [number for number, item in enumerate(field) if item.name == name][::-1]:
            del field[index]
    graph.initializer.extend(tensors)
    for node in reversed(nodes):
        graph.node.insert(0, node)


def eliminate_dead_nodes(model: ModelProto) -> None:
    """Remove stored tensors and nodes whose results have no consumer. Old graphs also list stored tensors among their
    inputs; without its tensor, such an entry would be an input that callers must give."""
    graph = model.graph
    while True:
        index = Index(model)
        nodes = [node for node in graph.node if any(index.is_consumed(name) for name in node.output)]
        tensors = [tensor for tensor in graph.initializer if index.is_consumed(tensor.name)]
        if len(nodes) == len(graph.node) and len(tensors) == len(graph.initializer):
            return
        dead = index.initializers.keys() - {tensor.name for tensor in tensors}
        inputs = [value for value in graph.input if value.name not in dead]
        for field, kept in (("node", nodes), ("initializer", tensors), ("input", inputs)):
            graph.ClearField(field)
            getattr(graph, field).extend(kept)


def chosen_weights(model: ModelProto, include: Sequence[str], *, convolutions: bool = False) -> list[Weight]:
    """Return matrices that MatMul and Gemm read, and on request weights of Conv, whose names match a shell-style
    pattern."""
    found = [
        weight
        for weight in weights(model)
        if (len(weight.shape) == 2 and all(use.node.op_type != "Conv" for use in weight.uses))
        or (convolutions and all(use.node.op_type == "Conv" for use in weight.uses))
    ]
    if not found:
        raise EdgekitError(
            "the graph has no product with a float32 weight that this pass could change; leave this pass out"
        )
    chosen = [weight for weight in found if any(fnmatch.fnmatch(weight.name, pattern) for pattern in include)]
    if not chosen:
        names = ", ".join(weight.name for weight in found)
        raise EdgekitError(f"include: no weight matches {', '.join(include)}; the graph has {names}")
    return chosen


def set_tensor(model: ModelProto, name: str, array: Array) -> None:
    """Give a stored tensor new values, for all its consumers."""
    tensor = next(item for item in model.graph.initializer if item.name == name)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array.astype(dtype)), name))
