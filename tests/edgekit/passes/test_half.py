"""Half precision: rounding against bit patterns, what stays in float32, what cannot be stored."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, shape_inference
from onnx.reference import ReferenceEvaluator

from edgekit.errors import EdgekitError
from edgekit.passes.half import Half, bfloat16
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
    size,
    stored,
)

CASES = {
    "mlp": (mlp, (32,)),
    "convolutional": (convolutional, (3, 8, 8)),
    "block": (block, (6, 32)),
    "dictionary": (dictionary, (32,)),
}
every_graph = pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES)


def types(candidate):
    """Element type of every value, by ONNX's own inference."""
    graph_ = shape_inference.infer_shapes(candidate.model, check_type=True, strict_mode=True).graph
    found = {item.name: item.data_type for item in graph_.initializer}
    values = (*graph_.input, *graph_.value_info, *graph_.output)
    return found | {value.name: value.type.tensor_type.elem_type for value in values}


def weights_only(candidate, dtype):
    """The candidate with its larger tensors rounded, everything in float32."""
    copied = candidate.copy_model()
    for item in copied.graph.initializer:
        value = onnx.numpy_helper.to_array(item)
        if value.size >= 64:
            rounded = value.astype(np.float16) if dtype == "fp16" else to_bfloat16(value)
            item.CopyFrom(onnx.numpy_helper.from_array(rounded.astype(np.float32), item.name))
    return type(candidate)(copied)


def to_bfloat16(value):
    """8 bits of significand, to nearest: by arithmetic instead of by bits."""
    fraction, exponent = np.frexp(value.astype(np.float64))
    return np.ldexp(np.round(fraction * 256), exponent - 8)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@every_graph
def test_storage_computes_in_float32_with_rounded_weights(make, shape, dtype):
    candidate, x = make(), normal(5, 20, *shape)
    after = Half(dtype=dtype, storage=True, keep=()).apply(candidate, context(*shape))
    onnx.checker.check_model(after.model, full_check=True)
    assert np.abs(run(after, x) - run(weights_only(candidate, dtype), x)).max() < 1e-5
    other = weights_only(candidate, "bf16" if dtype == "fp16" else "fp16")
    assert np.abs(run(after, x) - run(other, x)).max() > 1e-4, "the two dtypes cannot be told apart"
    assert size(after) < 0.72 * size(candidate)


@every_graph
def test_compute_in_half(make, shape):
    candidate, x = make(), normal(5, 20, *shape)
    after = Half().apply(candidate, context(*shape))
    onnx.checker.check_model(after.model, full_check=True)
    got, expected = run(after, x), run(candidate, x)
    assert got.dtype == np.float32
    assert 1e-6 < relative(got, expected) < 3e-3
    element_types = types(after)
    products = [node for node in after.model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    assert {element_types[name] for node in products for name in node.input} == {TensorProto.FLOAT16}


def test_sensitive_operators_stay_in_float32_and_the_list_decides():
    def normalized(compression):
        after = compression.apply(block(), context(6, 32))
        element_types = types(after)
        node = next(node for node in after.model.graph.node if node.op_type == "LayerNormalization")
        return {element_types[name] for name in node.input}

    assert normalized(Half()) == {TensorProto.FLOAT}
    assert normalized(Half(keep=("Softmax",))) == {TensorProto.FLOAT16}
    after = Half(keep_nodes=("h3.*",)).apply(block(), context(6, 32))
    assert stored(after)["down"].dtype == np.float32
    assert np.array_equal(stored(after)["down"], stored(block())["down"])


def test_sums_that_float16_cannot_hold_are_right_where_they_stay_in_float32():
    """64 squares of 100: in half their sum is infinite."""
    candidate = graph(
        [("Mul", "x x", "a", {}), ("ReduceSum", "a axes", "b", {}), ("Sqrt", "b", "y", {})],
        {"axes": np.array([1], np.int64)},
        {"x": ("batch", 64)},
        {"y": ("batch", 1)},
    )
    x = 100 + normal(1, 5, 64)
    kept = Half(keep=("Mul", "ReduceSum"), keep_nodes=("y.Sqrt",))
    with pytest.raises(EdgekitError, match="nothing can be converted"):
        kept.apply(candidate, context(64))
    narrow = Half(keep=("Mul",)).apply(candidate, context(64))
    # onnxruntime has no half sums on CPUs and quietly computes them in float32; ONNX's reference does what it is told
    with np.errstate(over="ignore"):
        sums = ReferenceEvaluator(narrow.model).run(None, {"x": x})[0]
    assert np.isinf(sums).all(), "the twin: this graph does not need float32"
    wide = Half(keep=("ReduceSum", "Sqrt")).apply(candidate, context(64))
    assert relative(run(wide, x), run(candidate, x)) < 1e-3


@pytest.mark.parametrize("storage", [False, True])
def test_a_weight_that_overflows_is_refused_by_name_or_kept(storage):
    candidate = mlp()
    tensor = next(item for item in candidate.model.graph.initializer if item.name == "up")
    value = stored(candidate)["up"].copy()
    value[3, 4] = 70_000
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, "up"))
    with pytest.raises(EdgekitError, match=r"'up' holds 70000, and float16 ends at 65504; set overflow = 'keep'"):
        Half(storage=storage).apply(candidate, context(32))
    after = Half(storage=storage, overflow="keep").apply(candidate, context(32))
    assert np.array_equal(stored(after)["up"], value)
    assert any(item.dtype == np.float16 for item in stored(after).values())
    x = normal(1, 5, 32, scale=0.01)
    assert relative(run(after, x), run(candidate, x)) < 1e-3
    assert np.isfinite(run(Half(dtype="bf16", storage=True).apply(candidate, context(32)), x)).all()


def test_a_constant_that_float16_rounds_to_zero_stays():
    candidate = graph(
        [("Add", "x tiny", "a", {}), ("Div", "one a", "b", {}), ("MatMul", "b w", "y", {})],
        {"tiny": np.float32(1e-9), "one": np.float32(1), "w": normal(1, 16, 16)},
        {"x": ("batch", 16)},
        {"y": ("batch", 16)},
    )
    after = Half().apply(candidate, context(16))
    assert stored(after)["tiny"] == np.float32(1e-9)


def test_a_tensor_with_consumers_of_both_dtypes_is_one_tensor_in_float32():
    candidate = graph(
        [
            ("LayerNormalization", "x w b", "a", {}),
            ("MatMul", "a v", "c", {}),
            ("Mul", "c w", "y", {}),
        ],
        {"w": normal(1, 64), "b": normal(2, 64), "v": normal(3, 64, 64)},
        {"x": ("batch", 64)},
        {"y": ("batch", 64)},
    )
    plan = {change.tensor: change.after for change in Half().plan(candidate)}
    assert plan["w"].startswith("left in float32")
    assert plan["v"] == "fp16"
    after = Half().apply(candidate, context(64))
    assert sum(value.size == 64 for value in stored(after).values()) == 2
    x = normal(4, 8, 64)
    assert relative(run(after, x), run(candidate, x)) < 3e-3


@pytest.mark.parametrize("storage", [False, True])
def test_a_tied_dictionary_stays_one_tensor(storage):
    after = Half(storage=storage).apply(dictionary(), context(32))
    assert sum(value.size == 32 * 32 for value in stored(after).values()) == 2


def test_subgraphs_are_left_in_float32():
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["a", "w"], ["then"])], "t", [], [helper.make_tensor_value_info("then", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["else"])], "e", [], [helper.make_tensor_value_info("else", 1, None)]
    )
    candidate = graph(
        [
            ("MatMul", "x v", "a", {}),
            ("ReduceSum", "a", "s", {"keepdims": 0}),
            ("Greater", "s zero", "yes", {}),
            ("If", "yes", "b", {"then_branch": branch, "else_branch": other}),
            ("Relu", "b", "y", {}),
        ],
        {"v": normal(1, 16, 16), "w": normal(2, 16, 16), "zero": np.float32(0)},
        {"x": ("batch", 16)},
        {"y": ("batch", 16)},
    )
    after = Half().apply(candidate, context(16))
    tensors = stored(after)
    assert tensors["w"].dtype == np.float32
    assert [value.dtype for name, value in tensors.items() if name.startswith("v")] == [np.float16]
    x = normal(3, 4, 16)
    assert relative(run(after, x), run(candidate, x)) < 3e-3


def test_bfloat16_is_rounded_to_the_nearest_ties_to_even():
    value = np.float32([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.14159, 1e-30, 65504.0, np.inf])
    got = (bfloat16(value).astype(np.uint32) << 16).view(np.float32)
    assert got.tolist() == [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -3.140625, *to_bfloat16(value[5:7]), np.inf]
    cut = (value.view(np.uint32) & 0xFFFF0000).view(np.float32)  # the planted failure: truncation
    assert not np.array_equal(cut, got)


def test_planning_changes_nothing_and_the_second_time_there_is_nothing_left():
    for compression in (Half(), Half(storage=True)):
        candidate = mlp()
        before = candidate.model.SerializeToString()
        assert {change.tensor for change in compression.plan(candidate)} >= {"up", "down"}
        once = compression.apply(candidate, context(32))
        assert candidate.model.SerializeToString() == before
        with pytest.raises(EdgekitError, match="nothing can be converted to fp16"):
            compression.apply(once, context(32))


def test_weights_behind_codes_are_no_trouble():
    from edgekit.passes.weight_only import WeightOnly

    coded = WeightOnly(bits=4).apply(block(), context(6, 32))
    x = normal(1, 5, 6, 32)
    for compression in (Half(storage=True), Half()):
        assert relative(run(compression.apply(coded, context(6, 32)), x), run(coded, x)) < 3e-3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Half(dtype="fp8"), "unknown dtype 'fp8'; expected one of: fp16, bf16"),
        (lambda: Half(keep=("Softmaxx",)), "'Softmaxx' is no ONNX operator"),
        (lambda: Half(overflow="clip"), "unknown overflow 'clip'"),
    ],
)
def test_mistakes_name_what_is_allowed(make, words):
    with pytest.raises(EdgekitError, match=words):
        make()


def test_an_old_graph_is_refused():
    candidate = graph(
        [("MatMul", "x w", "y", {})], {"w": normal(1, 8, 8)}, {"x": ("batch", 8)}, {"y": ("batch", 8)}, 11
    )
    with pytest.raises(EdgekitError, match="opset 11"):
        Half().plan(candidate)


def test_only_a_transpose_of_a_weight_is_in_half():
    """One of an activation before a product makes onnxruntime crash as it opens the graph."""
    candidate = graph(
        [
            ("Transpose", "x", "t", {"perm": [1, 0, 2]}),
            ("Transpose", "w", "v", {"perm": [1, 0]}),
            ("MatMul", "t v", "a", {}),
            ("Transpose", "a", "y", {"perm": [1, 0, 2]}),
        ],
        {"w": normal(1, 16, 16)},
        {"x": ("batch", 1, 16)},
        {"y": ("batch", 1, 16)},
    )
    after = Half().apply(candidate, context(1, 16))
    element_types = types(after)
    transposed = [element_types[node.input[0]] for node in after.model.graph.node if node.op_type == "Transpose"]
    assert sorted(transposed) == sorted([TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.FLOAT])
    x = normal(2, 5, 1, 16)
    assert relative(run(after, x), run(candidate, x)) < 3e-3
