"""The graph for a target has the target's opset, never a forbidden precision, and only operators that the target
supports."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.format import assemble_graph
from edgekit.data.dataset import UNKNOWN, Dataset
from edgekit.errors import EdgekitError
from edgekit.graph.lower import lower
from edgekit.passes.base import Context, GraphCandidate
from edgekit.passes.half import Half
from edgekit.passes.static_int8 import StaticInt8
from edgekit.targets import profile
from exporters.onnx_export import FLOAT, QUANTISED, OnnxExporter
from exporters.parser_versions import parser_versions
from exporters.target_graph import arithmetic, deployment_target, requirements, target_graph
from exporters.verify import verify
from tests.exporters.test_parser_versions import graph, node

# the newest opset that the target's first stack reads, the precision of its plan that a float network gets
EXPECTED = {
    "jetson-nano": (13, "float16"),
    "jetson-tx2": (13, "float16"),
    "jetson-xavier-nx": (17, "float16"),
    "jetson-orin-nano-8gb": (17, "float16"),
    "rtx-3060-12gb": (17, "float16"),
    "tesla-p40": (17, "float32"),
    "x86-avx512": (17, "float32"),
    "raspberry-pi-5": (17, "float32"),
}


@pytest.fixture(scope="module")
def bundle():
    from tests.toys import toy_bundle

    return toy_bundle(context=2)


@pytest.fixture(scope="module")
def model(bundle):
    return lower(bundle, weights="float32")


@pytest.fixture(scope="module")
def int8(model, bundle):
    """Return the model's products in symmetric int8, as the pass writes it, and in asymmetric int8."""
    inputs, _ = bundle.golden()
    data = Dataset(inputs, np.full(len(inputs["context"]), UNKNOWN))
    context = Context(data, None, seed=0)
    return {
        form: StaticInt8(scheme=form, weight_bits=8).apply(GraphCandidate(model), context).model
        for form in ("s8s8", "u8s8")
    }


@pytest.mark.parametrize("name", profile.names())
def test_every_target_gets_what_it_reads(name, model, bundle):
    """The quick row of the matrix: one small network for every target."""
    where = deployment_target(name)
    got = target_graph(model, where)
    opset, precision = EXPECTED.get(name, (17, got.precision))
    assert [(entry.domain, entry.version) for entry in got.model.opset_import] == [("", opset)]
    assert got.precision == precision
    assert got.precision not in where.target.plan.never
    assert arithmetic(got.model) == ({"float16"} if precision == "float16" else set())
    onnx.checker.check_model(got.model, full_check=True)
    if where.parser_version:
        assert {node.op_type for node in got.model.graph.node} <= where.parser_version.operators
    inputs, expected = bundle.golden()
    from exporters.verify import on_onnxruntime

    found = on_onnxruntime(got.model.SerializeToString()).run(None, inputs)[0]
    assert np.abs(found - expected["probabilities"]).max() < (1e-6 if precision == "float32" else 2e-3)


def test_half_leaves_normalizations_in_float32(model):
    """A parser without LayerNormalization gets it as sums, which must also not run in half precision."""
    got = target_graph(model, deployment_target("jetson-nano")).model
    dtypes = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(got).graph.value_info
    }
    sums = [node for node in got.graph.node if ".LayerNormalization." in node.name and node.op_type != "Cast"]
    assert len(sums) >= 2 * 9
    assert {dtypes[name] for node in sums for name in node.output} == {TensorProto.FLOAT}
    products = [node for node in got.graph.node if node.op_type == "MatMul"]
    assert {dtypes[name] for node in products for name in node.output if name in dtypes} == {TensorProto.FLOAT16}


def test_a_wrong_half_weight_is_noticed(model, bundle):
    got = target_graph(model, deployment_target("jetson-nano"))
    verify({"m": got.model.SerializeToString()}, bundle, tolerance=got.tolerance, batches=(1, 16))
    tensor = next(t for t in got.model.graph.initializer if t.data_type == TensorProto.FLOAT16 and len(t.dims) == 2)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float16(1.5), tensor.name))
    with pytest.raises(EdgekitError, match="differ"):
        verify({"m": got.model.SerializeToString()}, bundle, tolerance=got.tolerance, batches=(1, 16))


def test_forbidden_precisions_are_refused(model):
    with pytest.raises(EdgekitError, match=r"tesla-p40 must not be given float16: .*Use one of: float32, int8"):
        target_graph(model, deployment_target("tesla-p40"), "float16")
    half = Half().converted(GraphCandidate(model).copy_model())
    with pytest.raises(EdgekitError, match="tesla-p40 must not be given float16"):
        target_graph(half, deployment_target("tesla-p40"))
    target_graph(half, deployment_target("rtx-3060-12gb"))
    stored = Half(storage=True).converted(GraphCandidate(model).copy_model())
    assert arithmetic(stored) == set()
    assert target_graph(stored, deployment_target("tesla-p40")).precision == "float32"


def test_int8_must_come_quantized_and_symmetric(model, int8):
    with pytest.raises(EdgekitError, match=r"not quantized; int8 comes from `edgekit compress`.*'s8s8'"):
        target_graph(model, deployment_target("rtx-3060-12gb"), "int8")
    with pytest.raises(EdgekitError, match="jetson-nano must not be given int8"):
        target_graph(int8["s8s8"], deployment_target("jetson-nano"))
    with pytest.raises(EdgekitError, match="quantized to int8; it cannot be exported in float32"):
        target_graph(int8["s8s8"], deployment_target("tesla-p40", "tensorrt"), "float32")
    for name in ("jetson-xavier-nx", "jetson-orin-nano-8gb", "rtx-3060-12gb", "tesla-p40"):
        assert target_graph(int8["s8s8"], deployment_target(name, "tensorrt")).precision == "int8"
        with pytest.raises(EdgekitError, match=r"codes are uint8|an int32 bias"):
            target_graph(int8["u8s8"], deployment_target(name, "tensorrt"))
    assert target_graph(int8["u8s8"], deployment_target("x86-avx512")).precision == "int8"


def test_int8_is_held_to_the_graph_it_was(int8, bundle):
    quantized = assemble_graph(bundle.manifest, int8["s8s8"].SerializeToString(), bundle.golden())
    for name in ("jetson-xavier-nx", "tesla-p40"):
        got = target_graph(int8["s8s8"], deployment_target(name, "tensorrt"))
        checks = verify({"m": got.model.SerializeToString()}, quantized, tolerance=got.tolerance, batches=(1, 16))
        assert max(check.difference for check in checks) <= got.tolerance


def test_bfloat16_and_unknown_precisions_are_said_plainly(model):
    with pytest.raises(EdgekitError, match="bfloat16 cannot be verified here"):
        target_graph(model, deployment_target("rtx-3060-12gb"), "bfloat16")
    with pytest.raises(EdgekitError, match=r"unknown precision 'fp16'; expected one of: float32, float16, int8"):
        target_graph(model, deployment_target("rtx-3060-12gb"), "fp16")


def test_an_opset_is_obtained_or_refused(model, bundle):
    assert target_graph(model, deployment_target("jetson-xavier-nx"), version=13).model.opset_import[0].version == 13
    with pytest.raises(EdgekitError, match=r"opset 17 is newer than jetson-nano reads: .* takes up to 13"):
        target_graph(model, deployment_target("jetson-nano"), version=17)
    got = OnnxExporter(target="rtx-3060-12gb", opset=20).lower_for_target(bundle)
    assert got.model.opset_import[0].version == 20


def test_impossible_runtimes_and_stacks_list_what_is_there():
    with pytest.raises(EdgekitError, match=r"x86-avx2 has no tensorrt: its runtimes are onnxruntime, .*tesla-p40"):
        deployment_target("x86-avx2", "tensorrt")
    with pytest.raises(EdgekitError, match=r"unknown stack 'TensorRT 9' in rtx-3060-12gb; .*TensorRT 10, TensorRT 11"):
        deployment_target("rtx-3060-12gb", "tensorrt", "TensorRT 9")
    assert deployment_target("rtx-3060-12gb", "tensorrt", "TensorRT 11").parser_version is parser_versions()["11"]


def test_arithmetic_sees_float8_and_int4():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    one = numpy_helper.from_array(np.float32(1), "one")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["codes"], "q"),
        helper.make_node("DequantizeLinear", ["codes", "one", "zero"], ["y"], "d"),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [one, zero]), opset_imports=[helper.make_opsetid("", 19)]
    )
    assert arithmetic(model) == {"float8"}


def test_requirements_are_pinned_and_say_what_never_to_install():
    text = requirements(deployment_target("tesla-p40")).decode()
    assert "\nonnxruntime-gpu==1.26.0\n" in text
    assert "\n# never: nvidia-cudnn-cu12>=9.11 (" in text
    nano = requirements(deployment_target("jetson-nano")).decode()
    assert "tensorrt comes with JetPack 4.6" in nano
    assert [line for line in nano.splitlines() if not line.startswith("#")] == ["numpy==1.19.4"]
    assert requirements(deployment_target("jetson-orin-nano-8gb")).decode().endswith("\nnumpy\n")


def test_an_onnx_export_for_a_target_says_so_and_proves_itself(bundle, toy, tmp_path):
    result = OnnxExporter(target="jetson-nano").export(bundle, tmp_path / "nano")
    manifest = json.loads((tmp_path / "nano" / "manifest.json").read_text())
    assert (manifest["target"], manifest["sm"], manifest["precision"], manifest["opset"]) == (
        "jetson-nano",
        53,
        "float16",
        13,
    )
    assert manifest["stack"]["tensorrt"] == "8.2.1"
    assert manifest["axes"] == {
        "batch": {"multiple_of": 1, "at": {"light_curve": [0], "context": [0], "probabilities": [0]}}
    }
    assert "requirements-jetson-nano.txt" in result.files
    assert onnx.load(tmp_path / "nano" / FLOAT).opset_import[0].version == 13
    command = [sys.executable, "-I", str(tmp_path / "nano" / "verify.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert QUANTISED in OnnxExporter(target="tesla-p40").export(toy("palette"), tmp_path / "p40").files
    command = [sys.executable, "-I", str(tmp_path / "p40" / "verify.py")]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1, "a check on the CPU is no proof of the P40"
        assert "provider CUDAExecutionProvider is not available; choose from" in done.stdout
    command += ["--provider", "CPUExecutionProvider"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert QUANTISED not in OnnxExporter(target="jetson-nano").export(toy("palette"), tmp_path / "codes").files


def test_a_stack_without_a_target_is_an_error():
    with pytest.raises(EdgekitError, match="a stack or a precision is a target's"):
        OnnxExporter(precision="float16")


def test_what_is_compared_is_not_rounded(monkeypatch):
    """A router in half precision chooses another expert than the network's; the planted failure allows it."""
    from exporters import target_graph as module
    from tests.conformance.test_conformance import imported

    bundle = imported("mixture")
    model = lower(bundle)

    def worst():
        got = target_graph(model, deployment_target("rtx-3060-12gb"))
        checks = verify({"m": got.model.SerializeToString()}, bundle, tolerance=1.0, batches=(1, 16))
        return max(check.difference for check in checks)

    assert worst() < 5e-3
    monkeypatch.setattr(module, "_deciding", lambda graph: [])
    assert worst() > 5e-2


def test_what_cannot_be_in_half_says_so_and_bad_operators_come_first():
    only = graph(node("Softmax", ("x",)))
    with pytest.raises(
        EdgekitError, match=r"cannot be put into float16: nothing can be converted .*try --precision float32"
    ):
        target_graph(only, deployment_target("jetson-nano"))
    assert target_graph(only, deployment_target("jetson-nano"), "float32").precision == "float32"
    old = graph(node("Relu", ("x",)), opset=10)
    with pytest.raises(EdgekitError, match="cannot be put into float16: the graph is written in opset 10"):
        target_graph(old, deployment_target("jetson-nano"))
    assert target_graph(old, deployment_target("tesla-p40", "tensorrt")).model.opset_import[0].version == 10
    skip = helper.make_node("SkipLayerNormalization", ["x", "x", "g"], ["y"], "it", domain="com.microsoft")
    with pytest.raises(EdgekitError, match=r"TensorRT 8\.2 does not take node 'it' .*a runtime's own"):
        target_graph(graph(skip, g=np.ones(8, np.float32)), deployment_target("jetson-nano"))
