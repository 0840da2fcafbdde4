"""What passes ask of a graph and how they edit it, on graphs small enough to see the answer."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import EdgekitError
from edgekit.graph import model as graphs
from edgekit.graph.model import chosen_weights, eliminate_dead_nodes, replace_tensor, set_tensor, unique_name
from tests.edgekit.passes.graphs import convolutional, dictionary, graph, mlp, normal, run

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def plain(inputs, outputs=(("y", FLOAT, ("batch", 4)),), stored=()):
    """A graph of one Identity whose inputs and outputs are (name, type, shape); shape None: of unknown rank."""
    made = [[helper.make_tensor_value_info(*value) for value in part] for part in (inputs, outputs)]
    node = helper.make_node("Identity", [inputs[0][0] if inputs else "w"], ["y"], "same")
    return helper.make_model(helper.make_graph([node], "g", *made, list(stored)))


def test_a_normalized_graph_has_unique_names_one_form_of_numbers_and_no_metadata():
    model = mlp().model
    for node, name in zip(model.graph.node, ["a", "", "a", "Add_1"], strict=True):
        node.name = name
    as_list = helper.make_tensor("up.bias", FLOAT, [48], normal(2, 48))
    next(item for item in model.graph.initializer if item.name == "up.bias").CopyFrom(as_list)
    strings = helper.make_tensor("words", TensorProto.STRING, [1], [b"word"])
    model.graph.initializer.append(strings)
    for item in (model, model.graph, *model.graph.node, *model.graph.initializer):
        item.doc_string = "from line 3"
        item.metadata_props.add(key="source", value="train.py")
    before = model.SerializeToString()
    result = graphs.normalized(model)
    assert model.SerializeToString() == before
    assert [node.name for node in result.graph.node] == ["a", "Add_1", "a_2", "Add_1_3"]
    for item in (result, result.graph, *result.graph.node, *result.graph.initializer):
        assert (item.doc_string, list(item.metadata_props)) == ("", [])
    tensors = {item.name: item for item in result.graph.initializer}
    assert all(tensors[name].raw_data for name in tensors if name != "words")
    assert np.array_equal(numpy_helper.to_array(tensors["up.bias"]), normal(2, 48))
    assert tensors["words"].string_data == [b"word"]


def uses(model):
    """Each weight: the axis that every product sums over, and its consumers as text."""
    return {item.name: ([use.axis for use in item.uses], item.consumers) for item in graphs.weights(model)}


def test_products_and_the_axes_that_they_sum_over():
    assert uses(mlp().model) == {"up": ([0], "h0.MatMul"), "down": ([1], "y.Gemm")}
    assert uses(convolutional().model) == {"c1": ([1], "a.Conv"), "c2": ([1], "d.Conv"), "out": ([0], "y.Gemm")}
    (tied, _) = graphs.weights(dictionary().model)
    assert (tied.axes, tied.shape, tied.consumers) == ({0, 1}, (32, 32), "a.MatMul, b.MatMul (transposed)")
    assert [(use.axis, use.transposed, use.activation) for use in tied.uses] == [(0, False, "x"), (1, True, "a")]


OTHER_USES = {  # nodes that read w (4, 4) -> axes of its products; all consumers
    "as the first factor": ([("MatMul", "w v", "y", {})], None),
    "by an operator that is no product": ([("Add", "x w", "y", {})], None),
    "by a product and a sum": ([("MatMul", "x w", "h", {}), ("Add", "h w", "y", {})], ([0], "h.MatMul, y.Add")),
    "by a Transpose that swaps nothing": (
        [("Transpose", "w", "t", {"perm": [0, 1]}), ("MatMul", "x t", "y", {})],
        None,
    ),
    "by a Transpose without perm": (
        [("Transpose", "w", "t", {}), ("MatMul", "x t", "y", {})],
        ([1], "y.MatMul (transposed)"),
    ),
    "by a sum before and behind a Transpose": (
        [
            ("Add", "x w", "h", {}),
            ("Transpose", "w", "t", {}),
            ("MatMul", "h t", "i", {}),
            ("Add", "i t", "y", {}),
        ],
        ([1], "i.MatMul (transposed), h.Add, y.Add"),
    ),
    "by two Transposes in a row": (
        [("Transpose", "w", "t", {}), ("Transpose", "t", "u", {}), ("MatMul", "x u", "y", {})],
        ([0], "y.MatMul"),
    ),
    "plain after transposed": (
        [("Transpose", "w", "t", {}), ("MatMul", "x t", "h", {}), ("MatMul", "h w", "y", {})],
        ([0, 1], "y.MatMul, h.MatMul (transposed)"),
    ),
    "by a Gemm with transB": ([("Gemm", "x w", "y", {"transB": 1})], ([1], "y.Gemm")),
    "by a Gemm with transA": ([("Gemm", "w2 w", "y", {"transA": 1})], None),
    "as an output of the graph": ([("MatMul", "x w", "y", {})], ([0], "y.MatMul, an output of the graph")),
}


@pytest.mark.parametrize("case", OTHER_USES)
def test_all_consumers_of_a_weight(case):
    nodes, expected = OTHER_USES[case]
    tensors = {"w": normal(1, 4, 4), "v": normal(2, 4), "w2": normal(3, 4, 4)}
    model = graph(nodes, tensors, {"x": ("batch", 4)}, {"y": (None,) * (1 if "w v" in nodes[0][1] else 2)}).model
    if "output" in case:
        model.graph.output.append(helper.make_tensor_value_info("w", FLOAT, (4, 4)))
    assert uses(model).get("w") == expected


def test_products_of_other_domains_and_in_branches_are_named_and_not_changed():
    model = graph([("MatMul", "x w", "y", {})], {"w": normal(1, 4, 4)}, {"x": ("batch", 4)}, {"y": ("batch", 4)}).model
    model.graph.node.append(helper.make_node("MatMul", ["x", "w"], ["z"], "theirs", domain="custom"))
    inner = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["b"], "inner")], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["d"], "choice", then_branch=inner, else_branch=inner))
    assert uses(model) == {"w": ([0], "y.MatMul, theirs, inner, inner")}
    model.graph.node[0].domain = "ai.onnx"
    assert uses(model)["w"][0] == [0]
    model.graph.node[0].domain = "custom"
    assert uses(model) == {}


@pytest.mark.parametrize(("shape", "dtype", "axes"), [((4,), "f4", None), ((4, 4), "f2", None), ((2, 4, 4), "f4", [1])])
def test_weights_are_float32_of_two_or_more_dimensions(shape, dtype, axes):
    made = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "m")], "g", [], [])
    made.initializer.append(numpy_helper.from_array(np.zeros(shape, dtype), "w"))
    found = graphs.weights(helper.make_model(made))
    assert [[use.axis for use in item.uses] for item in found] == ([] if axes is None else [axes])


@pytest.mark.parametrize(
    ("make", "include", "convolutions", "expected"),
    [
        (mlp, ("*",), False, ["up", "down"]),
        (mlp, ("d*", "nothing"), False, ["down"]),
        (convolutional, ("*",), False, ["out"]),
        (convolutional, ("*",), True, ["c1", "c2", "out"]),
        (convolutional, ("c?",), True, ["c1", "c2"]),
        (mlp, ("x*", "z"), False, r"no weight matches x\*, z; the graph has up, down"),
        (convolutional, ("c1",), False, "no weight matches c1; the graph has out"),
    ],
)
def test_chosen_weights(make, include, convolutions, expected):
    if isinstance(expected, str):
        with pytest.raises(EdgekitError, match=expected):
            chosen_weights(make().model, include, convolutions=convolutions)
    else:
        found = chosen_weights(make().model, include, convolutions=convolutions)
        assert [item.name for item in found] == expected


def test_a_stack_of_matrices_is_not_chosen():
    model = graph(
        [("MatMul", "x w", "y", {})], {"w": normal(1, 3, 4, 4)}, {"x": ("batch", 3, 2, 4)}, {"y": ("batch", 3, 2, 4)}
    ).model
    with pytest.raises(EdgekitError, match="the graph has no product"):
        chosen_weights(model, ("*",), convolutions=True)


def test_a_graph_without_products_has_nothing_to_choose():
    model = graph([("Relu", "x", "y", {})], {}, {"x": ("batch", 4)}, {"y": ("batch", 4)}).model
    with pytest.raises(EdgekitError, match="the graph has no product"):
        chosen_weights(model, ("*",))


def test_values_that_depend_on_no_input():
    model = graph(
        [
            ("Transpose", "w", "t", {}),
            ("Add", "t b", "s", {}),
            ("MatMul", "x s", "y", {}),
            ("Add", "y b", "z", {}),
            ("RandomNormal", "", "noise", {"shape": [4]}),
        ],
        {"w": normal(1, 4, 4), "b": normal(2, 4)},
        {"x": ("batch", 4)},
        {"z": ("batch", 4)},
    ).model
    assert graphs.stored_values(model) == {"w", "b", "t", "s"}
    model.graph.node.append(helper.make_node("Clip", ["b", "", "b"], ["clipped"]))
    assert "clipped" in graphs.stored_values(model), "an input left out is no unknown value"


def test_attributes_and_opset():
    node = helper.make_node("Gemm", ["a", "b"], ["y"], transB=1, alpha=0.5)
    assert [graphs.attribute(node, name, 7) for name in ("transB", "alpha", "beta")] == [1, 0.5, 7]
    made = helper.make_graph([], "g", [], [])
    opsets = [helper.make_opsetid("custom", 3), helper.make_opsetid("ai.onnx", 15)]
    assert graphs.opset(helper.make_model(made, opset_imports=opsets)) == 15
    assert graphs.opset(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)])) == 17
    assert graphs.opset(helper.make_model(made, opset_imports=opsets[:1])) == 1


def test_unique_names():
    assert [
        unique_name("a", taken) for taken in ((), ("b",), ("a",), ("a", "a_0"), ("a", "a_1"), iter(("a", "b")))
    ] == [
        "a",
        "a",
        "a_0",
        "a_1",
        "a_0",
        "a_0",
    ]
    made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name) for name in ("", "n", "n", "")], "g", [], [])
    model = helper.make_model(made)
    graphs.name_nodes(model)
    assert [node.name for node in model.graph.node] == ["Relu_0", "n", "n_2", "Relu_3"]


def test_a_stored_tensor_becomes_computed_and_its_consumers_keep_its_name():
    candidate, x = mlp(), normal(9, 5, 32)
    before, model = run(candidate, x), candidate.model
    model.graph.input.append(helper.make_tensor_value_info("down", FLOAT, (10, 48)))  # as old graphs list them
    half = numpy_helper.from_array(normal(3, 10, 48, scale=0.2) / 2, "half")
    twice = [
        helper.make_node("Identity", ["half"], ["same"], "first"),
        helper.make_node("Add", ["same", "half"], ["down"], "second"),
    ]
    replace_tensor(model, "down", [half], twice)
    assert [node.name for node in model.graph.node][:3] == ["first", "second", "h0.MatMul"]
    assert [item.name for item in model.graph.initializer] == ["up", "up.bias", "down.bias", "half"]
    assert [item.name for item in model.graph.input] == ["x"]
    np.testing.assert_allclose(run(candidate, x), before, rtol=1e-6)


def test_dead_nodes_and_tensors_go_until_none_is_left():
    candidate = mlp()
    graph_ = candidate.model.graph
    graph_.node.insert(0, helper.make_node("Relu", ["spare"], ["dead"], "dead1"))
    graph_.node.insert(1, helper.make_node("Relu", ["dead"], ["deader"], "dead2"))
    graph_.initializer.append(numpy_helper.from_array(normal(1, 3), "spare"))
    eliminate_dead_nodes(candidate.model)
    assert candidate.model == mlp().model
    assert graphs.value_names(candidate.model) == {
        "x",
        "y",
        "h0",
        "h1",
        "h2",
        "up",
        "up.bias",
        "down",
        "down.bias",
    }


def test_a_dead_tensor_that_an_old_graph_lists_among_its_inputs_leaves_no_input_behind():
    candidate, x = mlp(), normal(9, 5, 32)
    for name, shape in (("up", (32, 48)), ("spare", (3,))):
        candidate.model.graph.input.append(helper.make_tensor_value_info(name, FLOAT, shape))
    candidate.model.graph.initializer.append(numpy_helper.from_array(normal(1, 3), "spare"))
    eliminate_dead_nodes(candidate.model)
    assert [item.name for item in candidate.model.graph.input] == ["x", "up"]
    np.testing.assert_array_equal(run(candidate, x), run(mlp(), x))


def test_an_input_that_is_left_out_keeps_no_node_alive():
    """A node with an unnamed output is dead although another node has an unnamed input."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "w"], ["dead", "", "deviation"], "unread"),
        helper.make_node("Clip", ["x", "", "top"], ["y"], "clip"),
    ]
    stored = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in (("w", 4), ("top", ()))]
    made = helper.make_graph(nodes, "g", [], [helper.make_tensor_value_info("y", FLOAT, None)], stored)
    model = helper.make_model(made)
    eliminate_dead_nodes(model)
    assert [node.name for node in model.graph.node] == ["clip"]
    assert [item.name for item in model.graph.initializer] == ["top"]


def test_a_node_of_which_one_output_is_read_stays():
    made = helper.make_graph([helper.make_node("Split", ["x"], ["a", "y"], "s", num_outputs=2)], "g", [], [])
    made.output.append(helper.make_tensor_value_info("y", FLOAT, None))
    model = helper.make_model(made)
    eliminate_dead_nodes(model)
    assert [node.name for node in model.graph.node] == ["s"]


def test_new_values_keep_the_type_of_the_tensor():
    model = mlp().model
    set_tensor(model, "up", np.asfortranarray(np.arange(32 * 48, dtype=np.float64).reshape(32, 48)))
    tensor = next(item for item in model.graph.initializer if item.name == "up")
    assert tensor.data_type == FLOAT
    assert np.array_equal(numpy_helper.to_array(tensor), np.arange(32 * 48).reshape(32, 48))
    onnx.checker.check_model(model, full_check=True)
