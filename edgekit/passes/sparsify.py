"""Set weights to zero: the smallest, or those with the least effect on activations (Wanda, Sun et al. 2023, arXiv
2306.11695, section 3: |W_ij| ||X_j||, compared within each output). The pattern is free, or two of every four along the
inputs, which sparse tensor cores multiply in half the time.

The pass does not train. To train with the zeros, prune the network (`magnitude_prune`) before it becomes a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, numpy_helper

from edgekit.errors import EdgekitError, unknown
from edgekit.graph.calibration import Moments, calibration_rows, moments
from edgekit.graph.model import Weight, chosen_weights, name_nodes, set_tensor
from edgekit.passes.base import Change, Context, GraphCandidate, Level, Pass, at_least

SCORES, PATTERNS = ("wanda", "magnitude"), ("any", "2:4")
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sparsify(Pass[GraphCandidate]):
    """`sparsity`: share of each weight that becomes zero (pattern "2:4": half). `samples`: rows of the training data
    from which wanda takes the norms of activations."""

    name: ClassVar[str] = "sparsify"
    summary: ClassVar[str] = "set the least important weights to zero, any of them or two of four"
    level: ClassVar[Level] = Level.GRAPH

    sparsity: float = 0.5
    pattern: str = "any"
    score: str = "wanda"
    samples: int = 256
    include: tuple[str, ...] = ("*",)  # patterns of the names of weights

    def __post_init__(self) -> None:
        at_least("sparsity", self.sparsity, 0.01, 0.99)
        if self.pattern not in PATTERNS:
            raise unknown("pattern", self.pattern, PATTERNS)
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise EdgekitError(f"sparsity = {self.sparsity:g} with pattern '2:4'; that is 0.5, leave it out")
        if self.score not in SCORES:
            raise unknown("score", self.score, SCORES)
        at_least("samples", self.samples, 1, 1_000_000)

    def plan(self, candidate: GraphCandidate) -> list[Change]:
        return self._chosen(candidate.copy_model())[1]

    def apply(self, candidate: GraphCandidate, context: Context) -> GraphCandidate:
        model = candidate.copy_model()
        chosen, _ = self._chosen(model)
        seen: dict[str, Moments] = {}
        if self.score == "wanda":
            rows = calibration_rows(model, context.train, self.samples, context.seed)
            seen = moments(model, [use.activation for weight in chosen for use in weight.uses], rows)
        for number, weight in enumerate(chosen, start=1):
            value = numpy_helper.to_array(weight.tensor).astype(np.float64)
            rows_first = np.moveaxis(value, weight.uses[0].axis, 0)  # (in, ...)
            importance = np.abs(rows_first)
            if self.score == "wanda":
                squares = sum(seen[use.activation].norms ** 2 for use in weight.uses)
                importance = importance * np.sqrt(squares)[:, None]
            if self.pattern == "2:4":
                zero = two_of_four(importance)
            elif self.score == "wanda":
                zero = least(importance, self.sparsity)
            else:
                zero = least(importance.reshape(-1, 1), self.sparsity).reshape(importance.shape)
            set_tensor(model, weight.name, np.moveaxis(np.where(zero, 0.0, rows_first), 0, weight.uses[0].axis))
            context.progress(self.name, number, len(chosen))
        return GraphCandidate(model)

    def _chosen(self, model: ModelProto) -> tuple[list[Weight], list[Change]]:
        name_nodes(model)
        chosen, changes = [], []
        for weight in chosen_weights(model, self.include, convolutions=self.score == "magnitude"):
            count = int(np.prod(weight.shape))
            zeros = count // 2 if self.pattern == "2:4" else round(self.sparsity * count)
            after = f"{zeros} of them zero" + (", 2 of every 4 inputs" if self.pattern == "2:4" else "")
            if reason := self._obstacle(weight):
                after = f"left as it is: {reason}"
            else:
                chosen.append(weight)
            changes.append(Change(weight.name, f"{count} weights", after))
        if not chosen:
            left = "; ".join(f"{change.tensor}: {change.after}" for change in changes[:5])
            raise EdgekitError(f"sparsify: no weight is left to prune ({left}); leave this pass out")
        return chosen, changes

    def _obstacle(self, weight: Weight) -> str:
        if self.pattern == "any" and self.score == "magnitude":
            return ""  # no axis matters here: a tied weight is pruned for all its consumers
        if len(weight.axes) > 1:
            return f"tied, read plain and transposed by {weight.consumers}"
        if self.pattern == "2:4" and weight.shape[weight.uses[0].axis] % 4:
            return f"{weight.shape[weight.uses[0].axis]} inputs are no multiple of 4"
        return ""


def least(importance: Float64, share: float) -> npt.NDArray[np.bool_]:
    """Return which of the (in, out) weights belong to this share of the least important weights of their column."""
    zero = np.zeros(importance.shape, bool)
    order = np.argsort(importance, axis=0, kind="stable")[: round(share * len(importance))]
    np.put_along_axis(zero, order, True, axis=0)
    return zero


def two_of_four(importance: Float64) -> npt.NDArray[np.bool_]:
    """Return which two of every four consecutive inputs, along the first axis, are the least important."""
    groups = importance.reshape(-1, 4, *importance.shape[1:])
    zero = np.zeros(groups.shape, bool)
    np.put_along_axis(zero, np.argsort(groups, axis=1, kind="stable")[:, :2], True, axis=1)
    return zero.reshape(importance.shape)
