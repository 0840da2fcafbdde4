"""Matrix products in int8. The weights are quantized once, with one scale per output column; the activations are
quantized while the model runs, by the range of each batch (onnxruntime's dynamic quantization). By default the pass
quantizes only MatMul and Gemm: convolutions lose more than they gain. With the operator Gather, tables that ids are
looked up in are stored as codes too, with one scale per row.

    Gather(table, ids)    becomes    Cast(Gather(codes, ids)) * Gather(scales, ids)
"""

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

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgekit.errors import EdgekitError, unknown
from edgekit.graph.index import Consumption, Index
from edgekit.graph.model import (
    Weight,
    attribute,
    eliminate_dead_nodes,
    name_nodes,
    stored_values,
    unique_name,
    value_names,
    weights,
)
from edgekit.passes.base import Change, Context, GraphCandidate, Level, Pass

OPERATORS = ("MatMul", "Gemm", "Conv")
SMALLEST_TABLE = 1024  # numbers; for a smaller table the nodes take as many bytes as the codes save
TABLES = "Gather"  # looks up rows of a table, such as the embeddings of tokens


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
        check_operators([name for name in self.operators if name != TABLES])
        check_weight_bits(self.weight_bits)

    def plan(self, candidate: GraphCandidate) -> list[Change]:
        model = candidate.copy_model()
        changes = products(model, self._products, self.exclude)[1]
        return [*changes, *(Change(name, "float32 table", "int8, one scale per row") for name in self._tables(model))]

    @property
    def _products(self) -> tuple[str, ...]:
        return tuple(name for name in self.operators if name != TABLES)

    def _tables(self, model: ModelProto) -> list[str]:
        return tables(model, self.exclude) if TABLES in self.operators else []

    def apply(self, candidate: GraphCandidate, context: Context) -> GraphCandidate:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        model = candidate.copy_model()
        chosen, _ = products(model, self._products, self.exclude)
        for name in self._tables(model):
            _quantize_table(model, name)
        nodes = [use.node.name for weight in chosen for use in weight.uses]
        nodes += [f"{name}_MatMul" for name in nodes]  # onnxruntime splits a Gemm and gives its product this name
        quantize = partial(
            quantize_dynamic,
            model,
            op_types_to_quantize=list(self._products),
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=nodes,
            reduce_range=self.weight_bits == 7,
        )
        with tempfile.TemporaryDirectory() as folder, quiet():
            quantize(model_output=Path(folder) / "model.onnx")
            return GraphCandidate(onnx.load(Path(folder) / "model.onnx"))


def tables(model: ModelProto, exclude: Sequence[str]) -> list[str]:
    """Return the names of float32 matrices of which every consumer is a Gather that looks up rows."""
    index = Index(model)
    return [
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) == 2
        and tensor.dims[0] * tensor.dims[1] >= SMALLEST_TABLE
        and all(_looks_up(item, exclude) for item in index.consumptions(tensor.name))
    ]


def _looks_up(item: Consumption, exclude: Sequence[str]) -> bool:
    node = item.node
    return (
        node is not None
        and not item.nested
        and (node.op_type, item.slot, attribute(node, "axis", 0)) == (TABLES, 0, 0)
        and node.name not in exclude
    )


def _quantize_table(model: ModelProto, name: str) -> None:
    graph = model.graph
    consumers = Index(model).consumers(name)
    table = numpy_helper.to_array(next(tensor for tensor in graph.initializer if tensor.name == name))
    largest = np.abs(table).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    codes = np.round(table / scale).astype(np.int8)
    taken = value_names(model)
    stored = [unique_name(f"{name}.{part}", taken) for part in ("codes", "scale")]
    for number, node in enumerate(consumers):
        ids, result, base = node.input[1], node.output[0], f"{name}.lookup_{number}"
        new = [
            helper.make_node("Gather", [stored[0], ids], [f"{base}.codes"], f"{base}.Gather"),
            helper.make_node("Cast", [f"{base}.codes"], [f"{base}.numbers"], f"{base}.Cast", to=TensorProto.FLOAT),
            helper.make_node("Gather", [stored[1], ids], [f"{base}.scale"], f"{base}.GatherScale"),
            helper.make_node("Mul", [f"{base}.numbers", f"{base}.scale"], [result], f"{base}.Mul"),
        ]
        at = list(graph.node).index(node)
        del graph.node[at]
        for item in reversed(new):
            graph.node.insert(at, item)
    graph.initializer.append(numpy_helper.from_array(codes, stored[0]))
    graph.initializer.append(numpy_helper.from_array(scale, stored[1]))
    eliminate_dead_nodes(model)


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
            + (f" ({left})" if left else _in_branches(model) or "; leave this pass out")
        )
    return chosen, changes


def _in_branches(model: ModelProto) -> str:
    """Say that products are in branches, which passes leave as they are, and what to do; "" if the graph has none."""
    branching = [node for node in model.graph.node if any(item.HasField("g") for item in node.attribute)]
    if not branching:
        return ""
    first = branching[0]
    return (
        f": the products are in branches of {first.op_type} {first.name!r}, which depends on {first.input[0]!r}; "
        "import the model with the input or axis fixed that decides: edgekit import --fix NAME=NUMBER"
    )


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
