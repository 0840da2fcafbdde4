"""Sensitivity of weights, against quantizing each by hand and reading the loss off the probabilities."""

import math
from dataclasses import replace

import numpy as np
import pytest

from edgekit.bundle.format import assemble
from edgekit.compression import metrics
from edgekit.compression.recipe import Step
from edgekit.compression.subject import applied
from edgekit.nn.training import probabilities
from edgekit.search import sensitivity
from edgekit.search.sensitivity import PROBE_BITS, sensitivities


def silent(what, done, total):
    pass


def matrices(bundle):
    return {name for name, value in bundle.weights().items() if value.ndim >= 2}


def log_loss(model, rows):
    """The mean over the classes of each one's mean of -log p(true), by the definition."""
    chosen = probabilities(model, rows)[np.arange(len(rows)), rows.labels].astype(np.float64)
    return float(np.mean([-np.log(chosen[rows.labels == label]).mean() for label in set(rows.labels.tolist())]))


@pytest.fixture
def job(tiny_job):
    whole = tiny_job([])
    return replace(whole, test=whole.test.take(np.arange(16)))


def test_changes_are_those_of_each_weight_quantized_alone(job):
    told = []
    ranked = sensitivities(job, lambda *given: told.append(given))
    assert told == [("sensitivity", number, len(ranked)) for number in range(len(ranked) + 1)]
    assert [item.change for item in ranked] == sorted((item.change for item in ranked), reverse=True)
    assert {item.nodes for item in ranked} == {()}, "this runtime runs no passes on graphs"
    found = {item.name: item.change for item in ranked}
    assert set(found) == matrices(job.source)
    before = log_loss(job.source.model(), job.test)
    for name, change in found.items():
        bundle = applied(job, Step("quantize", {"bits": PROBE_BITS, "epochs": 0, "include": [name]}))
        weights, original = bundle.weights(), job.source.weights()
        assert [key for key in weights if not np.array_equal(weights[key], original[key])] == [name], "it alone"
        assert len(np.unique(weights[name][0])) <= 2**PROBE_BITS
        assert change == pytest.approx(log_loss(bundle.model(), job.test) - before, abs=1e-6)
    assert max(map(abs, found.values())) > 1e-4, "the changes are far beyond the tolerance"


def with_weights(job, changes):
    weights = job.source.weights() | changes
    return replace(job, source=assemble(job.source.manifest, weights, {}, job.source.golden()))


def test_a_weight_that_three_bits_hold_exactly_changes_nothing(job, monkeypatch):
    probes = sensitivity._probes
    name = min(matrices(job.source))
    monkeypatch.setattr(sensitivity, "_probes", lambda *given: [item for item in probes(*given) if item[0] == name])
    weight = job.source.weights()[name]
    grid = np.float32(0.125) * np.clip(np.round(weight / np.float32(0.125)), -3, 3)
    grid.reshape(len(grid), -1)[:, 0] = np.float32(0.375)  # every row reaches the end of its grid
    (exact,), (other,) = (sensitivities(with_weights(job, {name: value}), silent) for value in (grid, weight))
    assert exact.change == 0.0 != other.change


def test_a_loss_that_is_no_number_is_the_worst(job, monkeypatch):
    """One weight, quantized, makes the metric NaN."""
    broken = sorted(matrices(job.source))[1]
    real, seen = sensitivity.applied, []
    monkeypatch.setattr(sensitivity, "applied", lambda *given: seen.append(given[1]) or real(*given))
    metric = metrics.metric(job.metric)

    class Breaking(type(metric)):
        def value(self, outputs, expected):
            return math.nan if seen and seen[-1].parameters["include"] == [broken] else super().value(outputs, expected)

    monkeypatch.setattr(metrics, "metric", lambda name: Breaking())
    first, *others = sensitivities(job, silent)
    assert (first.name, first.change) == (broken, math.inf)
    assert all(math.isfinite(item.change) for item in others)


@pytest.mark.parametrize(("rows", "looked_at"), [(5, 5), (1024, 1024), (1025, 1024)])
def test_no_more_than_1024_rows_are_looked_at(job, tiny, monkeypatch, rows, looked_at):
    seen = []
    real = sensitivity.outputs_of
    monkeypatch.setattr(sensitivity, "outputs_of", lambda job, *rest: seen.append(len(job.test)) or real(job, *rest))
    monkeypatch.setattr(sensitivity, "applied", lambda job, step: job.source)
    found = sensitivities(replace(job, test=tiny.light_curves(rows, 5)), silent)
    assert set(seen) == {looked_at}
    assert {item.change for item in found} == {0.0}, "nothing was quantized"
