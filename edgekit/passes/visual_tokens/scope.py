"""SCOPE (Deng et al., NeurIPS 2025, arXiv 2510.24214): greedily the token whose gain of coverage, times its saliency,
is largest. Coverage of a token is its greatest similarity to a kept one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.passes.visual_tokens.base import Scores, Selection, directions, per_view
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry


@dataclass(frozen=True, slots=True)
class Scope:
    """alpha: the power of the saliency, which is the CLS token's attention in the features' layer."""

    exact: ClassVar[bool] = True

    alpha: float = 1.0  # the authors' code

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise EdgekitError(f"alpha = {self.alpha}, the power of SCOPE's saliency; expected at least 0")

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        saliency = scores.layer(None).flatten() ** self.alpha
        points = directions(view_features).flatten(0, 1)

        def keep(candidates: Tensor, count: int) -> Tensor:
            return candidates[_greedy(points[candidates], saliency[candidates], count)]

        return Selection(geometry.in_order(per_view(geometry, budget.count(geometry), keep, points.device)))


def _greedy(points: Tensor, saliency: Tensor, count: int) -> Tensor:
    similar = points @ points.T
    covered = torch.zeros(len(points), device=points.device)
    kept = torch.empty(count, dtype=torch.int64, device=points.device)
    for place in range(count):
        gain = (similar - covered[:, None]).clamp(min=0).sum(0) * saliency
        gain[kept[:place]] = -torch.inf
        kept[place] = chosen = torch.argmax(gain)
        covered = torch.maximum(covered, similar[chosen])
    return kept
