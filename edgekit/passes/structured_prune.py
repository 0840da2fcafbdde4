"""Remove the attention heads and feed-forward units with the least effect on the loss, then recover.

Importance: Taylor expansion of the loss at the unit's output, squared and summed over mini-batches (Molchanov et al.
2019, arXiv 1906.10771, eq. 8). The result is a smaller dense network, which is faster on every device without sparse
kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgekit.bundle.family import PrunableGroup, build, prunable_groups
from edgekit.errors import EdgekitError
from edgekit.nn.training import tensors
from edgekit.passes.base import Candidate, Change, Context, Pass, at_least, loss, recover

SAMPLES, BATCH = 1024, 64  # for importance; the ranking of t2's heads is stable from about 500


@dataclass(frozen=True, slots=True)
class StructuredPrune(Pass[Candidate]):
    """`keep` maps constructor arguments of the family to the number that stays: {heads = 8, ff_dim = 64}."""

    name: ClassVar[str] = "structured_prune"
    summary: ClassVar[str] = "remove attention heads and feed-forward units, then recover"
    epochs_parameter: ClassVar[str] = "epochs"

    keep: Mapping[str, int]
    epochs: int = 8
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Mapping) or not self.keep:
            raise EdgekitError(f"keep = {self.keep!r}; expected a table such as {{heads = 8, ff_dim = 64}}")
        at_least("epochs", self.epochs, 0, 10_000)
        at_least("learning_rate", self.learning_rate, 1e-7, 1.0)

    def _groups(self, candidate: Candidate) -> list[PrunableGroup]:
        if candidate.family == "module":
            raise EdgekitError("a network that a Python function builds names no such units; use dependency_prune")
        groups = prunable_groups(candidate.family, candidate.model)
        for argument, left in self.keep.items():
            sizes = {group.size for group in groups if group.argument == argument}
            if not sizes:
                known = ", ".join(sorted({group.argument for group in groups}))
                raise EdgekitError(
                    f"keep.{argument}: a {candidate.family} has no such units to remove; allowed: {known}"
                )
            at_least(f"keep.{argument}", left, 1, max(sizes))
        return [group for group in groups if group.argument in self.keep]

    def plan(self, candidate: Candidate) -> list[Change]:
        state = candidate.model.state_dict()
        changes = []
        for group in self._groups(candidate):
            left = self.keep[group.argument] * group.width
            for name in (*group.rows, *group.columns):
                before = tuple(state[name].shape)
                after = (left, *before[1:]) if name in group.rows else (before[0], left)
                changes.append(
                    Change(name, str(before), f"{after}: {self.keep[group.argument]} of {group.size} {group.argument}")
                )
        return changes

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        groups = self._groups(candidate)
        scores = importance(candidate.model, groups, context)
        weights = {name: torch.from_numpy(value) for name, value in candidate.weights().items()}
        for group, score in zip(groups, scores, strict=True):
            units = score.topk(self.keep[group.argument]).indices.sort().values
            kept = (units.unsqueeze(1) * group.width + torch.arange(group.width)).reshape(-1)
            for name in group.rows:
                weights[name] = weights[name][kept]
            for name in group.columns:
                weights[name] = weights[name][:, kept]
        arguments: dict[str, Any] = {**candidate.arguments, **self.keep}
        model = build(candidate.family, arguments, {name: value.numpy() for name, value in weights.items()})
        model = recover(model, context, self.epochs, self.learning_rate, self.name)
        return Candidate(candidate.family, arguments, model)


def importance(model: nn.Module, groups: list[PrunableGroup], context: Context) -> list[Tensor]:
    """Return (units,) for each group: the first-order change of the loss if the unit's output were zero."""
    gates = [torch.ones(group.size, requires_grad=True) for group in groups]

    def gated(gate: Tensor, width: int) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
        return lambda module, inputs: inputs[0] * gate.repeat_interleave(width)

    hooks = [
        model.get_submodule(group.consumer).register_forward_pre_hook(gated(gate, group.width))
        for group, gate in zip(groups, gates, strict=True)
    ]
    scores = [torch.zeros(group.size) for group in groups]
    rows = torch.randperm(len(context.train), generator=torch.Generator().manual_seed(context.seed))[:SAMPLES].numpy()
    try:
        for start in range(0, len(rows), BATCH):
            batch = context.train.take(rows[start : start + BATCH])
            logits = model(*tensors(batch))
            missed = loss(logits, batch.labels, context.train.labels, logits.detach())
            for score, gradient in zip(scores, torch.autograd.grad(missed, gates), strict=True):
                score += gradient**2
    finally:
        for hook in hooks:
            hook.remove()
    return scores
