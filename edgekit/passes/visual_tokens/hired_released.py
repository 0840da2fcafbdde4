"""HiRED as its authors' code computes it (github.com/hasanar1f/HiRED, August 2024), for reproduction only. It differs
from Algorithm 1 of the paper:

- the tiles' shares are counts of tokens above the (1 - alpha) quantile of the base view, not attention;
- fault 1: these counts are of horizontal strips of the base view, because a vector in raster order is cut into equal
  runs, and not of the areas that the tiles cover;
- fault 2: height and width of the grid of tiles are swapped, so what an image that is not square keeps is what the
  wrong canvas shows after its padding is cut;
- floors and caps lose tokens, and so does padding: the budget is an upper bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgekit.passes.visual_tokens.base import Scores, Selection, highest
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry, mosaic, unpadded
from edgekit.passes.visual_tokens.hired import check_alpha


@dataclass(frozen=True, slots=True)
class HiredReleased:
    """alpha, initial, final: as for Hired."""

    exact: ClassVar[bool] = False

    alpha: float = 0.5
    initial: int = 0
    final: int | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        final, tokens = scores.layer(self.final), geometry.tokens
        asked = budget.tokens if budget.rate is None else int(budget.rate * geometry.views * tokens)
        count = min(asked or 0, geometry.views * tokens)
        if not geometry.tile_views:
            return Selection(geometry.in_order(highest(final[0], geometry.candidates.to(final.device), count)))
        base = int(self.alpha * count)
        parts = [0] * geometry.views
        parts[geometry.base] = min(base, tokens)
        for view, share in zip(geometry.tile_views, self._shares(scores, geometry, count - base), strict=True):
            parts[view] = share
        whole = torch.arange(tokens, device=final.device)
        kept = torch.cat([view * tokens + highest(final[view], whole, part) for view, part in enumerate(parts)])
        return Selection(geometry.in_order(kept[self._survivors(geometry).to(final.device)[kept]]))

    def _shares(self, scores: Scores, geometry: Geometry, count: int) -> list[int]:
        tokens, tiles = geometry.tokens, len(geometry.tile_views)
        above = torch.zeros(tokens, dtype=torch.bool)
        everywhere = torch.arange(tokens)
        above[highest(scores.layer(self.initial)[geometry.base].cpu(), everywhere, int(tokens * (1 - self.alpha)))] = (
            True
        )
        strips = [int(strip.sum()) for strip in above[: tokens // tiles * tiles].view(tiles, -1)]
        total = sum(strips)
        return [min(count * strip // total, tokens) if total else 0 for strip in strips]

    def _survivors(self, geometry: Geometry) -> Tensor:
        """Return (views * tokens,) bool: the tokens that are left after the padding of the swapped canvas is cut."""
        swapped = (geometry.tiles[1], geometry.tiles[0])
        whole = mosaic(swapped, geometry.tile_views, geometry.rows, geometry.columns)
        alive = torch.zeros(geometry.views * geometry.tokens, dtype=torch.bool)
        alive[geometry.of_view(geometry.base)] = True
        if geometry.size == (0, 0):  # the image fills the canvas, so nothing is cut
            alive[whole.flatten()] = True
            return alive
        alive[whole[unpadded(geometry.size, (len(whole), whole.shape[1]))].flatten()] = True
        return alive
