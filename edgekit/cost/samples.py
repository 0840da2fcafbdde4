"""The graphs to which the operator table is fitted: one operator each, in sizes around a core's cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, numpy_helper

# Operators that are not measured -> the measured operator with a similar loop.
ALIKE = {
    "Sub": "Add", "Div": "Mul", "Max": "Add", "Min": "Add", "Clip": "Relu", "LeakyRelu": "Relu", "Abs": "Relu",
    "Neg": "Relu", "Not": "Relu", "Floor": "Relu", "Ceil": "Relu", "Round": "Relu", "Sign": "Relu",
    "Reciprocal": "Mul", "HardSigmoid": "Relu", "HardSwish": "Mul", "PRelu": "Add", "And": "Add", "Or": "Add",
    "Equal": "Add", "Less": "Add", "LessOrEqual": "Add", "Greater": "Add", "GreaterOrEqual": "Add",
    "BiasGelu": "Gelu", "FastGelu": "Gelu", "QuickGelu": "Gelu", "Softplus": "Exp", "Log": "Exp", "Elu": "Exp",
    "Sin": "Exp", "Cos": "Exp", "LogSoftmax": "Softmax", "SkipLayerNormalization": "LayerNormalization",
    "SimplifiedLayerNormalization": "LayerNormalization", "InstanceNormalization": "LayerNormalization",
    "GroupNorm": "LayerNormalization", "ReduceSum": "ReduceMean", "ReduceMax": "ReduceMean", "ReduceMin": "ReduceMean",
    "GlobalAveragePool": "AveragePool", "GlobalMaxPool": "MaxPool", "ReorderInput": "Transpose",
    "ReorderOutput": "Transpose", "Split": "Slice", "Pad": "Concat", "Tile": "Expand", "GatherElements": "Gather",
    "GatherND": "Gather", "ConstantOfShape": "Expand", "DequantizeLinear": "QuantizeLinear", "Trilu": "Where",
    "DynamicQuantizeLinear": "QuantizeLinear", "BatchNormalization": "Mul", "Resize": "Expand",
}  # fmt: skip
ROWS = ("Add", "Mul")  # two rows in the table: for inputs of the same shape, and for one row that is added to all rows


@dataclass(frozen=True, slots=True)
class Sample:
    """One graph of one operator to time."""

    family: str
    model: ModelProto


def samples() -> list[Sample]:
    """Return the calibration set: graphs of one operator, from small sizes to sizes larger than a core's cache."""
    found: list[Sample] = []
    for rows, inner, columns in (
        (1, 32, 32),
        (1, 256, 256),
        (1, 1024, 1000),
        (16, 64, 64),
        (16, 512, 512),
        (64, 32, 128),
        (100, 192, 192),
        (200, 192, 768),
        (200, 768, 192),
        (256, 64, 64),
        (1000, 32, 32),
        (1600, 8, 64),
        (1600, 64, 128),
        (3000, 16, 32),
        (1, 2048, 2048),
        (8, 3000, 1100),
        (4000, 64, 256),
        (200, 32, 3),
        (200, 64, 10),
    ):
        found.append(_product("MatMul", (rows, inner), (inner, columns)))
        if columns <= 256 or rows <= 16:
            found.append(_product("Gemm", (rows, inner), (inner, columns)))
    for matrices, rows, inner, columns in (
        (4, 16, 16, 16),
        (3, 180, 64, 180),
        (3, 180, 180, 64),
        (16, 110, 2, 110),
        (16, 110, 110, 2),
        (64, 50, 8, 50),
        (64, 50, 50, 8),
        (256, 20, 16, 20),
        (32, 100, 16, 100),
        (32, 100, 100, 16),
        (1, 256, 256, 256),
        (8, 64, 32, 64),
        (512, 8, 8, 8),
        (300, 110, 2, 110),
        (300, 110, 110, 2),
        (96, 180, 64, 180),
        (96, 180, 180, 64),
        (200, 90, 4, 90),
        (200, 90, 90, 4),
    ):
        found.append(_two("MatMul", (matrices, rows, inner), (matrices, inner, columns), "product of activations"))
    for channels, out, size, kernel in (
        (3, 16, 32, 3),
        (3, 64, 64, 7),
        (16, 16, 16, 3),
        (32, 64, 32, 3),
        (64, 64, 16, 3),
        (64, 128, 14, 1),
        (128, 128, 14, 3),
        (32, 64, 56, 1),
        (256, 256, 7, 1),
        (256, 64, 28, 1),
        (8, 16, 64, 5),
        (1, 8, 28, 3),
        (20, 3, 40, 3),
        (48, 4, 24, 3),
        (24, 20, 32, 3),
        (32, 32, 96, 3),
    ):
        found.append(_convolution(channels, out, size, kernel, 1))
    for channels, size, kernel in (
        (16, 32, 3),
        (32, 56, 3),
        (64, 28, 3),
        (128, 14, 3),
        (96, 28, 5),
        (256, 7, 3),
        (8, 8, 3),
    ):
        found.append(_convolution(channels, channels, size, kernel, channels))
    shapes = (
        (1, 16, 32),
        (1, 100, 64),
        (4, 100, 64),
        (16, 100, 64),
        (64, 110, 32),
        (8, 180, 192),
        (64, 256, 64),
        (64, 240, 256),
    )
    for shape in shapes:
        found += [
            _two("Add", shape, shape),
            _two("Mul", shape, shape),
            _weighted("Add", shape),
            _weighted("Mul", shape),
        ]
        for op_type in ("Relu", "Erf", "Tanh", "Sigmoid", "Exp", "Sqrt"):
            found.append(_one(op_type, shape))
        found.append(_one("Gelu", shape, opset=20))
        found.append(_one("Softmax", shape, axis=-1))
        found.append(_one("ReduceMean", shape, axes=[-1], keepdims=1))
        found.append(_transposed(shape, (0, 2, 1)))
        found.append(_two("Concat", shape, shape, axis=1))
        found += [_normalized(shape), _power(shape), _where(shape), _slice(shape), _gather(shape), _expand(shape)]
        found += [_cast(shape), _reshape(shape), _quantized(shape)]
        found.append(_transposed((*shape[:2], 4, shape[2] // 4), (0, 2, 1, 3)))
        found.append(_transposed((*shape[:2], 4, shape[2] // 4), (0, 2, 3, 1)))
    for rows, width in ((16, 8), (100, 192), (200, 768), (1600, 16), (6000, 32), (1000, 256)):
        found += [_weighted(op_type, (rows, width)) for op_type in ROWS]
    for width in (2, 4, 16, 110, 180, 512):
        found.append(_one("Softmax", (8, 50, width), axis=-1))
        found.append(_normalized((8, 50, width)))
    for channels, size in ((16, 32), (64, 56), (64, 16), (128, 14), (8, 64), (32, 24)):
        for op_type in ("MaxPool", "AveragePool"):
            found.append(_one(op_type, (1, channels, size, size), kernel_shape=[2, 2], strides=[2, 2]))
        found.append(_one("ReduceMean", (1, channels, size, size), axes=[2, 3], keepdims=0))
        found.append(_transposed_convolution(channels, channels // 2, size // 2))
    for rows, inner, columns in (
        (1, 64, 64),
        (16, 64, 64),
        (16, 512, 512),
        (100, 192, 192),
        (200, 192, 768),
        (1000, 32, 32),
        (200, 768, 192),
    ):
        found.append(_dynamic(rows, inner, columns))
        found.append(_static(rows, inner, columns))
    return found


def composites() -> list[ModelProto]:
    """Return small networks that show contention: the time of operators whose weights and inputs are no longer in the
    cache."""
    found = [_dense(rows, width, depth) for rows, width, depth in ((1, 400, 5), (40, 200, 6), (500, 72, 8))]
    found += [_convolutions(channels, size) for channels, size in ((28, 40), (72, 20), (12, 72))]
    found += [_attention(rows, tokens, width) for rows, tokens, width in ((1, 80, 80), (6, 80, 80), (12, 30, 144))]
    return found


def _dense(rows: int, width: int, depth: int) -> ModelProto:
    nodes, weights = [], dict[str, Any]()
    for layer in range(depth):
        reads, writes = f"v{layer}" if layer else "a", f"v{layer + 1}" if layer + 1 < depth else "y"
        weights |= {f"w{layer}": _random(width, width) / width**0.5, f"b{layer}": _random(width)}
        nodes.append(helper.make_node("MatMul", [reads, f"w{layer}"], [f"m{layer}"], f"product{layer}"))
        nodes.append(helper.make_node("Add", [f"m{layer}", f"b{layer}"], [f"s{layer}"], f"bias{layer}"))
        nodes.append(helper.make_node("Relu" if layer % 2 else "Tanh", [f"s{layer}"], [writes], f"activation{layer}"))
    return graph_of(nodes, [(rows, width)], weights)


def _convolutions(channels: int, size: int) -> ModelProto:
    weights = {
        "w0": _random(channels, 3, 3, 3),
        "w1": _random(channels, channels, 3, 3) / channels,
        "w2": _random(channels, 1, 3, 3),
        "w3": _random(channels, channels, 1, 1) / channels,
    }
    nodes = []
    for number, groups in enumerate((1, 1, channels, 1)):
        reads, pads = f"r{number - 1}" if number else "a", [0 if number == 3 else 1] * 4
        conv = [reads, f"w{number}"]
        nodes.append(helper.make_node("Conv", conv, [f"c{number}"], f"conv{number}", group=groups, pads=pads))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"], f"relu{number}"))
    nodes.append(helper.make_node("Add", ["r1", "r3"], ["y"], "sum"))
    return graph_of(nodes, [(1, 3, size, size)], weights)


def _attention(rows: int, tokens: int, width: int, heads: int = 4) -> ModelProto:
    """Return a transformer block without the second half of its feed-forward layer."""
    weights: dict[str, Any] = {name: _random(width, width) / width**0.5 for name in ("q", "k", "v", "o")}
    weights |= {"up": _random(width, 2 * width), "scale": _random(width), "bias": _random(width)}
    weights |= {"split": np.array([0, 0, heads, -1]), "joined": np.array([0, 0, width])}
    nodes = [helper.make_node("LayerNormalization", ["a", "scale", "bias"], ["n"], "norm", axis=-1)]
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            helper.make_node("MatMul", ["n", name], [f"{name}1"], f"product {name}"),
            helper.make_node("Reshape", [f"{name}1", "split"], [f"{name}2"], f"split {name}"),
            helper.make_node("Transpose", [f"{name}2"], [f"{name}3"], f"turn {name}", perm=order),
        ]
    nodes += [
        helper.make_node("MatMul", ["q3", "k3"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["shares"], "softmax", axis=-1),
        helper.make_node("MatMul", ["shares", "v3"], ["mixed"], "mix"),
        helper.make_node("Transpose", ["mixed"], ["turned"], "turn back", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "joined"], ["flat"], "join"),
        helper.make_node("MatMul", ["flat", "o"], ["out"], "product o"),
        helper.make_node("Add", ["a", "out"], ["residual"], "residual"),
        helper.make_node("MatMul", ["residual", "up"], ["wide"], "product up"),
        helper.make_node("Sigmoid", ["wide"], ["y"], "sigmoid"),
    ]
    return graph_of(nodes, [(rows, tokens, width)], weights)


def graph_of(
    nodes: Sequence[Any],
    inputs: Sequence[tuple[int, ...]],
    weights: Mapping[str, Any],
    *,
    opset: int = 17,
    dtype: int = 1,
) -> ModelProto:
    """Return a graph around nodes that read a, b, ... and produce "y". The result stays inside the graph, as in a
    model: an output of the graph would take new memory in each call."""
    end = helper.make_node("ReduceMax", ["y"], ["end"], "end", keepdims=0)
    graph = helper.make_graph(
        [*nodes, end],
        "sample",
        [helper.make_tensor_value_info("abc"[n], TensorProto.FLOAT, shape) for n, shape in enumerate(inputs)],
        [helper.make_tensor_value_info("end", dtype, ())],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _random(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)


def _one(op_type: str, shape: tuple[int, ...], *, opset: int = 17, **attributes: Any) -> Sample:
    return Sample(
        ALIKE.get(op_type, op_type),
        graph_of([helper.make_node(op_type, ["a"], ["y"], op_type, **attributes)], [shape], {}, opset=opset),
    )


def _two(op_type: str, left: tuple[int, ...], right: tuple[int, ...], name: str = "", **attributes: Any) -> Sample:
    node = helper.make_node(op_type, ["a", "b"], ["y"], op_type, **attributes)
    return Sample(name or op_type, graph_of([node], [left, right], {}))


def _weighted(op_type: str, shape: tuple[int, ...]) -> Sample:
    """Return a sample with a stored row that is applied to every row of the input, as biases are."""
    node = helper.make_node(op_type, ["a", "w"], ["y"], op_type)
    return Sample(f"{op_type} row", graph_of([node], [shape], {"w": _random(shape[-1])}))


def _transposed(shape: tuple[int, ...], order: tuple[int, ...]) -> Sample:
    """Return a Transpose before a Reshape: the runtime often rewrites an operator directly after a Transpose to remove
    it."""
    nodes = [
        helper.make_node("Transpose", ["a"], ["t"], "Transpose", perm=list(order)),
        helper.make_node("Reshape", ["t", "flat"], ["y"], "Reshape"),
    ]
    return Sample("Transpose", graph_of(nodes, [shape], {"flat": np.array([-1])}))


def _product(op_type: str, left: tuple[int, int], right: tuple[int, int]) -> Sample:
    weights = {"w": _random(*right)} | ({"bias": _random(right[1])} if op_type == "Gemm" else {})
    node = helper.make_node(op_type, ["a", *weights], ["y"], op_type)
    return Sample("product with weights", graph_of([node], [left], weights))


def _convolution(channels: int, out: int, size: int, kernel: int, groups: int) -> Sample:
    weights = {"w": _random(out, channels // groups, kernel, kernel), "bias": _random(out)}
    pads = [kernel // 2] * 4
    node = helper.make_node("Conv", ["a", *weights], ["y"], "Conv", group=groups, pads=pads)
    return Sample("depthwise" if groups > 1 else "convolution", graph_of([node], [(1, channels, size, size)], weights))


def _transposed_convolution(channels: int, out: int, size: int) -> Sample:
    node = helper.make_node("ConvTranspose", ["a", "w"], ["y"], "ConvTranspose", strides=[2, 2])
    return Sample("ConvTranspose", graph_of([node], [(1, channels, size, size)], {"w": _random(channels, out, 2, 2)}))


def _normalized(shape: tuple[int, ...]) -> Sample:
    node = helper.make_node("LayerNormalization", ["a", "scale", "bias"], ["y"], "norm", axis=-1)
    return Sample(
        "LayerNormalization", graph_of([node], [shape], {"scale": _random(shape[-1]), "bias": _random(shape[-1])})
    )


def _power(shape: tuple[int, ...]) -> Sample:
    return Sample("Pow", graph_of([helper.make_node("Pow", ["a", "w"], ["y"], "Pow")], [shape], {"w": np.float32(2)}))


def _where(shape: tuple[int, ...]) -> Sample:
    nodes = [
        helper.make_node("Greater", ["a", "zero"], ["mask"], "Greater"),
        helper.make_node("Where", ["mask", "a", "zero"], ["y"], "Where"),
    ]
    return Sample("Where", graph_of(nodes, [shape], {"zero": np.float32(0)}))


def _slice(shape: tuple[int, ...]) -> Sample:
    ends = {"from": np.array([0]), "to": np.array([max(1, shape[-1] // 2)]), "axes": np.array([len(shape) - 1])}
    return Sample("Slice", graph_of([helper.make_node("Slice", ["a", *ends], ["y"], "Slice")], [shape], ends))


def _gather(shape: tuple[int, ...]) -> Sample:
    rows = {"rows": np.arange(shape[1])[::-1].copy()}
    return Sample(
        "Gather", graph_of([helper.make_node("Gather", ["a", "rows"], ["y"], "Gather", axis=1)], [shape], rows)
    )


def _expand(shape: tuple[int, ...]) -> Sample:
    node = helper.make_node("Expand", ["a", "shape"], ["y"], "Expand")
    return Sample("Expand", graph_of([node], [(1, *shape[1:])], {"shape": np.array([max(2, shape[0]), *shape[1:]])}))


def _cast(shape: tuple[int, ...]) -> Sample:
    node = helper.make_node("Cast", ["a"], ["y"], "Cast", to=TensorProto.INT32)
    return Sample("Cast", graph_of([node], [shape], {}, dtype=TensorProto.INT32))


def _reshape(shape: tuple[int, ...]) -> Sample:
    """Return a Reshape after another operator: the runtime copies when it reshapes an input."""
    nodes = [
        helper.make_node("Relu", ["a"], ["r"], "Relu"),
        helper.make_node("Reshape", ["r", "shape"], ["y"], "Reshape"),
    ]
    return Sample("Reshape", graph_of(nodes, [shape], {"shape": np.array([-1, shape[-1]])}))


def _quantized(shape: tuple[int, ...]) -> Sample:
    node = helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["y"], "QuantizeLinear")
    weights = {"scale": np.float32(0.05), "zero": np.uint8(128)}
    return Sample("QuantizeLinear", graph_of([node], [shape], weights, dtype=TensorProto.UINT8))


def _dynamic(rows: int, inner: int, columns: int) -> Sample:
    """Return the nodes that ONNX Runtime fuses into one DynamicQuantizeMatMul."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["a"], ["q", "s", "z"], "quantize"),
        helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["i"], "product"),
        helper.make_node("Cast", ["i"], ["f"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["scale"], "scales"),
        helper.make_node("Mul", ["f", "scale"], ["y"], "scaled"),
    ]
    codes = np.random.default_rng(0).integers(-64, 64, (inner, columns)).astype(np.int8)
    weights = {"w": codes, "wz": np.int8(0), "ws": np.float32(0.01)}
    return Sample("int8 dynamic", graph_of(nodes, [(rows, inner)], weights))


def _static(rows: int, inner: int, columns: int) -> Sample:
    """Return a product between QuantizeLinear and DequantizeLinear, as static_int8 writes it."""
    nodes = [
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], "weights"),
        helper.make_node("MatMul", ["d", "dw"], ["y"], "product"),
    ]
    codes = np.random.default_rng(0).integers(-64, 64, (inner, columns)).astype(np.int8)
    weights = {"w": codes, "wz": np.int8(0), "ws": np.float32(0.01), "s": np.float32(0.05), "z": np.uint8(128)}
    return Sample("int8 product", graph_of(nodes, [(rows, inner)], weights))
