"""Compare estimates from a data sheet with arithmetic by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.cost.layers import elsewhere
from edgekit.cost.operators import work
from edgekit.cost.roofline import estimate, in_mode, precision_on
from edgekit.errors import EdgekitError
from edgekit.graph.shapes import sized
from edgekit.targets import profile
from edgekit.targets.profile import Figure, PowerMode, PrecisionPlan, Rate

RATE, WIDTH = 1e12, 1e11


def toy(kind="gpu", launch=1e-6, **rates):
    """Return a device of round numbers."""
    base = profile.find("x86-avx2" if kind == "cpu" else "tesla-p40")
    figures = {"float32": RATE, **rates}
    return replace(
        base,
        name="toy",
        kind=kind,
        bandwidth=Figure(WIDTH, "x"),
        launch=Figure(launch, "x"),
        cores=4,
        rates={name: Rate(Figure(value, "x")) for name, value in figures.items()},
        plan=PrecisionPlan(("float32",), "round numbers", never=("bfloat16",)),
    )


def product(rows=64, width=256, *, relu=True, kind=TensorProto.FLOAT):
    """Return a graph of MatMul, bias, Relu and Softmax."""
    dtype = np.float16 if kind == TensorProto.FLOAT16 else np.float32
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "product"),
        helper.make_node("Add", ["m", "b"], ["a"], "bias"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Softmax", ["r"], ["y"], "softmax"),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", kind, ("n", width))],
        [helper.make_tensor_value_info("y", kind, None)],
        [
            numpy_helper.from_array(np.zeros((width, width), dtype), "w"),
            numpy_helper.from_array(np.zeros(width, dtype), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return work(model, sized(model, rows))


def test_on_a_gpu_bias_and_activation_are_part_of_the_product():
    rows, width = 64, 256
    found = estimate(product(rows, width), toy(), rows)
    assert [layer.name for layer in found.layers] == ["product", "softmax"]
    assert found.layers[0].fused == ("bias", "relu")
    operations = 2 * rows * width * width + 2 * rows * width
    moved = 4 * (rows * width + width * width + width + rows * width)  # x, weights, biases, the result: nothing between
    assert found.layers[0].operations == operations
    assert found.layers[0].bytes == moved
    assert found.layers[0].seconds == pytest.approx(max(operations / RATE, moved / WIDTH) + 1e-6)
    softmax = max(rows * width / RATE, 8 * rows * width / WIDTH) + 1e-6
    assert found.seconds == pytest.approx(found.layers[0].seconds + softmax)


def test_what_is_missing_from_the_rows_is_said_to_be_fused():
    """A user who looks for the Add reads which operator contains it."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in "xy")
    stored = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in (("w", (8, 8)), ("b", 8))]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], "m"), helper.make_node("Add", ["m", "b"], ["y"], "a")]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], stored))
    for kind, said in (("gpu", True), ("cpu", False)):
        report = elsewhere(model, toy(kind), 1)
        assert ([row.op_type for row in report.rows] == ["MatMul"]) is said
        assert report.formula.endswith("count with the operator before them") is said


def test_on_a_cpu_nothing_is_fused_and_cores_share():
    rows, width = 64, 256
    done = product(rows, width)
    one, four, nine = (estimate(done, toy("cpu"), rows, threads=threads) for threads in (1, 4, 9))
    assert [layer.name for layer in one.layers] == ["product", "bias", "relu", "softmax"]
    computing = 2 * rows * width * width / RATE
    assert one.layers[0].seconds == pytest.approx(computing + 1e-6)
    assert one.layers[1].bytes == 4 * (2 * rows * width + width)
    assert four.layers[0].seconds < one.layers[0].seconds
    assert nine.seconds == four.seconds, "there are four cores"


def test_a_value_that_others_read_too_is_written():
    """In a residual x + f(x), other operators may read x again, so the fusion must not swallow it."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "product"),
        helper.make_node("Relu", ["m"], ["r"], "relu"),
        helper.make_node("Softmax", ["m"], ["s"], "softmax"),
        helper.make_node("Add", ["r", "s"], ["y"], "sum"),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", 1, (8, 16))],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(np.zeros((16, 16), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    found = estimate(work(model, sized(model, 1)), toy(), 1)
    assert [(layer.name, layer.fused) for layer in found.layers] == [
        ("product", ()),
        ("relu", ()),
        ("softmax", ("sum",)),
    ]
    assert found.layers[2].bytes == 4 * 3 * 8 * 16  # m and r read, y written


def test_what_takes_the_time_is_named():
    done = product(64, 256)
    assert estimate(done, toy(launch=1e-3), 64).layers[0].bound == "launch"
    slow = replace(toy(launch=1e-9), bandwidth=Figure(1e14, "x"))
    assert estimate(done, slow, 64).layers[0].bound == "compute"
    narrow = replace(toy(launch=1e-9), bandwidth=Figure(1e9, "x"))
    found = estimate(done, narrow, 64).layers[0]
    assert found.bound == "memory"
    assert found.roofline == pytest.approx(found.bytes / 1e9)


def test_half_precision_speeds_up_products_and_halves_all_bytes():
    rows, width = 64, 256
    target = replace(toy(float16=8e12), bandwidth=Figure(1e13, "x"))
    full, half = (estimate(product(rows, width), target, rows, precision=name) for name in ("float32", "float16"))
    assert half.layers[0].bytes == full.layers[0].bytes / 2
    computing = 2 * rows * width * width / 8e12 + 2 * rows * width / RATE  # the bias and the Relu have no such units
    assert half.layers[0].seconds == pytest.approx(computing + 1e-6)
    assert half.layers[1].precision == "float16"


def test_int8_stands_for_the_products():
    rows, width = 64, 256
    target = toy(int8=4e12)
    found = estimate(product(rows, width), target, rows, precision="int8")
    assert found.layers[0].precision == "int8"
    assert found.layers[0].bytes == rows * width + width * width + 4 * width + 4 * rows * width
    assert found.layers[1].precision == "float32"


def test_the_plan_decides_the_precision_that_is_not_given():
    assert precision_on(profile.find("tesla-p40")) == "float32"
    assert precision_on(profile.find("jetson-nano")) == "float16"
    assert precision_on(profile.find("raspberry-pi-5")) == "float32", "int8 needs a graph of its own"
    with pytest.raises(EdgekitError, match=r"tesla-p40 must not be given float16"):
        precision_on(profile.find("tesla-p40"), "float16")
    with pytest.raises(EdgekitError, match=r"tesla-p40 has no int4; it has float32, float16, int8"):
        precision_on(profile.find("tesla-p40"), "int4")
    with pytest.raises(EdgekitError, match=r"unknown precision 'float_16'.*mean 'float16'"):
        precision_on(profile.find("tesla-p40"), "float_16")


def test_a_graph_in_what_the_device_must_never_be_given_is_refused():
    half = product(kind=TensorProto.FLOAT16)
    assert estimate(half, profile.find("rtx-3060-12gb"), 64).seconds > 0
    with pytest.raises(EdgekitError, match=r"tesla-p40 must not be given float16: .*1/64"):
        estimate(half, profile.find("tesla-p40"), 64)


def test_power_modes_scale_the_rates():
    target = replace(
        toy(), power=(PowerMode("full", 60, 1.0, "x"), PowerMode("low", 15, 0.1, "x", bandwidth_share=0.5))
    )
    low = in_mode(target, "low")
    assert low.rates["float32"].dense.value == pytest.approx(RATE / 10)
    assert low.bandwidth.value == WIDTH / 2
    assert estimate(product(), low, 64).seconds > estimate(product(), target, 64).seconds
    with pytest.raises(EdgekitError, match=r"unknown power mode 'lo' in toy; expected one of: full, low; .*'low'"):
        in_mode(target, "lo")
    with pytest.raises(EdgekitError, match=r"tesla-p40 has no power modes"):
        in_mode(profile.find("tesla-p40"), "low")


def test_a_faster_card_is_faster_and_a_larger_batch_slower():
    done = {rows: product(rows, 1024) for rows in (1, 4096)}
    names = ("jetson-nano", "jetson-orin-nano-8gb", "rtx-3060-12gb", "h200")
    times = [estimate(done[4096], profile.find(name), 4096).seconds for name in names]
    assert times == sorted(times, reverse=True)
    assert all(estimate(done[1], profile.find(n), 1).seconds < t for n, t in zip(names, times, strict=True))


def test_every_operator_of_a_real_model_is_sized(tiny_bundle):
    """The exported graph computes sizes itself, around attention."""
    from edgekit.compression.bench import float_graph

    graph = float_graph(tiny_bundle)
    one, nine = (estimate(work(graph, sized(graph, batch)), profile.find("tesla-p40"), batch) for batch in (1, 9))
    assert one.unknown == nine.unknown == ()
    assert sum(layer.operations for layer in nine.layers) == 9 * sum(layer.operations for layer in one.layers)
    assert nine.memory.weights == one.memory.weights
    assert nine.memory.activations == 9 * one.memory.activations


def test_planted_a_model_without_fusion_would_be_found():
    """The number of the first test differs from the bytes that separate kernels would move."""
    rows, width = 64, 256
    apart = estimate(product(rows, width), toy("cpu"), rows)
    together = estimate(product(rows, width), toy(), rows)
    assert not math.isclose(sum(item.bytes for item in apart.layers), sum(item.bytes for item in together.layers))
