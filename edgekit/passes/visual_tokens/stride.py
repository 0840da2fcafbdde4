"""Every so many-th token of the whole sequence: the spatial baseline of HiRED's Table 3, at an exact count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from edgekit.passes.visual_tokens.base import Scores, Selection, evenly
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry


@dataclass(frozen=True, slots=True)
class Stride:
    """No parameters."""

    exact: ClassVar[bool] = True

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        return Selection(evenly(geometry.candidates, budget.count(geometry)).to(view_features.device))
