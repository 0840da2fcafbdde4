"""What a trial came to, which trials deserve a longer recovery, and which the last round."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgekit.bundle.format import Bundle
from edgekit.compression.job import Job
from edgekit.compression.recipe import Step

NEAR = 10.0  # times the loss allowed: farther off, no recovery is tried


@dataclass(frozen=True, slots=True)
class Constraints:
    """What the result must keep to. max_size: packed bytes; max_latency: CPU milliseconds of a call at the first batch
    size; on a target that is not here, estimated ones."""

    max_loss: float
    max_size: int | None = None
    max_latency: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One trial. speedup: geometric mean over the batch sizes, against the original in the same run; loss: change of
    the metric on held-out rows; low: the lower end of its interval."""

    number: int
    recipe: tuple[Step, ...]
    loss: float
    bytes: int
    speedup: float
    latency_ms: float
    on_front: bool = False
    fits_memory: bool = True  # of the target
    low: float = math.nan

    def fits(self, limits: Constraints) -> bool:
        return (
            self.loss <= limits.max_loss
            and (limits.max_size is None or self.bytes <= limits.max_size)
            and (limits.max_latency is None or self.latency_ms <= limits.max_latency)
            and self.fits_memory
        )


Score = Callable[[Outcome], float]  # higher is better


def hopeful(outcome: Outcome, constraints: Constraints) -> bool:
    """Whether it keeps to the targets, or misses the loss by less than the noise of the held-out rows."""
    noisy = outcome.loss <= 2 * constraints.max_loss and math.isfinite(outcome.low)
    return (replace(outcome, loss=outcome.low) if noisy else outcome).fits(constraints)


def promising(outcome: Outcome, constraints: Constraints, others: Sequence[Outcome], score: Score) -> bool:
    """Whether nothing but a loss that a longer recovery may mend keeps the recipe from being the best so far."""
    recovers = any(step.parameters.get("epochs") for step in outcome.recipe)
    near = outcome.loss <= NEAR * constraints.max_loss and not hopeful(outcome, constraints)
    best = max([score(other) for other in others if other.fits(constraints)], default=-math.inf)
    return recovers and near and replace(outcome, loss=-math.inf).fits(constraints) and score(outcome) > best


def finalists(outcomes: Sequence[Outcome], constraints: Constraints, score: Score) -> list[Outcome]:
    """Recipes for the last round, best first."""
    return sorted((item for item in outcomes if item.recipe and hopeful(item, constraints)), key=score, reverse=True)


def score_of(job: Job) -> Score:
    """What the objective makes of an outcome."""
    original = packed(job.source)

    def score(outcome: Outcome) -> float:
        size, speed = math.log(original / outcome.bytes), math.log(outcome.speedup)
        return {"size": size, "latency": speed, "any": size + speed}[job.limits.objective]

    return score


def packed(bundle: Bundle) -> int:
    from edgekit.bundle.pack import pack

    return len(pack(bundle))
