"""CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967): a determinantal point process over a view's tokens, whose
kernel is their similarity times their relevance to the question. Its greedy maximum a posteriori is found by the fast
Cholesky update of Chen et al. 2018 (arXiv 1709.05135)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.passes.visual_tokens.base import Scores, Selection, directions, per_view
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry

LEAST = 1e-6  # the relevance of the least relevant token, and the least squared residual that is divided by


@dataclass(frozen=True, slots=True)
class CdPruner:
    """Relevance is scaled to 0..1 over the image. The count is divided evenly over the views."""

    exact: ClassVar[bool] = True

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        if scores.relevance is None:
            raise EdgekitError("CDPruner needs the question: give token_budget(..., relevance=...), or use scope")
        candidates = geometry.candidates.to(view_features.device)
        relevance = scores.relevance.flatten().double()
        own = relevance[candidates]
        spread = own.max() - own.min()
        relevance = (relevance - own.min()) / spread + LEAST if spread > 0 else torch.ones_like(relevance)
        points = directions(view_features).flatten(0, 1).double() * relevance[:, None]

        def keep(candidates: Tensor, count: int) -> Tensor:
            return candidates[greedy_map(points[candidates], count)]

        return Selection(geometry.in_order(per_view(geometry, budget.count(geometry), keep, points.device)))


def greedy_map(points: Tensor, count: int) -> Tensor:
    """Return the rows, greedily chosen, whose Gram matrix has the largest determinant. points: (rows, width).

    Beyond the rank of the points all determinants are 0; then the lower index goes first."""
    factors = torch.zeros(count, len(points), dtype=points.dtype, device=points.device)
    residual = (points * points).sum(1)
    kept = torch.empty(count, dtype=torch.int64, device=points.device)
    for place in range(count):
        kept[place] = chosen = torch.argmax(residual)
        row = points @ points[chosen] - factors[:place, chosen] @ factors[:place]
        factors[place] = row / residual[chosen].clamp(min=LEAST**2).sqrt()
        # rounding leaves tiny numbers beyond the rank, in an order of no meaning
        residual = residual - factors[place] ** 2
        residual = torch.where(residual < LEAST**2, torch.zeros_like(residual), residual)
        residual[kept[: place + 1]] = -torch.inf
    return kept
