"""Store weights in a second file next to the graph if one file would exceed protobuf's limit of 2 GB."""

from __future__ import annotations

from onnx import ModelProto, TensorProto
from onnx.external_data_helper import set_external_data

from edgekit.bundle.onnx_file import serialized, to_array

LARGEST = 2**31 - 2**24  # bytes of one file; protobuf ends at 2 GB, and metadata takes some
LEAST = 1024  # bytes; a smaller tensor stays in the graph
ALIGNED = 4096  # bytes, one memory page: runtimes map the file


def files(model: ModelProto, name: str, largest: int = LARGEST) -> dict[str, bytes]:
    """Return the graph as one file, or as `name` and `name`.data if one file would be larger than `largest`."""
    size = sum(max(len(tensor.raw_data), tensor.ByteSize()) for tensor in model.graph.initializer)
    if size <= largest:
        return {name: serialized(model)}
    skeleton, data = ModelProto(), bytearray()
    skeleton.CopyFrom(model)
    for tensor in skeleton.graph.initializer:
        raw = tensor.raw_data or to_array(tensor).tobytes()
        if len(raw) < LEAST:
            continue
        data += bytes(-len(data) % ALIGNED)
        whole = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=raw)
        set_external_data(whole, f"{name}.data", offset=len(data), length=len(raw))
        whole.ClearField("raw_data")
        tensor.CopyFrom(whole)
        data += raw
    return {name: serialized(skeleton), f"{name}.data": bytes(data)}
