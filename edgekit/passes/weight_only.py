"""Store weights in 8 or 4 bits, in groups with a scale each; activations and arithmetic stay in float32.

A weight is rounded to the nearest code, or such that later weights compensate for its error (`edgekit.passes.gptq`):
the pass rounds the weights input by input and spreads each error over the inputs not yet rounded, by the inverse of the
second moment of the inputs on training data.

    portable      codes -- Cast -- (two codes of 4 bits out of each byte) -- Mul scale -- Reshape -- the weight
    matmulnbits   onnxruntime's own operator: it multiplies the codes directly and reads less memory

Every runtime folds the portable form into float32 weights when it loads the model: the file is small, and the speed is
the same as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgekit.errors import EdgekitError, unknown
from edgekit.graph.calibration import Moments, calibration_rows, moments
from edgekit.graph.model import (
    Weight,
    attribute,
    chosen_weights,
    eliminate_dead_nodes,
    name_nodes,
    replace_tensor,
    unique_name,
    value_names,
)
from edgekit.passes.base import Change, Context, GraphCandidate, Level, Pass, at_least
from edgekit.passes.gptq import gptq as compensated
from edgekit.passes.gptq import inverse_factor

LAYOUTS, ROUNDINGS, GROUPS = ("portable", "matmulnbits"), ("nearest", "gptq"), (32, 64, 128)
DOMAIN = "com.microsoft"
FLOAT32_ARITHMETIC = 1  # MatMulNBits' accuracy level; at 4 it would quantize the activations too
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WeightOnly(Pass[GraphCandidate]):
    """`bits`: 8 or 4. `group`: the number of inputs that share a scale. `samples`: rows of the training data for gptq;
    `damping`: added to the second moment's diagonal, relative to its mean."""

    name: ClassVar[str] = "weight_only"
    summary: ClassVar[str] = "store matrices in 8 or 4 bits with a scale per group of inputs"
    level: ClassVar[Level] = Level.GRAPH

    bits: int = 8
    group: int = 32  # the scales cost 1 bit per weight; at 4 bits the accuracy is worth it
    rounding: str = "nearest"
    layout: str = "portable"
    samples: int = 256
    damping: float = 0.01  # the paper's value
    smallest: int = 1024  # numbers; for a smaller weight the decoding nodes take as many bytes as the codes save
    include: tuple[str, ...] = ("*",)  # patterns of the names of weights

    def __post_init__(self) -> None:
        for key, allowed in (("bits", (8, 4)), ("group", GROUPS)):
            if getattr(self, key) not in allowed:
                raise EdgekitError(f"{key} = {getattr(self, key)}; expected {' or '.join(map(str, allowed))}")
        if self.rounding not in ROUNDINGS:
            raise unknown("rounding", self.rounding, ROUNDINGS)
        if self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)
        at_least("samples", self.samples, 1, 1_000_000)
        at_least("damping", self.damping, 1e-6, 1)
        at_least("smallest", self.smallest, 1, 1e12)

    def precisions(self) -> tuple[str, ...]:
        """Return the precision of the codes: runtimes compute in float, but TensorRT treats DequantizeLinear on int8 as
        int8 arithmetic."""
        return (f"int{self.bits}",)

    def plan(self, candidate: GraphCandidate) -> list[Change]:
        return self._chosen(candidate.copy_model())[1]

    def apply(self, candidate: GraphCandidate, context: Context) -> GraphCandidate:
        model = candidate.copy_model()
        chosen, _ = self._chosen(model)
        seen: dict[str, Moments] = {}
        if self.rounding == "gptq":
            rows = calibration_rows(model, context.train, self.samples, context.seed)
            seen = moments(model, [use.activation for weight in chosen for use in weight.uses], rows)
        for number, weight in enumerate(chosen, start=1):
            axis = _axis(weight)
            value = numpy_helper.to_array(weight.tensor).astype(np.float64)
            value = value if axis == 0 else value.T
            if self.rounding == "nearest":
                codes, scale = nearest(value, self.bits, self.group)
            else:
                # For a tied weight, the errors of its consumers are added. A consumer that sums over the other axis is
                # not counted.
                second = sum(seen[use.activation].second for use in weight.uses if use.axis == axis)
                codes, scale = gptq(value, np.asarray(second), self.bits, self.group, self.damping)
            if self.layout == "portable":
                replace_tensor(model, weight.name, *self._decoder(model, weight, codes, scale))
            else:
                self._replace_products(model, weight, codes, scale)
            context.progress(self.name, number, len(chosen))
        eliminate_dead_nodes(model)
        return GraphCandidate(model)

    def _chosen(self, model: ModelProto) -> tuple[list[Weight], list[Change]]:
        name_nodes(model)
        chosen, changes = [], []
        for weight in chosen_weights(model, self.include):
            after = f"{self.bits} bit, one scale per {self.group} inputs"
            if reason := self._obstacle(weight):
                after = f"left in float32: {reason}"
            else:
                chosen.append(weight)
                if len(weight.uses) + len(weight.others) > 1:
                    after += f"; tied, one set of codes for {weight.consumers}"
            changes.append(Change(weight.name, f"{weight.shape} float32", after))
        if not chosen:
            left = "; ".join(f"{change.tensor}: {change.after}" for change in changes[:5])
            raise EdgekitError(f"weight_only: no matrix is left to compress ({left}); leave this pass out")
        return chosen, changes

    def _obstacle(self, weight: Weight) -> str:
        if np.prod(weight.shape) < self.smallest:
            return f"it has fewer than {self.smallest} numbers"
        if self.layout == "matmulnbits":
            if weight.others or len(weight.axes) > 1:
                return f"tied, read by {weight.consumers}; layout = 'portable' keeps it one tensor"
            if any(attribute(use.node, key, 1.0) != 1 for use in weight.uses for key in ("alpha", "beta")):
                return f"{weight.consumers} has alpha or beta; the pass 'fold' removes them"
        return ""

    def _decoder(
        self, model: ModelProto, weight: Weight, codes: npt.NDArray[np.int8], scale: Float64
    ) -> tuple[list[TensorProto], list[NodeProto]]:
        """Return tensors and nodes that compute the weight from codes (groups, group, out) and scales (groups, 1, out).
        They multiply integers of up to 8 bits with a float32 scale, so every runtime computes the same."""
        name, inputs = weight.name, weight.shape[_axis(weight)]
        taken = value_names(model)
        tensors: list[TensorProto] = []
        nodes: list[NodeProto] = []

        def store(part: str, array: npt.NDArray[Any]) -> str:
            tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), unique_name(f"{name}.{part}", taken)))
            taken.add(tensors[-1].name)
            return str(tensors[-1].name)

        def compute(op_type: str, *reads: str, last: bool = False, **attributes: Any) -> str:
            to = name if last else unique_name(f"{name}.{op_type}", taken)
            taken.add(to)
            nodes.append(
                helper.make_node(op_type, list(reads), [to], f"{name}.decode.{len(nodes)}.{op_type}", **attributes)
            )
            return to

        if self.bits == 8:
            numbers = compute("Cast", store("codes", codes), to=TensorProto.FLOAT)
        else:
            half = self.group // 2  # the low four bits hold the first half of a group
            unsigned = (codes + 8).astype(np.uint8)
            bytes_ = compute("Cast", store("codes", unsigned[:, :half] + 16 * unsigned[:, half:]), to=TensorProto.INT32)
            sixteen = store("sixteen", np.array(16, np.int32))
            high = compute("Div", bytes_, sixteen)
            low = compute("Sub", bytes_, compute("Mul", high, sixteen))
            numbers = compute("Cast", compute("Concat", low, high, axis=1), to=TensorProto.FLOAT)
            numbers = compute("Sub", numbers, store("middle", np.array(8, np.float32)))
        value = compute("Mul", numbers, store("scale", scale.astype(np.float32)))
        padded = codes.shape[0] * self.group
        steps: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
            ("Reshape", (store("shape", np.array([padded, codes.shape[2]], np.int64)),), {})
        ]
        if padded != inputs:  # the last group is not full
            ends = [
                store(part, np.array([end], np.int64)) for part, end in (("start", 0), ("end", inputs), ("axis", 0))
            ]
            steps.append(("Slice", tuple(ends), {}))
        if _axis(weight) == 1:
            steps.append(("Transpose", (), {"perm": [1, 0]}))
        for number, (op_type, reads, attributes) in enumerate(steps, start=1):
            value = compute(op_type, value, *reads, last=number == len(steps), **attributes)
        return tensors, nodes

    def _replace_products(self, model: ModelProto, weight: Weight, codes: npt.NDArray[np.int8], scale: Float64) -> None:
        """Replace every product with a weight by MatMulNBits. It reads (out, groups, bytes of a group) unsigned codes,
        with zero in the middle, and (out * groups) scales."""
        outputs = codes.shape[2]
        middle = 2 ** (self.bits - 1)
        unsigned = (codes.astype(np.int16) + middle).astype(np.uint8).transpose(2, 0, 1)
        if self.bits == 4:
            unsigned = unsigned[:, :, 0::2] + 16 * unsigned[:, :, 1::2]
        scales = scale.astype(np.float32)[:, 0].T.reshape(-1)
        taken = value_names(model)
        stored = [unique_name(f"{weight.name}.{part}", taken) for part in ("codes", "scale")]
        model.graph.initializer.extend(
            numpy_helper.from_array(np.ascontiguousarray(array), to)
            for array, to in zip((unsigned, scales), stored, strict=True)
        )
        if not any(entry.domain == DOMAIN for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        for use in weight.uses:
            node, bias = use.node, use.node.input[2:]
            result = unique_name(f"{node.output[0]}.product", value_names(model)) if bias else node.output[0]
            product = helper.make_node(
                "MatMulNBits",
                [node.input[0], *stored],
                [result],
                f"{node.name}.MatMulNBits",
                domain=DOMAIN,
                K=weight.shape[use.axis],
                N=outputs,
                bits=self.bits,
                block_size=self.group,
                accuracy_level=FLOAT32_ARITHMETIC,
            )
            index = [other.name for other in model.graph.node].index(node.name)
            if bias:
                model.graph.node.insert(
                    index, helper.make_node("Add", [result, bias[0]], [node.output[0]], f"{node.name}.Add")
                )
            model.graph.node.insert(index, product)
            model.graph.node.remove(node)


def _axis(weight: Weight) -> int:
    """Return the axis along which groups run: the axis that the first consumer sums over."""
    return weight.uses[0].axis


def nearest(weight: Float64, bits: int, group: int) -> tuple[npt.NDArray[np.int8], Float64]:
    """Return codes (groups, group, out) and scales (groups, 1, out) of a weight (in, out): symmetric, with a group's
    largest weight at the end of its grid."""
    grouped = _grouped(weight, group)
    scale = _scale(grouped, bits)
    return np.round(grouped / scale).astype(np.int8), scale


def gptq(
    weight: Float64, second: Float64, bits: int, group: int, damping: float
) -> tuple[npt.NDArray[np.int8], Float64]:
    """Return the same of a weight (in, out), rounded with compensation of errors. second: (in, in) sum of x x^T over
    the inputs x on training data."""
    inputs, outputs = weight.shape
    found, grids = compensated(
        weight.T, inverse_factor(second, damping), group, lambda block, _: Symmetric.fit(block, bits)
    )
    codes = np.zeros((-(-inputs // group) * group, outputs), np.int8)
    codes[:inputs] = found.T
    return codes.reshape(-1, group, outputs), np.stack([grid.scale.T for grid in grids])


@dataclass(frozen=True, slots=True)
class Symmetric:
    """Codes from -limit to limit, times a scale (out, 1)."""

    limit: int
    scale: Float64

    @classmethod
    def fit(cls, block: Float64, bits: int) -> Symmetric:
        """Return the grid of weights (out, group)."""
        return cls(2 ** (bits - 1) - 1, _scale(block.T[None], bits)[0].T)

    def codes(self, values: Float64) -> npt.NDArray[np.int8]:
        return np.clip(np.round(values / self.scale), -self.limit, self.limit).astype(np.int8)

    def values(self, codes: npt.NDArray[Any]) -> Float64:
        return codes * self.scale


def _grouped(weight: Float64, group: int) -> Float64:
    """Reshape to (groups, group, out); zeros fill up the last group."""
    inputs, outputs = weight.shape
    return np.pad(weight, ((0, -inputs % group), (0, 0))).reshape(-1, group, outputs)


def _scale(grouped: Float64, bits: int) -> Float64:
    """Return (groups, 1, out) steps, as float32 stores them."""
    scale = np.abs(grouped).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.where(scale == 0, 1.0, scale).astype(np.float32).astype(np.float64)
