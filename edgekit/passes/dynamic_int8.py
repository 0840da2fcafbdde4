"""Matrix products in int8. The weights are quantized once, with one scale per output column; the activations are
quantized while the model runs, by the range of each batch (onnxruntime's dynamic quantization). By default the pass
quantizes only MatMul and Gemm: convolutions and embeddings lose more than they gain."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import onnx
from onnx import ModelProto

from edgekit.errors import EdgekitError, unknown
from edgekit.graph.model import Weight, attribute, name_nodes, stored_values, weights
from edgekit.passes.base import Change, Context, GraphCandidate, Level, Pass

OPERATORS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True, slots=True)
class DynamicInt8(Pass[GraphCandidate]):
    """`operators`: the operator types to quantize; `exclude`: names of nodes that stay in float32."""

    name: ClassVar[str] = "dynamic_int8"
    summary: ClassVar[str] = "int8 matrix products, activations quantized as the model runs"
    level: ClassVar[Level] = Level.GRAPH
    computes_in: ClassVar[tuple[str, ...]] = ("int8",)
    writes: ClassVar[tuple[str, ...]] = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")
    weight_bits_parameter: ClassVar[str] = "weight_bits"

    operators: tuple[str, ...] = ("MatMul", "Gemm")
    exclude: tuple[str, ...] = ()
    # x86 CPUs without VNNI add two products in 16 bits, which overflows with 8-bit weights: on such a CPU t2's
    # probabilities changed by up to 0.28 instead of 0.015. With 7 bits every CPU computes the same.
    weight_bits: int = 7

    def __post_init__(self) -> None:
        check_operators(self.operators)
        check_weight_bits(self.weight_bits)

    def plan(self, candidate: GraphCandidate) -> list[Change]:
        return products(candidate.copy_model(), self.operators, self.exclude)[1]

    def apply(self, candidate: GraphCandidate, context: Context) -> GraphCandidate:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        model = candidate.copy_model()
        chosen, _ = products(model, self.operators, self.exclude)
        nodes = [use.node.name for weight in chosen for use in weight.uses]
        nodes += [f"{name}_MatMul" for name in nodes]  # onnxruntime splits a Gemm and gives its product this name
        quantize = partial(
            quantize_dynamic,
            model,
            op_types_to_quantize=list(self.operators),
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=nodes,
            reduce_range=self.weight_bits == 7,
        )
        with tempfile.TemporaryDirectory() as folder, quiet():
            quantize(model_output=Path(folder) / "model.onnx")
            return GraphCandidate(onnx.load(Path(folder) / "model.onnx"))


def check_operators(operators: Sequence[str]) -> None:
    for name in operators:
        if name not in OPERATORS:
            raise unknown("operator", name, OPERATORS, where="operators")


def check_weight_bits(bits: int) -> None:
    if bits not in (7, 8):
        raise EdgekitError(f"weight_bits = {bits}; expected 7 (any CPU) or 8 (VNNI, ARM, GPUs)")


def products(model: ModelProto, operators: Sequence[str], exclude: Sequence[str]) -> tuple[list[Weight], list[Change]]:
    """Return the weights whose products can be quantized, and a plan with a line for every weight. Nodes without names
    get names.

    A weight is quantized for all its consumers or for none: codes for one consumer and a float32 copy for another would
    make the file larger.
    """
    name_nodes(model)
    if strange := set(exclude) - {node.name for node in model.graph.node}:
        raise unknown("node", min(strange), [node.name for node in model.graph.node], where="exclude")
    chosen: list[Weight] = []
    changes: list[Change] = []
    seen: set[str] = set()
    for weight in weights(model):
        seen.update(use.node.name for use in weight.uses)
        if not any(use.node.op_type in operators for use in weight.uses):
            continue
        reason = _obstacle(weight, operators, exclude)
        after = f"left in float32: {reason}" if reason else "int8, one scale per output column"
        changes += [Change(use.node.name, f"{weight.shape} float32", after) for use in weight.uses]
        if not reason:
            chosen.append(weight)
    known = stored_values(model)
    for node in model.graph.node:
        if node.op_type in operators and node.name not in seen and node.input[1] in known:
            changes.append(Change(node.name, f"weight {node.input[1]!r}", "left as it is: stored as codes already"))
    if not chosen:
        left = "; ".join(sorted({f"{change.tensor}: {change.after}" for change in changes})[:5])
        raise EdgekitError(
            f"no {' or '.join(operators)} with a float32 weight is left to quantize"
            + (f" ({left})" if left else "; leave this pass out")
        )
    return chosen, changes


def _obstacle(weight: Weight, operators: Sequence[str], exclude: Sequence[str]) -> str:
    """Say why a weight cannot be quantized; "" if it can."""
    if len(weight.uses) + len(weight.others) == 1 and weight.uses[0].transposed:
        return "onnxruntime does not quantize a weight behind a Transpose; the pass 'fold' removes it"
    if weight.others or len(weight.axes) > 1 or any(use.transposed for use in weight.uses):
        return f"tied, read by {weight.consumers}"
    kept = [use.node for use in weight.uses if use.node.op_type not in operators or use.node.name in exclude]
    if kept:
        return f"{kept[0].name} stays in float32"
    scaled = [
        use.node.name for use in weight.uses if any(attribute(use.node, key, 1.0) != 1 for key in ("alpha", "beta"))
    ]
    if scaled:
        return f"{scaled[0]} has alpha or beta, which onnxruntime does not quantize; the pass 'fold' removes them"
    if len(weight.shape) != 2 and weight.uses[0].node.op_type != "Conv":
        return f"it has {len(weight.shape)} dimensions, and onnxruntime scales matrices only"
    return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of onnxruntime's quantizers: counts of tensors, and advice to preprocess graphs that are
    folded already."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger().setLevel(level)
