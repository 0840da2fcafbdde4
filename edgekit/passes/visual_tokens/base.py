"""The interface of methods that choose visual tokens, and the parts that several of them share.

They work in torch, not NumPy: features and scores lie where the tower wrote them, often on a GPU, the greedy methods'
steps are matrix products, and the ONNX graph of tower and selection is traced from the same operators. Ties go to the
lower index: `torch.sort(stable=True)` and `torch.argmax` both promise it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import Geometry


@dataclass(frozen=True, slots=True)
class Scores:
    """What the tower says about its tokens besides their features.

    attention: (layers, views, tokens), how much attention each token receives from the CLS token, or on average from
    all tokens if the tower has none; the heads are summed. heads: how many were summed. feature_layer: the index of the
    layer whose output the features are. keys: (views, tokens, heads, width) of that layer. relevance: (views, tokens),
    how close each token is to the question.
    """

    attention: Tensor
    heads: int
    feature_layer: int
    keys: Tensor | None = None
    relevance: Tensor | None = None

    def layer(self, index: int | None) -> Tensor:
        """Return (views, tokens) float32 of one layer; None: of the feature layer."""
        number = self.feature_layer if index is None else index
        if not -len(self.attention) <= number < len(self.attention):
            raise EdgekitError(f"layer {number} has no scores; the tower ran layers 0 to {len(self.attention) - 1}")
        return self.attention[number].float()

    def need_keys(self, method: str) -> Tensor:
        if self.keys is None:
            raise EdgekitError(f"{method} compares the tower's keys, and this tower gives none; use another method")
        return self.keys.float()


@dataclass(frozen=True, slots=True)
class Selection:
    """indices: (count,) int64, flat indices in the order in which the language model reads them. weights: None, or
    (count, views * tokens): the tokens that each kept token is the weighted sum of, if the method merges."""

    indices: Tensor
    weights: Tensor | None = None

    def features(self, view_features: Tensor) -> Tensor:
        """Return (count, width) of (views, tokens, width)."""
        flat = view_features.flatten(0, 1)
        if self.weights is None:
            return flat[self.indices]
        return (self.weights @ flat.float()).to(flat.dtype)


class Method(Protocol):
    """A frozen dataclass of a method's parameters. `exact`: whether it keeps as many tokens as the budget says."""

    exact: ClassVar[bool] = True

    def select(self, view_features: Tensor, scores: Scores, geometry: Geometry, budget: Budget) -> Selection:
        """Choose tokens of one image. view_features: (views, tokens, width), as the projector reads them."""
        ...


def highest(score: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Return the `count` candidates with the highest score, best first. score: (views * tokens,)."""
    ranked = torch.sort(score[candidates], descending=True, stable=True).indices
    return candidates[ranked[:count]]


def evenly(candidates: Tensor, count: int) -> Tensor:
    """Return `count` of the candidates at equal distances: the middle of each of `count` equal parts."""
    places = (2 * torch.arange(count, device=candidates.device) + 1) * len(candidates) // (2 * max(count, 1))
    return candidates[places]


def apportion(count: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Divide `count` in proportion to the weights by the largest remainder (Hamilton's method), none above its cap.

    What a cap cuts off is divided again among the others, so the parts sum to min(count, sum of caps). Shares are exact
    fractions of the weights, and equal remainders go to the lower index. Weights that are all 0 count as the caps."""
    parts = [0] * len(weights)
    left = min(count, sum(caps))
    exact = [Fraction(weight) for weight in weights]
    while left:
        open_ = [i for i in range(len(parts)) if parts[i] < caps[i]]
        total = sum(exact[i] for i in open_)
        share = {i: exact[i] * left / total if total else Fraction(caps[i] - parts[i]) for i in open_}
        if not total:
            room = sum(share.values())
            share = {i: value * left / room for i, value in share.items()}
        full = [i for i in open_ if parts[i] + share[i] >= caps[i]]
        if full:  # fix these at their caps, and divide the rest anew
            for i in full:
                left -= caps[i] - parts[i]
                parts[i] = caps[i]
            continue
        for i in open_:
            parts[i] += int(share[i])
            left -= int(share[i])
        for i in sorted(open_, key=lambda i: (int(share[i]) - share[i], i))[:left]:
            parts[i] += 1
        left = 0
    return parts


def per_view(geometry: Geometry, count: int, rule: Callable[[Tensor, int], Tensor], device: torch.device) -> Tensor:
    """Divide the count evenly over the views, as the published methods do for several views, and return what `rule`
    (candidates, count) keeps of each."""
    caps = [int(number) for number in geometry.valid.sum(1)]
    parts = apportion(count, [1.0] * geometry.views, caps)
    kept = [rule(geometry.of_view(view).to(device), part) for view, part in enumerate(parts) if part]
    return torch.cat(kept)


def directions(features: Tensor) -> Tensor:
    """Return features of length 1, float32; a zero stays zero."""
    return torch.nn.functional.normalize(features.float(), dim=-1)
