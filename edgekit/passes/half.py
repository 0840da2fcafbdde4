"""Half precision: float16 or bfloat16 weights and arithmetic, inputs and outputs in float32 (mixed precision as in
Micikevicius et al. 2018, arXiv 1710.03740, section 3, for inference alone).

    compute     x -- Cast -- [MatMul, Add, Relu, ... in half] -- Cast -- [Softmax, ... in float32] -- Cast -- ...
    storage     weights in half, a Cast to float32 after each, which every runtime folds: half the bytes, float32 speed

Sums over many terms and exponentials lose most accuracy, so those operators stay in float32; so do all operators that
the ONNX standard does not define in half. A CPU computes float16 slower than float32, so use `storage` there.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, defs, helper, numpy_helper, shape_inference

from edgekit.bundle.onnx_file import LEAST
from edgekit.errors import EdgekitError, unknown
from edgekit.graph.model import eliminate_dead_nodes, name_nodes, opset, replace_tensor, unique_name, value_names
from edgekit.passes.base import Change, Context, GraphCandidate, Level, Pass

DTYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
LARGEST = 65504.0  # of float16
SMALLEST = 2.0**-25  # float16 rounds a magnitude up to this one to zero
STORED = 64  # numbers; for a smaller tensor the Cast takes as many bytes as half precision saves
LEAST_OPSET = 13  # the first with bfloat16
NEVER = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")  # scales in half would change every code


@dataclass(frozen=True, slots=True)
class Half(Pass[GraphCandidate]):
    """`dtype`: fp16 or bf16. `keep`: operators that stay in float32; `keep_nodes`: patterns of the names of nodes that
    do. `storage`: convert weights only. `overflow`: whether to refuse a weight that float16 cannot hold, or to keep it
    and its consumers in float32."""

    name: ClassVar[str] = "half"
    summary: ClassVar[str] = "weights and arithmetic in 16 bits, sensitive operators in float32"
    level: ClassVar[Level] = Level.GRAPH

    dtype: str = "fp16"
    storage: bool = False
    keep: tuple[str, ...] = (
        "Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "ReduceMean", "ReduceSum", "ReduceL2",
        "Pow", "Exp", "Log", "CumSum", "TopK", "NonMaxSuppression",
    )  # fmt: skip
    keep_nodes: tuple[str, ...] = ()
    overflow: str = "refuse"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.overflow not in ("refuse", "keep"):
            raise unknown("overflow", self.overflow, ("refuse", "keep"))
        for name in self.keep:
            if not defs.has(name):
                raise EdgekitError(f"keep: {name!r} is no ONNX operator; expected names such as Softmax")

    def precisions(self) -> tuple[str, ...]:
        return () if self.storage else ({"fp16": "float16", "bf16": "bfloat16"}[self.dtype],)

    def plan(self, candidate: GraphCandidate) -> list[Change]:
        model = candidate.copy_model()
        narrow, nodes = self._chosen(model)
        sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        changes = [Change(name, f"{sizes[name]} float32", self.dtype) for name in sizes if name in narrow]
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= STORED and tensor.name not in narrow:
                changes.append(
                    Change(tensor.name, f"{tuple(tensor.dims)} float32", "left in float32: one of its consumers is")
                )
        op_types = Counter(node.op_type for node in model.graph.node if node.name in nodes)
        return changes + [
            Change(f"{count} {op_type}", "float32", self.dtype) for op_type, count in sorted(op_types.items())
        ]

    def apply(self, candidate: GraphCandidate, context: Context) -> GraphCandidate:
        return GraphCandidate(self.converted(candidate.copy_model()))

    def converted(self, model: ModelProto) -> ModelProto:
        """Rewrite the graph in place and return it."""
        narrow, nodes = self._chosen(model)
        if self.storage:
            for tensor in [item for item in model.graph.initializer if item.name in narrow]:
                stored = self._narrowed(tensor, unique_name(f"{tensor.name}.{self.dtype}", value_names(model)))
                cast = helper.make_node(
                    "Cast", [stored.name], [tensor.name], f"{tensor.name}.Cast", to=TensorProto.FLOAT
                )
                replace_tensor(model, tensor.name, [stored], [cast])
        else:
            self._convert(model, narrow, nodes)
        eliminate_dead_nodes(model)
        return model

    def _chosen(self, model: ModelProto) -> tuple[set[str], set[str]]:
        """Return the names of the tensors to store in half, and of the nodes to compute in half."""
        name_nodes(model)
        if opset(model) < LEAST_OPSET:
            raise EdgekitError(
                f"half: the graph is written in opset {opset(model)}, which defines too little in half; it needs "
                f"{LEAST_OPSET} or more: convert it with onnx.version_converter"
            )
        floats = _floats(model)
        lost = {tensor.name for tensor in model.graph.initializer if self._lost(tensor)}
        nodes = {
            node.name for node in model.graph.node if self._can(model, node, floats) and not lost & set(node.input)
        }
        consumers: dict[str, set[bool]] = {}
        for node in model.graph.node:
            slots = _slots(model, node, "input", DTYPES[self.dtype])
            for slot, name in enumerate(node.input):
                # in storage mode, all consumers count except those that must stay exact
                suits = not self._kept(node) if self.storage else node.name in nodes and slot in slots
                consumers.setdefault(name, set()).add(suits)
        bound = set(_inside(model.graph.node)) | {value.name for value in model.graph.input}  # names that must stay
        narrow = {
            tensor.name
            for tensor in model.graph.initializer
            if tensor.data_type == TensorProto.FLOAT
            and tensor.name not in lost | bound
            and consumers.get(tensor.name) == {True}
            and (not self.storage or np.prod(tensor.dims) >= STORED)
        }
        if not narrow and (self.storage or not nodes):
            raise EdgekitError(
                f"half: nothing can be converted to {self.dtype}; leave this pass out, or shorten keep and keep_nodes"
            )
        return narrow, set() if self.storage else nodes

    def _kept(self, node: NodeProto) -> bool:
        return node.op_type in (*self.keep, *NEVER) or any(fnmatch.fnmatch(node.name, p) for p in self.keep_nodes)

    def _can(self, model: ModelProto, node: NodeProto, floats: set[str]) -> bool:
        """Return whether a node can compute in half: it is not in `keep`, and the standard defines its operator in
        half."""
        if self._kept(node) or node.domain not in ("", "ai.onnx") or node.op_type == "Constant":
            return False
        if any(item.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for item in node.attribute):
            return False
        if node.op_type == "Cast":
            return False
        if node.op_type == "Transpose" and node.input[0] not in {tensor.name for tensor in model.graph.initializer}:
            return False  # in half before a product, it makes onnxruntime 1.24 to 1.32 crash (its issue 28392)
        slots = _slots(model, node, "input", DTYPES[self.dtype])
        reads = [node.input[slot] for slot in slots if node.input[slot]]
        return bool(reads) and all(name in floats for name in reads)

    def _lost(self, tensor: TensorProto) -> bool:
        """Return whether float16 cannot hold a tensor: its values are too large, or it is a constant such as 1e-12 that
        would become zero."""
        if self.dtype == "bf16" or tensor.data_type != TensorProto.FLOAT:
            return False
        value = np.abs(numpy_helper.to_array(tensor))
        finite = value[np.isfinite(value)]
        largest = float(finite.max(initial=0.0))
        if largest > LARGEST and self.overflow == "refuse":
            raise EdgekitError(
                f"half: {tensor.name!r} holds {largest:g}, and float16 ends at {LARGEST:g}; set overflow = 'keep' to "
                "leave it in float32, or dtype = 'bf16'"
            )
        vanishes = finite.size < LEAST and bool((finite[finite > 0] <= SMALLEST).any())
        return largest > LARGEST or vanishes

    def _convert(self, model: ModelProto, narrow: set[str], nodes: set[str]) -> None:
        """Rewrite the graph in place. A name still means the float32 value, and its half has another name. If a node
        needs the one that does not exist yet, a Cast computes it from the other."""
        graph, dtype = model.graph, DTYPES[self.dtype]
        floats, taken = _floats(model), value_names(model)
        halves: dict[str, str] = {}  # names of values in half by their float32 names
        full = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
        for tensor in list(graph.initializer):
            if tensor.name in narrow:
                halves[tensor.name] = unique_name(f"{tensor.name}.{self.dtype}", taken)
                taken.add(halves[tensor.name])
                tensor.CopyFrom(self._narrowed(tensor, halves[tensor.name]))
                full.discard(tensor.name)
        result: list[NodeProto] = []

        def in_half(name: str) -> str:
            if name not in halves:
                halves[name] = unique_name(f"{name}.{self.dtype}", taken)
                taken.add(halves[name])
                result.append(helper.make_node("Cast", [name], [halves[name]], f"{halves[name]}.Cast", to=dtype))
            return halves[name]

        def in_full(name: str) -> str:
            if name in halves and name not in full:
                cast = helper.make_node("Cast", [halves[name]], [name], f"{name}.Cast_to_float32", to=TensorProto.FLOAT)
                result.append(cast)
                full.add(name)
            return name

        for node in graph.node:
            converted = NodeProto()
            converted.CopyFrom(node)
            if node.name in nodes:
                for slot in _slots(model, node, "input", dtype):
                    if node.input[slot]:
                        converted.input[slot] = in_half(node.input[slot])
                for slot in set(range(len(node.input))) - set(_slots(model, node, "input", dtype)):
                    in_full(node.input[slot])
                for slot in _slots(model, node, "output", dtype):
                    if node.output[slot] in floats:
                        halves[node.output[slot]] = converted.output[slot] = unique_name(
                            f"{node.output[slot]}.{self.dtype}", taken
                        )
                        taken.add(converted.output[slot])
            else:
                for name in (*node.input, *_inside([node])):
                    in_full(name)
            full.update(converted.output)
            result.append(converted)
        for value in graph.output:
            in_full(value.name)
        graph.ClearField("node")
        graph.node.extend(result)
        graph.ClearField("value_info")  # it gives float32 as the type of values that are now in half

    def _narrowed(self, tensor: TensorProto, name: str) -> TensorProto:
        """Round a tensor to half: to the nearest, ties to even."""
        value = numpy_helper.to_array(tensor)
        raw = value.astype(np.float16).tobytes() if self.dtype == "fp16" else bfloat16(value).tobytes()
        return TensorProto(name=name, data_type=DTYPES[self.dtype], dims=tensor.dims, raw_data=raw)


def bfloat16(value: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to the upper 16 bits of float32, to the nearest, ties to even; numpy has no bfloat16."""
    bits = np.ascontiguousarray(value).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _slots(model: ModelProto, node: NodeProto, side: str, dtype: int) -> list[int]:
    """Return the inputs or outputs of a node that may be float32 as well as this half precision type."""
    try:
        schema = defs.get_schema(node.op_type, opset(model), "")
    except defs.SchemaError:
        return []
    allowed = {item.type_param_str: set(item.allowed_type_strs) for item in schema.type_constraints}
    wanted = {"tensor(float)", "tensor(float16)" if dtype == TensorProto.FLOAT16 else "tensor(bfloat16)"}
    formal = list(schema.inputs if side == "input" else schema.outputs)
    result = []
    for slot in range(len(node.input if side == "input" else node.output)):
        parameter = formal[min(slot, len(formal) - 1)]  # the last parameter may stand for many inputs
        if wanted <= allowed.get(parameter.type_str, set()):
            result.append(slot)
    return result


def _floats(model: ModelProto) -> set[str]:
    """Return the names of the values that are float32, as far as ONNX can infer them."""
    inferred = shape_inference.infer_shapes(model).graph
    names = {tensor.name for tensor in inferred.initializer if tensor.data_type == TensorProto.FLOAT}
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return names | {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}


def _inside(nodes: Iterable[NodeProto]) -> list[str]:
    """Return the names that the subgraphs of these nodes read."""
    found: list[str] = []
    for node in nodes:
        for item in node.attribute:
            for graph in [item.g] if item.HasField("g") else item.graphs:
                found += [name for inner in graph.node for name in inner.input] + [v.name for v in graph.output]
                found += _inside(graph.node)
    return found
