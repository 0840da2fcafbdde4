"""edgekit bench: rows for every model and batch size, timed in turns."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.cost import Rates, graph_cost, least_seconds


def product(rows, inner, columns):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", rows, inner))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", rows, columns))],
        [numpy_helper.from_array(np.ones((inner, columns), np.float32), "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_a_product_costs():
    cost = graph_cost(product(7, 32, 16), batch=3)
    assert cost.flops == 2 * 3 * 7 * 32 * 16
    assert cost.bytes == 4 * (3 * 7 * 32 + 32 * 16 + 3 * 7 * 16)
    assert least_seconds(cost, Rates(flops=1e9, bytes=1e30)) == pytest.approx(cost.flops / 1e9)
    assert least_seconds(cost, Rates(flops=1e30, bytes=1e9)) == pytest.approx(cost.bytes / 1e9)


def test_a_convolution_and_a_gemm_cost_their_multiplications():
    conv = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Flatten", ["y"], ["f"]),
         helper.make_node("Gemm", ["f", "g"], ["z"], transB=1)],
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 3, 10, 10))],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ("n", 5))],
        [numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w"),
         numpy_helper.from_array(np.ones((5, 256), np.float32), "g")],
    )  # fmt: skip
    model = helper.make_model(conv, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert graph_cost(model, batch=2).flops == 2 * (2 * 256 * 27 + 2 * 5 * 256)  # Flatten computes nothing


@pytest.fixture
def models(tmp_path):
    """A large product, ten times the work of a small one."""
    for name, width in (("large", 512), ("small", 48)):
        onnx.save(product(16, width, width), tmp_path / f"{name}.onnx")
    return tmp_path / "large.onnx", tmp_path / "small.onnx"


def test_bench_times_every_model_at_every_batch_size(models, edgekit):
    large, small = models
    done = edgekit("bench", large, "--vs", small, "--batch", "1,4", "--seconds", "0.1", "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert [(row["model"], row["batch"]) for row in found["results"]] == [
        (str(large), 1), (str(small), 1), (str(large), 4), (str(small), 4)
    ]  # fmt: skip
    for row in found["results"]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert 0 < row["roofline"] < 1.5
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    by_model = {row["model"]: row for row in found["results"] if row["batch"] == 4}
    assert by_model[str(small)]["speedup_low"] > 2, "a hundredth of the work cannot be half as fast"
    assert by_model[str(large)]["speedup"] == 1


def test_bench_prints_a_table(models, edgekit):
    done = edgekit("bench", models[0], "--batch", "1", "--seconds", "0.1")
    assert done.status == 0, done.err
    for word in ("p50 ms", "times as", "roofline", "cores"):
        assert word in done.out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["no-such"], 1, "unknown model 'no-such'"),
        (["t2-gr", "--batch", "0"], 2, "at least 1"),
        (["t2-gr", "--batch", "x"], 2, "whole numbers"),
        (["t2-gr", "--runtime", "tpu"], 1, "unknown runtime 'tpu'"),
    ],
)
def test_bad_input_is_one_line(arguments, status, words, edgekit):
    assert edgekit("bench", *arguments).failed_with(status, words)
