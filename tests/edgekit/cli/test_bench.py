"""edgekit bench: rows for every model and batch size, timed in turns."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.cost.operators import Rates, graph_cost, least_seconds


def product(rows, inner, columns):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", rows, inner))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", rows, columns))],
        [numpy_helper.from_array(np.ones((inner, columns), np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_a_product_costs():
    cost = graph_cost(product(7, 32, 16), batch=3)
    assert cost.flops == 2 * 3 * 7 * 32 * 16
    assert cost.bytes == 4 * (3 * 7 * 32 + 32 * 16 + 3 * 7 * 16)
    assert least_seconds(cost, Rates(flops=1e9, bytes=1e30)) == pytest.approx(cost.flops / 1e9)
    assert least_seconds(cost, Rates(flops=1e30, bytes=1e9)) == pytest.approx(cost.bytes / 1e9)


def test_a_convolution_and_a_gemm_cost_their_multiplications():
    conv = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["y"]),
            helper.make_node("Flatten", ["y"], ["f"]),
            helper.make_node("Gemm", ["f", "g"], ["z"], transB=1),
        ],
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 3, 10, 10))],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ("n", 5))],
        [
            numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w"),
            numpy_helper.from_array(np.ones((5, 256), np.float32), "g"),
        ],
    )
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
        (str(large), 1),
        (str(small), 1),
        (str(large), 4),
        (str(small), 4),
    ]
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


def test_a_target_that_is_not_here_is_estimated_and_says_so(models, edgekit):
    large, _ = models
    done = edgekit("bench", large, "--target", "rtx-3060-12gb", "--batch", "4")
    assert done.status == 0, done.err
    assert "estimate, nothing was run there" in done.out
    assert "max(operations / rate, bytes / bandwidth) + launch" in done.out
    assert "fits in 12 GB" in done.out
    found = json.loads(edgekit("bench", large, "--target", "rtx-3060-12gb", "--batch", "4", "--json").out)
    (result,) = found["results"]
    assert not found["measured_here"]
    assert result["measured"] is None
    assert result["precision"] == "float16"
    operations, moved = 2 * 4 * 16 * 512 * 512, 2 * (2 * 4 * 16 * 512 + 512 * 512)
    assert result["estimate"] == pytest.approx(max(operations / 51e12, moved / 360e9) + 5e-6)


def test_precision_power_and_layers_of_a_target(models, edgekit):
    large, small = models
    arguments = ["bench", large, "--vs", small, "--target", "jetson-agx-orin-64gb", "--batch", "1,64", "--json"]
    full = json.loads(edgekit(*arguments, "--precision", "float32").out)["results"]
    low = json.loads(edgekit(*arguments, "--precision", "float32", "--power", "15W").out)["results"]
    assert [(row["model"], row["batch"]) for row in full] == [
        (str(large), 1),
        (str(large), 64),
        (str(small), 1),
        (str(small), 64),
    ]
    assert low[1]["estimate"] > 2 * full[1]["estimate"]
    rows = json.loads(edgekit(*arguments, "--layers").out)["results"][0]["rows"]
    assert [row["op_type"] for row in rows] == ["MatMul"]
    assert edgekit(*arguments, "--power", "16W").failed_with(1, "unknown power mode '16W'", "MAXN")
    assert edgekit(*arguments, "--precision", "float8").failed_with(1, "must not be given float8", "float16, int8")


def test_what_does_not_fit_is_said_with_the_numbers(models, edgekit, tmp_path, monkeypatch):
    from edgekit.targets import profile

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profile.user_folder().mkdir(parents=True)
    text = profile.path_of("tesla-p40").read_text().replace("tesla-p40", "tiny").replace("24e9", "0.603e9")
    (profile.user_folder() / "tiny.toml").write_text(text)
    large, _ = models
    done = edgekit("bench", large, "--target", "tiny", "--batch", "1,1000")
    assert done.status == 0
    memory = [line for line in done.out.splitlines() if line.startswith("memory: ")]
    assert memory[0].endswith("fits in 603 MB")
    assert "weights 1.05 MB + activations 65.5 kB" in memory[0]
    assert "DOES NOT FIT in 603 MB" in memory[1]
    assert "activations 65.5 MB" in memory[1]
    found = json.loads(edgekit("bench", large, "--target", "tiny", "--batch", "1,1000", "--json").out)["results"]
    assert [row["fits"] for row in found] == [True, False]
    assert found[1]["needed"] == 4 * 512 * 512 + 4 * 2 * 1000 * 16 * 512 + 0.6e9


def test_this_machine_is_measured_beside_the_estimate(models, edgekit, monkeypatch):
    from edgekit.cost import measured
    from edgekit.cost.measured import TERMS, OperatorTable
    from edgekit.targets import local, profile

    law = tuple(1e-6 if term == "calls" else 0.0 for term in TERMS)
    table = OperatorTable({"Add": law, "product with weights": law}, 5e-6, 0.0, 1 << 20, 16, 1.0, {}, {}, {}, "test")
    monkeypatch.setattr(measured, "table", lambda **options: table)
    monkeypatch.setattr(local, "is_here", lambda target: target.name == "x86-avx512")
    large, _ = models
    done = edgekit("bench", large, "--target", "x86-avx512", "--batch", "4", "--seconds", "0.05")
    assert done.status == 0, done.err
    assert "measured on this machine" in done.out
    assert "measured ms" in done.out
    found = json.loads(
        edgekit("bench", large, "--target", "x86-avx512", "--batch", "4", "--seconds", "0.05", "--json").out
    )
    assert found["measured_here"]
    assert found["machine"]["cpu"]
    (row,) = found["results"][0]["rows"]
    assert row["op_type"] == "MatMul"
    assert row["estimate"] == pytest.approx(1e-6)
    assert row["measured"] > 2 * 4 * 16 * 512 * 512 / 2e12, "no core is that fast"
    assert 0 < row["roofline"] <= 1.5
    assert found["results"][0]["estimate"] == pytest.approx(6e-6)
    wrong = edgekit("bench", large, "--target", "x86-avx512", "--power", "15W")
    assert wrong.failed_with(1, "x86-avx512 is this machine", "got None, 15W and 1")
    assert profile.find("x86-avx512").kind == "cpu"


def test_a_target_of_no_such_name_and_options_without_a_target(models, edgekit):
    large, _ = models
    assert edgekit("bench", large, "--target", "rtx-3060").failed_with(1, "unknown target 'rtx-3060'", "rtx-3060-12gb")
    assert edgekit("bench", large, "--layers").failed_with(2, "go with --target NAME")
    assert edgekit("bench", large, "--target", "h200", "--runtime", "c").failed_with(2, "--runtime c: with --target")
