"""The requirements of a model: compare the memory with a count by hand, and precisions and opsets with profiles."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.format import Manifest, assemble_graph
from edgekit.bundle.tensors import TensorSpec
from edgekit.doctor.finding import Finding
from edgekit.doctor.needs import Needs, bytes_needed, judge, of, precisions
from edgekit.targets.profile import find
from tests.edgekit.doctor.test_checks import recorded

NEEDS = Needs("m", "onnx", 1000, ("float32",), 4000, opset=17, activations=1000)


def graph(nodes, stored=(), *, opset=17, domains=(), width=8):
    """Return a graph from (batch, width) to (batch, width), float32."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in "xy"]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(a, n) for n, a in stored])
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(made, opset_imports=imports, ir_version=8)


def bundled(model):
    specs = (TensorSpec("x", ("batch", 8)),), (TensorSpec("y", ("batch", 8)),)
    golden = {"x": np.zeros((2, 8), np.float32)}, {"y": np.zeros((2, 8), np.float32)}
    return assemble_graph(Manifest("m", "onnx", {}, *specs), model.SerializeToString(), golden)


HEAD = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["b"])]
CHAIN = [*HEAD, helper.make_node("Abs", ["b"], ["y"])]
SKIP = [*HEAD, helper.make_node("Abs", ["b"], ["c"]), helper.make_node("Add", ["c", "a"], ["y"])]


def test_the_peak_of_a_chain_is_three_values_and_a_skip_holds_a_fourth():
    """By hand: a value is 5 rows of 8 numbers of 4 bytes. x is the caller's and stays; a chain has one value read and
    one written beside it; in the skip, a waits too."""
    value = 5 * 8 * 4
    assert bytes_needed(graph(CHAIN), 5)[1] == 3 * value
    assert bytes_needed(graph(SKIP), 5)[1] == 4 * value
    assert bytes_needed(graph(SKIP), 10)[1] == 8 * value


def test_a_peak_that_cannot_be_told():
    unknown = [
        helper.make_node("NonZero", ["x"], ["n"]),
        helper.make_node("ReduceSum", ["n"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["f"], to=1),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    assert bytes_needed(graph(unknown), 1)[1] is None


def test_a_stored_weight_is_no_activation():
    weight = np.ones((8, 8), np.float32)
    product = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [("w", weight)])
    assert bytes_needed(product, 1) == (8 * 8 * 4, 2 * 8 * 4)
    needs = of(bundled(product), product, 3)
    assert (needs.weights, needs.activations, needs.opset, needs.precisions) == (256, 3 * 64, 17, ("float32",))
    assert (needs.parameters, needs.domains, needs.asymmetric, needs.batch) == (64, (), False, 3)


def quantized(point: int):
    weight = np.arange(64, dtype=np.int8).reshape(8, 8)
    stored = [("w", weight), ("s", np.float32(0.1)), ("z", np.int8(point))]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"]),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    return graph(nodes, stored)


def test_forms_of_int8():
    symmetric, other = quantized(0), quantized(3)
    assert precisions(symmetric) == ("int8",)
    assert not of(bundled(symmetric), symmetric, 1).asymmetric
    assert of(bundled(other), other, 1).asymmetric


def test_half_precision_by_a_cast():
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["h"], ["y"], to=1),
    ]
    assert precisions(graph(nodes)) == ("float16", "float32")


def test_operators_of_one_runtime():
    model = graph(
        [helper.make_node("BiasGelu", ["x", "b"], ["y"], domain="com.microsoft")],
        [("b", np.ones(8, np.float32))],
        domains=["com.microsoft"],
    )
    needs = of(bundled(model), model, 1)
    assert needs.domains == ("com.microsoft",)
    found = judge(needs, find("jetson-nano"), None)
    finding = "operators of com.microsoft, which TensorRT cannot parse"
    remedy = "export the model without the optimizations of one runtime"
    assert Finding("operators", "error", finding, remedy) in found
    assert all(check.name != "operators" for check in judge(needs, find("x86-avx2"), None))


@pytest.mark.parametrize(
    ("change", "target", "expected"),
    [
        ({}, "tesla-p40", []),
        ({"precisions": ("float16",)}, "tesla-p40", [("precision", "error")]),
        ({"precisions": ("float16",)}, "rtx-3060-12gb", []),
        ({"precisions": ("int8",)}, "jetson-nano", [("precision", "error"), ("opset", "warning")]),
        ({"precisions": ("float8",)}, "rtx-3060-12gb", [("precision", "error")]),
        ({"precisions": ("int4",)}, "tesla-p40", [("precision", "warning")]),
        ({"opset": 24}, "tesla-p40", [("opset", "warning")]),
        ({"opset": 99}, "raspberry-pi-5", [("opset", "error")]),
        ({"opset": 16}, "jetson-nano", [("opset", "warning")]),
        ({"opset": 13}, "jetson-nano", []),
        ({"opset": 18}, "jetson-nano", [("opset", "warning")]),
        ({"opset": None}, "jetson-nano", []),
        ({"asymmetric": True}, "tesla-p40", [("int8 form", "warning")]),
        ({"asymmetric": True}, "rtx-3060-12gb", [("int8 form", "error")]),
        ({"asymmetric": True}, "x86-avx2", []),
        ({"weights": 5 * 10**9}, "jetson-nano", [("opset", "warning"), ("model memory", "error")]),
        # 4 GB, of which the system has 1.5: what bench and compress say too
        ({"weights": 3 * 10**9}, "jetson-nano", [("opset", "warning"), ("model memory", "error")]),
        ({"weights": 2 * 10**9}, "jetson-nano", [("opset", "warning"), ("model memory", "warning")]),
    ],
)
def test_a_model_on_a_target(change, target, expected):
    if target == "jetson-nano" and change.get("opset", 17) == 17 and ("opset", "warning") in expected:
        change = {**change, "opset": 16}
    found = judge(replace(NEEDS, **change), find(target), None)
    assert [(check.name, check.status) for check in found if check.status != "ok"] == expected


def test_memory_is_that_which_is_free_here():
    system, target = recorded("p40-good"), find("tesla-p40")
    large = replace(NEEDS, weights=23_000_000_000)
    line = next(check for check in judge(large, target, system) if check.name == "model memory")
    assert line.status == "warning"
    assert line.finding.startswith(
        "23.0 GB for weights and activations at batch 1, 23.5 GB free on the GPU: this leaves little"
    )
    line = next(check for check in judge(large, find("x86-avx2"), system) if check.name == "model memory")
    assert line.status == "ok"  # the same model in the host's 60 GB


@pytest.mark.parametrize(
    ("name", "family", "packages", "expected"),
    [
        ("p40-good", "onnx", {}, ("ok", "onnxruntime (CUDAExecutionProvider)")),
        ("cpu-avx2", "t2", {"torch": "2"}, ("ok", "c, onnxruntime, torch")),
        ("cpu-bare", "t2", {"torch": "2"}, ("ok", "torch")),
        ("cpu-bare", "onnx", {}, ("error", "none of onnxruntime, openvino works here")),
    ],
)
def test_the_familys_runtime(name, family, packages, expected):
    system = replace(recorded(name), packages=packages)
    (line,) = (c for c in judge(replace(NEEDS, family=family), None, system) if c.name == "runtime")
    assert (line.status, line.finding) == expected


def test_a_network_without_torch_is_only_half_known():
    needs = replace(NEEDS, family="t2", activations=None)
    found = judge(needs, None, recorded("cpu-avx2"))
    assert [check.status for check in found if check.name == "runtime"] == ["warning", "ok"]
    assert any("activations not known" in check.finding for check in found)
