"""The image at a lower resolution: the mean of the tokens in each cell of a coarser grid. Plain downsampling beats many
methods (VTC-Bench, arXiv 2510.07143), so it is a baseline. It downsamples the tower's features, not the pixels: the
tower itself is not run again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgekit.passes.visual_tokens.base import Scores, Selection
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry


@dataclass(frozen=True, slots=True)
class Downsample:
    """The grid covers the tiles without padding, or the base view if there are no tiles. If the budget is larger than
    the number of the tiles' tokens, the rest is a grid on the base view. Each cell takes the place of its middle
    token."""

    exact: ClassVar[bool] = True

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        count = budget.count(geometry)
        base = geometry.of_view(geometry.base).view(geometry.rows, geometry.columns)
        planes = [geometry.image_mosaic, base] if geometry.tile_views else [base]
        cells: list[Tensor] = []
        for plane in planes:
            cells += _cells(plane, min(count - len(cells), plane.numel()))
        middle = torch.stack([cell.flatten()[cell.numel() // 2] for cell in cells])
        weights = torch.zeros(count, geometry.views * geometry.tokens)
        for row, place in enumerate(torch.argsort(geometry.order[middle])):
            weights[row, cells[place].flatten()] = 1 / cells[place].numel()
        device = view_features.device
        return Selection(geometry.in_order(middle).to(device), weights.to(device))


def _cells(plane: Tensor, count: int) -> list[Tensor]:
    """Cut (height, width) flat indices into `count` rectangles of nearly equal shape, row after row."""
    if not count:
        return []
    height, width = plane.shape
    rows = min(height, max(1, round(math.sqrt(count * height / width)), math.ceil(count / width)))
    rows = min(rows, count)
    found = []
    for row, band in enumerate(_cuts(height, rows)):
        columns = (row + 1) * count // rows - row * count // rows
        found += [plane[band, part] for part in _cuts(width, columns)]
    return found


def _cuts(length: int, parts: int) -> list[slice]:
    return [slice(part * length // parts, (part + 1) * length // parts) for part in range(parts)]
