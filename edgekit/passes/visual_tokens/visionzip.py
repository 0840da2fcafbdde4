"""VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): dominant tokens by the CLS token's attention, and contextual
tokens that the rest is merged into by the similarity of keys.

The CLS token itself, which the authors' code counts among the dominant tokens, is not handed to the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.passes.visual_tokens.base import Scores, Selection, apportion, directions, highest
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry
from edgekit.passes.visual_tokens.merging import identity, ordered, others


@dataclass(frozen=True, slots=True)
class VisionZip:
    """dominant: the share of a view's budget that dominant tokens take."""

    exact: ClassVar[bool] = True

    dominant: float = 54 / 64  # the paper's for 64, 128 and 192 tokens

    def __post_init__(self) -> None:
        if not 0 < self.dominant <= 1:
            raise EdgekitError(f"dominant = {self.dominant} of VisionZip; expected above 0 and at most 1")

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        attention = scores.layer(None).flatten()
        keys = directions(scores.need_keys("VisionZip").mean(2)).flatten(0, 1)
        caps = [int(number) for number in geometry.valid.sum(1)]
        kept, weights = [], []
        for view, count in enumerate(apportion(budget.count(geometry), [1.0] * geometry.views, caps)):
            candidates = geometry.of_view(view).to(attention.device)
            best = highest(attention, candidates, round(self.dominant * count))
            rest = others(candidates, best)
            targets = rest[:: max(1, len(rest) // max(1, count - len(best)))][: count - len(best)]
            own = torch.cat([best, targets])
            rows = identity(own, len(attention))
            if len(targets) and len(merged := others(rest, targets)):
                nearest = torch.argmax(keys[merged] @ keys[targets].T, dim=1)
                sizes = torch.bincount(nearest, minlength=len(targets))
                rows[len(best) + nearest, merged] = 1 / sizes[nearest].to(rows.dtype)
            kept.append(own)
            weights.append(rows)
        return ordered(geometry, torch.cat(kept), torch.cat(weights))
