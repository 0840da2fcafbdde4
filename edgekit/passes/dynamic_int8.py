"""Matrix products in int8: weights quantised once, one scale per output column; activations while the model runs, by
the range of the batch at hand (onnxruntime's dynamic quantisation). Only MatMul and Gemm by default: convolutions and
embeddings lose more than they gain."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx
from onnx import NodeProto, TensorProto

from edgekit.errors import EdgekitError
from edgekit.graph import matmul_weights
from edgekit.passes.base import GRAPH_LEVEL, Change, Context, GraphCandidate

OPERATORS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True, slots=True)
class DynamicInt8:
    """`operators`: which are quantised; `exclude`: names of nodes that stay in float32."""

    name: ClassVar[str] = "dynamic_int8"
    summary: ClassVar[str] = "int8 matrix products, activations quantised as the model runs"
    level: ClassVar[str] = GRAPH_LEVEL

    operators: tuple[str, ...] = ("MatMul", "Gemm")
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if strange := set(self.operators) - set(OPERATORS):
            raise EdgekitError(f"operators: {min(strange)!r}; allowed: {', '.join(OPERATORS)}")

    def plan(self, candidate: GraphCandidate) -> list[Change]:
        return [
            Change(node.name, f"{tuple(weight.dims)} float32", "int8, one scale per output column")
            for node, weight in self._chosen(candidate)
        ]

    def apply(self, candidate: GraphCandidate, context: Context) -> GraphCandidate:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        nodes = [node.name for node, _ in self._chosen(candidate)]
        level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)  # its advice to preprocess: graphs here are folded already
        try:
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / "model.onnx"
                quantize_dynamic(
                    candidate.copy_model(), target, op_types_to_quantize=list(self.operators), per_channel=True,
                    weight_type=QuantType.QInt8, nodes_to_quantize=nodes,
                )  # fmt: skip
                return GraphCandidate(onnx.load(target))
        finally:
            logging.getLogger().setLevel(level)

    def _chosen(self, candidate: GraphCandidate) -> list[tuple[NodeProto, TensorProto]]:
        chosen = [
            (node, weight)
            for node, weight in matmul_weights(candidate.model)
            if node.op_type in self.operators and node.name not in self.exclude
        ]
        if not chosen:
            raise EdgekitError(f"the graph has no {' or '.join(self.operators)} with a float32 weight left")
        return chosen
