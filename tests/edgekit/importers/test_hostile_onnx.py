"""ONNX files of strangers: what would run for ever, or fill the memory, ends in one line, and so do odd inputs."""

import time

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import EdgekitError
from edgekit.importers import sandbox
from edgekit.importers.onnx import from_onnx


def model_of(nodes, stored=(), *, x=(TensorProto.FLOAT, ["batch", 2]), y=(TensorProto.FLOAT, ["batch", 2])):
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", *x)], [helper.make_tensor_value_info("y", *y)], list(stored)
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def loop(trips):
    """y = x, copied again and again."""
    infos = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", 2]),
    ]
    outputs = [
        helper.make_tensor_value_info("still", TensorProto.BOOL, []),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, ["batch", 2]),
    ]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["still"]), helper.make_node("Neg", ["a"], ["b"])], "body", infos, outputs
    )
    stored = [numpy_helper.from_array(np.array(trips), "trips"), numpy_helper.from_array(np.array(True), "yes")]
    return model_of([helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=body)], stored)


def wide(numbers):
    """y = x + the sum of so many ones."""
    return model_of(
        [
            helper.make_node("ConstantOfShape", ["shape"], ["ones"]),
            helper.make_node("ReduceSum", ["ones"], ["sum"], keepdims=0),
            helper.make_node("Add", ["x", "sum"], ["y"]),
        ],
        [numpy_helper.from_array(np.array([numbers]), "shape")],
    )


def test_a_loop_without_end_is_stopped(monkeypatch):
    inputs, outputs = from_onnx(loop(3), "x", "x.onnx").golden()
    assert np.array_equal(outputs["y"], -inputs["x"])
    monkeypatch.setenv(sandbox.VARIABLE, "1")
    started = time.monotonic()
    with pytest.raises(EdgekitError, match=r"x\.onnx: it takes more than 1 s.*--time-limit") as caught:
        from_onnx(loop(1 << 62), "x", "x.onnx")
    assert time.monotonic() - started < 60
    assert "\n" not in str(caught.value)


def test_a_tensor_that_fills_the_memory_is_refused():
    inputs, outputs = from_onnx(wide(1000), "x", "x.onnx").golden()
    assert np.array_equal(outputs["y"], inputs["x"])
    with pytest.raises(EdgekitError, match=r"x\.onnx: .*(memory|alloc|signal)") as caught:
        from_onnx(wide(20 << 30), "x", "x.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ((77, ["batch", 2]), "element type 77"),
        ((TensorProto.STRING, ["batch", 2]), "element type 8"),
        ((TensorProto.COMPLEX64, ["batch", 2]), "element type 14"),
        ((TensorProto.FLOAT, ["batch", 1 << 40]), "one row of shape .* takes 4,398,046,511,104 bytes"),
        ((TensorProto.FLOAT, ["batch", -5]), "expected lengths from 0"),
    ],
)
def test_inputs_that_no_session_takes_are_refused_in_one_line(x, words):
    with pytest.raises(EdgekitError, match=words) as caught:
        from_onnx(model_of([helper.make_node("Identity", ["x"], ["y"])], x=x, y=x), "x", "x.onnx")
    assert "\n" not in str(caught.value)
