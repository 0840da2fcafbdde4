"""A model's operators on a target: the sum of its rows, merged by type."""

import numpy as np
import pytest
from onnx import helper

from edgekit.cost.layers import Row, _merged, elsewhere, lengths_of
from edgekit.cost.samples import graph_of
from edgekit.targets import profile


def model():
    weights = {f"w{n}": np.ones((64, 64), np.float32) for n in range(2)}
    nodes = [
        helper.make_node("MatMul", ["a", "w0"], ["m"], "first"),
        helper.make_node("Relu", ["m"], ["r"], "middle"),
        helper.make_node("MatMul", ["r", "w1"], ["y"], "last"),
    ]
    return graph_of(nodes, [(8, 64)], weights)


def test_an_estimate_has_a_row_for_each_operator_and_one_for_each_type():
    report = elsewhere(model(), profile.find("jetson-nano"), 1)
    assert [row.op_type for row in report.rows if row.op_type == "MatMul"] == ["MatMul", "MatMul"]
    merged = {row.op_type: row for row in report.by_op_type()}
    assert merged["MatMul"].count == 2
    assert merged["MatMul"].estimate == pytest.approx(sum(r.estimate for r in report.rows if r.op_type == "MatMul"))
    assert sum(row.operations for row in report.by_op_type()) == sum(row.operations for row in report.rows)
    assert report.measured is None
    assert all(row.measured is None for row in report.by_op_type())


def test_a_slower_device_takes_longer():
    fast, slow = (elsewhere(model(), profile.find(name), 1).estimate for name in ("h200", "jetson-nano"))
    assert slow > fast > 0


def test_merged_rows_are_weighed_by_their_time():
    rows = [Row("a", "K", 1, 10, 1, 1.0, None, 0.5, "memory"), Row("b", "K", 1, 10, 1, 3.0, None, 0.1, "compute")]
    merged = _merged("K", rows)
    assert (merged.estimate, merged.bound) == (4.0, "compute")
    assert merged.roofline == pytest.approx((0.5 * 1 + 0.1 * 3) / 4)


def test_lengths_are_those_of_the_inputs():
    value = helper.make_tensor_value_info("x", 1, ("batch", "tokens", 4))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [value])
    found = lengths_of(helper.make_model(graph), {"x": np.zeros((2, 7, 4))})
    assert found == {"tokens": 7}
