"""Bundles as passes take them and as they leave them: nothing is lost on the way, and the golden outputs are new."""

from dataclasses import replace

import numpy as np
import pytest

from edgekit.bundle.format import GRAPH
from edgekit.compression.recipe import Step
from edgekit.compression.subject import applied, bundle_of, candidate_of, context_of, for_pass, lowered
from edgekit.passes.base import Candidate, GraphCandidate
from edgekit.session import open_session

CODES = Step("cluster", {"bits": 4, "epochs": 0})


def test_a_bundle_comes_back_from_its_candidate(tiny_job):
    job = tiny_job([])
    again = bundle_of(job, candidate_of(job.source), ())
    assert {name: value.tobytes() for name, value in again.weights().items()} == {
        name: value.tobytes() for name, value in job.source.weights().items()
    }
    inputs, outputs = again.golden()
    found = open_session(job.source, "fake", threads=1).run(inputs)["probabilities"]
    np.testing.assert_allclose(outputs["probabilities"], found, atol=1e-6)
    manifest = again.manifest
    source = job.source.manifest
    assert (manifest.name, manifest.classes, manifest.arguments) == ("tiny", source.classes, source.arguments)
    assert (manifest.parent, manifest.seed, manifest.metrics) == (job.source.digest, job.seed, {})
    assert manifest.versions["numpy"] == np.__version__


def test_codes_survive_a_pass_and_the_next_one(tiny_job):
    """The encodings of a bundle are those of its candidate, and of the bundle that it becomes."""
    job = tiny_job([])
    first = applied(job, CODES)
    assert first.encodings()
    assert candidate_of(first).encodings.keys() == first.encodings().keys()
    again = bundle_of(replace(job, source=first), candidate_of(first), ())
    assert again.manifest.bits == first.manifest.bits
    assert again.contents["weights.safetensors"] == first.contents["weights.safetensors"]


def test_golden_outputs_are_the_new_models_on_rows_of_the_test_data(tiny_job):
    job = tiny_job([])
    bundle = applied(job, Step("cluster", {"bits": 2, "epochs": 0}))
    inputs, outputs = bundle.golden()
    rows = np.linspace(0, len(job.test) - 1, 8).astype(int)
    np.testing.assert_array_equal(inputs["light_curve"], job.test.inputs["light_curve"][rows])
    before = open_session(job.source, "fake", threads=1).run(inputs)["probabilities"]
    assert np.abs(outputs["probabilities"] - before).max() > 1e-3
    found = open_session(bundle, "fake", threads=1).run(inputs)["probabilities"]
    np.testing.assert_allclose(outputs["probabilities"], found, atol=1e-6)


def test_applying_a_pass_changes_neither_the_source_nor_its_digest(tiny_job):
    job = tiny_job([])
    before = {name: value.copy() for name, value in job.source.weights().items()}
    digest = job.source.digest
    applied(job, CODES)
    assert job.source.digest == digest
    assert all(np.array_equal(value, before[name]) for name, value in job.source.weights().items())


def test_a_network_becomes_a_graph_for_the_first_pass_on_graphs_only(tiny_job):
    job = tiny_job([])
    candidate = candidate_of(job.source)
    assert isinstance(candidate, Candidate)
    assert for_pass(CODES.build(), candidate, job) is candidate
    graph = for_pass(Step("dynamic_int8", {}).build(), candidate, job)
    assert isinstance(graph, GraphCandidate)
    assert lowered(graph, job) is graph
    bundle = bundle_of(job, graph, ())
    assert bundle.is_graph
    assert bundle.manifest.family == "onnx"
    inputs, outputs = bundle.golden()
    expected = open_session(job.source, "fake", threads=1).run(inputs)["probabilities"]
    np.testing.assert_allclose(outputs["probabilities"], expected, atol=1e-5)
    reopened = candidate_of(bundle)
    assert reopened.model.SerializeToString(deterministic=True) == bundle.contents[GRAPH]


def test_the_teacher_of_a_pass_is_the_network_itself(tiny_job):
    job = tiny_job([])
    candidate = candidate_of(job.source)
    context = context_of(job, candidate.model, 7)
    assert (context.teacher, context.seed) == (candidate.model, 7)
    assert context.train is job.train


@pytest.mark.parametrize("target", [None, "tesla-p40"])
def test_the_target_is_written_down_and_else_stays_what_it_was(tiny_job, target):
    from edgekit.targets import profile

    job = tiny_job([], target=profile.find(target) if target else None)
    source = replace(job.source, manifest=replace(job.source.manifest, target="older"))
    bundle = bundle_of(replace(job, source=source), candidate_of(source), ())
    assert bundle.manifest.target == (target or "older")
