"""Which architecture to try next: a pure function of the study's identity, the number of the trial, and the results of
earlier generations. So a study that was killed continues as if it had not been, and two processes may try the networks
of one generation at the same time.

generator: cross-entropy over the factors (Rubinstein 1999, "The Cross-Entropy Method for Combinatorial and Continuous
Optimization"), the open counterpart of generative synthesis (Wong et al. 2018, "FermiNets", arXiv 1809.05989): a
generator makes networks, limits say which count (the indicator), and the best of them change the generator.
nsga2: Deb et al. 2002, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II"; random: the control.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError
from edgekit.nas.space import Choice, Space, key_of
from edgekit.nn.hiera_config import HieraConfig

STRATEGIES = ("generator", "nsga2", "random")
MOST_DRAWS = 10_000  # of networks that break a limit or are known, for one that is tried
REPEATS = 200  # draws of known networks, after which a space is taken to have no others
ELITE = 0.25  # the share of all networks so far that changes the generator
SMOOTHING = 0.7  # weight of the best networks' values against equal ones
MUTATION = 0.15  # chance of each factor

Broken = Callable[[HieraConfig], Sequence[str]]  # the limits that a network breaks


@dataclass(frozen=True, slots=True)
class Tried:
    """A network and its result. score: higher is better; cost: lower is better."""

    choice: Choice
    key: str
    score: float
    cost: float


def draw(study: str, *parts: object) -> np.random.Generator:
    """Return the random numbers of one decision of a study: a counter-based generator (Salmon et al. 2011), whose key
    is the hash of the study and of the decision's name."""
    digest = hashlib.sha256("/".join([study, *map(str, parts)]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def propose(
    strategy: str, space: Space, study: str, number: int, generation: int, history: Sequence[Tried], known: set[str],
    broken: Broken,
) -> tuple[Choice, HieraConfig]:  # fmt: skip
    """Return a new network that keeps the limits. generation: networks that are proposed from the same history;
    history: results of all trials of earlier generations; known: keys of networks that were proposed before. Raises
    EdgekitError if none is found, and says what excluded how many."""
    rng = draw(study, strategy, number)
    earlier = history[: number // generation * generation]
    drawing = _drawing(strategy, space, earlier, generation, rng)
    reasons = Counter[str]()
    for choice, config in _valid(space, drawing, MOST_DRAWS, broken, reasons):
        if key_of(config) not in known:
            return choice, config
        reasons["were tried before"] += 1
    raise EdgekitError(
        f"none of {MOST_DRAWS:,} networks drawn for trial {number} can be tried: {told(reasons)}; allow more in "
        "[limits] or [space], or fewer candidates"
    )


def some(space: Space, rng: np.random.Generator, count: int, draws: int, broken: Broken) -> list[HieraConfig]:
    """Return different random networks that keep the limits. Raises EdgekitError if none of so many drawn ones does;
    there may be fewer than `count`."""
    found: dict[HieraConfig, None] = {}
    reasons = Counter[str]()
    repeated = 0  # draws since the last new network
    for _, config in _valid(space, lambda: space.sample(rng), draws, broken, reasons):
        repeated = repeated + 1 if config in found else 0
        found[config] = None
        if len(found) == count or repeated == REPEATS:
            break
    if not found:
        raise EdgekitError(f"none of {draws:,} networks keeps [limits]: {told(reasons)}; allow more")
    return list(found)


def _valid(
    space: Space, drawing: Callable[[], Choice], draws: int, broken: Broken, reasons: Counter[str]
) -> Iterator[tuple[Choice, HieraConfig]]:
    """Yield drawn networks that keep the limits, and count what excludes the others."""
    known: dict[HieraConfig, Sequence[str]] = {}  # counting operations takes longer than drawing
    for _ in range(draws):
        choice = drawing()
        try:
            config = space.config(choice)
        except EdgekitError as error:
            reasons[f"do not fit together, such as: {error}"[:200]] += 1
            continue
        if config not in known:
            known[config] = broken(config)
        if over := known[config]:
            reasons.update(f"break {limit}" for limit in over)
        else:
            yield choice, config


def told(reasons: Counter[str]) -> str:
    """Return what excluded how many networks, most first; a network may break several limits."""
    parts = [f"{count:,} {text}" for text, count in reasons.most_common() if text.startswith("break")]
    parts += [f"{count:,} {text}" for text, count in reasons.most_common() if not text.startswith("break")][:3]
    return "; ".join(parts)


def _drawing(
    strategy: str, space: Space, history: Sequence[Tried], generation: int, rng: np.random.Generator
) -> Callable[[], Choice]:
    if strategy == "random" or not history:
        return lambda: space.sample(rng)
    if strategy == "generator":
        weights = factor_weights(space, history)
        return lambda: space.sample(rng, weights)
    parents = survivors(history, generation)

    def child() -> Choice:
        first, second = (_winner(parents, rng).choice for _ in range(2))
        return space.mutated(space.crossed(first, second, rng), rng, MUTATION)

    return child


def factor_weights(space: Space, history: Sequence[Tried]) -> dict[str, list[float]]:
    """Return the chance of each value of each factor: its share among the best networks, and some of an equal share, so
    that no value is lost for ever."""
    elite = sorted(history, key=lambda item: (-item.score, item.cost, item.key))
    elite = elite[: max(2, round(ELITE * len(elite)))]
    found: dict[str, list[float]] = {}
    for place, (factor, values) in enumerate(space.factors.items()):
        counts = np.bincount([item.choice[place] for item in elite], minlength=len(values)) / len(elite)
        shares = SMOOTHING * counts + (1 - SMOOTHING) / len(values)
        found[factor] = [float(share) for share in shares / shares.sum()]
    return found


def survivors(history: Sequence[Tried], count: int) -> list[Tried]:
    """Return the parents of the next generation, best first: by front, then by the distance to neighbours."""
    ordered: list[Tried] = []
    for front in fronts(history):
        distances = crowding([history[index] for index in front])
        ordered += [history[index] for _, _, index in sorted(zip((-distances).tolist(), front, front, strict=True))]
        if len(ordered) >= count:
            break
    return ordered[:count]


def fronts(items: Sequence[Tried]) -> list[list[int]]:
    """Return the indices of each front: the first one holds what nothing dominates, the second what only the first
    dominates, and so on."""
    score, cost = (np.array([getattr(item, name) for item in items]) for name in ("score", "cost"))
    as_good = (score[:, None] >= score) & (cost[:, None] <= cost)
    over = as_good & ((score[:, None] > score) | (cost[:, None] < cost))  # the row's item, the column's
    left, found = np.arange(len(items)), []
    while len(left):
        behind = over[np.ix_(left, left)].any(axis=0)
        found.append([int(index) for index in left[~behind]])
        left = left[behind]
    return found


def crowding(front: Sequence[Tried]) -> npt.NDArray[np.float64]:
    """Return each network's distance to its neighbours on the front, infinite for the two ends."""
    found = np.zeros(len(front))
    for values in ([item.score for item in front], [item.cost for item in front]):
        order = np.argsort(values, kind="stable")
        spread = values[order[-1]] - values[order[0]]
        found[order[[0, -1]]] = np.inf
        if spread > 0:
            for before, here, behind in zip(order, order[1:], order[2:], strict=False):
                found[here] += (values[behind] - values[before]) / spread
    return found


def _winner(parents: Sequence[Tried], rng: np.random.Generator) -> Tried:
    """Return the better of two random parents; they are in order."""
    return parents[int(min(rng.integers(len(parents), size=2)))]


def effects(space: Space, history: Sequence[Tried]) -> list[tuple[str, Mapping[str, float]]]:
    """Return, by factor, the mean score of the networks with each value, the factor with the largest difference first;
    factors of which only one value was tried are left out."""
    found = []
    for place, (factor, values) in enumerate(space.factors.items()):
        groups = {
            str(value): [item.score for item in history if item.choice[place] == index]
            for index, value in enumerate(values)
        }
        means = {value: float(np.mean(scores)) for value, scores in groups.items() if scores}
        if len(means) > 1:
            found.append((factor, means))
    return sorted(found, key=lambda item: min(item[1].values()) - max(item[1].values()))
