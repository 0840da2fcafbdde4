"""The clean-up before any pass: older opsets, batch normalization, shape computations, branches. The function stays."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import edgekit
from edgekit.graph import simplify
from edgekit.graph.model import normalized, opset
from edgekit.graph.signature import of_model
from edgekit.graph.simplify import LEAST_OPSET, NEWER, simplified
from edgekit.importers import onnx as importer
from edgekit.passes.base import Context, GraphCandidate
from edgekit.passes.static_int8 import StaticInt8
from tests.edgekit.signature_graphs import FLOAT, INT64, branching, model, numbers


def outputs(graph, rows):
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, rows)[0]


def operators(graph):
    return [node.op_type for node in graph.graph.node]


def convolutional(version):
    """Conv, BatchNormalization, Relu, a pool and a Softmax over what follows, in any opset; Softmax changed in 13."""
    size = 8
    stored = [
        ("w", numbers(1, size, 3, 3, 3)),
        ("gamma", 1 + numbers(2, size)),
        ("beta", numbers(3, size)),
        ("mean", numbers(4, size)),
        ("variance", 1 + np.abs(numbers(5, size))),
        ("dense", numbers(6, size, 5)),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "variance"], ["n"], "norm", epsilon=1e-3),
        helper.make_node("Relu", ["n"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("MatMul", ["f", "dense"], ["d"], "matmul"),
        helper.make_node("Softmax", ["d"], ["y"], "softmax", axis=1),
    ]
    return model(nodes, [("x", FLOAT, ("batch", 3, 8, 8))], [("y", FLOAT, ("batch", 5))], stored, opset=version)


@pytest.mark.parametrize("version", range(7, 21))
def test_every_opset_from_7_to_20_becomes_one_that_passes_take(version):
    graph = convolutional(version)
    onnx.checker.check_model(graph)
    found = simplified(normalized(graph))
    assert opset(found) == (version if version >= LEAST_OPSET else NEWER)
    assert "BatchNormalization" not in operators(found)
    rows = {"x": np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)}
    assert np.abs(outputs(found, rows) - outputs(graph, rows)).max() < 1e-6


@pytest.mark.parametrize("version", [7, 9, 12])
def test_an_old_graph_is_imported_and_quantized(version):
    bundle = edgekit.import_onnx(convolutional(version), name="old")
    graph = bundle.graph()
    inputs, expected = bundle.golden()
    assert opset(graph) == NEWER
    from edgekit.data.dataset import Dataset

    data = Dataset(inputs, np.zeros(len(inputs["x"]), np.int64))
    int8 = StaticInt8().apply(GraphCandidate(graph), Context(data, None, 0, inputs=bundle.manifest.inputs))
    assert "QuantizeLinear" in operators(int8.model)
    assert np.abs(outputs(int8.model, inputs) - expected["y"]).max() < 0.05


def test_files_that_list_stored_tensors_as_inputs_are_converted_too():
    graph = convolutional(7)
    graph.ir_version = 3
    graph.graph.input.extend(
        helper.make_tensor_value_info(item.name, item.data_type, item.dims) for item in graph.graph.initializer
    )
    onnx.checker.check_model(graph)
    found = simplified(normalized(graph))
    assert [value.name for value in found.graph.input] == ["x"]
    assert opset(found) == NEWER


def reshaped():
    """A branch by arithmetic on a shape, as torch writes it; the lengths of all axes but the batch are known."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], "shape"),
        helper.make_node("Gather", ["shape", "one"], ["channels"], "gather"),
        helper.make_node("Equal", ["channels", "three"], ["is_three"], "equal"),
        helper.make_node(
            "If",
            ["is_three"],
            ["y"],
            "if",
            then_branch=branch("then", "Relu"),
            else_branch=branch("else", "Neg"),
        ),
    ]
    stored = [("one", np.array(1, np.int64)), ("three", np.array(3, np.int64))]
    return model(nodes, [("x", FLOAT, ("batch", 3, 8))], [("y", FLOAT, ("batch", 3, 8))], stored)


def branch(name, operator):
    node = helper.make_node(operator, ["x"], ["out"], operator)
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info("out", FLOAT, None)])


def test_a_branch_that_depends_on_a_known_length_is_inlined():
    found = simplified(normalized(reshaped()))
    assert operators(found) == ["Relu"]
    rows = {"x": np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)}
    assert np.array_equal(outputs(found, rows), outputs(reshaped(), rows))


def test_a_branch_that_depends_on_a_free_length_stays():
    graph = reshaped()
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "channels"
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "channels"
    found = simplified(normalized(graph))
    assert "If" in operators(found)
    for channels in (3, 5):
        rows = {"x": np.random.default_rng(2).standard_normal((2, channels, 8)).astype(np.float32)}
        assert np.array_equal(outputs(found, rows), outputs(graph, rows))


def test_weights_of_branches_are_stored_by_the_graph_under_names_of_their_own():
    found = simplified(normalized(branching()))
    tensors = {item.name: numpy_helper.to_array(item) for item in found.graph.initializer}
    assert sorted(array.shape for array in tensors.values()) == [(), (4, 6), (4, 6)]
    for rate in (16000, 8000):
        rows = {"x": numbers(13, 3, 4), "rate": np.array(rate, np.int64)}
        assert np.array_equal(outputs(found, rows), outputs(branching(), rows))


def test_a_normalization_whose_convolution_has_another_consumer_stays():
    graph = convolutional(17)
    graph.graph.output.append(helper.make_tensor_value_info("c", FLOAT, ("batch", 8, 8, 8)))
    assert "BatchNormalization" in operators(simplified(normalized(graph)))


def test_the_importer_keeps_the_graph_if_the_simpler_one_gives_other_outputs(monkeypatch):
    """The planted defect forgets the epsilon of a normalization, and adds it to the mean instead."""
    graph = normalized(convolutional(17))
    content = graph.SerializeToString()
    signature = of_model(graph)
    rows = {"x": np.random.default_rng(3).standard_normal((4, 3, 8, 8)).astype(np.float32)}
    expected = {"y": outputs(graph, rows)}
    assert operators(onnx.load_from_string(importer._simpler(graph, content, signature, rows, expected)))[1] == "Relu"
    right = simplify.normalization
    monkeypatch.setattr(simplify, "normalization", lambda found, epsilon: (right(found, epsilon)[0], found[1] + 0.1))
    unfolded = onnx.load_from_string(importer._simpler(graph, content, signature, rows, expected))
    assert operators(unfolded)[1] == "BatchNormalization"
    monkeypatch.setattr(simplify, "_remove_identities", lambda model: model.graph.node.pop() and False)
    assert importer._simpler(graph, content, signature, rows, expected) == content


def test_a_loop_keeps_its_body():
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"], "go"),
            helper.make_node("Add", ["sum", "x"], ["more"], "add"),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", INT64, ()),
            helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, ()),
            helper.make_tensor_value_info("sum", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", onnx.TensorProto.BOOL, ()),
            helper.make_tensor_value_info("more", FLOAT, None),
        ],
    )
    nodes = [helper.make_node("Loop", ["three", "", "x"], ["y"], "loop", body=body)]
    graph = model(nodes, [("x", FLOAT, ("batch", 4))], [("y", FLOAT, ("batch", 4))], [("three", np.array(3, np.int64))])
    rows = {"x": numbers(14, 2, 4)}
    found = simplified(normalized(graph))
    assert np.abs(outputs(found, rows) - 4 * rows["x"]).max() < 1e-6
    assert np.array_equal(outputs(found, rows), outputs(graph, rows))
