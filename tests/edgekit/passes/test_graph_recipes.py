"""Passes on graphs inside a guarded run: what loses is rolled back, and a network is lowered once."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.format import GRAPH, Manifest, assemble_graph
from edgekit.bundle.onnx_file import load, serialized
from edgekit.bundle.tensors import TensorSpec
from edgekit.compression import measure, metrics, report
from edgekit.compression.guard import Limits
from edgekit.compression.job import Job
from edgekit.compression.recipe import Step
from edgekit.compression.run import plan, run
from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError
from edgekit.graph import lower as lowering
from edgekit.graph.model import weights
from edgekit.passes.base import GraphCandidate, Level, Pass
from edgekit.passes.half import Half
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
    monkeypatch.setitem(measure.FLOAT_FORMS, "still", ({"optimization": "all"},))


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
    bundle = assemble_graph(manifest, serialized(candidate.model), (inputs, {"p": graphs.run(candidate, inputs["x"])}))

    def make(steps, **options):
        limits = Limits(max_loss=0.1, batches=(1, 16))
        settings = {"metric": "error-rate", "runtime": "still", **options}
        return Job(bundle, [Step(name, values) for name, values in steps], *parts, limits, **settings)

    return make


def verdicts(bundle):
    return [(record["pass"], record["kept"]) for record in bundle.manifest.records]


def test_a_pass_that_destroys_accuracy_is_rolled_back_and_the_next_starts_from_before_it(job, tmp_path):
    with_it = run(job([("low_rank", {"rank": 1}), BIG]), tmp_path / "with").bundle
    without = run(job([BIG]), tmp_path / "without").bundle
    assert verdicts(with_it) == [("low_rank", False), ("weight_only", True)]
    assert "in quality against the original" in with_it.manifest.records[0]["reason"]
    assert with_it.contents[GRAPH] == without.contents[GRAPH]
    # the twin: a rank that keeps the answers is kept
    assert verdicts(run(job([("low_rank", {"rank": 8, "include": ["up"]})]), tmp_path / "twin").bundle) == [
        ("low_rank", True)
    ]


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
    bundle = run(job([step]), tmp_path / "w").bundle
    record = bundle.manifest.records[0]
    assert record["kept"], record["reason"]
    assert record["after"]["bytes"] < record["before"]["bytes"]
    tied = [change["after"] for change in record["plan"] if change["tensor"] in ("D", "c.MatMul")]
    assert tied, "the record does not say what became of the tied matrix"
    graph = load(bundle.contents[GRAPH], "after")
    whole = [item for item in graph.graph.initializer if int(np.prod(item.dims)) == 96 * 96]
    assert len(whole) <= 1, "the tied matrix is stored twice"


class Planted(Pass[GraphCandidate]):
    """Not a real pass: halves the weights' bytes, which is a gain, and rewrites the graph."""

    name, summary, level = "planted", "what a bad pass would do", Level.GRAPH

    def plan(self, candidate):
        return []

    def apply(self, candidate, context):
        made = Half(storage=True).apply(candidate, context)
        self.mischief(made.model.graph)
        return made


@dataclass(frozen=True)
class EightRows(Planted):
    """Runs on the eight golden rows and on no other number."""

    def mischief(self, graph):
        graph.initializer.append(numpy_helper.from_array(np.array([8, 32]), "eight"))
        graph.node.insert(0, helper.make_node("Reshape", ["x", "eight"], ["x8"], "eight"))
        first = next(node for node in graph.node if node.op_type == "MatMul")
        first.input[0] = "x8"


def test_a_graph_that_runs_at_one_batch_size_only_is_rolled_back(job, register, tmp_path):
    register("edgekit.passes", "planted", EightRows)
    bundle = run(job([("planted", {}), BIG]), tmp_path / "w").bundle
    assert verdicts(bundle) == [("planted", False), ("weight_only", True)]
    assert "cannot run this model on inputs of shapes" in bundle.manifest.records[0]["reason"]


@dataclass(frozen=True)
class SpoilsTheSecond(Planted):
    factor: float

    def mischief(self, graph):
        producer = next(node for node in graph.node if "g" in node.output)
        producer.output[0] = "g0"
        graph.initializer.append(numpy_helper.from_array(np.array(self.factor, np.float32), "factor"))
        graph.node.insert(
            list(graph.node).index(producer) + 1, helper.make_node("Mul", ["g0", "factor"], ["g"], "spoil")
        )


@pytest.mark.parametrize(("factor", "kept"), [(2.5, False), (1.01, True)])
def test_an_output_that_the_metric_does_not_see_must_still_be_the_models(factor, kept, job, register, tmp_path):
    register("edgekit.passes", "planted", SpoilsTheSecond)
    model = classifier().model  # scores g beside probabilities p: a factor on g changes no answer
    model.graph.output.append(helper.make_tensor_value_info("g", TensorProto.FLOAT, ["batch", 4]))
    made = job([("planted", {"factor": factor})], metric="error-rate")
    manifest = replace(made.source.manifest, outputs=(*made.source.manifest.outputs, TensorSpec("g", ("batch", 4))))
    inputs, outputs = made.source.golden()
    source = assemble_graph(manifest, serialized(model), (inputs, {**outputs, "g": outputs["p"]}))
    bundle = run(replace(made, source=source), tmp_path / "w").bundle
    assert "output <code>g</code>" in report.render(bundle, source)
    record = bundle.manifest.records[0]
    assert record["kept"] is kept, record["reason"]
    assert record["other_outputs"]["g"] == pytest.approx(factor - 1, abs=0.01)
    assert kept or "output 'g', which the metric does not see" in record["reason"]


def test_a_metric_without_a_value_is_the_reason_and_no_runtime_is_blamed(job, monkeypatch, tmp_path):
    monkeypatch.setitem(metrics.METRICS, "nan", metrics.Custom("nan", lambda outputs, labels: float("nan")))
    bundle = run(job([("dynamic_int8", {})], metric="nan"), tmp_path / "w").bundle
    assert bundle.manifest.records[0]["reason"].startswith("the metric is nan")


@pytest.mark.parametrize("name", ["fold", "smooth_quant"])
def test_a_pass_that_has_nothing_to_do_is_rolled_back_with_the_reason(name, job, tmp_path):
    bundle = run(job([(name, {})]), tmp_path / "w").bundle
    assert verdicts(bundle) == [(name, False)]
    assert bundle.manifest.records[0]["reason"].startswith(f"{name}: ")


def test_calibration_data_of_the_wrong_shape_is_refused(job, tmp_path):
    wrong = job([("static_int8", {})])
    wrong = Job(
        wrong.source,
        wrong.recipe,
        Dataset({"x": normal(1, 50, 31)}, np.zeros(50, np.int64)),
        wrong.test,
        wrong.limits,
        wrong.metric,
        wrong.runtime,
    )
    bundle = run(wrong, tmp_path / "w").bundle
    assert verdicts(bundle) == [("static_int8", False)]
    assert "calibration data does not fit the graph: input 'x' has shape" in bundle.manifest.records[0]["reason"]


def test_a_network_is_lowered_once_and_only_by_the_first_pass_on_graphs(
    still, monkeypatch, tiny_bundle, tiny_data, tmp_path
):
    lowered, real = [], lowering.lower

    def counting(bundle, **options):
        if not bundle.is_graph and not options:  # a session that is timed asks for float32 weights
            lowered.append(bundle.manifest.family)
        return real(bundle, **options)

    monkeypatch.setattr(lowering, "lower", counting)
    steps = [
        ("magnitude_prune", {"sparsity": 0.3, "epochs": 1}),
        ("half", {"storage": True, "keep": []}),
        ("weight_only", {"bits": 8, "smallest": 100}),
    ]
    recipe = [Step(name, values) for name, values in steps]
    limits = Limits(max_loss=0.5, min_gain=-1.0, batches=(1, 16))  # so small a network gains nothing in bytes
    small = Job(tiny_bundle, recipe, *tiny_data, limits, runtime="still")
    bundle = run(small, tmp_path / "w").bundle
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
    with pytest.raises(EdgekitError, match="no product with a float32 weight that this pass could change"):
        plan(job([("half", {"storage": True, "keep": []}), ("sparsify", {"score": "magnitude"})]))
    steps = plan(job([("sparsify", {"score": "magnitude"}), ("half", {"storage": True})]))
    assert [step.name for step, _ in steps] == ["sparsify", "half"]
    assert {change.tensor for change in steps[0][1]} == {"up", "D", "down"}
