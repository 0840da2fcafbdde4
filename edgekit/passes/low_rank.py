"""Replace a matrix by the product of two thin ones, by truncated singular value decomposition. With `activations`, the
pass whitens the inputs seen on training data first, so that it minimizes the error of the outputs instead of the
weights' error (SVD-LLM, Wang et al. 2024, arXiv 2403.07378, section 3.1):

    sum of x x^T = L L^T,   L^T W = U S V^T,   W ~ (L^-T U_r) (S_r V_r^T)

    MatMul(x, W)  becomes  MatMul(MatMul(x, left), right)      r (m + n) numbers instead of m n
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edgekit.errors import EdgekitError
from edgekit.graph.calibration import Moments, calibration_rows, moments
from edgekit.graph.model import (
    Weight,
    attribute,
    chosen_weights,
    eliminate_dead_nodes,
    name_nodes,
    stored_values,
    unique_name,
    value_names,
)
from edgekit.passes.base import Change, Context, GraphCandidate, Level, Pass, at_least

# relative to the mean; added to the second moment's diagonal, because inputs that never vary have no inverse
DAMPING = 1e-6
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LowRank(Pass[GraphCandidate]):
    """`rank`: the rank of every matrix; 0 chooses the least that holds `energy` of the squared singular values.
    `samples`: rows of the training data for calibration."""

    name: ClassVar[str] = "low_rank"
    summary: ClassVar[str] = "replace matrices by products of two thin ones if that is smaller"
    level: ClassVar[Level] = Level.GRAPH

    rank: int = 0
    energy: float = 0.99  # a loss of 1 % of an output's variance is as large as that of int8
    activations: bool = True
    samples: int = 256
    include: tuple[str, ...] = ("*",)  # patterns of the names of weights

    def __post_init__(self) -> None:
        at_least("rank", self.rank, 0, 1_000_000)
        at_least("energy", self.energy, 0.01, 1)
        at_least("samples", self.samples, 1, 1_000_000)

    def plan(self, candidate: GraphCandidate) -> list[Change]:
        return self._chosen(candidate.copy_model())[1]

    def apply(self, candidate: GraphCandidate, context: Context) -> GraphCandidate:
        model = candidate.copy_model()
        chosen, _ = self._chosen(model)
        seen: dict[str, Moments] = {}
        if self.activations:
            rows = calibration_rows(model, context.train, self.samples, context.seed)
            seen = moments(model, [use.activation for weight in chosen for use in weight.uses], rows)
        done = 0
        for number, weight in enumerate(chosen, start=1):
            value = numpy_helper.to_array(weight.tensor).astype(np.float64)
            value = value if weight.uses[0].axis == 0 else value.T
            second = sum((seen[use.activation].second for use in weight.uses), np.zeros(())) if seen else None
            left, right, singular = factors(value, second)
            rank = self.rank or _holding(singular, self.energy)
            if _saves(rank, value.shape):
                _replace(model, weight, left[:, :rank], right[:rank])
                done += 1
            context.progress(self.name, number, len(chosen))
        if not done:
            raise EdgekitError(
                f"low_rank: no matrix gets smaller at energy = {self.energy:g}; set a lower energy or a rank, or "
                "leave this pass out"
            )
        eliminate_dead_nodes(model)
        return GraphCandidate(model)

    def _chosen(self, model: ModelProto) -> tuple[list[Weight], list[Change]]:
        name_nodes(model)
        chosen, changes = [], []
        for weight in chosen_weights(model, self.include):
            rank = f"rank {self.rank}" if self.rank else f"the rank that holds {self.energy:.1%}, if that is smaller"
            if reason := self._obstacle(model, weight):
                rank = f"left as it is: {reason}"
            else:
                chosen.append(weight)
            changes.append(Change(weight.name, f"{weight.shape}", rank))
        if not chosen:
            left = "; ".join(f"{change.tensor}: {change.after}" for change in changes[:5])
            raise EdgekitError(f"low_rank: no matrix is left to factorise ({left}); leave this pass out")
        return chosen, changes

    def _obstacle(self, model: ModelProto, weight: Weight) -> str:
        if weight.others or len(weight.axes) > 1 or any(use.transposed for use in weight.uses):
            return f"tied or behind a Transpose, read by {weight.consumers}"
        if any(_is_factor(model, use.node) for use in weight.uses):
            return "it is one of two factors already"
        if self.rank and not _saves(self.rank, weight.shape):
            return f"rank {self.rank} makes it no smaller"
        return ""


def factors(weight: Float64, second: Float64 | None) -> tuple[Float64, Float64, Float64]:
    """Return left (in, k), right (k, out) and the k singular values, largest first, of a weight (in, out). If both are
    cut after any r, their product is the best of that rank for inputs with this second moment (in, in)."""
    if second is None:
        u, singular, v = np.linalg.svd(weight, full_matrices=False)
        return u * np.sqrt(singular), np.sqrt(singular)[:, None] * v, singular
    mean = float(np.mean(np.diag(second))) or 1.0
    lower = np.linalg.cholesky(second + DAMPING * mean * np.eye(len(second)))
    u, singular, v = np.linalg.svd(lower.T @ weight, full_matrices=False)
    root = np.sqrt(singular)
    return np.linalg.solve(lower.T, u) * root, root[:, None] * v, singular


def _holding(singular: Float64, energy: float) -> int:
    """Return the least number of singular values whose squares hold this share of the sum of all squares."""
    shares = np.cumsum(singular**2) / max(float(np.sum(singular**2)), 1e-300)
    return min(int(np.searchsorted(shares, energy - 1e-12)) + 1, len(singular))


def _saves(rank: int, shape: tuple[int, ...]) -> bool:
    return rank * (shape[0] + shape[1]) < shape[0] * shape[1]


def _is_factor(model: ModelProto, node: NodeProto) -> bool:
    """Return whether this product directly follows, or is followed by, another product with a stored matrix."""
    stored = stored_values(model)
    products = [item for item in model.graph.node if item.op_type in ("MatMul", "Gemm") and item.input[1] in stored]
    follows = any(item.output[0] == node.input[0] for item in products if len(item.input) < 3)
    consumers = [item for item in model.graph.node if node.output[0] in item.input]
    return follows or (len(consumers) == 1 and consumers[0] in products and len(node.input) < 3)


def _replace(model: ModelProto, weight: Weight, left: Float64, right: Float64) -> None:
    """Replace each product with the weight by two products; they share the factors."""
    names = [unique_name(f"{weight.name}.{part}", value_names(model)) for part in ("left", "right")]
    transposed = weight.uses[0].axis == 1  # a Gemm that transposes its weight also transposes the factor
    arrays = (left, right.T if transposed else right)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name)
        for array, name in zip(arrays, names, strict=True)
    )
    for use in weight.uses:
        thin = unique_name(f"{use.node.output[0]}.thin", value_names(model))
        index = [node.name for node in model.graph.node].index(use.node.name)
        model.graph.node.insert(
            index, helper.make_node("MatMul", [use.activation, names[0]], [thin], f"{use.node.name}.thin")
        )
        use.node.input[0], use.node.input[1] = thin, names[1]
        assert bool(attribute(use.node, "transB", 0)) == transposed
