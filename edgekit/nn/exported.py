"""A network as torch.export captures it: what it is traced with, and how the result is trained like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.bundle import TensorSpec, multiple

TRACED = {"batch": 2}  # any length other than 1 will do: tracers bake ones in


def example(specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    """Zeros of the inputs' shapes."""
    return tuple(
        torch.zeros([TRACED.get(a, 3 * multiple(a)) if isinstance(a, str) else a for a in spec.shape]).to(
            getattr(torch, spec.dtype)
        )
        for spec in specs
    )


def dynamic_shapes(specs: Sequence[TensorSpec]) -> tuple[dict[int, Any], ...]:
    """Which axes of each input may have any length, as torch.export wants it; axes of one name have one length."""
    names = dict.fromkeys(axis for spec in specs for axis in spec.shape if isinstance(axis, str))
    axes = {name: multiple(name) * torch.export.Dim(f"axis_{number}") for number, name in enumerate(names)}
    return tuple({n: axes[a] for n, a in enumerate(spec.shape) if isinstance(a, str)} for spec in specs)


class Exported(nn.Module):
    """A captured network. Dropout and batch normalisation are operators of its graph, so that its mode is set by
    rewriting them; torch's own train() and eval() refuse."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Tensor) -> Any:
        return self.graph(*inputs)

    def train(self, mode: bool = True) -> Exported:
        from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train

        self.training = mode
        (move_exported_model_to_train if mode else move_exported_model_to_eval)(self.graph)
        return self
