"""Round weights to a uniform grid of 8 or fewer bits with one scale per output row, and train through the rounding
(straight-through estimator, Jacob et al. 2018, arXiv 1712.05877, section 3). The scale minimizes the squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.bundle.encoding import Affine, Encoding
from edgekit.passes.base import (
    Candidate,
    Change,
    Context,
    Pass,
    at_least,
    decoded,
    frozen,
    matrices,
    owner,
    recover,
    register,
    unregister,
)

CLIPS = np.linspace(0.5, 1.0, 26)  # the candidates for the end of the grid, as shares of a row's largest weight


@dataclass(frozen=True, slots=True)
class Quantize(Pass[Candidate]):
    """`bits`: 8 (int8) down to 2; activations stay in float, so every runtime can run the result."""

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "put weights on a uniform grid, one scale per output row, then recover"
    epochs_parameter: ClassVar[str] = "epochs"

    bits: int = 8
    epochs: int = 2
    learning_rate: float = 5e-4
    include: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        at_least("bits", self.bits, 2, 8)
        at_least("epochs", self.epochs, 0, 10_000)
        at_least("learning_rate", self.learning_rate, 1e-7, 1.0)

    def plan(self, candidate: Candidate) -> list[Change]:
        state = candidate.model.state_dict()
        return [
            Change(
                name,
                f"{state[name].numel()} x 32 bit",
                f"{state[name].numel()} x {self.bits} bit + {len(state[name])} scales",
            )
            for name in matrices(candidate.model, self.include)
        ]

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        model = candidate.copy_model()
        names = matrices(model, self.include)
        grids = {}
        for name in names:
            module, attribute = owner(model, name)
            grids[name] = FakeQuantize(getattr(module, attribute).detach(), self.bits)
            register(model, name, grids[name])
        encodings: dict[str, Encoding] = {name: e for name, e in candidate.encodings.items() if name not in names}
        frozen(model, encodings)
        model = recover(model, context, self.epochs, self.learning_rate, self.name)
        for name in names:
            weight = unregister(model, name)
            grid = grids[name]
            codes = rounded(weight * grid.nonzero_mask, grid.scale, self.bits).to(torch.int8)
            encodings[name] = Affine(self.bits, codes.numpy(), grid.scale.numpy())
        decoded(encodings, model)
        return Candidate(candidate.family, candidate.arguments, model, encodings)


def best_scale(weight: Tensor, bits: int) -> Tensor:
    """Return the (rows, 1, ...) step of each row's symmetric grid, with the least squared rounding error over
    `CLIPS`."""
    axes = tuple(range(1, weight.ndim))
    largest = weight.abs().amax(dim=axes, keepdim=True).clamp_min(1e-12)
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for clip in CLIPS:
        scale = largest * float(clip) / (2 ** (bits - 1) - 1)
        error = ((rounded(weight, scale, bits) * scale - weight) ** 2).sum(dim=axes, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def rounded(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the nearest codes on the grid."""
    limit = 2 ** (bits - 1) - 1
    return torch.round(weight / scale).clamp(-limit, limit)


class FakeQuantize(nn.Module):
    """Weight rounded to its grid; gradients pass straight through. A weight of exactly zero was pruned and does not
    change."""

    scale: Tensor
    nonzero_mask: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", best_scale(weight, bits))
        self.register_buffer("nonzero_mask", (weight != 0).to(weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        weight = weight * self.nonzero_mask
        return weight + (rounded(weight, self.scale, self.bits) * self.scale - weight).detach()
