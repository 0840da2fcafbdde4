"""The least work of a graph: operations and bytes, operator by operator, and the lower bound of its time on a machine
of known rates (Williams et al. 2009, "Roofline", CACM 52(4))."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from edgekit.cost.timing import in_turns, timed
from edgekit.errors import EdgekitError
from edgekit.graph.index import Index
from edgekit.graph.shapes import Sizes, Value, item_bytes, sized

Shape = tuple[int, ...]
MOST_TRIES = 100_000  # the largest number of calls that measure a rate
Bytes = Mapping[str, float]  # by precision: "float32", "int8"; "other" for all other types
PRECISION: Mapping[int, str] = {
    TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT8: "int8", TensorProto.UINT8: "int8", TensorProto.INT4: "int4", TensorProto.UINT4: "int4",
    TensorProto.FLOAT8E4M3FN: "float8", TensorProto.FLOAT8E5M2: "float8",
}  # fmt: skip
# the same bytes under another name
VIEWS = frozenset(("Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze", "Dropout"))
# they read as many bytes as they write
MOVES = frozenset(("Gather", "GatherElements", "GatherND", "Slice", "Split", "Expand", "Tile"))
# Elementwise operators; a GPU's compiler fuses them into the operator before.
POINTWISE = frozenset(
    (
        "Abs", "Add", "And", "BatchNormalization", "BiasGelu", "Cast", "Ceil", "Clip", "Cos", "DequantizeLinear",
        "Div", "Elu", "Equal", "Erf", "Exp", "FastGelu", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid",
        "HardSwish", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Not", "Or",
        "PRelu", "Pow", "QuantizeLinear", "QuickGelu", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin",
        "Softplus", "Sqrt", "Sub", "Tanh", "Where",
    )
)  # fmt: skip
MATRIX = frozenset(("MatMul", "FusedMatMul", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"))
GENERAL = frozenset(("Gemm", "FusedGemm", "QGemm"))
CONVOLUTION = frozenset(("Conv", "FusedConv", "ConvInteger", "QLinearConv", "NhwcFusedConv"))
INTEGER = frozenset(
    (
        "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "ConvInteger",
        "QLinearConv",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cost:
    """flops: two for each multiplication and addition of matrix products and convolutions; one for each output value of
    other operators. bytes: weights, inputs and outputs once; values in between may never leave a cache."""

    flops: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates that one thread of a machine reaches. flops: float32 operations a second; bytes: from memory, a
    second."""

    flops: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Operator:
    """One node of a graph, and its least work.

    operations: as in Cost. product: whether it is a matrix product or convolution, for which devices have special
    units; then `precision` is that of its factors, else of its result. matrices: products that do not share a factor,
    such as heads of attention; groups of a convolution; rows of a normalization. inner: terms of each sum of a product;
    columns: of its result, or channels of a group. read, written: bytes of activations; weights: bytes of stored
    tensors. inputs, outputs: names of those activations. view: it only renames bytes. sizes_only: it computes a shape,
    on the processor that starts the kernels.
    """

    name: str
    op_type: str
    operations: float
    precision: str
    product: bool
    matrices: int
    inner: int
    columns: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    read: Bytes
    written: Bytes
    weights: Bytes
    view: bool = False
    sizes_only: bool = False

    @property
    def bytes(self) -> float:
        return sum(self.read.values()) + sum(self.written.values()) + sum(self.weights.values())


@dataclass(frozen=True, slots=True)
class Workload:
    """A graph's operators in its order. values: activations and tensors by name; stored: those that are in memory all
    the time; unknown: names of the nodes whose shapes are not known, which count as zero."""

    operators: tuple[Operator, ...]
    values: Mapping[str, Value]
    stored: Mapping[str, Value]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    unknown: tuple[str, ...]


def graph_cost(model: ModelProto, batch: int, lengths: Mapping[str, int] | None = None) -> Cost:
    """Return the cost of one call at a batch size; `lengths` of other named axes, by default 2."""
    sizes = sized(model, batch, lengths)
    ends = {item.name for item in (*model.graph.initializer, *model.graph.input, *model.graph.output)}
    moved = sum(sizes.values[name].bytes for name in ends if name in sizes.values)
    return Cost(sum(item.operations for item in work(model, sizes).operators), float(moved))


def work(model: ModelProto, sizes: Sizes) -> Workload:
    """Return the operators of a graph at these sizes.

    Every runtime computes values that depend on stored tensors alone once, before the first call; they count as stored.
    A DequantizeLinear is part of the product that reads it, if its only consumers are products on dequantized factors:
    runtimes turn this pattern into integer kernels, which read the codes.
    """
    stored_ends = set(sizes.stored)
    inputs = tuple(value.name for value in model.graph.input if value.name not in stored_ends)
    constants = _constants(model, sizes)
    codes = _codes(model)
    operators, unknown, stored = [], [], dict[str, Value]()
    for node in model.graph.node:
        if all(name in constants for name in node.output if name):
            continue
        if any(name and name not in sizes.values for name in node.output[:1]):
            unknown.append(node.name or node.op_type)
            continue
        operator = _operator(node, sizes, constants, codes)
        operators.append(operator)
        for name in node.input:
            held = codes.get(name, name)
            if held in constants and held in sizes.values and not operator.view:
                stored[held] = sizes.values[held]
    return Workload(
        tuple(operators),
        sizes.values,
        stored,
        inputs,
        tuple(value.name for value in model.graph.output),
        tuple(unknown),
    )


def _constants(model: ModelProto, sizes: Sizes) -> set[str]:
    """Return the names of values that are the same in every call: stored tensors, and values computed from them alone.
    Values computed from the sizes of the inputs are not included, because every call computes them."""
    found = set(sizes.stored)
    for node in model.graph.node:
        if node.op_type == "Constant" or (node.input and all(not name or name in found for name in node.input)):
            found |= {name for name in node.output if name}
    return found


def _codes(model: ModelProto) -> dict[str, str]:
    """Return the codes by the name of their dequantized value, if its only consumers are products on dequantized
    factors."""
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    index = Index(model)
    return {
        name: node.input[0]
        for name, node in made.items()
        if name not in index.outputs
        and index.consumers(name)
        and all(
            consumer.op_type in ("MatMul", "Gemm", "Conv") and all(factor in made for factor in consumer.input[:2])
            for consumer in index.consumers(name)
        )
    }


def _operator(node: NodeProto, sizes: Sizes, constants: set[str], codes: Mapping[str, str]) -> Operator:
    values = sizes.values
    outputs = tuple(name for name in node.output if name and name in values)
    reads = [codes.get(name, name) for name in node.input if name]
    view = (node.op_type in VIEWS and node.domain in ("", "ai.onnx")) or any(name in codes for name in node.output)
    sizes_only = all(name in sizes.known for name in outputs)
    out = values[outputs[0]]
    product, operations, matrices, inner = _operations(node, values)
    columns = (out.shape[1] // matrices if "Conv" in node.op_type else out.shape[-1]) if product and out.shape else 1
    first = codes.get(node.input[0], node.input[0]) if node.input else ""
    dtype = values[first].dtype if product and first in values else out.dtype
    precision = "int8" if node.op_type in INTEGER else PRECISION.get(dtype, "other")
    written = _bytes(values, outputs)
    activations = tuple(dict.fromkeys(name for name in reads if name not in constants))
    read, weights = _bytes(values, activations), _bytes(values, dict.fromkeys(n for n in reads if n in constants))
    if node.op_type in MOVES:
        source = weights if not activations or node.input[0] in constants else read
        read, weights = ({}, dict(written)) if source is weights else (dict(written), {})
    if view:
        operations, read, written, weights = 0.0, {}, {}, {}
    return Operator(
        node.name or node.op_type,
        node.op_type,
        operations,
        precision,
        product,
        matrices,
        inner,
        columns,
        activations,
        outputs,
        read,
        written,
        weights,
        view,
        sizes_only,
    )


def _operations(node: NodeProto, values: Mapping[str, Value]) -> tuple[bool, float, int, int]:
    """Return whether a node is a product, its operations, its matrices (or rows) and the terms of a sum."""
    shapes = [values[name].shape if name in values else () for name in node.input]
    out = values[node.output[0]].shape
    count, op_type = float(math.prod(out)), node.op_type
    attributes = {item.name: item for item in node.attribute}
    if op_type in MATRIX and shapes[0]:
        transposed = "transA" in attributes and attributes["transA"].i and len(shapes[0]) > 1
        inner = shapes[0][-2 if transposed else -1]
        return True, 2 * count * inner, _matrices(shapes[1], out), inner
    if op_type == "QLinearMatMul" and shapes[0]:
        return True, 2 * count * shapes[0][-1], _matrices(shapes[3], out), shapes[0][-1]
    if op_type == "MatMulNBits" and "K" in attributes:
        return True, 2 * count * attributes["K"].i, 1, attributes["K"].i
    if op_type in GENERAL and len(shapes[0]) == 2:
        transposed = "transA" in attributes and attributes["transA"].i
        return True, 2 * count * shapes[0][0 if transposed else 1], 1, shapes[0][0 if transposed else 1]
    if op_type in CONVOLUTION and len(shapes) > 1:
        kernel = shapes[3] if op_type == "QLinearConv" else shapes[1]
        groups = attributes["group"].i if "group" in attributes else 1
        inner = math.prod(kernel[1:])
        return True, 2 * count * inner, groups, inner
    if op_type == "ConvTranspose" and shapes[0] and shapes[1]:
        groups = attributes["group"].i if "group" in attributes else 1
        return True, 2.0 * math.prod(shapes[0]) * math.prod(shapes[1][1:]), groups, shapes[0][1] // groups
    # of ONNX 23: scores, and the weighted sum of values
    if op_type == "Attention" and len(shapes) > 2 and len(shapes[0]) in (3, 4):
        heads = shapes[0][1] if len(shapes[0]) == 4 else attributes["q_num_heads"].i
        total = math.prod(shapes[0]) + math.prod(shapes[0][:-1]) * shapes[2][-1]  # for each key
        return True, 2.0 * total * shapes[1][-2], shapes[0][0] * heads, math.prod(shapes[0][2:]) // shapes[0][-2]
    if op_type == "Einsum" and "equation" in attributes:
        letters = dict[str, int]()
        for term, shape in zip(attributes["equation"].s.decode().split("->")[0].split(","), shapes, strict=False):
            letters |= dict(zip(term.strip(), shape, strict=False))
        total = math.prod(letters.values())
        return True, 2.0 * total, 1, max(1, round(total / max(count, 1)))
    if op_type in ("LSTM", "GRU", "RNN") and len(shapes) > 2 and len(shapes[0]) == 3:
        steps, rows = shapes[0][:2]
        return True, 2.0 * steps * rows * (math.prod(shapes[1]) + math.prod(shapes[2])), steps, shapes[2][-1]
    if op_type in ("MaxPool", "AveragePool") and "kernel_shape" in attributes:
        return False, count * math.prod(attributes["kernel_shape"].ints), 1, 1
    if op_type.startswith(("Reduce", "ArgM", "Global", "CumSum")) and shapes and shapes[0]:
        return False, float(math.prod(shapes[0])), math.prod(out), 1
    if op_type in ("Softmax", "LogSoftmax") or "Normalization" in op_type:
        return False, count, math.prod(out[:-1]), 1
    if op_type in ("Shape", "Constant", "Transpose", "Concat", "Pad", *VIEWS, *MOVES):
        rows = math.prod(out[:-1]) if op_type in MOVES else 1
        return False, 0.0, rows, 1
    return False, count, math.prod(out[:-1]) if out else 1, 1


def _matrices(second: Shape, out: Shape) -> int:
    """Return the number of products with separate second factors: one if the second factor is a single matrix."""
    return math.prod(out[:-2]) if math.prod(second[:-2]) > 1 else 1


def _bytes(values: Mapping[str, Value], names: Any) -> dict[str, float]:
    result: dict[str, float] = {}
    for name in names:
        if name in values:
            precision = PRECISION.get(values[name].dtype, "other")
            result[precision] = result.get(precision, 0.0) + values[name].count * item_bytes(values[name].dtype)
    return result


def least_seconds(cost: Cost, rates: Rates) -> float:
    """Return the roofline: the longer of the times for computing and for moving bytes."""
    return max(cost.flops / rates.flops, cost.bytes / rates.bytes)


def measured_rates(seconds: float = 0.3) -> Rates:
    """Measure one thread of this machine with onnxruntime: a large matrix product, and a copy that exceeds every
    cache."""
    product = _one_node("MatMul", (512, 512), (512, 512))
    copy = _one_node("Add", (1 << 23,), (1,))
    return Rates(2 * 512**3 / _fastest(product, seconds), 2 * 4 * (1 << 23) / _fastest(copy, seconds))


def _one_node(operator: str, left: Shape, right: Shape) -> Callable[[], Any]:
    """Return a function that runs one operator on one thread."""
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
    """Return the CPU seconds of the fastest call: the limit is the machine's speed without load."""
    best = float(in_turns([timed(call, time.thread_time)], seconds=seconds, most=MOST_TRIES).min())
    if not 0 < best < math.inf:
        raise EdgekitError("the machine's rates cannot be measured: its clock of CPU time stands still")
    return best
