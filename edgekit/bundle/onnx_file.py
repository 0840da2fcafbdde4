"""The file `graph.onnx` of a bundle: parse and check it, count its learnt numbers, take them out to pack the bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, missing_extra

try:
    import onnx
    from onnx import ModelProto, TensorProto, numpy_helper
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "onnx", "onnx", "reading an ONNX graph") from None

Array = npt.NDArray[Any]
# types that numpy has
PLAIN = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32)
LEAST = 8  # the least size of a learnt tensor; shapes, axes and single constants have fewer numbers


def load(content: bytes, source: str) -> ModelProto:
    """Parse and check a graph. It raises if the weights are in other files, because a bundle holds one file."""
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # onnx passes on protobuf's DecodeError without a public name
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
    """The inverse of `without_weights`."""
    model = onnx.load_from_string(skeleton)
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.raw_data = np.ascontiguousarray(arrays[tensor.name]).tobytes()
    return serialized(model)


def serialized(model: ModelProto) -> bytes:
    """Return bytes that are always the same for the same graph."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content
