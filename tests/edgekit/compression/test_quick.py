"""One step to fewer bits: smaller, close to the original, and refused when it is not."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.format import with_files
from edgekit.compression import quick
from edgekit.compression.quick import compared, quantize
from edgekit.errors import EdgekitError
from edgekit.importers.onnx import from_onnx
from edgekit.passes.dynamic_int8 import DynamicInt8, tables
from edgekit.session import open_session


@pytest.fixture(scope="module")
def text():
    """A table of 200 ids, and a product behind it."""
    random = np.random.default_rng(0)
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", 32])
    stored = [
        numpy_helper.from_array(
            (random.normal(size=(200, 64)) * random.lognormal(size=(200, 1))).astype("f4"), "table"
        ),
        numpy_helper.from_array(random.normal(size=(64, 32)).astype(np.float32), "w"),
    ]
    nodes = [helper.make_node("Gather", ["table", "ids"], ["h"], "look"), helper.make_node("MatMul", ["h", "w"], ["y"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [ids], [y], stored), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    return from_onnx(model.SerializeToString(), "text", "here")


@pytest.mark.parametrize(
    ("form", "ratio", "cosine"), [("int8", 3.2, 0.995), ("fp16", 1.8, 0.9999), ("int4", 1.05, 0.98)]
)
def test_each_form_is_smaller_and_close(form, ratio, cosine, text):
    result = quantize(text, form)
    assert result.bytes[0] / result.bytes[1] > ratio
    assert result.cosine > cosine
    assert result.milliseconds[0] > 0
    inputs, outputs = result.bundle.golden()
    found = open_session(result.bundle, "onnxruntime", threads=1).run(inputs)["y"]
    np.testing.assert_allclose(found, outputs["y"], atol=1e-5)
    assert result.bundle.manifest.parent == text.digest


def test_a_table_is_stored_as_codes_with_a_scale_per_row(text):
    graph = onnx.load_from_string(quantize(text, "int8").bundle.contents["graph.onnx"])
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    assert stored["table.codes"].dtype == np.int8
    assert stored["table.scale"].shape == (200, 1)
    assert "table" not in stored
    original = numpy_helper.to_array(next(t for t in text.graph().graph.initializer if t.name == "table"))
    error = np.abs(stored["table.codes"] * stored["table.scale"] - original)
    assert (error <= stored["table.scale"] * 0.5001).all()
    assert tables(text.graph(), ["look"]) == []
    assert tables(text.graph(), []) == ["table"]
    with pytest.raises(EdgekitError, match="unknown operator 'Softmax'"):
        DynamicInt8(operators=("Softmax",))


def test_a_result_that_points_elsewhere_is_refused(text, monkeypatch):
    class Damaging:
        name = "damaging"

        def apply(self, candidate, context):
            model = candidate.copy_model()
            for tensor in model.graph.initializer:
                if tensor.name == "w":
                    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), "w"))
            return type(candidate)(model)

    monkeypatch.setattr(quick, "_pass_of", lambda to, calibrated: Damaging())
    with pytest.raises(EdgekitError, match=r"text: in int8, the cosine .* at least 0\.98 .*Nothing was written"):
        quantize(text, "int8")


def test_data_are_checked_and_become_the_golden_rows(text):
    rows = {"ids": np.random.default_rng(1).integers(0, 200, (20, 6)), "labels": np.zeros(20)}
    result = quantize(text, "fp16", rows)
    np.testing.assert_array_equal(result.bundle.golden()[0]["ids"], rows["ids"][:8])
    assert not result.bundle.manifest.synthetic
    assert quantize(text, "fp16").bundle.manifest.synthetic
    with pytest.raises(EdgekitError, match="input 'ids' is missing"):
        quantize(text, "fp16", {"other": rows["ids"]})
    with pytest.raises(EdgekitError, match="unknown form 'int2'; expected one of: int8, int4, fp16"):
        quantize(text, "int2")


def test_a_result_that_is_not_smaller_is_refused(text, monkeypatch):
    class Idle:
        name = "idle"

        def apply(self, candidate, context):
            return candidate

    monkeypatch.setattr(quick, "_pass_of", lambda to, calibrated: Idle())
    with pytest.raises(EdgekitError, match="int8 does not make it smaller"):
        quantize(text, "int8")


def test_the_tokenizer_stays_with_the_model(text):
    source = with_files(text, {"tokenizer.json": b"{}"})
    assert quantize(source, "int8").bundle.contents["tokenizer.json"] == b"{}"


def test_the_cosine_and_the_difference_of_outputs():
    one = {"y": np.array([[1.0, 0.0], [0.0, 0.0]]), "n": np.array([1, 2])}
    assert compared(one, one) == (1.0, 0.0)
    cosine, difference = compared(one, {"y": np.array([[1.0, 1.0], [0.0, 0.0]]), "n": np.array([3, 4])})
    assert (round(cosine, 3), difference) == (0.707, 1.0)
    assert compared(one, {"y": np.array([[1.0, 0.0], [1.0, 0.0]])})[0] == 0.0
    assert np.isnan(compared(one, {"y": np.full((2, 2), np.nan)})[0])
