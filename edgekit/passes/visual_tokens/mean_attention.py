"""edgekit's own preset: attention that is averaged over layers, times distance to what is kept already.

Which layer's scores are best depends on content and checkpoint; the mean of all layers, each divided by its sum in the
view, was near the best one in each of three experiments. A quarter of the budget goes to the base view, and the tiles
compete with each other. Parameters were chosen on toy tasks, before this code: see docs/jobs/visual-tokens.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgekit.passes.visual_tokens.base import Scores, Selection, directions
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry
from edgekit.passes.visual_tokens.hired import check_alpha, split


@dataclass(frozen=True, slots=True)
class MeanAttention:
    """alpha: the base view's share. layers: those whose scores are averaged; None: up to the features' layer.
    diverse: whether a score is multiplied by the distance (1 - cosine) to the nearest kept token of its group, which is
    the base view or all tiles."""

    exact: ClassVar[bool] = True

    alpha: float = 0.25
    layers: tuple[int, ...] | None = None
    diverse: bool = True

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        score = self.score(scores, geometry).flatten()
        points = directions(view_features).flatten(0, 1)
        candidates = geometry.candidates.to(score.device)
        of_base = candidates // geometry.tokens == geometry.base
        base, tiles = split(self.alpha, budget.count(geometry), geometry)
        kept = [
            group[_greedy(points[group], score[group], count, self.diverse)]
            for group, count in ((candidates[of_base], base), (candidates[~of_base], tiles))
        ]
        return Selection(geometry.in_order(torch.cat(kept)))

    def score(self, scores: Scores, geometry: Geometry) -> Tensor:
        """Return (views, tokens): the mean over layers of each view's shares of attention."""
        last = scores.feature_layer % len(scores.attention)
        chosen = range(last + 1) if self.layers is None else self.layers
        valid = geometry.valid.to(scores.attention.device)
        layers = [scores.layer(index) * valid for index in chosen]
        shares = [layer / layer.sum(1, keepdim=True).clamp(min=1e-12) for layer in layers]
        return torch.stack(shares).mean(0)


def _greedy(points: Tensor, score: Tensor, count: int, diverse: bool) -> Tensor:
    if not diverse:
        return torch.sort(score, descending=True, stable=True).indices[:count]
    merit = score.clone()
    nearest = torch.ones_like(score)
    kept = torch.empty(count, dtype=torch.int64, device=score.device)
    for place in range(count):
        merit[kept[:place]] = -torch.inf
        kept[place] = chosen = torch.argmax(merit)
        distance = (1 - points @ points[chosen]).clamp(min=0)
        nearest = distance if place == 0 else torch.minimum(nearest, distance)
        merit = score * nearest
    return kept
