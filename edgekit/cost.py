"""What a graph must do at least: floating-point operations and bytes, and from them the time that no float32 program
beats on a machine of known rates (Williams et al. 2009, "Roofline", CACM 52(4))."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, shape_inference

from edgekit.bundle import multiple
from edgekit.errors import EdgekitError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """flops: multiplications and additions of matrix products and convolutions, two for each pair; of other operators
    one for each output value. bytes: weights, inputs and outputs once; what is in between may never leave a cache."""

    flops: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Rates:
    """What one thread of a machine reaches. flops: float32 operations a second; bytes: from memory, a second."""

    flops: float
    bytes: float


def graph_cost(model: ModelProto, batch: int, lengths: Mapping[str, int] | None = None) -> Cost:
    """What one call costs at a batch size; `lengths` of other named axes, 2 where it says nothing."""
    sized = ModelProto()
    sized.CopyFrom(model)
    for value in (*sized.graph.input, *sized.graph.output):
        for number, axis in enumerate(value.type.tensor_type.shape.dim):
            if not axis.HasField("dim_value"):
                name = axis.dim_param
                axis.dim_value = batch if number == 0 else (lengths or {}).get(name, 2 * multiple(name or "axis"))
    del sized.graph.value_info[:]
    inferred = shape_inference.infer_shapes(sized, data_prop=True).graph
    shapes: dict[str, Shape] = {}
    sizes: dict[str, int] = {}
    for tensor in inferred.initializer:
        shapes[tensor.name], sizes[tensor.name] = tuple(tensor.dims), _item_bytes(tensor.data_type)
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        kind = value.type.tensor_type
        if all(axis.HasField("dim_value") for axis in kind.shape.dim):
            shapes[value.name] = tuple(axis.dim_value for axis in kind.shape.dim)
            sizes[value.name] = _item_bytes(kind.elem_type)
    ends = {item.name for item in (*inferred.initializer, *inferred.input, *inferred.output)}
    moved = sum(math.prod(shapes[name]) * sizes[name] for name in ends if name in shapes)
    return Cost(sum(_flops(node, shapes) for node in inferred.node), float(moved))


def _flops(node: NodeProto, shapes: Mapping[str, Shape]) -> float:
    out = math.prod(shapes.get(node.output[0], (0,)))
    flops = float(out)
    ins = [shapes.get(name, ()) for name in node.input]
    if node.op_type in ("MatMul", "MatMulInteger", "FusedMatMul", "DynamicQuantizeMatMul") and ins[0]:
        flops = 2.0 * out * ins[0][-1]
    elif node.op_type == "Gemm" and len(ins[0]) == 2:
        transposed = any(item.name == "transA" and item.i for item in node.attribute)
        flops = 2.0 * out * ins[0][0 if transposed else 1]
    elif node.op_type in ("Conv", "ConvInteger") and len(ins) > 1 and ins[1]:
        flops = 2.0 * out * math.prod(ins[1][1:])
    elif node.op_type in ("Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Shape", "Constant"):
        flops = 0.0
    return flops


def _item_bytes(kind: int) -> int:
    return int(np.dtype(helper.tensor_dtype_to_np_dtype(kind)).itemsize) if kind != TensorProto.STRING else 16


def least_seconds(cost: Cost, rates: Rates) -> float:
    """The roofline: the longer of computing and of moving."""
    return max(cost.flops / rates.flops, cost.bytes / rates.bytes)


def measured_rates(seconds: float = 0.3) -> Rates:
    """This machine's, of one thread, by onnxruntime: a large matrix product, and a copy that no cache holds."""
    product = _one_node("MatMul", (512, 512), (512, 512))
    copy = _one_node("Add", (1 << 23,), (1,))
    return Rates(2 * 512**3 / _fastest(product, seconds), 2 * 4 * (1 << 23) / _fastest(copy, seconds))


def _one_node(operator: str, left: Shape, right: Shape) -> Callable[[], Any]:
    """A call of one operator on one thread."""
    import onnxruntime

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("a", left), ("b", right))]
    out = helper.make_tensor_value_info("c", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node(operator, ["a", "b"], ["c"])], operator, values, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feed = {"a": rng.random(left, np.float32), "b": rng.random(right, np.float32)}
    return lambda: session.run(None, feed)


def _fastest(call: Callable[[], Any], seconds: float) -> float:
    """CPU seconds of the fastest call: the limit is what the machine can do, not what it does under load."""
    best, until = math.inf, time.thread_time() + seconds
    while time.thread_time() < until:
        started = time.thread_time()
        call()
        best = min(best, time.thread_time() - started)
    if not 0 < best < math.inf:
        raise EdgekitError("the machine's rates cannot be measured: its clock of CPU time stands still")
    return best
