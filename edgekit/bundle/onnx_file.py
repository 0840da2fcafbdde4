"""The file `graph.onnx` of a bundle: parse and check it, count its learnt numbers, take them out to pack the bundle."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, missing_extra

try:
    import onnx
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "onnx", "onnx", "reading an ONNX graph") from None

Array = npt.NDArray[Any]
# types that numpy has
PLAIN = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32)
LARGEST_GRAPH = 1_000_000  # nodes; the largest models that run on a device have some ten thousand
DEEPEST = 100  # functions that call one another in a chain
# bits of the types whose numbers share a byte
NARROW = {
    number: 2 if name.endswith("INT2") else 4
    for name, number in TensorProto.DataType.items()
    if name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
}
LEAST = 8  # the least size of a learnt tensor; shapes, axes and single constants have fewer numbers


def load(content: bytes, source: str) -> ModelProto:
    """Parse and check a graph. It raises if the graph reads other files, because a bundle holds one file, and if small
    functions that call one another stand for a huge graph."""
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # onnx passes on protobuf's DecodeError without a public name
        raise EdgekitError(f"{source}: not an ONNX model, or cut short ({error}); export it again") from None
    if not model.graph.output:
        raise EdgekitError(f"{source}: not an ONNX model, it has no outputs; export it again")
    for tensor in tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            raise EdgekitError(
                f"{source}: the weights of {tensor.name!r} are in another file; save the model as one file: "
                "onnx.save(onnx.load(PATH), OTHER_PATH)"
            )
        if not _holds_its_numbers(tensor):
            raise EdgekitError(
                f"{source}: the tensor {tensor.name!r} of type {tensor.data_type} does not hold the numbers of its "
                "shape; export the model again"
            )
    if (nodes := expanded_nodes(model)) > LARGEST_GRAPH:
        raise EdgekitError(
            f"{source}: its functions call one another so often that the graph has {nodes:,} nodes; edgekit reads up "
            f"to {LARGEST_GRAPH:,}"
        )
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise EdgekitError(f"{source}: not a valid ONNX model: {str(error).splitlines()[0]}") from None
    return model


def graphs(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """Yield the subgraphs of the nodes, such as branches of an If, and the subgraphs of those."""
    for node in nodes:
        for item in node.attribute:
            for graph in [item.g] if item.HasField("g") else item.graphs:
                yield graph
                yield from graphs(graph.node)


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor of the file: of the graph, its subgraphs, functions, training graphs, attributes, and the
    parts of sparse tensors."""
    roots = [model.graph, *(graph for item in model.training_info for graph in (item.initialization, item.algorithm))]
    functions = [function.node for function in model.functions]
    bodies = [*(graph.node for graph in roots), *functions]
    every = [*roots, *(graph for nodes in bodies for graph in graphs(nodes))]
    for graph in every:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    defaults = (item for function in model.functions for item in function.attribute_proto)
    lists = [*functions, *(graph.node for graph in every)]
    of_nodes = (item for nodes in lists for node in nodes for item in node.attribute)
    for item in (*of_nodes, *defaults):
        yield from ([item.t] if item.HasField("t") else item.tensors)
        for sparse in [item.sparse_tensor] if item.HasField("sparse_tensor") else item.sparse_tensors:
            yield from (sparse.values, sparse.indices)


def _holds_its_numbers(tensor: TensorProto) -> bool:
    """Return whether the tensor stores as many numbers as its shape has."""
    known = tensor.data_type in TensorProto.DataType.values() and tensor.data_type != TensorProto.UNDEFINED
    if not known or any(length < 0 for length in tensor.dims):
        return False
    count = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        return bool(len(tensor.string_data) == count)
    if tensor.raw_data:
        bits = NARROW.get(tensor.data_type) or 8 * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
        return bool(len(tensor.raw_data) == (bits * count + 7) // 8)
    if count > tensor.ByteSize() * 8:
        return False  # even a number of one bit takes more than the tensor holds
    try:
        return bool(to_array(tensor).size == count)
    except (ValueError, TypeError, KeyError, OverflowError):
        return False


def expanded_nodes(model: ModelProto) -> int:
    """Return how many nodes the graph has if each call of a function of the file is replaced by the function's nodes,
    as runtimes do. A function that calls itself counts as more than any graph has."""
    functions = {(function.domain, function.name): function for function in model.functions}
    known: dict[tuple[str, str], int] = {}

    def count(nodes: Iterable[NodeProto], callers: frozenset[tuple[str, str]]) -> int:
        total = 0
        for node in (*nodes, *(inner for graph in graphs(nodes) for inner in graph.node)):
            key = (node.domain, node.op_type)
            if key in callers:
                return LARGEST_GRAPH + 1
            if key in functions and key not in known:
                if len(callers) > DEEPEST:
                    return LARGEST_GRAPH + 1
                known[key] = count(functions[key].node, callers | {key})
            total += known.get(key, 1)
        return total

    return count(model.graph.node, frozenset())


def parameters(model: ModelProto) -> int:
    """Return how many learnt numbers the graph stores, of any type."""
    return sum(int(np.prod(tensor.dims)) for tensor in learnt(model))


def learnt(model: ModelProto) -> Iterator[TensorProto]:
    """Yield the initializers that hold weights; shapes, axes and single constants do not count."""
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims) >= LEAST and tensor.data_type != TensorProto.INT64:
            yield tensor


def to_array(tensor: TensorProto) -> Array:
    return numpy_helper.to_array(tensor)


def without_weights(content: bytes) -> tuple[bytes, dict[str, Array]]:
    """Return the graph without the bytes of its learnt tensors, and those tensors by name."""
    model = onnx.load_from_string(content)
    arrays = {}
    for tensor in learnt(model):
        if tensor.data_type in PLAIN:
            arrays[tensor.name] = to_array(tensor)
            empty = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            tensor.CopyFrom(empty)
    return serialized(model), arrays


def with_weights(skeleton: bytes, arrays: Mapping[str, Array]) -> bytes:
    """Return the inverse of `without_weights`. Raises ValueError if the skeleton is not an ONNX graph."""
    try:
        model = onnx.load_from_string(skeleton)
    except Exception as error:  # onnx passes on protobuf's DecodeError without a public name
        raise ValueError(f"the graph is damaged: {error}") from None
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.raw_data = np.ascontiguousarray(arrays[tensor.name]).tobytes()
    return serialized(model)


def serialized(model: ModelProto) -> bytes:
    """Return bytes that are always the same for the same graph."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content
