"""The base view alone: the baseline that every budget of one view's size has to beat. In a 2x2 tiling it is a budget of
20 %."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.passes.visual_tokens.base import Scores, Selection, evenly
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry


@dataclass(frozen=True, slots=True)
class BaseView:
    """A budget below one view's tokens takes every so many-th token of it; one above it is an error."""

    exact: ClassVar[bool] = True

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        base, count = geometry.of_view(geometry.base), budget.count(geometry)
        if count > len(base):
            raise EdgekitError(
                f"a budget of {count} tokens is more than the {len(base)} of the base view; "
                "lower it, or use a method that reads the tiles, such as hired"
            )
        return Selection(geometry.in_order(evenly(base, count).to(view_features.device)))
