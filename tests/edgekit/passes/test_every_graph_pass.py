"""What holds for every pass on graphs. A new pass joins by one line in PASSES."""

from dataclasses import fields
from importlib.metadata import entry_points

import numpy as np
import onnx
import pytest

from edgekit.bundle.onnx_file import serialized
from edgekit.compression.recipe import Step
from edgekit.errors import EdgekitError
from edgekit.graph.calibration import BATCH, activations, calibration_rows, moments, ranges
from edgekit.graph.model import weights
from edgekit.graph.signature import of_model
from edgekit.passes.base import Change, Context, Level
from edgekit.passes.dynamic_int8 import DynamicInt8
from edgekit.passes.fold import Fold
from edgekit.passes.half import Half
from edgekit.passes.low_rank import LowRank
from edgekit.passes.smooth_quant import SmoothQuant
from edgekit.passes.sparsify import Sparsify
from edgekit.passes.static_int8 import StaticInt8
from edgekit.passes.weight_only import WeightOnly
from tests.edgekit.passes.graphs import (
    block,
    context,
    convolutional,
    dictionary,
    graph,
    mlp,
    normal,
    relative,
    run,
)

PASSES = {
    "dynamic_int8": DynamicInt8(),
    "static_int8 for CPUs": StaticInt8(),
    "static_int8 for TensorRT": StaticInt8(scheme="s8s8", weight_bits=8),
    "half": Half(),
    "half, stored": Half(dtype="bf16", storage=True),
    "weight_only 8": WeightOnly(smallest=256),
    "weight_only 4, gptq": WeightOnly(bits=4, rounding="gptq", smallest=256),
    "weight_only 4, matmulnbits": WeightOnly(bits=4, layout="matmulnbits", smallest=256),
    "fold": Fold(),
    "smooth_quant": SmoothQuant(),
    "low_rank": LowRank(rank=14),
    "sparsify": Sparsify(sparsity=0.1),
    "sparsify 2:4": Sparsify(pattern="2:4"),
}
GRAPHS = {
    "mlp": (mlp, (32,)),
    "convolutional": (convolutional, (3, 8, 8)),
    "block": (block, (6, 32)),
    "dictionary": (dictionary, (32,)),
}
every_pass = pytest.mark.parametrize("compression", PASSES.values(), ids=PASSES)
every_graph = pytest.mark.parametrize(("make", "shape"), GRAPHS.values(), ids=GRAPHS)


def test_the_list_holds_every_registered_pass():
    registered = {point.load() for point in entry_points(group="edgekit.passes") if point.value.startswith("edgekit.")}
    on_graphs = {kind for kind in registered if kind.level == Level.GRAPH}
    assert on_graphs == {type(item) for item in PASSES.values()}


def planned(compression, candidate):
    """The plan, or why there is none."""
    try:
        return compression.plan(candidate), ""
    except EdgekitError as error:
        return [], str(error)


@every_graph
@every_pass
def test_each_pass_on_each_graph(compression, make, shape):
    """It says first what it then does, leaves its candidate alone, repeats itself, and keeps inputs and outputs; or it
    says why not, when planning and when asked to do it."""
    candidate, calibration = make(), context(*shape)
    before = serialized(candidate.model)
    plan, refused = planned(compression, candidate)
    if refused:
        with pytest.raises(EdgekitError) as raised:
            compression.apply(candidate, calibration)
        assert str(raised.value) == refused
        return
    assert plan
    assert all(isinstance(change, Change) and change.tensor and change.after for change in plan)
    after, again = (compression.apply(candidate, calibration) for _ in range(2))
    assert serialized(candidate.model) == before
    assert serialized(after.model) == serialized(again.model)
    assert serialized(after.model) != before
    onnx.checker.check_model(after.model)
    assert of_model(after.model, "after") == of_model(candidate.model, "before")
    for rows in (1, 33):
        x = normal(50, rows, *shape)
        assert relative(run(after, x), run(candidate, x)) < 0.6


@every_pass
def test_no_pass_refuses_every_graph(compression):
    assert not all(planned(compression, make())[1] for make, _ in GRAPHS.values())


@every_pass
def test_a_recipe_can_hold_it(compression):
    values = {item.name: getattr(compression, item.name) for item in fields(compression)}
    as_toml = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    assert Step(compression.name, as_toml).build() == compression


def test_calibration_rows_are_drawn_by_the_seed_and_all_where_there_are_fewer():
    model, data = mlp().model, context(32).train
    data = type(data)(data.inputs, np.arange(len(data)))
    first, again, other = (calibration_rows(model, data, 50, seed).labels for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(set(first)) == 50
    assert len(calibration_rows(model, data, 500, 0)) == 200


def test_moments_are_those_of_all_rows_together():
    candidate, data = block(), context(6, 32, rows=BATCH * 3 + 5).train
    found = moments(candidate.model, ["x", "h2"], data)
    whole = run(candidate, data.inputs["x"], "h2").reshape(-1, 64).astype(np.float64)
    assert found["h2"].count == len(whole) == 6 * len(data)
    assert np.allclose(found["h2"].second, whole.T @ whole, rtol=1e-6)
    assert np.allclose(found["h2"].largest, np.abs(whole).max(axis=0))
    assert np.allclose(found["x"].norms, np.linalg.norm(data.inputs["x"].reshape(-1, 32), axis=0), rtol=1e-6)
    last = moments(candidate.model, ["h2"], data.take(np.arange(BATCH)))["h2"]
    assert not np.allclose(last.second, found["h2"].second), "one batch is as good as all: nothing was added up"


def test_activations_come_in_batches_and_inputs_among_them():
    data = context(32, rows=BATCH + 1).train
    parts = list(activations(mlp().model, ["h1", "x", "y"], data))
    assert [len(part["y"]) for part in parts] == [BATCH, 1]
    assert np.array_equal(np.concatenate([part["x"] for part in parts]), data.inputs["x"])


@pytest.mark.parametrize("compute", [lambda *a: moments(*a), lambda *a: ranges(*a, "minmax", 100.0)])
def test_activations_that_are_not_finite_are_an_error(compute):
    candidate = graph(
        [("Sqrt", "x", "a", {}), ("MatMul", "a w", "y", {})],
        {"w": normal(1, 8, 8)},
        {"x": ("batch", 8)},
        {"y": ("batch", 8)},
    )
    with pytest.raises(EdgekitError, match="'a' is NaN or infinite"):
        compute(candidate.model, ["a"], context(8).train)


def test_tied_weights_are_one_weight_with_several_consumers():
    found = {weight.name: weight for weight in weights(dictionary().model)}
    assert sorted(found) == ["D", "out"]
    assert [(use.node.name, use.axis, use.transposed) for use in found["D"].uses] == [
        ("a.MatMul", 0, False),
        ("b.MatMul", 1, True),
    ]
    assert found["D"].axes == {0, 1}
    assert found["out"].axes == {0}
    gathered = graph(
        [("MatMul", "x w", "a", {}), ("Add", "a w", "y", {})],
        {"w": normal(1, 8, 8)},
        {"x": ("batch", 8)},
        {"y": (8, 8)},
    )
    assert [weight.others for weight in weights(gathered.model)] == [("y.Add",)]


def test_inputs_of_a_convolution_are_summed_over_its_second_axis():
    found = {weight.name: weight for weight in weights(convolutional().model)}
    assert {name: set(weight.axes) for name, weight in found.items()} == {"c1": {1}, "c2": {1}, "out": {0}}


def test_a_context_without_labels_will_do():
    data = context(32).train
    unlabelled = Context(type(data)(data.inputs, np.full(len(data), -1)), None, 0)
    assert StaticInt8().apply(mlp(), unlabelled).model.graph.node
