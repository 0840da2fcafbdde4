"""The description of a bundle: its sizes, its tensors, and the bundles from which it was made."""

from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekit.compression.describe import ancestry, describe, tensor_rows
from edgekit.importers.api import import_onnx


def product(weight: np.ndarray):
    """Return a bundle of the graph y = x W."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", len(weight)))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", weight.shape[1]))],
        [numpy_helper.from_array(weight, "w")],
    )
    return import_onnx(onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_the_tensors_of_a_graph_are_counted():
    weight = np.ones((4, 3), np.float32)
    weight[0] = 0
    assert tensor_rows(product(weight)) == [
        {"name": "w", "shape": [4, 3], "encoding": "float32", "zeros": 0.25, "bytes": 48}
    ]


def test_the_tensors_of_a_network_have_its_shapes(toy):
    rows = {row["name"]: row for row in tensor_rows(toy("palette"))}
    shapes = {name: list(value.shape) for name, value in toy().weights().items()}
    assert {name: row["shape"] for name, row in rows.items()} == shapes
    assert {row["encoding"] for row in rows.values() if len(row["shape"]) == 2} == {"palette 4 bit"}


def test_a_bundle_in_memory_has_no_path_and_no_exports(toy):
    found = describe(toy())
    assert (found["path"], found["exports"]) == (None, [])
    assert found["parameters"] == sum(value.size for value in toy().weights().values())


def test_the_parent_of_a_bundle_without_records_is_its_ancestor(toy):
    alone, child = toy(), replace(toy(), manifest=replace(toy().manifest, parent="ab" * 32))
    assert [step["digest"] for step in ancestry(alone)] == [alone.digest]
    assert [step["digest"] for step in ancestry(child)] == ["ab" * 32, child.digest]
