"""ONNX graphs: read, checked, described. What a model is once it has left its network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle import TensorSpec
from edgekit.errors import EdgekitError, missing_extra

try:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "onnx", "onnx", "reading an ONNX graph") from None

Array = npt.NDArray[Any]
_PLAIN = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32)  # numpy's own
LEAST = 8  # a learnt tensor has at least so many numbers; shapes, axes and single constants have fewer


def load(content: bytes, source: str) -> ModelProto:
    """Parse and check a graph. Weights in files beside it are refused: a bundle holds one file."""
    try:
        model = onnx.load_from_string(content)
    except DecodeError as error:
        raise EdgekitError(f"{source}: not an ONNX model, or cut short ({error}); export it again") from None
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise EdgekitError(
            f"{source}: its weights are in other files; save it as one: onnx.save(onnx.load(PATH), OTHER_PATH)"
        )
    if not model.graph.output:
        raise EdgekitError(f"{source}: not an ONNX model, it has no outputs; export it again")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise EdgekitError(f"{source}: not a valid ONNX model: {str(error).splitlines()[0]}") from None
    return model


def specs(model: ModelProto, source: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs. The first axis of each must be the batch, of any length."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_spec(value, source) for value in model.graph.input if value.name not in stored)
    outputs = tuple(_spec(value, source) for value in model.graph.output)
    if not inputs:
        raise EdgekitError(f"{source}: takes no inputs; there is nothing to run it on")
    for spec in inputs:
        if not spec.shape or isinstance(spec.shape[0], int):
            raise EdgekitError(
                f"{source}: input {spec.name!r} has shape {spec.shape_text}; the first axis must be a batch of any "
                "length: export it with a dynamic batch axis"
            )
    return inputs, outputs


def _spec(value: onnx.ValueInfoProto, source: str) -> TensorSpec:
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        raise EdgekitError(f"{source}: {value.name!r} is not a tensor of known rank; export it with shapes")
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    axes: list[int | str] = []
    for number, axis in enumerate(tensor.shape.dim):
        name = "batch" if number == 0 else axis.dim_param.replace(" ", "").replace("*", "x") or f"axis_{number}"
        axes.append(axis.dim_value if axis.HasField("dim_value") else name)
    return TensorSpec(value.name, tuple(axes), dtype.name)


def parameters(model: ModelProto) -> int:
    """How many learnt numbers the graph stores, whatever their type."""
    return sum(int(np.prod(tensor.dims)) for tensor in learnt(model))


def learnt(model: ModelProto) -> Iterator[TensorProto]:
    """Initialisers that hold weights; shapes, axes and single constants do not count."""
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims) >= LEAST and tensor.data_type != TensorProto.INT64:
            yield tensor


def matmul_weights(model: ModelProto) -> Iterator[tuple[NodeProto, TensorProto]]:
    """Every MatMul, Gemm and Conv with a float weight of the file as its second input, and that weight."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv") and node.domain in ("", "ai.onnx"):
            weight = stored.get(node.input[1])
            if weight is not None and weight.data_type == TensorProto.FLOAT and len(weight.dims) >= 2:
                yield node, weight


def to_array(tensor: TensorProto) -> Array:
    return numpy_helper.to_array(tensor)


def without_weights(content: bytes) -> tuple[bytes, dict[str, Array]]:
    """The graph with the bytes of its learnt tensors taken out, and those tensors by name."""
    model = onnx.load_from_string(content)
    arrays = {}
    for tensor in learnt(model):
        if tensor.data_type in _PLAIN:
            arrays[tensor.name] = to_array(tensor)
            empty = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            tensor.CopyFrom(empty)
    return serialised(model), arrays


def with_weights(skeleton: bytes, arrays: Mapping[str, Array]) -> bytes:
    """The inverse of `without_weights`."""
    model = onnx.load_from_string(skeleton)
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.raw_data = np.ascontiguousarray(arrays[tensor.name]).tobytes()
    return serialised(model)


def serialised(model: ModelProto) -> bytes:
    """The same bytes for the same graph, always."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content
