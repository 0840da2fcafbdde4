"""Graphs as bundles: axes of any length, golden rows, and the same bytes whatever an exporter left in the file."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.format import GRAPH
from edgekit.errors import EdgekitError
from edgekit.importers.onnx import from_onnx
from edgekit.session import open_session

WEIGHT = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def model_of(shape=("n", 6), *, elem_type=TensorProto.FLOAT, name="product"):
    x = helper.make_tensor_value_info("x", elem_type, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 4))
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name=name)
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(WEIGHT, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def imported(model, **options):
    return from_onnx(model.SerializeToString(), "m", "m.onnx", **options)


def test_golden_outputs_are_what_numpy_computes_from_the_golden_inputs():
    inputs, outputs = imported(model_of()).golden()
    np.testing.assert_allclose(outputs["y"], inputs["x"] @ WEIGHT, atol=1e-5)
    assert np.abs(outputs["y"] - inputs["x"] @ np.roll(WEIGHT, 1, axis=0)).max() > 0.1


def test_given_rows_become_the_golden_ones():
    rows = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    inputs, outputs = imported(model_of(), golden={"x": rows}).golden()
    np.testing.assert_array_equal(inputs["x"], rows)
    assert len(outputs["y"]) == 3
    with pytest.raises(EdgekitError, match="input 'x' has shape"):
        imported(model_of(), golden={"x": rows[:, :5]})


def test_names_of_axes_are_the_files_and_the_first_is_the_batch():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("anything", "time", None, 3))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("anything", "2 * time", None, 3))
    node = helper.make_node("Concat", ["x", "x"], ["y"], axis=1)
    graph = helper.make_graph([node], "g", [x], [y])
    bundle = imported(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert bundle.manifest.inputs[0].shape == ("batch", "time", "axis_2", 3)
    assert bundle.manifest.outputs[0].shape == ("batch", "2xtime", "axis_2", 3)


def test_what_exporters_leave_behind_does_not_change_the_bundle():
    """Comments, metadata, the form in which numbers are stored, and a node without a name."""
    plain = imported(model_of(name="MatMul_0"))
    other = model_of(name="")
    other.doc_string = other.graph.doc_string = other.graph.node[0].doc_string = "made at midnight"
    other.metadata_props.add(key="path", value="/home/somebody")
    (tensor,) = other.graph.initializer
    tensor.ClearField("raw_data")
    tensor.float_data.extend(WEIGHT.ravel().tolist())
    assert imported(other).contents[GRAPH] == plain.contents[GRAPH]
    assert imported(other).digest == plain.digest
    tensor.float_data[0] += 1
    assert imported(other).digest != plain.digest


def test_the_bundle_runs_any_number_of_rows():
    bundle = imported(model_of())
    session = open_session(bundle, "onnxruntime", threads=1)
    for rows in (0, 1, 9):
        x = np.random.default_rng(rows).normal(size=(rows, 6)).astype(np.float32)
        np.testing.assert_allclose(session.run({"x": x})["y"], x @ WEIGHT, atol=1e-5)


def test_the_graph_in_the_bundle_is_valid_onnx():
    onnx.checker.check_model(onnx.load_from_string(imported(model_of()).contents[GRAPH]))
