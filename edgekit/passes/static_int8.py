"""Products in int8 with fixed scales (Jacob et al. 2018, arXiv 1712.05877, section 2). Weights have one scale per
output channel, and each activation has one scale from calibration on training data. The pass writes QuantizeLinear and
DequantizeLinear, which onnxruntime and TensorRT fuse into integer kernels.

    x -- Quantize -- Dequantize --\\
    codes, scales -- Dequantize -- MatMul -- float32

    u8s8   activations uint8 with a zero point, weights int8, biases of Conv and Gemm int32: the form that CPUs multiply
    s8s8   both symmetric int8, biases float32: TensorRT refuses zero points and int32 biases

The pass quantizes only products with a stored weight, and only for them: other consumers of an activation, such as the
residual around a block, still read it in float32. onnxruntime's own quantizer rounds it for all its consumers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgekit.errors import EdgekitError, unknown
from edgekit.graph.calibration import calibration_rows, ranges
from edgekit.graph.index import Index
from edgekit.graph.model import Weight, eliminate_dead_nodes, opset, replace_tensor, unique_name, value_names
from edgekit.passes.base import Change, Context, GraphCandidate, Level, Pass, at_least
from edgekit.passes.dynamic_int8 import OPERATORS, check_operators, check_weight_bits, products

SCHEMES = ("u8s8", "s8s8")
METHODS = ("minmax", "percentile", "entropy")
PICKS = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")  # every result is one of the inputs
LEAST_OPSET = 13  # the first with a scale per channel
Float64 = npt.NDArray[np.float64]
FakeQuantize = tuple[float, int]  # scale and zero point of an activation


@dataclass(frozen=True, slots=True)
class StaticInt8(Pass[GraphCandidate]):
    """`scheme`: see above. `method` chooses the range of an activation: all values seen (minmax), all but the outermost
    100 - `percentile` per cent, or the range whose histogram on 8 bits is nearest in relative entropy. `samples`: rows
    of the training data for calibration."""

    name: ClassVar[str] = "static_int8"
    summary: ClassVar[str] = "int8 products with fixed activation scales, calibrated on training data"
    level: ClassVar[Level] = Level.GRAPH
    computes_in: ClassVar[tuple[str, ...]] = ("int8",)
    scheme_parameter: ClassVar[str] = "scheme"
    weight_bits_parameter: ClassVar[str] = "weight_bits"

    scheme: str = "u8s8"
    method: str = "minmax"  # a few hundred samples hold few outliers to clip
    samples: int = 256
    percentile: float = 99.999
    weight_bits: int = 7  # as in dynamic_int8; 8 for TensorRT, which adds in 32 bits
    operators: tuple[str, ...] = OPERATORS
    exclude: tuple[str, ...] = ()  # names of nodes that stay in float32

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise unknown("scheme", self.scheme, SCHEMES)
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        at_least("samples", self.samples, 1, 1_000_000)
        at_least("percentile", self.percentile, 50, 100)
        check_weight_bits(self.weight_bits)
        check_operators(self.operators)

    def plan(self, candidate: GraphCandidate) -> list[Change]:
        return products(candidate.copy_model(), self.operators, self.exclude)[1]

    def apply(self, candidate: GraphCandidate, context: Context) -> GraphCandidate:
        model = candidate.copy_model()
        chosen, _ = products(model, self.operators, self.exclude)
        if opset(model) < LEAST_OPSET:
            raise EdgekitError(
                f"static_int8: the graph is written in opset {opset(model)}; a scale per channel needs {LEAST_OPSET} "
                "or more: convert it with onnx.version_converter"
            )
        rows = calibration_rows(model, context.train, self.samples, context.seed)
        nodes = [use.node for weight in chosen for use in weight.uses]
        rounded = {} if self.scheme == "s8s8" else _rounded_outputs(model, nodes)
        wanted = {node.input[0] for node in nodes} | set(rounded.values())
        found = ranges(model, sorted(wanted), rows, self.method, self.percentile)
        grids = {name: self._grid(low, high) for name, (low, high) in found.items()}
        producers, after_convolutions = Index(model).producers, set(rounded.values())
        grids = {name: grids[picked_from(producers, name, after_convolutions)] for name in grids}
        for weight in chosen:
            self._quantize_weight(model, weight, grids)
        products_of = {name: [node for node in nodes if node.input[0] == name] for name in wanted}
        for name in sorted(wanted):
            everything = [node for node in model.graph.node if name in node.input]
            consumers = everything if name in rounded.values() else products_of[name]
            self._quantize_activation(model, name, grids[name], consumers)
        eliminate_dead_nodes(model)
        return GraphCandidate(model)

    def _grid(self, low: float, high: float) -> FakeQuantize:
        if self.scheme == "s8s8":
            return max(-low, high) / 127 or 1.0, 0
        low, high = min(low, 0.0), max(high, 0.0)  # zero must be on the grid, because padding consists of zeros
        scale = (high - low) / 255 or 1.0
        return scale, round(-low / scale)

    def _quantize_weight(self, model: ModelProto, weight: Weight, grids: dict[str, FakeQuantize]) -> None:
        """Replace a weight by codes and one scale per output channel, and the biases of its products by int32."""
        name, value = weight.name, numpy_helper.to_array(weight.tensor).astype(np.float64)
        channel = 1 - weight.uses[0].axis
        peak = np.abs(value).max(axis=tuple(axis for axis in range(value.ndim) if axis != channel))
        scale = peak / (2 ** (self.weight_bits - 1) - 1)
        biases = {} if self.scheme == "s8s8" else _biases(model, weight)
        # 31 bits must hold the bias in steps of the weight's scale times the activation's scale
        for index, bias in biases.items():
            scale = np.maximum(scale, np.abs(bias) / (grids[weight.uses[index].activation][0] * 2**30))
        scale = np.where(scale == 0, 1.0, scale).astype(np.float32).astype(np.float64)
        shape = [-1 if axis == channel else 1 for axis in range(value.ndim)]
        codes = np.round(value / scale.reshape(shape)).astype(np.int8)
        tensors, nodes = dequantized(model, name, codes, scale, channel)
        replace_tensor(model, name, tensors, nodes)
        for index, bias in biases.items():
            use = weight.uses[index]
            steps = scale * grids[use.activation][0]
            to = unique_name(f"{use.node.name}.bias", value_names(model))
            tensors, nodes = dequantized(model, to, np.round(bias / steps).astype(np.int32), steps, 0)
            replace_tensor(model, to, tensors, nodes)
            use.node.input[2] = to

    def _quantize_activation(
        self, model: ModelProto, name: str, grid: FakeQuantize, consumers: list[NodeProto]
    ) -> None:
        """Insert a pair that rounds an activation for these nodes, directly before the first of them."""
        scale, zero = grid
        dtype = np.int8 if self.scheme == "s8s8" else np.uint8
        taken = value_names(model)
        made = [unique_name(f"{name}.{part}", taken) for part in ("scale", "zero_point", "int8", "rounded")]
        tensors = (np.float32(scale), dtype(zero))
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value), to) for value, to in zip(tensors, made, strict=False)
        )
        names = {node.name for node in consumers}
        first = 0
        for index, node in reversed(list(enumerate(model.graph.node))):
            if node.name in names:
                first = index
                node.input[:] = [made[3] if given == name else given for given in node.input]
        pair = [
            helper.make_node("QuantizeLinear", [name, *made[:2]], [made[2]], made[2]),
            helper.make_node("DequantizeLinear", [made[2], *made[:2]], [made[3]], made[3]),
        ]
        for node in reversed(pair):
            model.graph.node.insert(first, node)


def picked_from(producers: Mapping[str, NodeProto], name: str, rounded: Collection[str]) -> str:
    """Return the rounded value whose elements `name` consists of, or `name`. With one grid for both, a second rounding
    changes nothing, and onnxruntime runs what is between them, such as a pool, on the integers."""
    at = name
    while (node := producers.get(at)) is not None and node.op_type in PICKS:
        at = str(node.input[0])
        if at in rounded:
            return at
    return name


def _rounded_outputs(model: ModelProto, nodes: list[NodeProto]) -> dict[str, str]:
    """Return the results to round as well, by the node that produces them: CPUs have no integer convolution with a
    float32 result. The rounding comes after a Relu, whose work it then does."""
    index = Index(model)
    result = {}
    for node in nodes:
        if node.op_type == "Conv":
            after = index.only_consumer(node.output[0])
            name = after.output[0] if after is not None and after.op_type == "Relu" else node.output[0]
            if name not in index.outputs:
                result[node.name] = name
    return result


def _biases(model: ModelProto, weight: Weight) -> dict[int, Float64]:
    """Return the stored biases (out,) of the products with a weight, by the index of the use."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    channels = weight.shape[1 - weight.uses[0].axis]
    result = {}
    for index, use in enumerate(weight.uses):
        bias = stored.get(use.node.input[2]) if len(use.node.input) > 2 else None
        if bias is not None and bias.data_type == TensorProto.FLOAT and tuple(bias.dims) == (channels,):
            result[index] = numpy_helper.to_array(bias).astype(np.float64)
    return result


def dequantized(
    model: ModelProto, name: str, codes: npt.NDArray[Any], scale: Float64, axis: int
) -> tuple[list[TensorProto], list[NodeProto]]:
    taken = value_names(model)
    stored = [unique_name(f"{name}.{part}", taken) for part in ("codes", "scale", "zeros")]
    # The zero points are zero and are stored, because without them onnxruntime finds no integer kernel for Gemm.
    arrays = (codes, scale.astype(np.float32), np.zeros(scale.shape, codes.dtype))
    tensors = [numpy_helper.from_array(array, to) for array, to in zip(arrays, stored, strict=True)]
    return tensors, [helper.make_node("DequantizeLinear", stored, [name], f"{name}.DequantizeLinear", axis=axis)]
