"""Which trials are hopeful, which recover longer, and which are run on the test rows."""

import math
from dataclasses import replace

import pytest

from edgekit.compression.recipe import Step
from edgekit.compression.trials import Constraints, Outcome
from edgekit.search.outcomes import finalists, hopeful, promising, score_of

LIMITS = Constraints(0.1)
TRAINED, PLAIN = Step("cluster", {"epochs": 1}), Step("half", {})
GOOD = Outcome(0, (TRAINED,), loss=0.05, bytes=100, speedup=2.0, latency_ms=1.0, low=0.02)


def speed(outcome):
    return outcome.speedup


@pytest.mark.parametrize(
    ("loss", "low", "expected"),
    [(0.1, 0.0, True), (0.15, 0.09, True), (0.15, 0.11, False), (0.21, 0.05, False), (math.inf, 0.0, False)],
)
def test_a_loss_within_the_noise_is_hopeful(loss, low, expected):
    assert hopeful(replace(GOOD, loss=loss, low=low), LIMITS) is expected


def test_only_a_trained_recipe_that_would_be_best_recovers_longer():
    heavy = replace(GOOD, number=1, loss=0.5, low=0.4, speedup=4.0)
    assert promising(heavy, LIMITS, [GOOD], speed)
    assert not promising(replace(heavy, recipe=(PLAIN,)), LIMITS, [GOOD], speed), "nothing to train"
    assert not promising(replace(heavy, loss=1.5, low=1.4), LIMITS, [GOOD], speed), "too far off"
    assert not promising(replace(heavy, speedup=1.5), LIMITS, [GOOD], speed), "another is better already"
    assert not promising(replace(heavy, fits_memory=False), LIMITS, [GOOD], speed), "recovery frees no memory"


def test_finalists_are_hopeful_have_passes_and_come_best_first():
    slow, empty, lost = replace(GOOD, speedup=1.1), replace(GOOD, recipe=()), replace(GOOD, loss=0.9, low=0.8)
    assert finalists([slow, empty, lost, GOOD], LIMITS, speed) == [GOOD, slow]


@pytest.mark.parametrize(("objective", "better"), [("size", 0), ("latency", 1), ("any", 1)])
def test_the_objective_decides_the_score(objective, better, tiny_job):
    job = tiny_job([])
    job = replace(job, limits=replace(job.limits, objective=objective))
    pair = replace(GOOD, bytes=100, speedup=1.0), replace(GOOD, bytes=200, speedup=4.0)
    assert max((0, 1), key=lambda index: score_of(job)(pair[index])) == better
