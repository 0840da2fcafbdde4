"""The records of a search: which trials fit, and which are on its Pareto front."""

import math

import pytest

from edgekit.compression.recipe import Step
from edgekit.compression.trials import Constraints, Outcome, SearchRecord

GOOD = Outcome(0, (Step("cluster", {}), Step("half", {})), 0.1, 100, 1.5, 2.0, on_front=True)


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        (Constraints(0.1), True),
        (Constraints(0.09), False),
        (Constraints(0.1, max_size=100), True),
        (Constraints(0.1, max_size=99), False),
        (Constraints(0.1, max_latency=2.0), True),
        (Constraints(0.1, max_latency=1.9), False),
    ],
)
def test_each_constraint_counts(limits, fits):
    assert GOOD.fits(limits) is fits


def test_the_front_is_in_the_order_of_loss():
    best = Outcome(1, (), 0.05, 200, 1.0, 2.0, on_front=True)
    behind = Outcome(2, (), 0.01, 300, 0.9, 3.0)
    assert SearchRecord((GOOD, best, behind), (), 1, Constraints(1.0)).front == [best, GOOD]


def test_names_of_the_passes():
    assert GOOD.passes == "cluster, half"
    assert Outcome(1, (), 0.0, 1, 1.0, 1.0).passes == "as it is"


def test_a_recipe_that_was_written_before_a_pass_was_renamed_has_its_present_name():
    told = {**GOOD.to_json(), "recipe": [{"name": "quantise", "bits": 4, "seed": 3}], "loss": None}
    read = Outcome.from_json(told)
    assert read.recipe == (Step("quantize", {"bits": 4}, 3),)
    assert read.loss == math.inf
