"""Set the smallest weights of all matrices together to zero, then train with the zeros fixed (Han et al. 2015, arXiv
1506.02626). This saves bytes in the packed file; dense kernels run no faster.

The pattern 2:4 keeps the two largest of every four neighbouring inputs; in a convolution it does so at each position of
the kernel. The sparse tensor cores of NVIDIA cards from Ampere on skip these zeros (Mishra et al. 2021, arXiv
2104.08378, section 3); no CPU runs the result faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from edgekit.errors import EdgekitError, unknown
from edgekit.passes.base import Candidate, Change, Context, Pass, at_least, matrices, recover, register, unregister

PATTERNS = ("", "2:4")


@dataclass(frozen=True, slots=True)
class MagnitudePrune(Pass[Candidate]):
    """`sparsity`: share of the matching matrices' weights that becomes zero; `pattern`: "2:4" instead of it, which
    zeroes half of the weights of every matrix whose inputs are multiples of 4."""

    name: ClassVar[str] = "magnitude_prune"
    summary: ClassVar[str] = "set the smallest weights to zero, then train with the zeros fixed"
    epochs_parameter: ClassVar[str] = "epochs"

    sparsity: float = 0.5
    pattern: str = ""
    epochs: int = 4
    learning_rate: float = 1e-3
    include: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        at_least("sparsity", self.sparsity, 0.01, 0.99)
        if self.pattern not in PATTERNS:
            raise unknown("pattern", self.pattern, PATTERNS[1:])
        if self.pattern and self.sparsity != 0.5:
            raise EdgekitError(f"sparsity = {self.sparsity}; the pattern 2:4 is one half, leave sparsity out")
        at_least("epochs", self.epochs, 0, 10_000)
        at_least("learning_rate", self.learning_rate, 1e-7, 1.0)

    def _masks(self, candidate: Candidate) -> dict[str, Tensor]:
        parameters = dict(candidate.model.named_parameters())
        chosen = {name: parameters[name].detach() for name in matrices(candidate.model, self.include)}
        if self.pattern:
            masks = {name: two_of_four(value) for name, value in chosen.items() if value.shape[1] % 4 == 0}
            if not masks:
                raise EdgekitError("pattern = '2:4'; no matching weight has inputs of a multiple of 4")
            return masks
        sizes = torch.cat([value.abs().flatten() for value in chosen.values()])
        limit = sizes.kthvalue(max(1, round(self.sparsity * len(sizes)))).values
        return {name: value.abs() > limit for name, value in chosen.items()}

    def plan(self, candidate: Candidate) -> list[Change]:
        masks = self._masks(candidate)
        changes = [
            Change(name, f"{mask.numel()} weights", f"{int(mask.sum())} left, {1 - mask.float().mean():.0%} zeros")
            for name, mask in masks.items()
        ]
        parameters = dict(candidate.model.named_parameters())
        return changes + [
            Change(name, str(tuple(parameters[name].shape)), "left alone: its inputs are no multiple of 4")
            for name in matrices(candidate.model, self.include)
            if name not in masks
        ]

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        model = candidate.copy_model()
        masks = self._masks(candidate)
        for name, mask in masks.items():
            register(model, name, Masked(mask))
        model = recover(model, context, self.epochs, self.learning_rate, self.name)
        for name in masks:
            unregister(model, name)
        return Candidate(candidate.family, candidate.arguments, model)


def two_of_four(weight: Tensor) -> Tensor:
    """Return True for the two largest of every four neighbouring inputs, along the second axis of (out, in, ...)."""
    inputs_last = weight.abs().movedim(1, -1)
    fours = inputs_last.reshape(-1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.topk(2, dim=1).indices, True)
    return kept.reshape(inputs_last.shape).movedim(-1, 1)


class Masked(nn.Module):
    """The weight where a fixed mask is true, and zero elsewhere."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0.0)  # a product would give -0.0, which compresses worse
