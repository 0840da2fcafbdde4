"""One index of a graph: producers, consumers, stored tensors; subgraphs count as consumers."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.graph.index import Index, element_types


def value(name):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])


@pytest.fixture
def model():
    """y = MatMul(x, w) + (x, or relu(h), by a condition); h is read by the graph, by a branch, and as an output."""
    branches = {
        "then_branch": helper.make_graph([helper.make_node("Relu", ["h"], ["t"], "inner")], "then", [], [value("t")]),
        "else_branch": helper.make_graph(
            [helper.make_node("Identity", ["x"], ["e"], "other")], "else", [], [value("e")]
        ),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "product"),
        helper.make_node("If", ["condition"], ["chosen"], "choice", **branches),
        helper.make_node("Add", ["h", "h"], ["twice"], "double"),
        helper.make_node("Add", ["twice", "chosen"], ["y"], "sum"),
    ]
    stored = [
        numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"),
        numpy_helper.from_array(np.array(True), "condition"),
        numpy_helper.from_array(np.zeros(3, np.float32), "unread"),
    ]
    graph = helper.make_graph(nodes, "g", [value("x")], [value("y"), value("h")], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_producers_and_stored_tensors(model):
    index = Index(model)
    assert {name: node.name for name, node in index.producers.items()} == {
        "h": "product", "chosen": "choice", "twice": "double", "y": "sum",
    }  # fmt: skip
    assert set(index.initializers) == {"w", "condition", "unread"}
    assert index.outputs == {"y", "h"}
    assert {"x", "w", "h", "t", "e", "unread"} <= index.values


def test_every_reading_is_counted_in_branches_and_as_outputs_too(model):
    index = Index(model)
    found = [(item.node and item.node.name, item.slot, item.nested) for item in index.consumptions("h")]
    assert sorted(found, key=str) == sorted(
        [("double", 0, False), ("double", 1, False), ("inner", 0, True), (None, -1, False)], key=str
    )
    assert [node.name for node in index.consumers("h")] == ["double", "double"]
    assert index.is_consumed("x")
    assert not index.is_consumed("unread")
    assert index.consumptions("nothing") == []


def test_an_output_of_a_branch_is_read_by_the_node_that_holds_the_branch(model):
    (found,) = Index(model).consumptions("t")
    assert (found.node.name, found.slot, found.nested) == ("choice", -1, True)
    assert Index(model).consumers("t") == []
    assert Index(model).only_consumer("t") is None


@pytest.mark.parametrize(("name", "only"), [("twice", "sum"), ("h", None), ("x", None), ("y", None), ("w", "product")])
def test_a_value_has_one_consumer_only_if_nothing_else_reads_it(name, only, model):
    found = Index(model).only_consumer(name)
    assert (found and found.name) == only


def test_values_of_subgraphs_without_a_consumer_are_values_too(model):
    """A new value of the graph must not have the name of one, which ONNX forbids."""
    branch = model.graph.node[1].attribute[0].g
    branch.node.append(helper.make_node("Relu", ["h"], ["inner.unread"], "dead"))
    branch.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "inner.stored"))
    assert {"inner.unread", "inner.stored"} <= Index(model).values


def test_an_index_describes_the_graph_as_it_was(model):
    before = Index(model)
    model.graph.node.append(helper.make_node("Relu", ["unread"], ["r"], "late"))
    assert not before.is_consumed("unread")
    assert Index(model).is_consumed("unread")


def test_element_types_of_stored_given_and_computed_values(model):
    found = element_types(model)
    assert {found[name] for name in ("x", "w", "h", "y")} == {TensorProto.FLOAT}
    assert found["condition"] == TensorProto.BOOL
