"""Move the scale of outlier features from activations into weights, so that both fit into 8 bits (SmoothQuant, Xiao et
al. 2023, arXiv 2211.10438, section 4, equation 4).

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)
    normalization's scale and bias / s -- product with diag(s) W       the same function

The pass has no gain by itself. It prepares for `static_int8` or `dynamic_int8`, which have one activation scale for all
features. A second run of the pass changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from edgekit.errors import EdgekitError
from edgekit.graph.calibration import calibration_rows, moments
from edgekit.graph.model import (
    Weight,
    attribute,
    eliminate_dead_nodes,
    name_nodes,
    set_tensor,
    unique_name,
    value_names,
    weights,
)
from edgekit.passes.base import Change, Context, GraphCandidate, Level, Pass, at_least

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Site:
    """An activation after a stored scale, and the weights of all its consumers. vectors: (node, input) of that scale
    and of the bias after it."""

    activation: str
    vectors: tuple[tuple[NodeProto, int], ...]
    weights: tuple[Weight, ...]


@dataclass(frozen=True, slots=True)
class SmoothQuant(Pass[GraphCandidate]):
    """`alpha`: the share of the range that moves into the weights, from 0 (none) to 1. `samples`: rows of the training
    data for calibration."""

    name: ClassVar[str] = "smooth_quant"
    summary: ClassVar[str] = "move outlying features from activations into weights, before int8"
    level: ClassVar[Level] = Level.GRAPH
    prepares: ClassVar[bool] = True  # kept for later passes if it loses nothing

    alpha: float = 0.5  # the paper's value for all but the most extreme models
    samples: int = 256

    def __post_init__(self) -> None:
        at_least("alpha", self.alpha, 0, 1)
        at_least("samples", self.samples, 1, 1_000_000)

    def plan(self, candidate: GraphCandidate) -> list[Change]:
        return _sites(candidate.copy_model())[1]

    def apply(self, candidate: GraphCandidate, context: Context) -> GraphCandidate:
        model = candidate.copy_model()
        sites, _ = _sites(model)
        rows = calibration_rows(model, context.train, self.samples, context.seed)
        seen = moments(model, [site.activation for site in sites], rows)
        for site in sites:
            values = {weight.name: numpy_helper.to_array(weight.tensor).astype(np.float64) for weight in site.weights}
            largest = np.max(
                [np.abs(values[item.name]).max(axis=1 - item.uses[0].axis) for item in site.weights], axis=0
            )
            scale = smoothing(seen[site.activation].largest, largest, self.alpha)
            for node, slot in site.vectors:
                _divide(model, node, slot, scale)
            for weight in site.weights:
                factor = scale[:, None] if weight.uses[0].axis == 0 else scale
                set_tensor(model, weight.name, values[weight.name] * factor)
        eliminate_dead_nodes(model)
        return GraphCandidate(model)


def smoothing(activations: Float64, weights: Float64, alpha: float) -> Float64:
    """Return (features,) divisors from the largest magnitude of each feature and of the weights that multiply it; 1 if
    one of the two is zero."""
    known = (activations > 0) & (weights > 0)
    scale = np.where(known, activations, 1.0) ** alpha / np.where(known, weights, 1.0) ** (1 - alpha)
    return np.where(known, scale, 1.0)


def _sites(model: ModelProto) -> tuple[list[_Site], list[Change]]:
    """Return the activations whose scales can move, and a plan with a line for every normalization."""
    name_nodes(model)
    by_node = {use.node.name: weight for weight in weights(model) for use in weight.uses}
    ends = {value.name for value in model.graph.output}
    sites, changes = [], []
    for node in model.graph.node:
        vectors = _vectors(model, node)
        if not vectors:
            continue
        consumers = [other for other in model.graph.node if node.output[0] in other.input]
        products = [other for other in consumers if other.name in by_node and other.input[0] == node.output[0]]
        if not products:
            continue  # no product follows this scale
        before = "one scale for " + node.output[0]
        others = [other.name for other in consumers if other not in products] + ["the graph's output"] * (
            node.output[0] in ends
        )
        found = {by_node[other.name].name: by_node[other.name] for other in products}
        shared = [weight for weight in found.values() if not _own(weight, node.output[0])]
        if others:
            changes.append(Change(node.name, before, f"left as it is: also read by {', '.join(others)}"))
        elif shared:
            reason = f"{shared[0].name} is tied or behind a Transpose, read by {shared[0].consumers}"
            changes.append(Change(node.name, before, f"left as it is: {reason}"))
        else:
            sites.append(_Site(node.output[0], tuple(vectors), tuple(found.values())))
            changes.append(Change(node.name, before, f"features balanced with {', '.join(found)}"))
    if not sites:
        left = "; ".join(f"{change.tensor}: {change.after}" for change in changes[:5])
        raise EdgekitError(
            "smooth_quant: no product directly follows a normalization or a stored scale"
            + (f" ({left})" if left else "; leave this pass out")
        )
    return sites, changes


def _own(weight: Weight, activation: str) -> bool:
    """Return whether a weight is a matrix that is read, as it is stored, by products with this activation only."""
    alike = all(use.activation == activation and not use.transposed for use in weight.uses)
    return alike and not weight.others and len(weight.shape) == 2 and len(weight.axes) == 1


def _vectors(model: ModelProto, node: NodeProto) -> list[tuple[NodeProto, int]]:
    """Return scale and bias (features,) of a LayerNormalization along the last axis, or of an Add after a Mul."""
    stored = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 1}
    if node.op_type == "LayerNormalization":
        given = [slot for slot in (1, 2) if slot < len(node.input) and node.input[slot]]
        plain = attribute(node, "axis", -1) == -1 and len(node.output) == 1
        return [(node, slot) for slot in given] if plain and all(node.input[slot] in stored for slot in given) else []
    if node.op_type != "Add" or not (bias := [slot for slot in (0, 1) if node.input[slot] in stored]):
        return []
    scaled = node.input[1 - bias[0]]
    made = next((other for other in model.graph.node if scaled in other.output), None)
    alone = sum(list(other.input).count(scaled) for other in model.graph.node) == 1
    alone = alone and scaled not in {value.name for value in model.graph.output}
    if made is None or made.op_type != "Mul" or not alone:
        return []
    scale = [slot for slot in (0, 1) if made.input[slot] in stored]
    return [(made, scale[0]), (node, bias[0])] if scale else []


def _divide(model: ModelProto, node: NodeProto, slot: int, scale: Float64) -> None:
    """Divide a node's vector. The result is a new tensor, because other nodes may share the old one (such as ones and
    zeros)."""
    tensor = next(item for item in model.graph.initializer if item.name == node.input[slot])
    value = np.broadcast_to(numpy_helper.to_array(tensor), scale.shape) / scale
    node.input[slot] = unique_name(f"{tensor.name}.smoothed", value_names(model))
    model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), node.input[slot]))
