"""Remove the channels and attention heads with the least effect on the loss from any torch network, then recover.

The network's dependency graph tells which weights lose a channel together (DepGraph, Fang et al. 2023, arXiv
2301.12900, section 3; by torch-pruning). Importance is the same as in structured_prune: Taylor expansion of the loss in
a gate on the unit's output, squared and summed over mini-batches (Molchanov et al. 2019, arXiv 1906.10771, eq. 8).

The pass tests every group: it cuts each one on trial. If the network cannot run without a group, or its outputs change
their shape, the pass leaves the group alone and names it in the plan.
"""

from __future__ import annotations

import copy
import fnmatch
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from edgekit.errors import EdgekitError, unknown
from edgekit.nn.module import remove
from edgekit.nn.training import tensors
from edgekit.nn.units import Group, TensorAxis, find_groups, removal, results
from edgekit.passes.base import Candidate, Change, Context, Pass, at_least, example_inputs, loss, recover

SAMPLES, BATCH = 1024, 64  # for importance, as in structured_prune
MOST = 0.9  # the largest share of a group's units that competition may remove: an empty layer cuts the network in two
# The groups of a network, by pass and arguments: cutting every group of a transformer on trial takes half a minute.
_found: WeakKeyDictionary[nn.Module, dict[str, tuple[list[Group], dict[str, str]]]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class DependencyPrune(Pass[Candidate]):
    """`sparsity`: share of each group's channels or heads to remove; `layers`: other shares, by shell-style patterns of
    layer names. The last match wins, and 0 leaves a layer alone."""

    name: ClassVar[str] = "dependency_prune"
    summary: ClassVar[str] = "remove channels and attention heads of any network, then recover"
    epochs_parameter: ClassVar[str] = "epochs"
    multiple_parameter: ClassVar[str] = "round_to"

    sparsity: float
    layers: Mapping[str, float] = field(default_factory=dict)
    # remaining channels are a multiple of this: a vector register, and int8 tensor cores, take so many at once
    round_to: int = 8
    global_ranking: bool = False  # groups compete for the total that is removed, instead of each losing the same share
    importance: str = "taylor"  # or "magnitude", which needs no data
    epochs: int = 8
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        at_least("sparsity", self.sparsity, 0.0, 0.95)
        for pattern, share in self.layers.items():
            at_least(f"layers.{pattern}", share, 0.0, 0.95)
        at_least("round_to", self.round_to, 1, 256)
        if self.importance not in ("taylor", "magnitude"):
            raise unknown("importance", self.importance, ("taylor", "magnitude"))
        at_least("epochs", self.epochs, 0, 10_000)
        at_least("learning_rate", self.learning_rate, 1e-7, 1.0)

    def plan(self, candidate: Candidate) -> list[Change]:
        state = candidate.model.state_dict()
        groups, alone = self._groups(candidate)
        changes = []
        lost: dict[TensorAxis, int] = defaultdict(int)
        for group in groups:
            for tensor_axis, taken in group.axes.items():
                lost[tensor_axis] += sum(len(taken[unit]) for unit in range(group.size - self._left(group)))
        for group in groups:
            text = f"{self._left(group)} of {group.size} {group.category} of {group.name}"
            text += ", or as many as the ranking of all groups keeps" * self.global_ranking
            for name in dict.fromkeys(name for name, _ in group.axes):
                before = tuple(state[name].shape)
                after = tuple(length - lost[name, axis] for axis, length in enumerate(before))
                changes.append(Change(name, str(before), f"{after}: {text}"))
        return changes + [Change(name, "as it is", f"left alone: {reason}") for name, reason in alone.items()]

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        groups, alone = self._groups(candidate)
        if not groups:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in alone.items()) or "it has no layers"
            raise EdgekitError(f"no channels or heads can be removed ({reasons}); leave {self.name} out of the recipe")
        model = candidate.copy_model()
        scores = _taylor(model, groups, context) if self.importance == "taylor" else _magnitude(model, groups)
        steps = removal(
            candidate.model,
            [
                (group, _least(group, score, group.size - left))
                for group, score, left in zip(groups, scores, self._kept(groups, scores), strict=True)
            ],
        )
        model = remove(candidate.copy_model(), steps)
        try:
            results(model, example_inputs(candidate))
        except Exception as error:  # the network's own code may raise anything
            raise EdgekitError(
                f"the network runs if one group is cut, but not if all are cut "
                f'({str(error)[:120]}); leave some groups alone, such as layers = {{"{groups[0].name}" = 0}}'
            ) from error
        pruned = [*candidate.arguments.get("pruned", ()), *steps]
        model = recover(model, context, self.epochs, self.learning_rate, self.name)
        return Candidate(candidate.family, {**candidate.arguments, "pruned": pruned}, model)

    def groups(self, candidate: Candidate) -> list[str]:
        """Return the names of the groups that the pass prunes."""
        return [group.name for group in self._groups(candidate)[0]]

    def _groups(self, candidate: Candidate) -> tuple[list[Group], dict[str, str]]:
        """Return the groups to prune, and the groups to leave alone with the reason. `plan` and `apply` both call
        this."""
        known = _found.setdefault(candidate.model, {})
        key = f"{self!r}, {candidate.family}, {dict(candidate.arguments)!r}"
        if key not in known:
            known[key] = self._found_in(candidate)
        groups, alone = known[key]
        return list(groups), dict(alone)

    def _found_in(self, candidate: Candidate) -> tuple[list[Group], dict[str, str]]:
        if candidate.family != "module":
            raise EdgekitError(
                f"a {candidate.family} is no model built by a Python function; use structured_prune instead"
            )
        model = candidate.copy_model()
        example = example_inputs(candidate)
        found, alone = find_groups(model, example, self.round_to)
        names = [group.name for group in found]
        for pattern in self.layers:
            if not fnmatch.filter(names, pattern):
                raise unknown("layer", pattern, names, where="layers")
        chosen = []
        with torch.no_grad():
            shapes = [value.shape for value in results(model, example)]
        for group in found:
            if self._left(group) == group.size:
                if self._share(group) > 0:
                    alone[group.name] = f"{group.size} {group.category}; none can go at multiples of {group.step}"
            elif reason := _obstacle(model, example, shapes, group, self._left(group)):
                alone[group.name] = reason
            else:
                chosen.append(group)
        return chosen, alone

    def _share(self, group: Group) -> float:
        shares = [share for pattern, share in self.layers.items() if fnmatch.fnmatch(group.name, pattern)]
        return shares[-1] if shares else self.sparsity

    def _left(self, group: Group) -> int:
        """Return the number of units that stay if each group loses its own share."""
        wanted = group.size * (1 - self._share(group))
        return min(group.size, max(1, round(wanted / group.step)) * group.step)

    def _kept(self, groups: Sequence[Group], scores: Sequence[Tensor]) -> list[int]:
        """Return the number of units that stay in each group."""
        if not self.global_ranking:
            return [self._left(group) for group in groups]
        # scores of different groups have different units, so each group's mean score counts as 1
        scaled = [score / score.mean().clamp(min=1e-30) for score in scores]
        removed = sum(group.size - self._left(group) for group in groups)
        limit = torch.cat(scaled).kthvalue(max(1, removed)).values
        kept = []
        for group, score in zip(groups, scaled, strict=True):
            wanted = max(int((score > limit).sum()), group.size * (1 - MOST))
            kept.append(min(group.size, max(1, round(wanted / group.step)) * group.step))
        return kept


def _obstacle(model: nn.Module, example: list[Tensor], shapes: list[torch.Size], group: Group, left: int) -> str:
    """Say why the network, whose outputs have these shapes, cannot lose the group's first units; "" if it can."""
    if group.counts:  # heads were already cut on trial when they were found
        return ""
    units = _least(group, torch.arange(group.size, dtype=torch.float32), group.size - left)
    try:
        cut = remove(copy.deepcopy(model), removal(model, [(group, units)]))
        with torch.no_grad():
            after = [value.shape for value in results(cut, example)]
    except EdgekitError:
        return "torch-pruning does not see the order in which they are read"
    except Exception as error:  # the network's own code may raise anything
        return f"the network does not run without them ({str(error)[:120]})"
    return "" if after == shapes else "they are outputs of the network"


def _least(group: Group, scores: Tensor, count: int) -> list[int]:
    """Return the `count` units with the lowest scores, the same number from each share."""
    parts = scores.reshape(group.shares, -1)
    order = parts.argsort(dim=1, stable=True)[:, : count // group.shares]
    first = torch.arange(group.shares).unsqueeze(1) * parts.shape[1]
    return [int(unit) for unit in (order + first).flatten().sort().values]


def _taylor(model: nn.Module, groups: Sequence[Group], context: Context) -> list[Tensor]:
    """Return (units,) for each group: the first-order change of the loss if no consumer read the unit."""
    scores = [torch.zeros(group.size) for group in groups]
    chosen_axes = [group.consumers or tuple(group.axes)[:1] for group in groups]
    rows = torch.randperm(len(context.train), generator=torch.Generator().manual_seed(context.seed))[:SAMPLES].numpy()
    for start in range(0, len(rows), BATCH):
        batch = context.train.take(rows[start : start + BATCH])
        model.zero_grad()
        output = results(model, tensors(batch))[0]
        # with its own output as the target, the loss has no gradient; with zeros as the target it has one
        expected = output.detach() if output.ndim == 2 else torch.zeros_like(output)
        loss(output, batch.labels, context.train.labels, expected).backward()
        for group, chosen, score in zip(groups, chosen_axes, scores, strict=True):
            score += sum(_per_unit(model, group, tensor_axis, taylor=True) for tensor_axis in chosen) ** 2
    return scores


def _magnitude(model: nn.Module, groups: Sequence[Group]) -> list[Tensor]:
    """Return (units,) for each group: the sum of squares of all weights that belong to the unit."""
    return [
        torch.stack([_per_unit(model, group, tensor_axis, taylor=False) for tensor_axis in group.axes]).sum(dim=0)
        for group in groups
    ]


def _per_unit(model: nn.Module, group: Group, tensor_axis: TensorAxis, *, taylor: bool) -> Tensor:
    """Return (units,) sums over the indices of each unit: of weight x gradient, or of squared weights."""
    name, axis = tensor_axis
    path, _, attribute = name.rpartition(".")
    value = getattr(model.get_submodule(path), attribute).detach()
    other = getattr(model.get_submodule(path), attribute).grad if taylor else value
    if other is None:
        return torch.zeros(group.size)
    along = (value * other).movedim(axis, 0).flatten(1).sum(dim=1) if value.ndim > 1 else value * other
    return torch.stack([along[list(taken)].sum() for taken in group.axes[tensor_axis]])
