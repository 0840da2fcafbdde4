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
class Targets:
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

    def fits(self, limits: Targets) -> bool:
        return (
            self.loss <= limits.max_loss
            and (limits.max_size is None or self.bytes <= limits.max_size)
            and (limits.max_latency is None or self.latency_ms <= limits.max_latency)
            and self.fits_memory
        )


Merit = Callable[[Outcome], float]  # higher is better


def hopeful(outcome: Outcome, targets: Targets) -> bool:
    """Whether it keeps to the targets, or misses the loss by less than the noise of the held-out rows."""
    noisy = outcome.loss <= 2 * targets.max_loss and math.isfinite(outcome.low)
    return (replace(outcome, loss=outcome.low) if noisy else outcome).fits(targets)


def promising(outcome: Outcome, targets: Targets, others: Sequence[Outcome], merit: Merit) -> bool:
    """Whether nothing but a loss that a longer recovery may mend keeps the recipe from being the best so far."""
    recovers = any(step.parameters.get("epochs") for step in outcome.recipe)
    near = outcome.loss <= NEAR * targets.max_loss and not hopeful(outcome, targets)
    best = max([merit(other) for other in others if other.fits(targets)], default=-math.inf)
    return recovers and near and replace(outcome, loss=-math.inf).fits(targets) and merit(outcome) > best


def finals(outcomes: Sequence[Outcome], targets: Targets, merit: Merit) -> list[Outcome]:
    """Recipes for the last round, best first."""
    return sorted((item for item in outcomes if item.recipe and hopeful(item, targets)), key=merit, reverse=True)


def merit_of(job: Job) -> Merit:
    """What the objective makes of an outcome."""
    original = packed(job.source)

    def merit(outcome: Outcome) -> float:
        size, speed = math.log(original / outcome.bytes), math.log(outcome.speedup)
        return {"size": size, "latency": speed, "any": size + speed}[job.limits.objective]

    return merit


def packed(bundle: Bundle) -> int:
    from edgekit.bundle.pack import pack

    return len(pack(bundle))
