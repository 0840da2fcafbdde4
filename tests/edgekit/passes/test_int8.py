"""Dynamic and static int8: against integer arithmetic in numpy, and what must stay in float32."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edgekit.errors import EdgekitError
from edgekit.passes.base import GraphCandidate
from edgekit.passes.dynamic_int8 import DynamicInt8
from edgekit.passes.static_int8 import StaticInt8
from tests.edgekit.passes.graphs import (
    block,
    context,
    convolutional,
    dictionary,
    graph,
    mlp,
    normal,
    operators,
    pooled,
    relative,
    run,
    size,
    stored,
)

FLOAT64 = np.float64


def on_grid(value, scale, zero=0, low=-128, high=127):
    """Values rounded to an integer grid and back, in float64."""
    return (np.clip(np.round(value.astype(FLOAT64) / scale) + zero, low, high) - zero) * scale


def per_column(weight, largest=63):
    """(in, out) weights on the whole numbers up to the largest, one scale per column."""
    return on_grid(weight, np.abs(weight.astype(FLOAT64)).max(axis=0) / largest)


def same_rows(got, expected):
    """Share of the rows that agree to float32. Where a float32 rounds to the other side of a level, a row is off."""
    return float((np.abs(got - expected).max(axis=1) < 1e-4).mean())


def activation(value, seen, form):
    """Activations on the grid that the range of `seen` gives."""
    low, high = min(float(seen.min()), 0.0), max(float(seen.max()), 0.0)
    if form == "s8s8":
        return on_grid(value, max(-low, high) / 127)
    scale = (high - low) / 255
    return on_grid(value, scale, zero=np.round(-low / scale), low=0, high=255)


def reference(weights, x, seen, form):
    """The multilayer perceptron on integer grids."""
    w = {name: value.astype(FLOAT64) for name, value in weights.items()}

    def hidden(value):
        return np.maximum(value @ w["up"] + w["up.bias"], 0)

    inner = np.maximum(activation(x, seen, form) @ per_column(w["up"]) + w["up.bias"], 0)
    return activation(inner, hidden(seen), form) @ per_column(w["down"].T) + w["down.bias"]


def rows(candidate, samples):
    """All calibration rows: as many are asked for as there are."""
    return context(
        *(axis.dim_value for axis in candidate.model.graph.input[0].type.tensor_type.shape.dim[1:]), rows=samples
    )


@pytest.mark.parametrize("form", ["u8s8", "s8s8"])
def test_static_int8_is_the_integer_arithmetic_of_the_paper(form):
    candidate = mlp()
    calibration = rows(candidate, 64)
    seen = calibration.train.inputs["x"]
    after = StaticInt8(scheme=form, samples=64).apply(candidate, calibration)
    x = normal(7, 200, 32)
    expected = reference(stored(candidate), x, seen, form)
    assert same_rows(run(after, x), expected) > 0.85
    other = reference(stored(candidate), x, seen, "s8s8" if form == "u8s8" else "u8s8")
    assert same_rows(run(after, x), other) < 0.05, "the two forms cannot be told apart"
    assert relative(run(after, x), run(candidate, x)) < 0.03


def test_dynamic_int8_takes_the_range_of_the_batch():
    candidate = mlp()
    after = DynamicInt8().apply(candidate, context(32))
    x = normal(7, 50, 32)
    weights = stored(candidate)
    inner = np.maximum(activation(x, x, "u8s8") @ per_column(weights["up"], 64) + weights["up.bias"], 0)
    expected = activation(inner, inner, "u8s8") @ per_column(weights["down"].T, 64) + weights["down.bias"]
    assert relative(run(after, x), expected) < 2e-3
    halved = activation(inner / 2, inner, "u8s8") @ per_column(weights["down"].T, 64) + weights["down.bias"]
    assert relative(run(after, x), halved) > 0.1


def test_every_product_of_the_plan_is_quantized_gemm_included():
    after = DynamicInt8().apply(mlp(), context(32))
    assert operators(after).count("MatMulInteger") == 2
    assert not {name for name, value in stored(after).items() if value.ndim == 2 and value.dtype == np.float32}


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
@pytest.mark.parametrize(("make", "shape"), [(mlp, (32,)), (convolutional, (3, 8, 8)), (block, (6, 32))])
def test_each_method_on_each_kind_of_network(method, make, shape):
    candidate, calibration = make(), context(*shape)
    after = StaticInt8(method=method).apply(candidate, calibration)
    x = calibration.train.inputs["x"][:50]
    assert relative(run(after, x), run(candidate, x)) < (0.1 if method == "entropy" else 0.06)
    assert size(after) < 0.65 * size(candidate)


def test_the_range_is_chosen_by_the_method():
    """One value of 200 rows is an outlier: min and max follow it, a percentile does not."""
    calibration = context(32)
    calibration.train.inputs["x"][17, 3] = 1000.0
    scales = {}
    for name, chosen in {"minmax": {}, "percentile": {"percentile": 99.9}, "entropy": {}}.items():
        after = StaticInt8(method=name, **chosen).apply(mlp(), calibration)
        scales[name] = stored(after)["x.scale"]
    assert scales["minmax"] == pytest.approx((1000 - calibration.train.inputs["x"].min()) / 255)
    assert scales["percentile"] < 0.1 * scales["minmax"]
    assert scales["entropy"] < 0.5 * scales["minmax"]


def test_the_form_for_tensorrt_has_no_zero_points_and_no_integer_bias():
    after = StaticInt8(scheme="s8s8").apply(convolutional(), context(3, 8, 8))
    tensors = stored(after)
    zeros = [tensors[node.input[2]] for node in after.model.graph.node if node.op_type == "QuantizeLinear"]
    assert zeros
    assert not any(value.any() for value in zeros)
    assert {value.dtype for value in zeros} == {np.dtype(np.int8)}
    assert not any(value.dtype == np.int32 for value in tensors.values())
    cpu = stored(StaticInt8(scheme="u8s8").apply(convolutional(), context(3, 8, 8)))
    assert any(value.dtype == np.int32 for value in cpu.values()), "the twin: the other form has integer biases"


def test_products_of_two_activations_stay_in_float32():
    candidate = graph(
        [("MatMul", "x w", "a", {}), ("MatMul", "a x", "y", {})],
        {"w": normal(1, 8, 8)},
        {"x": ("batch", 8, 8)},
        {"y": ("batch", 8, 8)},
    )
    after = StaticInt8().apply(candidate, context(8, 8))
    first, last = [node for node in after.model.graph.node if node.op_type == "MatMul"]
    assert list(last.input) == ["a", "x"], "an activation was rounded for a consumer in float32"
    assert list(first.input) == ["x.rounded", "w"]


@pytest.mark.parametrize("compression", [DynamicInt8(), StaticInt8()], ids=lambda item: item.name)
class TestTied:
    def test_a_dictionary_used_both_ways_is_left_alone_and_the_plan_says_so(self, compression):
        candidate = dictionary()
        plan = {change.tensor: change.after for change in compression.plan(candidate)}
        assert plan["a.MatMul"] == plan["b.MatMul"]
        assert plan["a.MatMul"].startswith("left in float32: tied, read by ")
        assert plan["y.MatMul"].startswith("int8")
        after = compression.apply(candidate, context(32))
        tensors = stored(after)
        assert np.array_equal(tensors["D"], stored(candidate)["D"])
        assert sum(value.size == 32 * 32 for value in tensors.values()) == 2, "D has become two tensors"

    def test_a_matrix_behind_a_transpose_is_named(self, compression):
        candidate = graph(
            [("Transpose", "w", "wt", {}), ("MatMul", "x wt", "a", {}), ("MatMul", "a v", "y", {})],
            {"w": normal(1, 16, 16), "v": normal(2, 16, 16)},
            {"x": ("batch", 16)},
            {"y": ("batch", 16)},
        )
        after = {change.tensor: change.after for change in compression.plan(candidate)}
        assert "behind a Transpose" in after["a.MatMul"]
        assert after["y.MatMul"].startswith("int8")

    def test_two_products_with_one_matrix_share_its_codes(self, compression):
        candidate = graph(
            [("MatMul", "x w", "a", {}), ("Relu", "a", "b", {}), ("MatMul", "b w", "y", {})],
            {"w": normal(1, 32, 32, scale=0.2)},
            {"x": ("batch", 32)},
            {"y": ("batch", 32)},
        )
        after = compression.apply(candidate, context(32))
        assert sum(value.size == 32 * 32 for value in stored(after).values()) == 1
        x = normal(3, 40, 32)
        assert relative(run(after, x), run(candidate, x)) < 0.05

    def test_a_matrix_tied_to_an_excluded_node_stays_whole(self, compression):
        candidate = graph(
            [("MatMul", "x w", "a", {}), ("MatMul", "a w", "b", {}), ("MatMul", "b v", "y", {})],
            {"w": normal(1, 16, 16), "v": normal(2, 16, 16)},
            {"x": ("batch", 16)},
            {"y": ("batch", 16)},
        )
        after = {change.tensor: change.after for change in type(compression)(exclude=("b.MatMul",)).plan(candidate)}
        assert after["a.MatMul"] == "left in float32: b.MatMul stays in float32"


@pytest.mark.parametrize("compression", [DynamicInt8(), StaticInt8()], ids=lambda item: item.name)
def test_nodes_without_names_and_with_one_name(compression):
    candidate = mlp()
    for node in candidate.model.graph.node:
        node.name = ""
    before = candidate.model.SerializeToString()
    plan = compression.plan(candidate)
    assert len({change.tensor for change in plan}) == len(plan) == 2
    after = compression.apply(candidate, context(32))
    assert candidate.model.SerializeToString() == before
    x = normal(3, 10, 32)
    assert 0 < relative(run(after, x), run(candidate, x)) < 0.05


@pytest.mark.parametrize("compression", [DynamicInt8(), StaticInt8()], ids=lambda item: item.name)
def test_the_second_time_there_is_nothing_left(compression):
    once = compression.apply(mlp(), context(32))
    with pytest.raises(EdgekitError, match=r"no MatMul or Gemm.* with a float32 weight is left"):
        compression.apply(once, context(32))


def test_a_weight_stored_as_codes_is_left_as_it_is():
    candidate = graph(
        [("Cast", "codes", "w", {"to": TensorProto.FLOAT}), ("MatMul", "x w", "a", {}), ("MatMul", "a v", "y", {})],
        {"codes": np.ones((8, 8), np.int8), "v": normal(1, 8, 8)},
        {"x": ("batch", 8)},
        {"y": ("batch", 8)},
    )
    after = {change.tensor: change.after for change in DynamicInt8().plan(candidate)}
    assert after == {
        "a.MatMul": "left as it is: stored as codes already",
        "y.MatMul": "int8, one scale per output column",
    }


def test_a_gemm_with_alpha_is_not_promised():
    candidate = graph(
        [("Gemm", "x w b", "a", {"alpha": 0.5}), ("MatMul", "a v", "y", {})],
        {"w": normal(1, 8, 8), "b": normal(2, 8), "v": normal(3, 8, 8)},
        {"x": ("batch", 8)},
        {"y": ("batch", 8)},
    )
    plan = {change.tensor: change.after for change in DynamicInt8().plan(candidate)}
    assert plan["a.Gemm"].startswith("left in float32: a.Gemm has alpha")
    assert operators(DynamicInt8().apply(candidate, context(8))).count("MatMulInteger") == 1


@pytest.mark.parametrize(
    ("shape", "words"), [((31,), r"shape \(200, 31\); expected \(batch, 32\)"), ((6, 32), r"shape \(200, 6, 32\)")]
)
def test_calibration_data_of_the_wrong_shape(shape, words):
    with pytest.raises(EdgekitError, match=r"calibration data does not fit the graph: input 'x' has " + words):
        StaticInt8().apply(mlp(), context(*shape))


def test_no_calibration_data_at_all():
    with pytest.raises(EdgekitError, match="no rows"):
        StaticInt8().apply(mlp(), context(32, rows=0))


def test_the_seed_chooses_the_rows_and_the_same_seed_the_same():
    first, again, other = (
        stored(StaticInt8(samples=8).apply(mlp(), context_))
        for context_ in (context(32), context(32), type(context(32))(context(32).train, None, seed=9))
    )
    assert first["x.scale"] == again["x.scale"]
    assert first["x.scale"] != other["x.scale"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StaticInt8(scheme="u8u8"), "unknown scheme 'u8u8'; expected one of: u8s8, s8s8"),
        (lambda: StaticInt8(method="mse"), "unknown method 'mse'"),
        (lambda: StaticInt8(samples=0), "samples = 0"),
        (lambda: StaticInt8(percentile=3.0), "percentile = 3"),
        (lambda: DynamicInt8(operators=("Softmax",)), "unknown operator 'Softmax'"),
        (lambda: DynamicInt8(exclude=("h.MatMul",)).plan(mlp()), "unknown node 'h.MatMul' in exclude"),
        (lambda: DynamicInt8(operators=("Conv",)).plan(mlp()), "no Conv with a float32 weight"),
    ],
)
def test_mistakes_name_what_is_allowed(make, words):
    with pytest.raises(EdgekitError, match=words):
        make()


def test_results_are_valid_graphs():
    for compression in (DynamicInt8(), StaticInt8(scheme="u8s8"), StaticInt8(scheme="s8s8")):
        after = compression.apply(convolutional(), context(3, 8, 8))
        onnx.checker.check_model(after.model, full_check=True)
        assert isinstance(after, GraphCandidate)
        assert {helper.printable_type(value.type) for value in after.model.graph.output} == {"FLOAT, batchx5"}


def fused(candidate, tmp_path):
    """The operators that onnxruntime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(candidate.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


def test_onnxruntime_finds_an_integer_kernel_for_every_product(tmp_path):
    for make, shape, kernel in (
        (mlp, (32,), "QGemm"),
        (block, (6, 32), "MatMulIntegerToFloat"),
        (convolutional, (3, 8, 8), "QLinearConv"),
    ):
        op_types = fused(StaticInt8().apply(make(), context(*shape)), tmp_path)
        assert kernel in op_types
        assert not {"MatMul", "Gemm", "Conv"} & set(op_types)
    after = StaticInt8().apply(mlp(), context(32))
    for node in after.model.graph.node:  # the twin: weights without zero points
        if node.op_type == "DequantizeLinear" and node.input[0].endswith(".codes"):
            node.input.pop()
    assert "Gemm" in fused(after, tmp_path)


def test_pools_run_on_integers(tmp_path, monkeypatch):
    """A value that is rounded, pooled and rounded again has one grid, so that nothing is converted in between."""
    inputs, border = normal(5, 64, 3, 9, 9), np.ones((9, 9))
    border[-1] = 2  # the largest values are where the pool does not look
    exact = run(pooled(), inputs)
    after = StaticInt8(weight_bits=8).apply(pooled(), context(3, 9, 9, scale=border))
    op_types = fused(after, tmp_path)
    assert "NhwcMaxPool" in op_types
    assert "DequantizeLinear" not in op_types
    assert np.abs(run(after, inputs) - exact).max() < 0.03 * np.abs(exact).max()
    # the twin: with a grid for each, onnxruntime converts around the pool
    monkeypatch.setattr("edgekit.passes.static_int8.PICKS", ())
    apart = fused(StaticInt8(weight_bits=8).apply(pooled(), context(3, 9, 9, scale=border)), tmp_path)
    assert "DequantizeLinear" in apart
    assert "MaxPool" in apart
