"""Decide which trials of a search recover longer, and which recipes are run at full length on the test rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from edgekit.bundle.pack import pack
from edgekit.compression.job import Job
from edgekit.compression.trials import Constraints, Outcome

NEAR = 10.0  # multiples of the allowed loss: a trial that loses more does not recover longer


Score = Callable[[Outcome], float]  # higher is better


def hopeful(outcome: Outcome, constraints: Constraints) -> bool:
    """Return whether the trial keeps to the constraints, or exceeds the loss by less than the noise of the held-out
    rows."""
    noisy = outcome.loss <= 2 * constraints.max_loss and math.isfinite(outcome.low)
    return (replace(outcome, loss=outcome.low) if noisy else outcome).fits(constraints)


def promising(outcome: Outcome, constraints: Constraints, others: Sequence[Outcome], score: Score) -> bool:
    """Return whether only its loss, which a longer recovery may reduce, keeps the recipe from being the best so far."""
    recovers = any(step.parameters.get("epochs") for step in outcome.recipe)
    near = outcome.loss <= NEAR * constraints.max_loss and not hopeful(outcome, constraints)
    best = max([score(other) for other in others if other.fits(constraints)], default=-math.inf)
    return recovers and near and replace(outcome, loss=-math.inf).fits(constraints) and score(outcome) > best


def finalists(outcomes: Sequence[Outcome], constraints: Constraints, score: Score) -> list[Outcome]:
    """Return the recipes to run at full length on the test rows, the best score first."""
    return sorted((item for item in outcomes if item.recipe and hopeful(item, constraints)), key=score, reverse=True)


def score_of(job: Job) -> Score:
    """Return the score of an outcome under the job's objective."""
    original = len(pack(job.source))

    def score(outcome: Outcome) -> float:
        size, speed = math.log(original / outcome.bytes), math.log(outcome.speedup)
        return {"size": size, "latency": speed, "any": size + speed}[job.limits.objective]

    return score
