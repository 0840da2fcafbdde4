"""Compare the cost of operators with numbers counted by hand in float64 and, for products, with loops that count."""

import itertools
import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.cost.operators import work
from edgekit.graph.shapes import sized

FLOAT, INT8, UINT8, HALF = TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT16


def model(nodes, inputs, outputs, weights=None, opset=17, dtype_of_inputs=FLOAT):
    """nodes: (operator, "inputs", "outputs", attributes)."""
    made = [
        helper.make_node(op, reads.split(), writes.split(), f"{op}{number}", **attributes)
        for number, (op, reads, writes, attributes) in enumerate(nodes)
    ]
    graph = helper.make_graph(
        made,
        "test",
        [helper.make_tensor_value_info(name, dtype_of_inputs, shape) for name, shape in inputs.items()],
        [
            helper.make_tensor_value_info(name, HALF if dtype_of_inputs == HALF else FLOAT, None)
            for name in outputs.split()
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def costs(built, batch=1, lengths=None):
    done = work(built, sized(built, batch, lengths))
    assert done.unknown == ()
    return {item.op_type: item for item in done.operators}, done


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def multiplications(left, right):
    """Count the multiplications of a stack of matrix products by a loop over all indices."""
    stack = np.broadcast_shapes(left[:-2], right[:-2])
    indices = itertools.product(*(range(n) for n in stack), range(left[-2]), range(right[-1]), range(left[-1]))
    return sum(1 for _ in indices)


@pytest.mark.parametrize(
    ("left", "right"), [((3, 5), (5, 4)), ((2, 3, 5), (5, 4)), ((2, 3, 5), (2, 5, 4)), ((2, 1, 3, 5), (1, 4, 5, 2))]
)
def test_a_product_costs_what_a_loop_counts(left, right):
    found, _ = costs(model([("MatMul", "a b", "y", {})], {"a": left, "b": right}, "y"))
    assert found["MatMul"].operations == 2 * multiplications(left, right)
    assert found["MatMul"].product
    assert found["MatMul"].inner == 5
    assert dict(found["MatMul"].read) == {"float32": 4 * (math.prod(left) + math.prod(right))}


def test_stored_factors_are_weights_and_not_activations():
    found, done = costs(model([("MatMul", "x w", "y", {})], {"x": ("n", 7, 32)}, "y", {"w": zeros(32, 16)}), batch=3)
    item = found["MatMul"]
    assert (item.operations, item.matrices) == (2 * 3 * 7 * 32 * 16, 1)
    assert dict(item.read) == {"float32": 4 * 3 * 7 * 32}
    assert dict(item.weights) == {"float32": 4 * 32 * 16}
    assert dict(item.written) == {"float32": 4 * 3 * 7 * 16}
    assert set(done.stored) == {"w"}


@pytest.mark.parametrize(("transposed", "shape", "inner"), [(0, (6, 8), 8), (1, (6, 8), 6)])
def test_a_gemm_reads_its_first_factor_either_way(transposed, shape, inner):
    weights = {"b": zeros(inner, 5), "c": zeros(5)}
    found, _ = costs(model([("Gemm", "a b c", "y", {"transA": transposed})], {"a": shape}, "y", weights))
    assert found["Gemm"].operations == 2 * (8 if transposed else 6) * 5 * inner


def counted_convolution(batch, channels, size, out, kernel, groups, stride, pad):
    """Count the multiplications of a convolution, with padding, by a loop over its output."""
    width = (size + 2 * pad - kernel) // stride + 1
    ends = (batch, groups, out // groups, width, width, channels // groups, kernel, kernel)
    return sum(1 for _ in itertools.product(*(range(end) for end in ends)))


@pytest.mark.parametrize(
    ("channels", "size", "out", "kernel", "groups", "stride", "pad"),
    [(3, 7, 4, 3, 1, 1, 0), (4, 6, 8, 3, 2, 1, 1), (6, 5, 6, 3, 6, 2, 1), (4, 5, 3, 1, 1, 1, 0)],
)
def test_a_convolution_in_groups_costs_what_a_loop_counts(channels, size, out, kernel, groups, stride, pad):
    attributes = {"group": groups, "strides": [stride] * 2, "pads": [pad] * 4}
    weights = {"w": zeros(out, channels // groups, kernel, kernel)}
    found, _ = costs(model([("Conv", "x w", "y", attributes)], {"x": (2, channels, size, size)}, "y", weights))
    expected = 2 * counted_convolution(2, channels, size, out, kernel, groups, stride, pad)
    assert found["Conv"].operations == expected
    assert found["Conv"].matrices == groups


def test_a_transposed_convolution_multiplies_each_input_by_its_kernel():
    weights = {"w": zeros(3, 5, 2, 2)}
    built = model([("ConvTranspose", "x w", "y", {"strides": [2, 2]})], {"x": (1, 3, 4, 4)}, "y", weights)
    found, _ = costs(built)
    assert found["ConvTranspose"].operations == 2 * (3 * 4 * 4) * (5 * 2 * 2)


def attention(rows, heads, tokens, width):
    shape = (rows, heads, tokens, width)
    return model(
        [
            ("Transpose", "k", "kt", {"perm": [0, 1, 3, 2]}),
            ("MatMul", "q kt", "s", {}),
            ("Softmax", "s", "p", {"axis": -1}),
            ("MatMul", "p v", "y", {}),
        ],
        {"q": shape, "k": shape, "v": shape},
        "y",
    )


def test_attention_costs_its_two_products_and_the_softmax():
    rows, heads, tokens, width = 2, 3, 7, 4
    done = work(built := attention(rows, heads, tokens, width), sized(built, 1))
    products = [item for item in done.operators if item.product]
    assert [item.operations for item in products] == [2 * rows * heads * tokens * tokens * width] * 2
    assert [item.matrices for item in products] == [rows * heads] * 2
    softmax = next(item for item in done.operators if item.op_type == "Softmax")
    assert softmax.operations == rows * heads * tokens * tokens
    assert softmax.matrices == rows * heads * tokens


@pytest.mark.parametrize("flat", [False, True])
def test_attention_in_one_operator_costs_the_same(flat):
    rows, heads, tokens, width = 2, 3, 7, 4
    shape = (rows, tokens, heads * width) if flat else (rows, heads, tokens, width)
    attributes = {"q_num_heads": heads, "kv_num_heads": heads} if flat else {}
    built = model([("Attention", "q k v", "y", attributes)], {"q": shape, "k": shape, "v": shape}, "y", opset=23)
    found, _ = costs(built)
    assert found["Attention"].operations == 2 * 2 * rows * heads * tokens * tokens * width


def quantized(other_consumer=False):
    nodes = [
        ("QuantizeLinear", "x s z", "q", {}),
        ("DequantizeLinear", "q s z", "d", {}),
        ("DequantizeLinear", "w ws wz", "dw", {}),
        ("MatMul", "d dw", "m", {}),
    ]
    nodes.append(("Add", "m d", "y", {}) if other_consumer else ("Relu", "m", "y", {}))
    return model(
        nodes,
        {"x": (8, 16)},
        "y",
        {"s": np.float32(1), "z": np.uint8(0), "ws": np.float32(1), "wz": np.int8(0), "w": np.zeros((16, 16), np.int8)},
    )


def test_a_product_between_codes_is_int8_and_reads_codes():
    found, done = costs(quantized())
    assert found["MatMul"].precision == "int8"
    assert dict(found["MatMul"].read) == {"int8": 8 * 16}
    assert dict(found["MatMul"].weights) == {"int8": 16 * 16}
    assert found["DequantizeLinear"].view, "it is part of the product"
    assert "w" in done.stored
    assert "dw" not in done.stored


def test_codes_that_something_else_reads_are_decoded():
    found, _ = costs(quantized(other_consumer=True))
    assert found["MatMul"].precision == "float32"
    assert not found["DequantizeLinear"].view
    assert dict(found["DequantizeLinear"].written) == {"float32": 4 * 8 * 16}


def test_what_stored_tensors_alone_decide_is_stored():
    """The graph stores a weight in half precision, with a Cast that every runtime folds."""
    nodes = [("Cast", "h", "w", {"to": FLOAT}), ("MatMul", "x w", "y", {})]
    found, done = costs(model(nodes, {"x": (1, 32)}, "y", {"h": zeros(32, 8, dtype=np.float16)}))
    assert set(found) == {"MatMul"}
    assert dict(found["MatMul"].weights) == {"float32": 4 * 32 * 8}
    assert sum(value.bytes for value in done.stored.values()) == 4 * 32 * 8


def test_a_table_is_read_where_it_is_looked_up():
    weights = {"table": zeros(1000, 16)}
    built = model([("Gather", "table ids", "y", {})], {"ids": (2, 5)}, "y", weights, dtype_of_inputs=TensorProto.INT64)
    found, _ = costs(built)
    assert found["Gather"].bytes < 4 * 1000 * 16
    assert dict(found["Gather"].written) == {"float32": 4 * 2 * 5 * 16}


def test_half_precision_has_half_the_bytes():
    found, _ = costs(model([("MatMul", "a b", "y", {})], {"a": (4, 4), "b": (4, 4)}, "y", dtype_of_inputs=HALF))
    assert found["MatMul"].precision == "float16"
    assert found["MatMul"].bytes == 2 * 3 * 16


def test_shapes_that_the_graph_computes_are_followed():
    """The graph reshapes to (shape[0], 2, -1), as exporters write it."""
    nodes = [
        ("Shape", "x", "s", {}), ("Gather", "s zero", "n", {}), ("Unsqueeze", "n axes", "n1", {}),
        ("Concat", "n1 rest", "to", {"axis": 0}), ("Reshape", "x to", "r", {}), ("Relu", "r", "y", {}),
    ]  # fmt: skip
    weights = {"zero": np.int64(0), "axes": np.array([0]), "rest": np.array([2, -1])}
    found, done = costs(model(nodes, {"x": ("n", 6, 4)}, "y", weights), batch=5)
    assert done.values["y"].shape == (5, 2, 12)
    assert found["Concat"].sizes_only
    assert found["Reshape"].view
    assert found["Reshape"].bytes == 0
    assert not found["Relu"].sizes_only


def test_arithmetic_on_sizes_that_onnx_does_not_follow_is_done_here():
    """The graph has a Range over a length, and a mask made of it."""
    nodes = [
        ("Shape", "x", "s", {"start": 1, "end": 2}), ("Squeeze", "s", "length", {}),
        ("Range", "zero length one", "r", {}),
        ("Unsqueeze", "r axes", "column", {}), ("LessOrEqual", "column r", "mask", {}),
        ("Where", "mask x low", "y", {}),
    ]  # fmt: skip
    weights = {"zero": np.int64(0), "one": np.int64(1), "axes": np.array([1]), "low": np.float32(-1)}
    _, done = costs(model(nodes, {"x": ("n", "tokens")}, "y", weights), batch=6, lengths={"tokens": 6})
    assert done.values["mask"].shape == (6, 6)
    assert done.values["y"].shape == (6, 6)


def test_open_axes_are_multiples_of_what_they_must_be():
    built = model([("Relu", "x", "y", {})], {"x": ("n", "9*faces", "k")}, "y")
    assert sized(built, 4).values["y"].shape == (4, 18, 2)
    assert sized(built, 4, {"9*faces": 27, "k": 3}).values["y"].shape == (4, 27, 3)


def test_what_cannot_be_sized_is_named_and_not_counted():
    nodes = [("NonZero", "x", "at", {}), ("Cast", "at", "y", {"to": FLOAT})]
    built = model(nodes, {"x": (3, 4)}, "y")
    done = work(built, sized(built, 1))
    assert done.unknown == ("NonZero0", "Cast1")
    assert done.operators == ()


def test_a_large_weight_does_not_go_through_inference(monkeypatch):
    """Shape inference gets the graph without the numbers: a graph of 2 GB cannot be copied."""
    seen = []
    real = onnx.shape_inference.infer_shapes

    def spy(light, **options):
        seen.append(light.ByteSize())
        return real(light, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", spy)
    built = model([("MatMul", "x w", "y", {})], {"x": (1, 512)}, "y", {"w": zeros(512, 512)})
    assert built.ByteSize() > 1_000_000
    assert sized(built, 1).values["y"].shape == (1, 512)
    assert max(seen) < 2000


def test_planted_a_count_without_the_sum_would_be_found():
    """The loops above would fail for a wrong count: one multiplication for each output, or forgotten groups, give
    another number."""
    assert multiplications((3, 5), (5, 4)) != 3 * 4
    assert counted_convolution(2, 4, 6, 8, 3, 2, 1, 1) * 2 == counted_convolution(2, 4, 6, 8, 3, 1, 1, 1)
