"""The graphs that the table of measured operators is fitted to: one operator each, in sizes around a core's cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, numpy_helper

# operators that are not measured, by the one whose loop is like theirs
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
ROWS = ("Add", "Mul")  # two rows in the table: of inputs of the same shape, and with one row for all


@dataclass(frozen=True, slots=True)
class Sample:
    """One graph of one operator to be timed."""

    family: str
    model: ModelProto


def samples() -> list[Sample]:
    """The calibration set: graphs of one operator, small to larger than a core's cache."""
    found: list[Sample] = []
    for rows, inner, columns in (
        (1, 32, 32), (1, 256, 256), (1, 1024, 1000), (16, 64, 64), (16, 512, 512), (64, 32, 128), (100, 192, 192),
        (200, 192, 768), (200, 768, 192), (256, 64, 64), (1000, 32, 32), (1600, 8, 64), (1600, 64, 128), (3000, 16, 32),
    ):  # fmt: skip
        found.append(_product("MatMul", (rows, inner), (inner, columns)))
        if columns <= 256 or rows <= 16:
            found.append(_product("Gemm", (rows, inner), (inner, columns)))
    for matrices, rows, inner, columns in (
        (4, 16, 16, 16), (3, 197, 64, 197), (3, 197, 197, 64), (16, 103, 2, 103), (16, 103, 103, 2), (64, 50, 8, 50),
        (64, 50, 50, 8), (256, 20, 16, 20), (32, 100, 16, 100), (32, 100, 100, 16), (1, 256, 256, 256),
        (8, 64, 32, 64), (512, 8, 8, 8),
    ):  # fmt: skip
        found.append(_two("MatMul", (matrices, rows, inner), (matrices, inner, columns), "product of activations"))
    for channels, out, size, kernel in (
        (3, 16, 32, 3), (3, 64, 64, 7), (16, 16, 16, 3), (32, 64, 32, 3), (64, 64, 16, 3), (64, 128, 14, 1),
        (128, 128, 14, 3), (32, 64, 56, 1), (256, 256, 7, 1), (256, 64, 28, 1), (8, 16, 64, 5), (1, 8, 28, 3),
    ):  # fmt: skip
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
    shapes = ((1, 16, 32), (1, 100, 64), (4, 100, 64), (16, 100, 64), (64, 103, 32), (8, 197, 192), (64, 256, 64))
    for shape in shapes:
        found += [
            _two("Add", shape, shape),
            _two("Mul", shape, shape),
            _weighted("Add", shape),
            _weighted("Mul", shape),
        ]
        for kind in ("Relu", "Erf", "Tanh", "Sigmoid", "Exp", "Sqrt"):
            found.append(_one(kind, shape))
        found.append(_one("Gelu", shape, opset=20))
        found.append(_one("Softmax", shape, axis=-1))
        found.append(_one("ReduceMean", shape, axes=[-1], keepdims=1))
        found.append(_turned(shape, (0, 2, 1)))
        found.append(_two("Concat", shape, shape, axis=1))
        found += [_normalised(shape), _power(shape), _where(shape), _slice(shape), _gather(shape), _expand(shape)]
        found += [_cast(shape), _reshape(shape), _quantised(shape)]
        found.append(_turned((*shape[:2], 4, shape[2] // 4), (0, 2, 1, 3)))
        found.append(_turned((*shape[:2], 4, shape[2] // 4), (0, 2, 3, 1)))
    for rows, width in ((16, 8), (100, 192), (200, 768), (1600, 16), (6000, 32), (1000, 256)):
        found += [_weighted(kind, (rows, width)) for kind in ROWS]
    for width in (2, 4, 16, 103, 197, 512):
        found.append(_one("Softmax", (8, 50, width), axis=-1))
        found.append(_normalised((8, 50, width)))
    for channels, size in ((16, 32), (64, 56), (64, 16), (128, 14), (8, 64), (32, 24)):
        for kind in ("MaxPool", "AveragePool"):
            found.append(_one(kind, (1, channels, size, size), kernel_shape=[2, 2], strides=[2, 2]))
        found.append(_one("ReduceMean", (1, channels, size, size), axes=[2, 3], keepdims=0))
        found.append(_transposed(channels, channels // 2, size // 2))
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


def graph_of(
    nodes: Sequence[Any],
    inputs: Sequence[tuple[int, ...]],
    weights: Mapping[str, Any],
    *,
    opset: int = 17,
    kind: int = 1,
) -> ModelProto:
    """A graph around nodes that read a, b, ... and make "y". What they make stays inside, as it does in a model: an
    output that the caller gets would be new memory in each call."""
    end = helper.make_node("ReduceMax", ["y"], ["end"], "end", keepdims=0)
    graph = helper.make_graph(
        [*nodes, end], "sample",
        [helper.make_tensor_value_info("abc"[n], TensorProto.FLOAT, shape) for n, shape in enumerate(inputs)],
        [helper.make_tensor_value_info("end", kind, ())],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _random(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)


def _one(kind: str, shape: tuple[int, ...], *, opset: int = 17, **attributes: Any) -> Sample:
    return Sample(
        ALIKE.get(kind, kind),
        graph_of([helper.make_node(kind, ["a"], ["y"], kind, **attributes)], [shape], {}, opset=opset),
    )


def _two(kind: str, left: tuple[int, ...], right: tuple[int, ...], name: str = "", **attributes: Any) -> Sample:
    node = helper.make_node(kind, ["a", "b"], ["y"], kind, **attributes)
    return Sample(name or kind, graph_of([node], [left, right], {}))


def _weighted(kind: str, shape: tuple[int, ...]) -> Sample:
    """With a stored row that every row of the input gets, as biases are."""
    node = helper.make_node(kind, ["a", "w"], ["y"], kind)
    return Sample(f"{kind} row", graph_of([node], [shape], {"w": _random(shape[-1])}))


def _turned(shape: tuple[int, ...], order: tuple[int, ...]) -> Sample:
    """Before a reshape: what follows a Transpose directly is often rewritten to do without it."""
    nodes = [
        helper.make_node("Transpose", ["a"], ["t"], "Transpose", perm=list(order)),
        helper.make_node("Reshape", ["t", "flat"], ["y"], "Reshape"),
    ]
    return Sample("Transpose", graph_of(nodes, [shape], {"flat": np.array([-1])}))


def _product(kind: str, left: tuple[int, int], right: tuple[int, int]) -> Sample:
    weights = {"w": _random(*right)} | ({"bias": _random(right[1])} if kind == "Gemm" else {})
    node = helper.make_node(kind, ["a", *weights], ["y"], kind)
    return Sample("product with weights", graph_of([node], [left], weights))


def _convolution(channels: int, out: int, size: int, kernel: int, groups: int) -> Sample:
    weights = {"w": _random(out, channels // groups, kernel, kernel), "bias": _random(out)}
    pads = [kernel // 2] * 4
    node = helper.make_node("Conv", ["a", *weights], ["y"], "Conv", group=groups, pads=pads)
    return Sample("depthwise" if groups > 1 else "convolution", graph_of([node], [(1, channels, size, size)], weights))


def _transposed(channels: int, out: int, size: int) -> Sample:
    node = helper.make_node("ConvTranspose", ["a", "w"], ["y"], "ConvTranspose", strides=[2, 2])
    return Sample("ConvTranspose", graph_of([node], [(1, channels, size, size)], {"w": _random(channels, out, 2, 2)}))


def _normalised(shape: tuple[int, ...]) -> Sample:
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
    return Sample("Cast", graph_of([node], [shape], {}, kind=TensorProto.INT32))


def _reshape(shape: tuple[int, ...]) -> Sample:
    """After an operator: a reshape of an input copies it."""
    nodes = [
        helper.make_node("Relu", ["a"], ["r"], "Relu"), helper.make_node("Reshape", ["r", "shape"], ["y"], "Reshape")
    ]  # fmt: skip
    return Sample("Reshape", graph_of(nodes, [shape], {"shape": np.array([-1, shape[-1]])}))


def _quantised(shape: tuple[int, ...]) -> Sample:
    node = helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["y"], "QuantizeLinear")
    weights = {"scale": np.float32(0.05), "zero": np.uint8(128)}
    return Sample("QuantizeLinear", graph_of([node], [shape], weights, kind=TensorProto.UINT8))


def _dynamic(rows: int, inner: int, columns: int) -> Sample:
    """The nodes that ONNX Runtime makes one DynamicQuantizeMatMul of."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["a"], ["q", "s", "z"], "quantise"),
        helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["i"], "product"),
        helper.make_node("Cast", ["i"], ["f"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["scale"], "scales"),
        helper.make_node("Mul", ["f", "scale"], ["y"], "scaled"),
    ]
    codes = np.random.default_rng(0).integers(-64, 64, (inner, columns)).astype(np.int8)
    weights = {"w": codes, "wz": np.int8(0), "ws": np.float32(0.01)}
    return Sample("int8 dynamic", graph_of(nodes, [(rows, inner)], weights))


def _static(rows: int, inner: int, columns: int) -> Sample:
    """A product between QuantizeLinear and DequantizeLinear, as static_int8 leaves it."""
    nodes = [
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"], "quantise"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantise"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], "weights"),
        helper.make_node("MatMul", ["d", "dw"], ["y"], "product"),
    ]
    codes = np.random.default_rng(0).integers(-64, 64, (inner, columns)).astype(np.int8)
    weights = {
        "w": codes, "wz": np.int8(0), "ws": np.float32(0.01), "s": np.float32(0.05), "z": np.uint8(128)
    }  # fmt: skip
    return Sample("int8 product", graph_of(nodes, [(rows, inner)], weights))
