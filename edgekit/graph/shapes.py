"""Compute the shapes of all values of a graph for given lengths of its open axes. ONNX infers them; if the graph
computes a shape itself, this module does that arithmetic, and repeats both until no new shape appears."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from edgekit.bundle.tensors import multiple
from edgekit.graph.signature import batch_places

Array = npt.NDArray[Any]
LARGEST = 4096  # numbers; a larger tensor is data, not a shape
RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
)


@dataclass(frozen=True, slots=True)
class Value:
    """A stored tensor or an activation: its shape, and its type as ONNX's number (TensorProto.FLOAT and so on)."""

    shape: tuple[int, ...]
    dtype: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return self.count * item_bytes(self.dtype)


@dataclass(frozen=True, slots=True)
class Sizes:
    """values: by name, without those of unknown shape. known: the values of tensors that depend only on sizes. stored:
    names of tensors that the graph holds."""

    values: Mapping[str, Value]
    known: Mapping[str, Array]
    stored: frozenset[str]


def sized(
    model: ModelProto,
    batch: int,
    lengths: Mapping[str, int] | None = None,
    also: Mapping[str, Value] | None = None,
) -> Sizes:
    """Compute the sizes at a batch size. `lengths`: of other open axes by name; an axis without an entry gets twice its
    multiple. `also`: values known from elsewhere, for graphs with operators that ONNX does not define."""
    light = _light(model, batch, lengths or {}, also or {})
    known: dict[str, Array] = {}
    while True:
        inferred = shape_inference.infer_shapes(light, data_prop=True).graph
        values = _values(inferred)
        new = _folded(light, values, known)
        if not new:
            break
        known |= new
        light.graph.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in new.items() if value.dtype.kind in "ifb"
        )
        left = [node for node in light.graph.node if not all(name in known for name in node.output if name)]
        del light.graph.node[:]
        light.graph.node.extend(left)
        del light.graph.value_info[:]
        light.graph.value_info.extend(_info(name, value) for name, value in (also or {}).items() if name not in known)
    for name, array in known.items():
        values[name] = Value(array.shape, int(helper.np_dtype_to_tensor_dtype(array.dtype)))
    stored = {tensor.name: Value(tuple(tensor.dims), tensor.data_type) for tensor in model.graph.initializer}
    return Sizes({**values, **stored}, known, frozenset(stored))


def item_bytes(dtype: int) -> float:
    """Return the bytes of one number; 0.5 if two numbers share a byte."""
    if dtype in (TensorProto.INT4, TensorProto.UINT4):
        return 0.5
    return 16 if dtype == TensorProto.STRING else int(np.dtype(helper.tensor_dtype_to_np_dtype(dtype)).itemsize)


def _light(model: ModelProto, batch: int, lengths: Mapping[str, int], also: Mapping[str, Value]) -> ModelProto:
    """Return the graph with lengths for its open axes and without the values of its weights, which inference would
    copy."""
    light = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    large = {tensor.name for tensor in model.graph.initializer if math.prod(tensor.dims) > LARGEST}
    for tensor in model.graph.initializer:
        if tensor.name in large:
            graph.input.append(_info(tensor.name, Value(tuple(tensor.dims), tensor.data_type)))
        else:
            graph.initializer.append(tensor)
    places = batch_places(model)
    for value in model.graph.input:
        if value.name in large:
            continue
        graph.input.append(value)
        at = places.get(value.name, 0)
        for number, axis in enumerate(graph.input[-1].type.tensor_type.shape.dim):
            if not axis.HasField("dim_value"):
                name = axis.dim_param
                axis.dim_value = batch if number == at else lengths.get(name, 2 * multiple(name or "axis"))
    for value in model.graph.output:
        graph.output.append(value)
        graph.output[-1].type.tensor_type.ClearField("shape")  # the exporter's own guess
    inputs = {value.name for value in graph.input}
    graph.value_info.extend(_info(name, value) for name, value in also.items() if name not in inputs)
    return light


def _info(name: str, value: Value) -> Any:
    return helper.make_tensor_value_info(name, value.dtype, value.shape)


def _values(graph: Any) -> dict[str, Value]:
    found = {tensor.name: Value(tuple(tensor.dims), tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and tensor.elem_type and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            found[value.name] = Value(tuple(axis.dim_value for axis in tensor.shape.dim), tensor.elem_type)
    return found


def _folded(model: ModelProto, values: Mapping[str, Value], known: Mapping[str, Array]) -> dict[str, Array]:
    """Return the results of nodes whose inputs are small and all known, and the shapes that Shape nodes return."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer} | dict(known)
    new: dict[str, Array] = {}
    for node in model.graph.node:
        if node.op_type == "Shape" and node.domain in ("", "ai.onnx") and node.input[0] in values:
            ends = {item.name: item.i for item in node.attribute}
            shape = values[node.input[0]].shape[ends.get("start", 0) : ends.get("end")]
            new[node.output[0]] = np.array(shape, np.int64)
        elif node.op_type in RANDOM or not defs.has(node.op_type, node.domain) or _has_graph(node):
            continue
        elif all(not name or name in constants or name in new for name in node.input):
            sizes = [values[name].count for name in node.output if name in values]
            if node.op_type == "Constant" or (len(sizes) == len(node.output) and max(sizes, default=0) <= LARGEST):
                try:
                    new |= evaluated(model, node, {**constants, **new})
                except Exception:  # a node that the reference cannot compute stays unknown and is reported as such
                    continue
    return {name: value for name, value in new.items() if value.size <= LARGEST}


def evaluated(model: ModelProto, node: NodeProto, constants: Mapping[str, Array]) -> dict[str, Array]:
    """Compute the outputs of a node of the model, by name, from constants. ONNX's reference implementation does it, and
    may raise any exception."""
    names = [name for name in node.output if name]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_value_info(name, helper.make_tensor_type_proto(0, None)) for name in set(node.input) if name],
        [helper.make_value_info(name, helper.make_tensor_type_proto(0, None)) for name in names],
    )
    one = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    results = ReferenceEvaluator(one).run(None, {name: constants[name] for name in set(node.input) if name})
    return {name: np.asarray(result) for name, result in zip(names, results, strict=True)}


def _has_graph(node: NodeProto) -> bool:
    return any(item.HasField("g") or item.graphs for item in node.attribute)
