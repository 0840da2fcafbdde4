"""The simulated device, with really executed steps: what each policy promises about alerts at 256 a second.

The costs are of the same form as those of SmolLM2, with 8 layers instead of 30 and prompts of 300 tokens, so that the
test is short. A layer of a step of 512 tokens takes 18 ms, a whole step up to 150 ms."""

import dataclasses
import functools

import pytest

from edgekit.importers.api import open_model
from edgekit.session import open_session
from tests.conftest import ROOT
from tests.runtimes.llm.conftest import compiler
from tools.simulate_device import Costs, simulate

ERRORS = (0.8, 0.95, 0.98, 1.0, 1.0, 1.02, 1.05, 1.3)
COSTS = Costs(3e-3, 2.5e-4, 2e-7, 2e-4, 3e-4, 1e-4, 7e-5, ERRORS)


@pytest.fixture(scope="module")
def row(toy):
    """Return row(policy, slow), what one policy gave in three virtual seconds."""
    model = toy("llama", "Q4_0", layers=8)
    session = open_session(open_model(ROOT / "models" / "t2-gr"), "onnxruntime", threads=1)

    @functools.cache
    def found(policy, slow=False, exact=False):
        costs = dataclasses.replace(COSTS, errors=(1.0, 1.0)) if exact else COSTS
        return simulate(model, session, policy, costs=costs, seconds=3.0, slow=slow, long_prompt=300)

    return found


@compiler
def test_the_same_costs_give_the_same_numbers(toy, row):
    first = row("layers")
    again = row.__wrapped__("layers")
    assert {**first, "real_seconds": 0} == {**again, "real_seconds": 0}


@compiler
@pytest.mark.parametrize("slow", [False, True])
def test_pauses_between_layers_miss_nothing_and_give_more_tokens_than_budgets_that_miss_little(row, slow):
    assert row("layers", slow)["missed"] == 0.0
    # without errors in the costs, which a few large steps draw more seldom than many small ones
    layers = row("layers", slow, exact=True)
    budgets = [row(policy, slow, exact=True) for policy in ("32", "64", "256")]
    good = [item["tokens_per_s"] for item in budgets if item["missed"] < 0.01]
    assert good
    assert layers["missed"] == 0.0
    assert layers["tokens_per_s"] >= max(good)
    assert any(item["missed"] > 0.01 for item in budgets)  # the twin: too large a budget is found out


@compiler
def test_the_adaptive_budget_misses_little_also_when_the_device_slows_down(row):
    assert row("adaptive")["missed"] <= 0.005
    assert row("adaptive", True)["missed"] <= 0.01
    assert row("512")["missed"] > 0.1


@compiler
def test_the_daemon_keeps_chats_smooth_beside_long_prompts(row):
    assert row("serve")["missed"] == 0.0
    assert row("serve")["between_tokens_ms"]["p100"] <= 60.0
    assert row("layers")["between_tokens_ms"]["p100"] > 60.0
