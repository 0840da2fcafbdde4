"""What PruMerge and VisionZip share: a row of weights for each kept token."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekit.passes.visual_tokens.base import Selection
from edgekit.passes.visual_tokens.geometry import Geometry


def identity(kept: Tensor, width: int) -> Tensor:
    """Return (kept, width) weights that leave each kept token as it is."""
    weights = torch.zeros(len(kept), width, device=kept.device)
    weights[torch.arange(len(kept), device=kept.device), kept] = 1
    return weights


def others(candidates: Tensor, kept: Tensor) -> Tensor:
    """Return the candidates that are not kept, in their order."""
    return candidates[~torch.isin(candidates, kept)]


def ordered(geometry: Geometry, kept: Tensor, weights: Tensor) -> Selection:
    """Return the selection with its rows in the order in which the language model reads them."""
    places = torch.argsort(geometry.order.to(kept.device)[kept])
    return Selection(kept[places], weights[places])
