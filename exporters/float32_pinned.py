"""Find the layers that must compute in float32, because a weakly typed TensorRT may run any layer in half.

Before TensorRT 10, --fp16 says that the builder *may* use half, for every layer: it runs a softmax, a sum or a mask of
-1e9 that the graph keeps in float32 in half whenever that is faster. Since 8.4, trtexec has options that set the
precision of single layers (--layerPrecisions, --layerOutputTypes: CHANGELOG of NVIDIA/TensorRT, 8.4.1). The parser
gives a layer the name of the node whose work it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto

from edgekit.graph.index import Index, element_types
from edgekit.graph.model import attribute

# They compute nothing, so they are in half only if the layers around them are.
MOVING = frozenset(
    (
        "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Slice",
        "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    )
)  # fmt: skip
TYPED = frozenset(("Cast", "Constant", "ConstantOfShape", "DequantizeLinear", "QuantizeLinear", "Shape", "Size"))
DECIDING = frozenset(("ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "TopK"))
SEPARATORS = ",'*"  # characters that have another meaning in trtexec's list of layers


@dataclass(frozen=True, slots=True)
class Float32Pinned:
    """Names of nodes. layers: they compute in float32; outputs: those whose result also stays in float32."""

    layers: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """Return options of trtexec 8.4 and later. The constraint is `prefer`: under `obey`, a fusion that has no
        float32 version would fail the build. If trtexec cannot follow the preference it prints a warning, and verify.py
        measures the difference."""
        found = []
        for option, names in (("layerPrecisions", self.layers), ("layerOutputTypes", self.outputs)):
            if listed := sorted(set(names) - set(self.unnameable)):
                found.append(f"--{option}={','.join(f'{name}:fp32' for name in listed)}")
        return ["--precisionConstraints=prefer", *found] if found else []

    @property
    def unnameable(self) -> list[str]:
        """Return the names that such an option cannot hold."""
        return [name for name in self.layers if not name or set(SEPARATORS) & set(name)]


NOTHING = Float32Pinned()


def float32_pinned(model: ModelProto) -> Float32Pinned:
    """Return the nodes that compute in float32 in a graph of float32 and half."""
    types, index = element_types(model), Index(model)
    found: set[str] = set()
    outputs: set[str] = set()
    for node in reversed(model.graph.node):
        if not _is_pinned(node, types, index.consumers(node.output[0]), found):
            continue
        found.add(node.name)
        after = index.consumers(node.output[0])
        narrowed = bool(after) and all(_to_half(consumer) for consumer in after)
        if len(node.output) == 1 and types.get(node.output[0]) == TensorProto.FLOAT and not narrowed:
            outputs.add(node.name)
    names = [node.name for node in model.graph.node]
    return Float32Pinned(tuple(n for n in names if n in found), tuple(n for n in names if n in outputs))


def _is_pinned(node: NodeProto, types: dict[str, int], after: Sequence[NodeProto], found: set[str]) -> bool:
    if node.op_type in TYPED or TensorProto.FLOAT not in {types.get(name) for name in node.input}:
        return False
    if node.op_type in MOVING:
        return bool(after) and all(consumer.name in found for consumer in after)
    return types.get(node.output[0]) == TensorProto.FLOAT or node.op_type in DECIDING


def _to_half(node: NodeProto) -> bool:
    return node.op_type == "Cast" and attribute(node, "to", 0) == TensorProto.FLOAT16
