"""PruMerge and PruMerge+ (Shang et al. 2024, arXiv 2403.15388, Algorithm 1), at an exact count.

Published, the number of outliers of the CLS token's attention decides how many tokens are kept, so a budget cannot be
held. Here the count is given: PruMerge keeps the tokens with the most attention; PruMerge+ keeps the outliers (above
the third quartile by 1.5 interquartile ranges) and fills up with tokens at equal distances. The token that the authors'
code adds for all that was dropped is not in the paper, and not here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.passes.visual_tokens.base import Scores, Selection, evenly, highest, per_view
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry
from edgekit.passes.visual_tokens.merging import identity, ordered, others


@dataclass(frozen=True, slots=True)
class PruMerge:
    """plus: PruMerge+. neighbours: how many tokens with the most similar keys are added to each kept token, weighted by
    the attention (the mean of the heads) that they get."""

    exact: ClassVar[bool] = True

    plus: bool = False
    neighbours: int = 32  # the authors' code

    def __post_init__(self) -> None:
        if self.neighbours < 0:
            raise EdgekitError(f"neighbours = {self.neighbours} of PruMerge; expected at least 0")

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        attention = scores.layer(None).flatten() / scores.heads
        keys = torch.nn.functional.normalize(scores.need_keys("PruMerge").flatten(2).flatten(0, 1), dim=-1)

        def keep(candidates: Tensor, count: int) -> Tensor:
            return self._keep(attention, candidates, count)

        kept = per_view(geometry, budget.count(geometry), keep, attention.device)
        weights = identity(kept, len(attention))
        for view in range(geometry.views):
            candidates = geometry.of_view(view).to(attention.device)
            rows = torch.isin(kept, candidates).nonzero().flatten()
            own = kept[rows]
            similar = keys[own] @ keys[candidates].T
            similar[own[:, None] == candidates] = -torch.inf
            most = min(self.neighbours, len(candidates) - 1)
            near = candidates[torch.sort(similar, descending=True, stable=True).indices[:, :most]]
            weights[rows[:, None], near] += attention[near]
        return ordered(geometry, kept, weights)

    def _keep(self, attention: Tensor, candidates: Tensor, count: int) -> Tensor:
        if not self.plus:
            return highest(attention, candidates, count)
        own = attention[candidates].double()
        first, third = torch.quantile(own, torch.tensor([0.25, 0.75], dtype=torch.float64, device=own.device))
        outliers = int((own > third + 1.5 * (third - first)).sum())
        best = highest(attention, candidates, min(outliers, count))
        return torch.cat([best, evenly(others(candidates, best), count - len(best))])
