"""Tokens drawn at random, each with the same probability: six of eight published methods lose to it at moderate
budgets (UniPruneBench, arXiv 2511.02650)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgekit.passes.visual_tokens.base import Scores, Selection
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry


@dataclass(frozen=True, slots=True)
class RandomTokens:
    """seed: the same seed draws the same places in every image of the same geometry."""

    exact: ClassVar[bool] = True

    seed: int = 0

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        drawn = torch.randperm(len(geometry.candidates), generator=torch.Generator().manual_seed(self.seed))
        kept = geometry.candidates[drawn[: budget.count(geometry)]]
        return Selection(geometry.in_order(kept).to(view_features.device))
