"""A network as torch.export captures it: the inputs for tracing, and a module that can be trained like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from edgekit.bundle.tensors import TensorSpec, multiple

TRACED = {"batch": 2}  # any length except 1: tracers make an axis of length 1 a constant


def example(specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    """Return zeros with the inputs' shapes."""
    return tuple(
        torch.zeros([TRACED.get(a, 3 * multiple(a)) if isinstance(a, str) else a for a in spec.shape]).to(
            getattr(torch, spec.dtype)
        )
        for spec in specs
    )


def dynamic_shapes(specs: Sequence[TensorSpec]) -> tuple[dict[int, Any], ...]:
    """Return the axes of each input that may have any length, in torch.export's form; axes with the same name have the
    same length."""
    names = dict.fromkeys(axis for spec in specs for axis in spec.shape if isinstance(axis, str))
    axes = {name: multiple(name) * torch.export.Dim(f"axis_{number}") for number, name in enumerate(names)}
    return tuple({n: axes[a] for n, a in enumerate(spec.shape) if isinstance(a, str)} for spec in specs)


class Exported(nn.Module):
    """A captured network. Dropout and batch normalization are operators of its graph, and the mode is an argument of
    these operators; torch's own train() and eval() refuse. torchao's functions for this change every dropout to p =
    0.5."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Tensor) -> Any:
        return self.graph(*inputs)

    def train(self, mode: bool = True) -> Exported:
        self.training = mode
        for node in self.graph.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            for index, argument in enumerate(schema.arguments if schema else ()):
                if argument.name in ("train", "training"):
                    _give(node, index, argument.name, mode)
                elif argument.name == "dropout_p":  # of attention, which has no mode argument
                    rate = node.args[index] if index < len(node.args) else node.kwargs.get("dropout_p", 0.0)
                    rate = node.meta.setdefault("dropout_p", rate)
                    if rate:
                        _give(node, index, argument.name, rate if mode else 0.0)
        self.graph.recompile()
        return self


def _give(node: Node, index: int, name: str, value: float) -> None:
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(name, value)
