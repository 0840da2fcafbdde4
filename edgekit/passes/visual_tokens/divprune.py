"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): the tokens whose least distance to each other is largest, found
greedily over all views together. It looks at no attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgekit.passes.visual_tokens.base import Scores, Selection, directions
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry


@dataclass(frozen=True, slots=True)
class DivPrune:
    """The first token is the one whose nearest other token is farthest; distance is 1 - cosine."""

    exact: ClassVar[bool] = True

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        candidates, count = geometry.candidates.to(view_features.device), budget.count(geometry)
        points = directions(view_features.flatten(0, 1)[candidates])
        similar = points @ points.T
        nearest = 1 - similar.fill_diagonal_(-1).amax(1)
        kept = torch.empty(count, dtype=torch.int64, device=points.device)
        for place in range(count):
            kept[place] = chosen = torch.argmax(nearest)
            distance = 1 - similar[chosen]
            nearest = distance if place == 0 else torch.minimum(nearest, distance)
            nearest[kept[: place + 1]] = -torch.inf
        return Selection(geometry.in_order(candidates[kept]))
