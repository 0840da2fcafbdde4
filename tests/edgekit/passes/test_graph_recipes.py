"""Passes on graphs inside a guarded run: what loses is rolled back, and a network is lowered once."""

import numpy as np
import pytest

from edgekit import measure
from edgekit.bundle import GRAPH, Manifest, TensorSpec, assemble_graph
from edgekit.compress import plan, run
from edgekit.data import Dataset
from edgekit.errors import EdgekitError
from edgekit.graph import load, serialised, weights
from edgekit.guard import Limits
from edgekit.job import Job
from edgekit.recipe import Step
from exporters.onnx_export import OnnxExporter
from runtimes.sessions.onnxruntime_session import OnnxRuntimeSession
from tests.edgekit.passes import graphs
from tests.edgekit.passes.graphs import normal

BIG = ("weight_only", {"bits": 8})


class Still(OnnxRuntimeSession):
    """onnxruntime whose runs all take the same time, so that size alone decides."""

    seconds = 1e-3


@pytest.fixture
def still(register, fake_clock, monkeypatch):
    register("edgekit.sessions", "still", Still)
    monkeypatch.setitem(measure.FLOAT_FORMS, "still", ({"optimisation": "all"},))


def classifier():
    """x (batch, 32) -> 96 -> 96, tied: once as itself and once transposed -> probabilities of 4 classes."""
    return graphs.graph(
        [
            ("MatMul", "x up", "a", {}),
            ("Relu", "a", "b", {}),
            ("Transpose", "D", "Dt", {"perm": [1, 0]}),
            ("MatMul", "b D", "c", {}),
            ("Relu", "c", "d", {}),
            ("MatMul", "d Dt", "e", {}),
            ("Add", "e b", "f", {}),
            ("MatMul", "f down", "g", {}),
            ("Softmax", "g", "p", {"axis": -1}),
        ],
        {
            "up": normal(1, 32, 96, scale=0.02) + normal(4, 32, 8, scale=0.4) @ normal(5, 8, 96, scale=0.4),
            "D": normal(2, 96, 96, scale=0.1),
            "down": normal(3, 96, 4, scale=0.5),
        },
        {"x": ("batch", 32)},
        {"p": ("batch", 4)},
    )


@pytest.fixture
def job(still):
    """job(steps, ...): a graph whose answers are right by definition; whatever changes them is an error."""
    candidate = classifier()
    parts = []
    for seed, rows in ((1, 200), (2, 300)):
        x = normal(seed, rows, 32)
        parts.append(Dataset({"x": x}, graphs.run(candidate, x).argmax(axis=1).astype(np.int64)))
    manifest = Manifest(
        name="small",
        family="onnx",
        arguments={},
        inputs=(TensorSpec("x", ("batch", 32)),),
        outputs=(TensorSpec("p", ("batch", 4)),),
        classes=("a", "b", "c", "d"),
    )
    inputs = {"x": parts[1].inputs["x"][:8]}
    bundle = assemble_graph(manifest, serialised(candidate.model), (inputs, {"p": graphs.run(candidate, inputs["x"])}))

    def make(steps, **options):
        limits = Limits(max_loss=0.1, batches=(1, 16))
        settings = {"metric": "error-rate", "runtime": "still", **options}
        return Job(bundle, [Step(name, values) for name, values in steps], *parts, limits, **settings)

    return make


def verdicts(bundle):
    return [(record["pass"], record["kept"]) for record in bundle.manifest.records]


def test_a_pass_that_destroys_accuracy_is_rolled_back_and_the_next_starts_from_before_it(job, tmp_path):
    with_it = run(job([("low_rank", {"rank": 1}), BIG]), tmp_path / "with")
    without = run(job([BIG]), tmp_path / "without")
    assert verdicts(with_it) == [("low_rank", False), ("weight_only", True)]
    assert "in quality against the original" in with_it.manifest.records[0]["reason"]
    assert with_it.contents[GRAPH] == without.contents[GRAPH]
    # the twin: a rank that keeps the answers is kept
    assert verdicts(run(job([("low_rank", {"rank": 8, "include": ["up"]})]), tmp_path / "twin")) == [("low_rank", True)]


@pytest.mark.parametrize(
    "step",
    [
        ("static_int8", {}),
        ("dynamic_int8", {}),
        ("half", {"storage": True}),
        ("weight_only", {"rounding": "gptq"}),
        ("sparsify", {"sparsity": 0.2, "score": "magnitude"}),
    ],
    ids=lambda step: step[0],
)
def test_each_pass_that_shrinks_is_kept_and_its_plan_recorded(step, job, tmp_path):
    bundle = run(job([step]), tmp_path / "w")
    record = bundle.manifest.records[0]
    assert record["kept"], record["reason"]
    assert record["after"]["bytes"] < record["before"]["bytes"]
    tied = [change["after"] for change in record["plan"] if change["tensor"] in ("D", "c.MatMul")]
    assert tied, "the record does not say what became of the tied matrix"
    graph = load(bundle.contents[GRAPH], "after")
    whole = [item for item in graph.graph.initializer if int(np.prod(item.dims)) == 96 * 96]
    assert len(whole) <= 1, "the tied matrix is stored twice"


@pytest.mark.parametrize("name", ["fold", "smooth_quant"])
def test_a_pass_that_has_nothing_to_do_is_rolled_back_with_the_reason(name, job, tmp_path):
    bundle = run(job([(name, {})]), tmp_path / "w")
    assert verdicts(bundle) == [(name, False)]
    assert bundle.manifest.records[0]["reason"].startswith(f"{name}: ")


def test_calibration_data_of_the_wrong_shape_is_refused(job, tmp_path):
    wrong = job([("static_int8", {})])
    wrong = Job(wrong.source, wrong.recipe, Dataset({"x": normal(1, 50, 31)}, np.zeros(50, np.int64)), wrong.test,
                wrong.limits, wrong.metric, wrong.runtime)  # fmt: skip
    bundle = run(wrong, tmp_path / "w")
    assert verdicts(bundle) == [("static_int8", False)]
    assert "calibration data does not fit the graph: input 'x' has shape" in bundle.manifest.records[0]["reason"]


def test_a_network_is_lowered_once_and_only_by_the_first_pass_on_graphs(
    still, register, tiny_bundle, tiny_data, tmp_path
):
    lowered = []

    class Counting(OnnxExporter):
        def graph(self, bundle):
            if not bundle.is_graph:
                lowered.append(bundle.manifest.family)
            return super().graph(bundle)

    register("edgekit.exporters", "onnx", Counting)
    steps = [
        ("magnitude_prune", {"sparsity": 0.3, "epochs": 1}),
        ("half", {"storage": True, "keep": []}),
        ("weight_only", {"bits": 8, "smallest": 100}),
    ]
    recipe = [Step(name, values) for name, values in steps]
    limits = Limits(max_loss=0.5, min_gain=-1.0, batches=(1, 16))  # so small a network gains nothing in bytes
    small = Job(tiny_bundle, recipe, *tiny_data, limits, runtime="still")
    bundle = run(small, tmp_path / "w")
    assert verdicts(bundle)[:2] == [("magnitude_prune", True), ("half", True)]
    assert "no matrix is left to compress" in bundle.manifest.records[2]["reason"]  # half has them
    assert lowered == ["t2"]
    assert bundle.is_graph
    assert all(np.prod(weight.shape) < 64 for weight in weights(load(bundle.contents[GRAPH], "after")))
    # a pass on the network cannot come after
    late = Job(tiny_bundle, [recipe[1], recipe[0]], *tiny_data, limits, runtime="still")
    with pytest.raises(EdgekitError, match="has turned it into a graph"):
        run(late, tmp_path / "late")


def test_the_plan_of_a_recipe_follows_what_passes_leave(job):
    with pytest.raises(EdgekitError, match="no product with a float32 weight left"):
        plan(job([("half", {"storage": True, "keep": []}), ("sparsify", {"score": "magnitude"})]))
    steps = plan(job([("sparsify", {"score": "magnitude"}), ("half", {"storage": True})]))
    assert [step.name for step, _ in steps] == ["sparsify", "half"]
    assert {change["tensor"] for change in steps[0][1]} == {"up", "D", "down"}
