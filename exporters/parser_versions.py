"""What the ONNX parser of each TensorRT version reads, from `tensorrt.toml`, and a check of a graph against it.

The check finds at export what the parser would refuse on the device, and names the node and the reason: unknown
operators, other domains, zero points, int32 biases, modes and second outputs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from edgekit.errors import EdgekitError, unknown
from edgekit.graph.model import attribute, opset, stored_values
from edgekit.targets.profile import Stack

TABLE = Path(__file__).parent / "tensorrt.toml"
RTX = "rtx"


@dataclass(frozen=True, slots=True)
class ParserVersion:
    """One parser version. `flags`: options of its trtexec, without dashes; `dialect`: its names for the options of
    build.sh."""

    name: str
    opset: int
    typing: str  # weak: flags choose the precision; strong: the graph does; either
    operators: frozenset[str]
    stored: Mapping[str, tuple[int, ...]]
    single: frozenset[str]
    resize: frozenset[str]
    flags: frozenset[str]
    dialect: Mapping[str, str]

    @property
    def title(self) -> str:
        return "TensorRT-RTX" if self.name == RTX else f"TensorRT {self.name}"

    def refuse(self, model: ModelProto) -> None:
        """Raise at the first node that this parser version does not read."""
        if (version := opset(model)) > self.opset:
            raise EdgekitError(f"{self.title} reads ONNX opsets up to {self.opset}; the graph is in {version}")
        for node, reason in self.problems(model):
            raise EdgekitError(f"{self.title} does not take node {node.name!r} ({node.op_type}): {reason}")

    def problems(self, model: ModelProto) -> Iterable[tuple[NodeProto, str]]:
        """Yield the nodes that it does not read, each with the reason."""
        fixed = stored_values(model)
        values = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in _nodes(model.graph.node):
            if node.domain not in ("", "ai.onnx"):
                yield node, f"domain {node.domain!r} is a runtime's own; export without that runtime's optimizations"
            elif node.op_type not in self.operators:
                yield node, _instead(node.op_type)
            elif node.op_type in self.single and any(node.output[1:]):
                yield node, "only the first output of this operator is supported"
            elif node.op_type == "Resize" and (mode := attribute(node, "mode", b"nearest").decode()) not in self.resize:
                yield node, f"mode {mode!r}; expected {' or '.join(sorted(self.resize))}"
            elif node.op_type in ("QuantizeLinear", "DequantizeLinear") and (why := _asymmetric(node, values)):
                yield node, why
            for number in self.stored.get(node.op_type, ()):
                if number < len(node.input) and node.input[number] and node.input[number] not in fixed:
                    yield (
                        node,
                        f"input {node.input[number]!r} must be stored in the graph, not computed",
                    )


def _nodes(nodes: Iterable[NodeProto]) -> Iterable[NodeProto]:
    """Yield all nodes, including those in subgraphs."""
    for node in nodes:
        yield node
        for item in node.attribute:
            for graph in [item.g] if item.HasField("g") else item.graphs:
                yield from _nodes(graph.node)


def _instead(operator: str) -> str:
    if operator in ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"):
        return "no such operator; quantize with the pass static_int8, scheme = 's8s8'"
    return "no such operator; rewrite that layer with others"


def _asymmetric(node: NodeProto, values: Mapping[str, TensorProto]) -> str:
    """Say why the parser refuses the zero point or type of a quantizing node; "" if it does not."""
    stored = values.get(node.input[0])
    if stored is not None and stored.data_type == TensorProto.INT32:
        return "an int32 bias; quantize with the pass static_int8, scheme = 's8s8', which leaves biases in float32"
    if len(node.input) < 3 or not node.input[2]:
        return "" if node.op_type == "DequantizeLinear" else "without a zero point its codes are uint8"
    zero = values.get(node.input[2])
    if zero is None:
        return "its zero point is not stored in the graph"
    if zero.data_type in (TensorProto.UINT8, TensorProto.INT32, TensorProto.UINT16, TensorProto.INT16):
        dtype = TensorProto.DataType.Name(zero.data_type).lower()
        return f"codes are {dtype}, which must be int8; quantize with scheme = 's8s8'"
    if zero.data_type == TensorProto.INT8 and np.any(numpy_helper.to_array(zero)):
        return "its zero point is not 0; quantize with scheme = 's8s8'"
    return ""


@cache
def parser_versions() -> Mapping[str, ParserVersion]:
    """Return all parser versions by name, oldest first."""
    table: dict[str, dict[str, Any]] = tomllib.loads(TABLE.read_text("utf-8"))
    found: dict[str, ParserVersion] = {}
    for name, own in table.items():
        base = found.get(own.get("after", ""))
        operators = (base.operators if base else frozenset()) | set(own.get("operators", ()))
        flags = (base.flags if base else frozenset()) | set(own.get("flags", ()))
        stored = {key: tuple(numbers) for key, numbers in own["stored"].items()} if "stored" in own else None
        found[name] = ParserVersion(
            name,
            own["opset"],
            own["typing"],
            operators - set(own.get("without", ())),
            stored if stored is not None else base.stored if base else {},
            frozenset(own["single"]) if "single" in own else base.single if base else frozenset(),
            frozenset(own["resize"]) if "resize" in own else base.resize if base else frozenset(),
            flags - set(own.get("without_flags", ())),
            own.get("dialect", {}),
        )
    return found


def parser_version(stack: Stack) -> ParserVersion | None:
    """Return the parser version of a stack, or None if its runtime has no parser of its own."""
    if stack.runtime == "tensorrt-rtx":
        return parser_versions()[RTX]
    if stack.runtime != "tensorrt":
        return None
    known = [name for name in parser_versions() if name != RTX]
    parts = stack.tensorrt.split(".")
    for name in (".".join(parts[:2]), parts[0]):
        if name in known:
            return parser_versions()[name]
    raise unknown("TensorRT parser version", stack.tensorrt or "(none given)", known, where=stack.name)
