"""Set the smallest weights to zero, over all matrices together, and recover with the zeros held (Han et al. 2015,
arXiv 1506.02626). Saves bytes in the packed file; dense kernels run no faster for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgekit.passes.base import Candidate, Change, Context, at_least, matrices, owner, recover


@dataclass(frozen=True, slots=True)
class MagnitudePrune:
    """`sparsity`: share of the matching matrices' weights that becomes zero."""

    name: ClassVar[str] = "magnitude_prune"
    summary: ClassVar[str] = "set the smallest weights to zero, then recover with the zeros held"

    sparsity: float
    epochs: int = 4
    learning_rate: float = 1e-3
    include: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        at_least("sparsity", self.sparsity, 0.01, 0.99)
        at_least("epochs", self.epochs, 0, 10_000)
        at_least("learning_rate", self.learning_rate, 1e-7, 1.0)

    def _masks(self, candidate: Candidate) -> dict[str, Tensor]:
        parameters = dict(candidate.model.named_parameters())
        chosen = {name: parameters[name].detach() for name in matrices(candidate.model, self.include)}
        sizes = torch.cat([value.abs().flatten() for value in chosen.values()])
        limit = sizes.kthvalue(max(1, round(self.sparsity * len(sizes)))).values
        return {name: value.abs() > limit for name, value in chosen.items()}

    def plan(self, candidate: Candidate) -> list[Change]:
        return [
            Change(name, f"{mask.numel()} weights", f"{int(mask.sum())} left, {1 - mask.float().mean():.0%} zeros")
            for name, mask in self._masks(candidate).items()
        ]

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        model = candidate.copy_model()
        masks = self._masks(candidate)
        for name, mask in masks.items():
            module, attribute = owner(model, name)
            parametrize.register_parametrization(module, attribute, Masked(mask))
        model = recover(model, context, self.epochs, self.learning_rate, self.name)
        for name in masks:
            module, attribute = owner(model, name)
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        return Candidate(candidate.family, candidate.arguments, model)


class Masked(nn.Module):
    """The weight where a fixed mask is true, zero elsewhere."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0.0)  # a product would leave -0.0, which packs worse
