"""TensorRT-RTX: real engines for an RTX 3060, compiled without one, and graphs that its parser refuses.

Skipped where the package (extra rtx) is not installed.
"""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import EdgekitError
from exporters import tensorrt_rtx_export as rtx
from exporters.parser_versions import RTX, parser_versions
from exporters.tensorrt_export import TensorRtExporter
from exporters.tensorrt_rtx_export import TensorRtRtxExporter, compile_engine, preflight
from tests.exporters.test_parser_versions import graph, node, quantized

SHAPES = {"x": {"min": [1, 8], "opt": [4, 8], "max": [16, 8]}}


def test_without_the_package_its_absence_is_named(monkeypatch, toy, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EdgekitError, match=r"needs tensorrt-rtx, .*pip install 'edgekit\[rtx\]'"):
        TensorRtRtxExporter().export(toy(), tmp_path / "out")
    with pytest.raises(EdgekitError, match=r"tesla-p40 has no tensorrt-rtx: .*rtx-3060-12gb"):
        TensorRtRtxExporter(target="tesla-p40").export(toy(), tmp_path / "out")
    monkeypatch.setattr(rtx, "find_spec", lambda name: None)
    assert preflight(graph(node("Unique", ("x",)))) == ""


@pytest.fixture(scope="module")
def trt():
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'edgekit[rtx]'")


def test_the_operator_table_is_what_the_parser_says(trt):
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    parser = trt.OnnxParser(builder.create_network(0), trt.Logger(trt.Logger.ERROR))
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert {name for name in names if parser.supports_operator(name)} == parser_versions()[RTX].operators


def test_an_engine_is_compiled_and_its_release_pinned(trt, toy, tmp_path):
    result = TensorRtRtxExporter().export(toy(context=2), tmp_path / "kit")
    manifest = json.loads((tmp_path / "kit" / "manifest.json").read_text())
    assert result.files["model.sm86.rtx"] > 100_000
    assert manifest["engine"]["sm"] == 86
    assert manifest["engine"]["tensorrt_rtx"] == trt.__version__
    assert manifest["engine"]["run"] is False
    assert manifest["precision"] == "float16"
    pins = (tmp_path / "kit" / "requirements-rtx-3060-12gb.txt").read_text().splitlines()
    assert f"tensorrt-rtx=={trt.__version__}" in pins
    command = [sys.executable, "-I", str(tmp_path / "kit" / "verify.py"), "--runs", "3"]
    done = subprocess.run([*command, "--runtime", "onnxruntime"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_other_capabilities_are_refused_with_those_that_are_known(trt):
    with pytest.raises(EdgekitError, match=r"tesla-p40 has compute capability 6\.1; .*7\.5, 8\.0, 8\.6.*rtx-3060-12gb"):
        rtx.compiles_for("tesla-p40")
    with pytest.raises(EdgekitError, match="x86-avx2 has no GPU"):
        rtx.compiles_for("x86-avx2")
    assert rtx.compiles_for("rtx-3060-8gb") == 86


def float8():
    """Return products in float8, for which compute capability 8.6 has no units."""
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    model = quantized(np.int8(0))
    model.opset_import[0].version = 19
    weight = helper.make_tensor("weight", TensorProto.FLOAT8E4M3FN, [8, 8], np.ones(64))
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in ("zero", "weight", "zeros", "scales")]
    one = numpy_helper.from_array(np.float32(1), "scales")
    zeros = helper.make_tensor("zeros", TensorProto.FLOAT8E4M3FN, [], [0.0])
    model.graph.ClearField("initializer")
    model.graph.initializer.extend([*kept, zero, weight, one, zeros])
    return model


BAD = {
    "int32 bias": (
        quantized(np.int8(0), bias=np.ones(8, np.int32)),
        r"node 'offset\.DequantizeLinear' \(DequantizeLinear\): .*Int32 but must have type FP8",
    ),
    "zero point": (quantized(np.int8(3)), r"'codes\.QuantizeLinear' .*[Zz]ero.point"),
    "uint8": (quantized(np.uint8(7)), r"'codes\.QuantizeLinear'"),
    "contrib operator": (
        graph(
            helper.make_node("SkipLayerNormalization", ["x", "x", "g"], ["y"], "layer.skip", domain="com.microsoft"),
            g=np.ones(8, np.float32),
        ),
        r"node 'layer\.skip' \(SkipLayerNormalization\): .*Plugin not found",
    ),
    "unknown operator": (graph(node("Det", ("x",))), r"'layer\.Det'"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_planted_bad_graphs_are_refused_with_the_parsers_reason(trt, case):
    model, reason = case
    with pytest.raises(EdgekitError, match=f"TensorRT-RTX {trt.__version__}, for sm_86, refuses the graph: .*{reason}"):
        compile_engine(model, SHAPES, 86)
    with pytest.raises(EdgekitError, match=f"of the family of TensorRT 10 and 11, refuses the graph: .*{reason}"):
        preflight(model)


def test_float8_is_refused_for_86_and_taken_for_89(trt):
    """The parser accepts it; the builder knows the units of each capability."""
    with pytest.raises(EdgekitError, match=r"for sm_86, .*(fp8|FP8|f8)"):
        compile_engine(float8(), SHAPES, 86)
    assert compile_engine(float8(), SHAPES, 89)


def test_symmetric_int8_compiles(trt):
    assert compile_engine(quantized(np.int8(0)), SHAPES, 86)


def test_a_shape_that_no_engine_can_have_is_the_builders_error(trt):
    model = graph(node("Relu", ("x",)))
    wrong = {"x": {"min": [1, 9], "opt": [4, 9], "max": [16, 9]}}  # the graph says 8
    with pytest.raises(EdgekitError, match="cannot build it"):
        compile_engine(model, wrong, 86)


def test_kits_for_tensorrt_10_are_shown_to_its_parser(trt, toy, tmp_path, monkeypatch):
    result = TensorRtExporter(target="jetson-orin-nano-8gb").export(toy(), tmp_path / "kit")
    assert result.manifest["parser"].startswith(f"accepted by the parser of TensorRT-RTX {trt.__version__}")
    nano = TensorRtExporter(target="jetson-nano").export(toy(), tmp_path / "nano")
    assert nano.manifest["parser"].startswith("not run")
    table = parser_versions()["10"]
    blind = replace(table, operators=table.operators | {"Det", "Unique"})
    monkeypatch.setattr("exporters.target_graph.parser_version", lambda stack: blind)
    from edgekit.graph.lower import lower
    from exporters.onnx_export import OnnxExporter

    spoilt = lower(toy())
    next(item for item in spoilt.graph.node if item.op_type == "Softmax").op_type = "Hardmax"
    monkeypatch.setattr(
        OnnxExporter,
        "lower_for_target",
        lambda self, bundle, runtime="": replace(lower_for_target(self, bundle, runtime), model=contrib(spoilt)),
    )
    with pytest.raises(EdgekitError, match="refuses the graph"):
        TensorRtExporter(target="jetson-orin-nano-8gb").export(toy(), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def lower_for_target(exporter, bundle, runtime):
    from edgekit.graph.lower import float_graph
    from exporters.target_graph import deployment_target, target_graph

    return target_graph(float_graph(bundle), deployment_target(exporter.target, runtime))


def contrib(model):
    """Return a graph with a node that only onnxruntime has, as its own optimizer writes it."""
    spoilt = onnx.ModelProto()
    spoilt.CopyFrom(model)
    spoilt.graph.node[0].domain, spoilt.graph.node[0].op_type = "com.microsoft", "FusedMatMul"
    spoilt.opset_import.add(domain="com.microsoft", version=1)
    return spoilt
