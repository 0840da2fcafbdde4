"""Train the network as int8 arithmetic will run it (Jacob et al. 2018, arXiv 1712.05877, section 3): weights are
rounded to a grid per output channel, the input of each product is rounded on its running range, and gradients pass
straight through.

The resulting weights lie on the grid of `static_int8` and `dynamic_int8`, so that their rounding of weights changes
nothing; put one of them after this pass. `qat_int8` instead converts the network to a Q/DQ graph in one pass, and keeps
the activation ranges that it was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.passes.base import (
    Candidate,
    Change,
    Context,
    Pass,
    at_least,
    frozen,
    matrices,
    owner,
    recover,
    register,
    unregister,
)

MOMENTUM = 0.99  # of the running range: about the last hundred batches
PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Qat(Pass[Candidate]):
    """`weight_bits`: as in the int8 pass that follows; `activation_bits`: 8 in that pass. The pass leaves alone weights
    of layers other than Linear and Conv, and weights that are encoded already."""

    name: ClassVar[str] = "qat"
    summary: ClassVar[str] = "train through the rounding of int8, for the pass after it"
    prepares: ClassVar[bool] = True
    epochs_parameter: ClassVar[str] = "epochs"

    weight_bits: int = 7
    activation_bits: int = 8
    epochs: int = 3
    learning_rate: float = 5e-4
    include: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        at_least("weight_bits", self.weight_bits, 2, 8)
        at_least("activation_bits", self.activation_bits, 2, 8)
        at_least("epochs", self.epochs, 0, 10_000)
        at_least("learning_rate", self.learning_rate, 1e-7, 1.0)

    def plan(self, candidate: Candidate) -> list[Change]:
        return [
            Change(name, "float32", f"trained as {self.weight_bits} bit, inputs as {self.activation_bits} bit")
            for name in self._chosen(candidate)
        ]

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        model = candidate.copy_model()
        names = self._chosen(candidate)
        for name in names:
            module, _ = owner(model, name)
            register(model, name, RoundedWeight(self.weight_bits))
            module.register_forward_pre_hook(RoundedInput(self.activation_bits))
        frozen(model, candidate.encodings)
        model = recover(model, context, self.epochs, self.learning_rate, self.name)
        for name in names:
            module, _ = owner(model, name)
            unregister(model, name)
            # found by class: recovery returns a copy of the model with copies of the hooks, so stored handles do not
            # fit
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, RoundedInput):
                    del module._forward_pre_hooks[key]
        return Candidate(candidate.family, candidate.arguments, model, candidate.encodings)

    def _chosen(self, candidate: Candidate) -> list[str]:
        names = [
            name
            for name in matrices(candidate.model, self.include)
            if isinstance(owner(candidate.model, name)[0], PRODUCTS) and name not in candidate.encodings
        ]
        if not names:
            raise EdgekitError(f"no Linear or Conv weight that matches {', '.join(self.include)} is in float32")
        return names


class RoundedWeight(nn.Module):
    """A weight on a symmetric grid per output channel, as wide as the channel's largest value."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.limit = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        peak = weight.detach().abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
        scale = (peak / self.limit).clamp_min(1e-12)
        rounded: Tensor = weight + (torch.round(weight / scale) * scale - weight).detach()
        return rounded


class RoundedInput:
    """A forward pre-hook that rounds the input of a layer to a grid of 2**bits steps over its running range, with zero
    on the grid. It updates the range while the model trains."""

    def __init__(self, bits: int) -> None:
        self.steps = 2**bits - 1
        self.low = self.high = 0.0
        self.seen = False

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        if module.training or not self.seen:
            low, high = min(float(x.detach().min()), 0.0), max(float(x.detach().max()), 0.0)
            keep = MOMENTUM if self.seen else 0.0
            self.low, self.high = keep * self.low + (1 - keep) * low, keep * self.high + (1 - keep) * high
            self.seen = True
        scale = (self.high - self.low) / self.steps or 1.0
        zero = round(-self.low / scale)
        rounded = (torch.round(x / scale) + zero).clamp(0, self.steps) - zero
        return (x + (rounded * scale - x).detach(), *inputs[1:])
