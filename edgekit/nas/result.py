"""What a study found: the networks of the last rung with their noise, what cannot be told apart, the front, and what
each factor does; and a network as a bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edgekit.bundle.bounded import arrays_from_safetensors, read_file
from edgekit.bundle.format import Bundle
from edgekit.errors import EdgekitError
from edgekit.importers.base import GOLDEN_ROWS
from edgekit.nas.bundles import bundle_of
from edgekit.nas.ranks import spearman
from edgekit.nas.spec import COSTS
from edgekit.nas.strategies import Tried, effects, fronts
from edgekit.nas.study import WEIGHTS, Study
from edgekit.nn.hiera_config import HieraConfig, arguments

FEW = 4  # networks with several seeds that a correlation between seeds needs


class Scored(Protocol):
    """What the last rung trained."""

    @property
    def scores(self) -> tuple[float, ...]: ...

    @property
    def mean(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Finalist:
    """A network of the last rung. scores: of each seed; limits that it breaks when it is measured are in `breaks`."""

    arm: str
    key: str
    config: HieraConfig
    scores: tuple[float, ...]
    costs: Mapping[str, float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))


@dataclass(frozen=True, slots=True)
class Noise:
    """How much training with another seed changes a score. spread: the standard deviation between seeds of one network,
    pooled over the networks; distinguishable: the smallest difference of two means that is told apart, twice the
    standard error of a difference; ceiling: Spearman's correlation between two seeds over the networks, which no
    predictor of one seed's scores can be expected to pass (NaN if there are few networks)."""

    seeds: int
    spread: float
    distinguishable: float
    ceiling: float


def finalists(study: Study) -> list[Finalist]:
    """Return the networks of the last rung, best first; without training, each arm's best trials."""
    search, score = study.spec.search, study.spec.score
    found: list[Finalist] = []
    for arm in search.arms:
        if study.rows is None:
            events = sorted(study.trials(arm), key=lambda item: (-item["score"], item["key"]))[: score.keep[-1]]
            groups = [[event] for event in events]
        else:
            events = study.rung(len(score.epochs) - 1, arm)
            groups = [
                [item for item in events if item["key"] == key] for key in dict.fromkeys(e["key"] for e in events)
            ]
        for group in groups:
            costs: dict[str, float] = {name: group[0][name] for name in COSTS if name in group[0]}
            scores = tuple(item["score"] for item in group)
            found.append(Finalist(arm, group[0]["key"], HieraConfig(**group[0]["arguments"]), scores, costs))
    return sorted(found, key=lambda item: (-item.mean, item.costs[search.cost], item.key))


def ranked(items: Sequence[Finalist], measured: Mapping[str, Any], cost: str) -> list[Finalist]:
    """Return the finalists in the order of what was measured: those that break a limit last, the best score first, and
    of equal scores the cheaper one."""

    def order(item: Finalist) -> tuple[bool, float, float, str]:
        taken = measured[item.key]
        price = taken["milliseconds"] if cost == "milliseconds" else item.costs[cost]
        return bool(taken["breaks"]), -item.mean, price, item.key

    return sorted(items, key=order)


def noise_of(items: Sequence[Scored]) -> Noise | None:
    """Return the noise between seeds; None if no network has two."""
    several = [item for item in items if len(item.scores) > 1]
    if not several:
        return None
    seeds = min(len(item.scores) for item in several)
    spread = math.sqrt(float(np.mean([np.var(item.scores, ddof=1) for item in several])))
    first, second = ([item.scores[n] for item in several] for n in (0, 1))
    ceiling = spearman(first, second) if len(several) >= FEW else math.nan
    return Noise(seeds, spread, 2 * math.sqrt(2) * spread / math.sqrt(seeds), ceiling)


def verdict(first: Scored, second: Scored, noise: Noise) -> str:
    """Say whether the first network is better than the second."""
    gap = first.mean - second.mean
    if abs(gap) < noise.distinguishable:
        return "not distinguishable"
    return "better" if gap > 0 else "worse"


def front(items: Sequence[Tried]) -> list[Tried]:
    """Return the networks that no other one dominates, by cost."""
    return sorted((items[index] for index in fronts(items)[0]), key=lambda item: item.cost) if items else []


def summary(study: Study, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return all that the report shows, as JSON; numbers that are not known are None. measured: milliseconds and broken
    limits of the finalists, by key, by which they are ranked again."""
    found, spec = finalists(study), study.spec
    if measured:
        found = ranked(found, measured, spec.search.cost)
    noise = noise_of(found)
    best = found[0] if found else None
    rows = [
        {
            "arm": item.arm, "key": item.key, "mean": item.mean, "scores": list(item.scores), **item.costs,
            "against_best": verdict(item, best, noise) if best and noise and item is not best else "",
            "arguments": arguments(item.config),
        }
        for item in found
    ]  # fmt: skip
    trials = {arm: study.trials(arm) for arm in spec.search.arms}
    everything = [event for events in trials.values() for event in events]
    trained = study.rows is not None
    own = spec.search.strategy
    compared = None
    if noise and len(spec.search.arms) > 1:
        tops = {arm: next((item for item in found if item.arm == arm), None) for arm in spec.search.arms}
        mine, control = tops[own], tops["random"]
        compared = verdict(mine, control, noise) if mine and control else None
    return {
        "study": study.id,
        "score": "accuracy on the test rows" if trained else f"the proxy {spec.score.proxy}, which is no accuracy",
        "trained": trained,
        "cost": spec.search.cost,
        "trials": {arm: len(events) for arm, events in trials.items()},
        "journal": study.journal.digest,
        "finalists": rows,
        "noise": None if noise is None else {
            "seeds": noise.seeds, "spread": noise.spread, "distinguishable": noise.distinguishable,
            "ceiling": _known(noise.ceiling),
        },
        "against_random": compared,
        "supernet": None if (gate := study.gate) is None else {
            "epochs": spec.score.supernet, "networks": gate.networks, "correlation": _known(gate.correlation),
            "accepted": gate.accepted, "text": str(gate),
        },
        "front": {arm: [[item.key, item.cost, item.score] for item in front(study.tried(arm))] for arm in trials},
        "points": {arm: [[item.key, item.cost, item.score] for item in study.tried(arm)] for arm in trials},
        "proxies": {
            name: _known(spearman([e["proxies"][name] for e in everything], [e["score"] for e in everything]))
            for name in (everything[0]["proxies"] if everything else ())
        } if trained else {},
        "effects": [[factor, dict(means)] for factor, means in effects(spec.space, study.tried(own))],
        "clock": None if study.clock is None else study.clock.describe(),
    }  # fmt: skip


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def bundle(study: Study, item: Finalist) -> Bundle:
    """Return a finalist as a bundle: with the weights of its first seed and reference outputs on test rows, or with new
    weights if nothing was trained."""
    if study.rows is None:
        return bundle_of(item.config)
    path = study.folder / WEIGHTS / f"{item.key}-0.safetensors"
    if not path.is_file():
        raise EdgekitError(f"{path}: the weights of this network are missing; begin the study again in another folder")
    weights = arrays_from_safetensors(read_file(path), str(path))
    rows = study.rows.test.take(np.arange(min(GOLDEN_ROWS, len(study.rows.test))))
    return bundle_of(item.config, weights, dict(rows.inputs))
