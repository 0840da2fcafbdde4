"""HiRED (Arif et al., AAAI 2025, arXiv 2408.10945, Algorithm 1), without the faults of its released code: the tiles'
shares come from the exact area of the base view that each tile covers, padding is never chosen, and the parts sum to
the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.passes.visual_tokens.base import Scores, Selection, apportion, highest
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry


@dataclass(frozen=True, slots=True)
class Hired:
    """alpha: the base view's share of the budget. initial: the layer whose scores divide the rest over the tiles.
    final: the layer whose scores choose within a view; None: the layer whose output the features are."""

    exact: ClassVar[bool] = True

    alpha: float = 0.5  # the paper's, figure 6
    initial: int = 0
    final: int | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        final = scores.layer(self.final).flatten()
        parts = self.counts(scores.layer(self.initial), geometry, budget)
        kept = [
            highest(final, geometry.of_view(view).to(final.device), part) for view, part in enumerate(parts) if part
        ]
        return Selection(geometry.in_order(torch.cat(kept)))

    def counts(self, initial: Tensor, geometry: Geometry, budget: Budget) -> list[int]:
        """Return how many tokens of each view are kept. initial: (views, tokens)."""
        caps = [int(number) for number in geometry.valid.sum(1)]
        count = budget.count(geometry)
        base, tiles = split(self.alpha, count, geometry)
        masses = (
            geometry.tile_weights @ initial[geometry.base].double().cpu() if geometry.tile_views else torch.zeros(0)
        )
        parts = [0] * geometry.views
        parts[geometry.base] = base
        shares = apportion(tiles, masses.tolist(), [caps[view] for view in geometry.tile_views])
        for view, share in zip(geometry.tile_views, shares, strict=True):
            parts[view] = share
        return parts


def split(alpha: float, count: int, geometry: Geometry) -> tuple[int, int]:
    """Return how many of the count tokens the base view gives, and how many all tiles together: floor(alpha * count)
    and the rest, as far as either has so many."""
    base, total = int(geometry.valid[geometry.base].sum()), len(geometry.candidates)
    first = min(int(round(alpha * count, 9)), base)
    first = max(first, count - (total - base))
    return first, count - first


def check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise EdgekitError(f"alpha = {alpha}, the base view's share of the budget; expected 0 to 1")
