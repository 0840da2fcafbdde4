"""Tensors of the Open Inference Protocol v2, as JSON and as bytes behind the JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.tensors import Arrays, TensorSpec
from runtimes.daemon.fields import Fields, parse
from runtimes.daemon.refusal import RefusedError

DTYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER = "inference-header-content-length"
MOST_AXES = 16


@dataclass(frozen=True, slots=True)
class InferRequest:
    """outputs: whether each output that is wanted comes as bytes; empty for all outputs; binary: whether those come as
    bytes that say nothing of it; deadline: seconds from now."""

    id: str | None
    arrays: Arrays
    outputs: Mapping[str, bool]
    binary: bool
    deadline: float | None


def read(content: bytes, header: str | None) -> InferRequest:
    """Return the request in a body. header: of HTTP, the bytes of JSON at the beginning, if bytes follow."""
    size = len(content)
    if header is not None:
        if not (header.isascii() and header.isdigit() and int(header[:12]) <= len(content)):
            raise RefusedError(400, f"Inference-Header-Content-Length is {header[:40]!r}; expected 0 to {len(content)}")
        size = int(header)
    fields = Fields(parse(content[:size]))
    rest = memoryview(content)[size:]
    arrays: Arrays = {}
    for number, item in enumerate(fields.take("inputs", list, needed=True)):
        name, array, used = _input(item, f"inputs[{number}]", rest)
        if name in arrays:
            raise RefusedError(400, f"the input {name[:60]!r} is given twice")
        arrays[name], rest = array, rest[used:]
    if len(rest):
        raise RefusedError(400, f"{len(rest)} bytes follow that belong to no input")
    binary, deadline = _parameters(fields.take("parameters", dict, {}))
    request = InferRequest(fields.take("id", str), arrays, _outputs(fields, binary), binary, deadline)
    fields.finish(("id", "inputs", "outputs", "parameters"))
    return request


def _parameters(given: Mapping[str, Any]) -> tuple[bool, float | None]:
    fields = Fields(given, "parameters.")
    binary = bool(fields.take("binary_data_output", bool, False))
    timeout = fields.number("timeout", 0, 0, 1e15) / 1e6  # microseconds, as Triton has it
    deadline = fields.number("deadline_ms", 0, 1, 1e9) / 1e3 if "deadline_ms" in fields else None
    fields.finish(("binary_data_output", "timeout", "deadline_ms"), {"priority": 0, "sequence_id": 0})
    return binary, deadline if deadline is not None else timeout or None


def _outputs(fields: Fields, binary: bool) -> Mapping[str, bool]:
    found = {}
    for number, item in enumerate(fields.take("outputs", list, [])):
        output = Fields(item if isinstance(item, dict) else {}, f"outputs[{number}].")
        parameters = Fields(output.take("parameters", dict, {}), f"outputs[{number}].parameters.")
        found[output.take("name", str, needed=True)] = bool(parameters.take("binary_data", bool, binary))
        parameters.finish(("binary_data",), {"classification": 0})
        output.finish(("name", "parameters"))
    return found


def _input(value: Any, where: str, rest: memoryview) -> tuple[str, npt.NDArray[Any], int]:
    """Return the name, the array, and how many of the bytes behind the JSON it took."""
    fields = Fields(value if isinstance(value, dict) else {}, f"{where}.")
    name = fields.take("name", str, needed=True)
    dtype = np.dtype(DTYPES[fields.choice("datatype", "", tuple(DTYPES))])
    shape = fields.take("shape", list, needed=True)
    if not 1 <= len(shape) <= MOST_AXES or not all(type(axis) is int and 0 <= axis < 1 << 40 for axis in shape):
        raise fields.refused("shape", shape, f"1 to {MOST_AXES} whole numbers")
    parameters = Fields(fields.take("parameters", dict, {}), f"{where}.parameters.")
    data = fields.take("data", list)
    size = parameters.take("binary_data_size", int)
    parameters.finish(("binary_data_size",))
    fields.finish(("name", "datatype", "shape", "parameters", "data"))
    if (data is None) == (size is None):
        raise RefusedError(400, f"{where}: expected data, or parameters.binary_data_size, and not both")
    if size is None:
        return name, _from_json(data, dtype, shape, where), 0
    return name, _from_bytes(rest, size, dtype, shape, where), size


def _from_bytes(
    rest: memoryview, size: int, dtype: np.dtype[Any], shape: Sequence[int], where: str
) -> npt.NDArray[Any]:
    needed = math.prod(shape) * dtype.itemsize
    if size != needed or size > len(rest):
        raise RefusedError(
            400, f"{where}: {size} bytes, of {len(rest)} that follow the JSON; {dtype} of shape {shape} has {needed}"
        )
    if dtype.kind == "b" and any(byte > 1 for byte in rest[:size]):
        raise RefusedError(400, f"{where}: bytes of BOOL are 0 and 1")
    return np.frombuffer(rest[:size], dtype).reshape(shape)


def _from_json(data: list[Any], dtype: np.dtype[Any], shape: Sequence[int], where: str) -> npt.NDArray[Any]:
    """Return an array from numbers in row-major order, nested or not."""
    try:
        found = np.asarray(data) if data else np.empty(0, dtype)
    except (ValueError, OverflowError):
        raise RefusedError(400, f"{where}.data is no array of numbers, or a ragged one") from None
    if found.size != math.prod(shape) or (found.ndim > 1 and list(found.shape) != list(shape)):
        raise RefusedError(400, f"{where}.data has shape {list(found.shape)}; expected {shape}, or it flat")
    allowed = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[dtype.kind]
    if found.size and found.dtype.kind not in allowed:
        raise RefusedError(400, f"{where}.data holds other values than numbers of {NAMES[str(dtype)]}")
    with np.errstate(over="ignore"):
        array = found.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(array, found):
        raise RefusedError(400, f"{where}.data holds numbers outside the range of {NAMES[str(dtype)]}")
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise RefusedError(400, f"{where}.data holds numbers that are too large for {NAMES[str(dtype)]}")
    return array.reshape(shape)


def write(name: str, request: InferRequest, found: Arrays) -> tuple[bytes, int | None]:
    """Return the body of an answer, and how many of its bytes are JSON, if bytes follow."""
    wanted = request.outputs or dict.fromkeys(found, request.binary)
    tensors, blobs = [], []
    for output, binary in wanted.items():
        array = np.ascontiguousarray(found[output])
        tensor: dict[str, Any] = {"name": output, "datatype": NAMES[str(array.dtype)], "shape": list(array.shape)}
        if binary:
            blobs.append(array.tobytes())
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        elif array.dtype.kind == "f" and not np.isfinite(array).all():
            raise RefusedError(
                400,
                f"the output {output!r} holds NaN or infinite values for these inputs; JSON has none, ask for bytes",
            )
        else:
            tensor["data"] = array.reshape(-1).tolist()
        tensors.append(tensor)
    answer = {"model_name": name, "model_version": "1", "outputs": tensors}
    head = json.dumps(answer | ({"id": request.id} if request.id is not None else {})).encode()
    return head + b"".join(blobs), len(head) if blobs else None


def described(spec: TensorSpec) -> dict[str, Any]:
    """Return an input or output as the protocol describes it; -1 is an axis of any length."""
    shape = [axis if isinstance(axis, int) else -1 for axis in spec.shape]
    return {"name": spec.name, "datatype": NAMES.get(spec.dtype, spec.dtype.upper()), "shape": shape}


def check_outputs(request: InferRequest, specs: Sequence[TensorSpec]) -> None:
    names = [spec.name for spec in specs]
    for name in request.outputs:
        if name not in names:
            raise RefusedError(400, f"unknown output {name[:60]!r}; the model gives {', '.join(names)}")
