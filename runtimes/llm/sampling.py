"""Choose the next token from logits.

A request's choices depend on its seed and on nothing else: the number for its n-th token is drawn from a counter-based
generator (Philox, Salmon et al. 2011) at n, so batches and schedules cannot change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError

FEW = 128  # largest weights that are sorted first, to find those that together have a share


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose. temperature: 0 takes the most probable token; top_k: of how many of the most probable, 0 for all;
    top_p: of the fewest that together have this probability (Holtzman et al., arXiv 1904.09751); min_p: of those with
    at least this share of the largest probability; repetition: by which the logits of tokens that came before are
    divided (multiplied where they are negative; Keskar et al., arXiv 1909.05858); seed: of the random numbers."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = [
            ("temperature", 0 <= self.temperature <= 100, "0 to 100"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "0 to below 1"),
            ("repetition", 0 < self.repetition <= 100, "more than 0, and at most 100"),
            ("seed", 0 <= self.seed < 1 << 64, "a whole number below 2**64"),
        ]
        for name, good, expected in limits:
            if not good:
                raise EdgekitError(f"sampling: {name} = {getattr(self, name)}; expected {expected}")

    def for_answer(self, number: int) -> Sampling:
        """Return it for one of several answers to a prompt, counted from 0: each has the next seed."""
        return replace(self, seed=(self.seed + number) % (1 << 64))


def choose(
    logits: npt.NDArray[np.float32],
    sampling: Sampling,
    before: Sequence[int],
    number: int,
    allowed: npt.NDArray[np.bool_] | None = None,
) -> int:
    """Return the id of the next token. logits: (vocabulary,); before: the tokens of the sequence; number: of this
    choice in its request; allowed: (vocabulary,) which tokens may be chosen, at least one; None: all."""
    scores = logits.astype(np.float64)
    if sampling.repetition != 1.0 and len(before):
        seen = np.unique(np.asarray(before, np.int64))
        scores[seen] = np.where(
            scores[seen] > 0, scores[seen] / sampling.repetition, scores[seen] * sampling.repetition
        )
    if allowed is not None:
        scores[~allowed] = -np.inf
    if sampling.temperature == 0:
        return int(scores.argmax())
    weights = probabilities(scores, sampling)
    generator = np.random.Generator(np.random.Philox(key=sampling.seed, counter=number))
    ends = weights.cumsum()
    return int(min(np.searchsorted(ends, generator.random() * ends[-1], side="right"), np.flatnonzero(weights)[-1]))


def probabilities(scores: npt.NDArray[np.float64], sampling: Sampling) -> npt.NDArray[np.float64]:
    """Return (vocabulary,) the weights of the tokens that may be chosen, and 0 for the others."""
    scaled = (scores - scores.max()) / sampling.temperature
    weights: npt.NDArray[np.float64] = np.exp(scaled)
    most = min(sampling.top_k or len(weights), len(weights))
    if sampling.min_p:
        most = min(most, int((weights >= sampling.min_p).sum()))  # the largest weight is 1
    if most == len(weights) and sampling.top_p == 1:
        return weights  # all of them may be chosen
    kept = largest(weights, most)[:most] if sampling.top_p == 1 else nucleus(weights, sampling.top_p, most)
    values = weights[kept]
    weights[:] = 0.0
    weights[kept] = values
    return weights


def largest(weights: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.intp]:
    """Return the indices of the largest weights in order, at least `count`; equal ones in the order of their indices.
    This does not sort the others: a vocabulary takes milliseconds."""
    if count >= len(weights):
        return np.argsort(-weights, kind="stable")
    least = np.partition(weights, len(weights) - count)[len(weights) - count]
    found = np.flatnonzero(weights >= least)
    return found[np.argsort(-weights[found], kind="stable")]


def nucleus(weights: npt.NDArray[np.float64], share: float, most: int) -> npt.NDArray[np.intp]:
    """Return the indices of the fewest largest weights that together have this share of the sum, at most `most`."""
    wanted, count = share * weights.sum(), min(FEW, most)
    while True:
        order = largest(weights, count)[:count]
        ends = weights[order].cumsum()
        if ends[-1] >= wanted or count == most:
            return order[: int(np.searchsorted(ends, wanted)) + 1]
        count = min(8 * count, most)
