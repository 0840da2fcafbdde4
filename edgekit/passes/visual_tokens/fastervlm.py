"""FasterVLM (Zhang et al. 2024, arXiv 2412.01818): the tokens that the CLS token attends to most, evenly over the
views."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from edgekit.passes.visual_tokens.base import Scores, Selection, highest, per_view
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry


@dataclass(frozen=True, slots=True)
class FasterVlm:
    """layer: the layer of the scores; None: the layer whose output the features are."""

    exact: ClassVar[bool] = True

    layer: int | None = None

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        score = scores.layer(self.layer).flatten()
        kept = per_view(geometry, budget.count(geometry), partial(highest, score), score.device)
        return Selection(geometry.in_order(kept))
