"""A run also measures what the metric does not cover: other outputs, and the fastest float32 form."""

import math
from dataclasses import replace

import numpy as np
import pytest

from edgekit.compression import measure
from edgekit.targets import profile

CODES, NUMBERS = np.array([1, 2, 3, 4]), np.array([1.0, 2.0], np.float32)


@pytest.mark.parametrize(
    ("exact", "found", "far"),
    [
        (CODES, CODES, 0.0),
        (CODES, np.array([1, 2, 3, 5]), 0.25),
        (NUMBERS, NUMBERS, 0.0),
        (NUMBERS, np.zeros(2, np.float32), 1.0),
        (NUMBERS, NUMBERS[:1], math.inf),
        (NUMBERS, np.array([1.0, np.nan], np.float32), math.inf),
    ],
)
def test_how_far_an_output_has_drifted(exact, found, far):
    assert measure.drifted({"y": exact}, {"y": found}) == {"y": pytest.approx(far)}
    assert measure.drifted({"y": exact}, {}) == {"y": math.inf}


@pytest.mark.parametrize(("slow", "chosen"), [("a", "b"), ("b", "a"), ("", "a")])
def test_the_fastest_form_is_chosen_or_else_the_first(slow, chosen, tiny_job, register, monkeypatch):
    from tests.conftest import FakeSession

    class Formed(FakeSession):
        def __init__(self, bundle, *, threads=None, chunk=None, form="a"):
            super().__init__(bundle, threads=threads, chunk=chunk)
            self.seconds *= 2 if form == slow else 1

    register("edgekit.sessions", "formed", Formed)
    monkeypatch.setitem(measure.FLOAT_FORMS, "formed", ({"form": "a"}, {"form": "b"}))
    monkeypatch.setattr(measure, "_best_forms", {})
    assert measure.best_float_form(tiny_job([], runtime="formed")) == {"form": chosen}
    elsewhere = tiny_job([], runtime="formed", target=profile.find("jetson-nano"))
    assert measure.best_float_form(elsewhere) == {"form": "a"}, "the fastest form here may not be the fastest there"


def test_the_quality_of_rows_does_not_depend_on_how_many_there_are(tiny_job, tiny_bundle):
    from edgekit.compression.subject import candidate_of

    job = tiny_job([])
    candidate = candidate_of(tiny_bundle)
    whole = measure.outputs_of(job, tiny_bundle, candidate)
    few = measure.outputs_of(replace(job, test=job.test.take(np.arange(5))), tiny_bundle, candidate)
    assert np.abs(whole[:5] - few).max() < 1e-6
    assert np.abs(whole[1:6] - few).max() > 1e-3
