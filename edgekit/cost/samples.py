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


# The sizes of the calibration set, from small ones to some larger than a core's cache.
# rows x inner x columns, of products with weights
PRODUCTS = """
    1x32x32 1x256x256 1x1024x1000 16x64x64 16x512x512 64x32x128 100x192x192 200x192x768 200x768x192 256x64x64
    1000x32x32 1600x8x64 1600x64x128 3000x16x32 1x2048x2048 8x3000x1100 4000x64x256 200x32x3 200x64x10
"""
# matrices x rows x inner x columns, of products of activations
BATCHED_PRODUCTS = """
    4x16x16x16 3x180x64x180 3x180x180x64 16x110x2x110 16x110x110x2 64x50x8x50 64x50x50x8 256x20x16x20 32x100x16x100
    32x100x100x16 1x256x256x256 8x64x32x64 512x8x8x8 300x110x2x110 300x110x110x2 96x180x64x180 96x180x180x64
    200x90x4x90 200x90x90x4
"""
# channels in x channels out x side of the image x side of the kernel
CONVOLUTIONS = """
    3x16x32x3 3x64x64x7 16x16x16x3 32x64x32x3 64x64x16x3 64x128x14x1 128x128x14x3 32x64x56x1 256x256x7x1 256x64x28x1
    8x16x64x5 1x8x28x3 20x3x40x3 48x4x24x3 24x20x32x3 32x32x96x3
"""
# channels x side of the image x side of the kernel
DEPTHWISE = "16x32x3 32x56x3 64x28x3 128x14x3 96x28x5 256x7x3 8x8x3"
# rows x tokens x width, of activations
SHAPES = "1x16x32 1x100x64 4x100x64 16x100x64 64x110x32 8x180x192 64x256x64 64x240x256"
# rows x width, of one row that is added to all rows
ROWS_AND_WIDTHS = "16x8 100x192 200x768 1600x16 6000x32 1000x256"
# channels x side, of images
CHANNELS_AND_SIZES = "16x32 64x56 64x16 128x14 8x64 32x24"
# rows x inner x columns, of products in int8
INT8_PRODUCTS = "1x64x64 16x64x64 16x512x512 100x192x192 200x192x768 1000x32x32 200x768x192"
WIDTHS = (2, 4, 16, 110, 180, 512)  # of sums along the last axis


def samples() -> list[Sample]:
    """Return the calibration set: graphs of one operator at the sizes above."""
    found: list[Sample] = []
    for rows, inner, columns in _sizes(PRODUCTS):
        found.append(_product("MatMul", (rows, inner), (inner, columns)))
        if columns <= 256 or rows <= 16:
            found.append(_product("Gemm", (rows, inner), (inner, columns)))
    for matrices, rows, inner, columns in _sizes(BATCHED_PRODUCTS):
        found.append(_two("MatMul", (matrices, rows, inner), (matrices, inner, columns), "product of activations"))
    found += [_convolution(channels, out, size, side, 1) for channels, out, size, side in _sizes(CONVOLUTIONS)]
    found += [_convolution(channels, channels, size, kernel, channels) for channels, size, kernel in _sizes(DEPTHWISE)]
    for shape in _sizes(SHAPES):
        found += _of_activations(shape)
    found += [_weighted(op_type, shape) for shape in _sizes(ROWS_AND_WIDTHS) for op_type in ROWS]
    for width in WIDTHS:
        found += [_one("Softmax", (8, 50, width), axis=-1), _normalized((8, 50, width))]
    for channels, size in _sizes(CHANNELS_AND_SIZES):
        image = (1, channels, size, size)
        found += [_one(name, image, kernel_shape=[2, 2], strides=[2, 2]) for name in ("MaxPool", "AveragePool")]
        found.append(_one("ReduceMean", image, axes=[2, 3], keepdims=0))
        found.append(_transposed_convolution(channels, channels // 2, size // 2))
    found += [make(*sizes) for sizes in _sizes(INT8_PRODUCTS) for make in (_dynamic, _static)]
    return found


def _sizes(table: str) -> list[tuple[int, ...]]:
    """Return [(1, 32, 32), (16, 64, 64)] for "1x32x32 16x64x64"."""
    return [tuple(map(int, item.split("x"))) for item in table.split()]


def _of_activations(shape: tuple[int, ...]) -> list[Sample]:
    """Return a sample of each operator that reads activations only."""
    rows, tokens, width = shape
    heads = (rows, tokens, 4, width // 4)
    return [
        *(_two(op_type, shape, shape) for op_type in ROWS),
        *(_weighted(op_type, shape) for op_type in ROWS),
        *(_one(op_type, shape) for op_type in ("Relu", "Erf", "Tanh", "Sigmoid", "Exp", "Sqrt")),
        _one("Gelu", shape, opset=20),
        _one("Softmax", shape, axis=-1),
        _one("ReduceMean", shape, axes=[-1], keepdims=1),
        _transposed(shape, (0, 2, 1)),
        _two("Concat", shape, shape, axis=1),
        *(make(shape) for make in (_normalized, _power, _where, _slice, _gather, _expand)),
        *(make(shape) for make in (_cast, _reshape, _quantized)),
        _transposed(heads, (0, 2, 1, 3)),
        _transposed(heads, (0, 2, 3, 1)),
    ]


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
            helper.make_node("Transpose", [f"{name}2"], [f"{name}3"], f"transpose {name}", perm=order),
        ]
    nodes += [
        helper.make_node("MatMul", ["q3", "k3"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["shares"], "softmax", axis=-1),
        helper.make_node("MatMul", ["shares", "v3"], ["mixed"], "mix"),
        helper.make_node("Transpose", ["mixed"], ["transposed"], "transpose back", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["transposed", "joined"], ["flat"], "join"),
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
