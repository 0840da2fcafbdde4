"""Remove the channels and attention heads that the loss would miss least from any torch network, then recover.

Which weights lose a channel together is read off the network's dependency graph (DepGraph, Fang et al. 2023, arXiv
2301.12900, section 3; by torch-pruning). Importance is structured_prune's: Taylor expansion of the loss in a gate on
the unit's output, squared and summed over mini-batches (Molchanov et al. 2019, arXiv 1906.10771, eq. 8).

Nothing is believed unseen: each group is cut on trial, and one that the network cannot run without, or that changes its
outputs' shape, is left alone and named.
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
from edgekit.nn.units import Group, Place, find_groups, removal, results
from edgekit.passes.base import Candidate, Change, Context, Pass, at_least, example_inputs, loss, recover

SAMPLES, BATCH = 1024, 64  # for importance, as in structured_prune
MOST = 0.9  # of a group's units at most, when groups compete: an empty layer cuts the network in two
# what was found of a network, by pass and arguments: cutting every group on trial takes half a minute of a transformer
_found: WeakKeyDictionary[nn.Module, dict[str, tuple[list[Group], dict[str, str]]]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class DependencyPrune(Pass[Candidate]):
    """`sparsity`: share of each group's channels or heads to remove; `layers`: other shares, by shell-style patterns of
    layer names, the last match wins, 0 leaves a layer alone."""

    name: ClassVar[str] = "dependency_prune"
    summary: ClassVar[str] = "remove channels and attention heads of any network, then recover"
    epochs_parameter: ClassVar[str] = "epochs"
    multiple_parameter: ClassVar[str] = "round_to"

    sparsity: float
    layers: Mapping[str, float] = field(default_factory=dict)
    round_to: int = 8  # channels left are a multiple: what a vector register, and int8 tensor cores, take at once
    global_ranking: bool = False  # let groups compete for what is removed in all, rather than each give its share
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
        lost: dict[Place, int] = defaultdict(int)
        for group in groups:
            for place, taken in group.places.items():
                lost[place] += sum(len(taken[unit]) for unit in range(group.size - self._left(group)))
        for group in groups:
            text = f"{self._left(group)} of {group.size} {group.kind} of {group.name}"
            text += ", or as many as others leave it" * self.global_ranking
            for name in dict.fromkeys(name for name, _ in group.places):
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
        except Exception as error:  # whatever somebody's code raises
            raise EdgekitError(
                f"the network runs without the units of any one group, not without those of all "
                f'({str(error)[:120]}); leave some alone, such as layers = {{"{groups[0].name}" = 0}}'
            ) from error
        pruned = [*candidate.arguments.get("pruned", ()), *steps]
        model = recover(model, context, self.epochs, self.learning_rate, self.name)
        return Candidate(candidate.family, {**candidate.arguments, "pruned": pruned}, model)

    def groups(self, candidate: Candidate) -> list[str]:
        """Names of what is removed from."""
        return [group.name for group in self._groups(candidate)[0]]

    def _groups(self, candidate: Candidate) -> tuple[list[Group], dict[str, str]]:
        """What is removed from, and what is left alone, why. A plan and its application ask the same."""
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
                    alone[group.name] = f"{group.size} {group.kind}; none can go at multiples of {group.step}"
            elif reason := _obstacle(model, example, shapes, group, self._left(group)):
                alone[group.name] = reason
            else:
                chosen.append(group)
        return chosen, alone

    def _share(self, group: Group) -> float:
        shares = [share for pattern, share in self.layers.items() if fnmatch.fnmatch(group.name, pattern)]
        return shares[-1] if shares else self.sparsity

    def _left(self, group: Group) -> int:
        """Units that stay, when each group gives its own share."""
        wanted = group.size * (1 - self._share(group))
        return min(group.size, max(1, round(wanted / group.step)) * group.step)

    def _kept(self, groups: Sequence[Group], scores: Sequence[Tensor]) -> list[int]:
        """Units that stay in each group."""
        if not self.global_ranking:
            return [self._left(group) for group in groups]
        # scores of different groups are of different units: an average one counts 1 everywhere
        scaled = [score / score.mean().clamp(min=1e-30) for score in scores]
        removed = sum(group.size - self._left(group) for group in groups)
        limit = torch.cat(scaled).kthvalue(max(1, removed)).values
        kept = []
        for group, score in zip(groups, scaled, strict=True):
            wanted = max(int((score > limit).sum()), group.size * (1 - MOST))
            kept.append(min(group.size, max(1, round(wanted / group.step)) * group.step))
        return kept


def _obstacle(model: nn.Module, example: list[Tensor], shapes: list[torch.Size], group: Group, left: int) -> str:
    """Why the network, whose outputs have these shapes, cannot do without the group's first units, or nothing."""
    if group.counts:  # heads, which have been cut on trial when they were found
        return ""
    units = _least(group, torch.arange(group.size, dtype=torch.float32), group.size - left)
    try:
        cut = remove(copy.deepcopy(model), removal(model, [(group, units)]))
        with torch.no_grad():
            after = [value.shape for value in results(cut, example)]
    except EdgekitError:
        return "they are read in an order that torch-pruning does not see"
    except Exception as error:  # whatever somebody's code raises
        return f"the network does not run without them ({str(error)[:120]})"
    return "" if after == shapes else "they are outputs of the network"


def _least(group: Group, scores: Tensor, count: int) -> list[int]:
    """The `count` units of the lowest scores, equally many of each share."""
    parts = scores.reshape(group.shares, -1)
    order = parts.argsort(dim=1, stable=True)[:, : count // group.shares]
    first = torch.arange(group.shares).unsqueeze(1) * parts.shape[1]
    return [int(unit) for unit in (order + first).flatten().sort().values]


def _taylor(model: nn.Module, groups: Sequence[Group], context: Context) -> list[Tensor]:
    """(units,) for each group: how much the loss would change to first order if nobody read the unit."""
    scores = [torch.zeros(group.size) for group in groups]
    places = [group.readers or tuple(group.places)[:1] for group in groups]
    rows = torch.randperm(len(context.train), generator=torch.Generator().manual_seed(context.seed))[:SAMPLES].numpy()
    for start in range(0, len(rows), BATCH):
        batch = context.train.take(rows[start : start + BATCH])
        model.zero_grad()
        output = results(model, tensors(batch))[0]
        # a network's own output as its aim would have no gradient; to be nothing is an aim that has one
        aim = output.detach() if output.ndim == 2 else torch.zeros_like(output)
        loss(output, batch.labels, context.train.labels, aim).backward()
        for group, chosen, score in zip(groups, places, scores, strict=True):
            score += sum(_per_unit(model, group, place, taylor=True) for place in chosen) ** 2
    return scores


def _magnitude(model: nn.Module, groups: Sequence[Group]) -> list[Tensor]:
    """(units,) for each group: the square of all weights that go with the unit."""
    return [
        torch.stack([_per_unit(model, group, place, taylor=False) for place in group.places]).sum(dim=0)
        for group in groups
    ]


def _per_unit(model: nn.Module, group: Group, place: Place, *, taylor: bool) -> Tensor:
    """(units,) sums over the positions of each: of weight x gradient, or of squared weights."""
    name, axis = place
    path, _, attribute = name.rpartition(".")
    value = getattr(model.get_submodule(path), attribute).detach()
    other = getattr(model.get_submodule(path), attribute).grad if taylor else value
    if other is None:
        return torch.zeros(group.size)
    along = (value * other).movedim(axis, 0).flatten(1).sum(dim=1) if value.ndim > 1 else value * other
    return torch.stack([along[list(taken)].sum() for taken in group.places[place]])
