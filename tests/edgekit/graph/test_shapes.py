"""Shapes of all values for given lengths: those that onnxruntime computes, and a few counted by hand."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.graph.shapes import LARGEST, Value, item_bytes, sized

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def graph(nodes, shape, stored=(), outputs=("y",), opset=17):
    """x of this shape -> outputs. nodes: (operator, "inputs", "outputs", attributes); "-" is an input left out."""
    made = [
        helper.make_node(op, [name.strip("-") for name in reads.split()], writes.split(), f"{op}{number}", **attributes)
        for number, (op, reads, writes, attributes) in enumerate(nodes)
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(stored).items()]
    x = helper.make_tensor_value_info("x", FLOAT, shape)
    # the output's shape is wrong on purpose: an exporter's guess at one batch size must not be believed
    ys = [helper.make_tensor_value_info(name, FLOAT, (1,)) for name in outputs]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("custom", 1)]
    return helper.make_model(helper.make_graph(made, "g", [x], ys, tensors), opset_imports=opsets, ir_version=10)


FLATTENED = [  # y = x.reshape(x.shape[0], x.shape[1] * x.shape[2]), as torch writes it
    ("Shape", "x", "all", {}),
    ("Gather", "all zero", "rows", {"axis": 0}),
    ("Gather", "all one", "left", {"axis": 0}),
    ("Shape", "x", "last", {"start": -1, "end": 3}),
    ("Squeeze", "last", "right", {}),
    ("Mul", "left right", "both", {}),
    ("Unsqueeze", "rows first", "rows1", {}),
    ("Unsqueeze", "both first", "both1", {}),
    ("Concat", "rows1 both1", "target", {"axis": 0}),
    ("Reshape", "x target", "y", {}),
]
NUMBERS = {"zero": np.int64(0), "one": np.int64(1), "first": np.array([0], np.int64)}
GRAPHS = {
    "arithmetic on shapes": (FLATTENED, ("batch", "tokens", 4), NUMBERS),
    "two rounds of it": (
        [
            *FLATTENED[:-1],
            ("Reshape", "x target", "h", {}),
            ("Shape", "h", "again", {}),
            ("ConstantOfShape", "again", "zeros", {}),
            ("Add", "zeros h", "y", {}),
        ],
        ("batch", "tokens", 4),
        NUMBERS,
    ),
    "a range by the length": (
        [
            ("Shape", "x", "end1", {"start": 1, "end": 2}),
            ("Squeeze", "end1", "end", {}),
            ("Range", "zero end one", "positions", {}),
            ("Gather", "table positions", "rows", {"axis": 0}),
            ("Add", "x rows", "y", {}),
        ],
        ("batch", "tokens", 4),
        {**NUMBERS, "table": np.zeros((20, 4), np.float32)},
    ),
    "a constant in a node": (
        [
            ("Constant", "", "target", {"value": numpy_helper.from_array(np.array([-1, 2], np.int64))}),
            ("Reshape", "x target", "y", {}),
        ],
        ("batch", 4),
        {},
    ),
    "a weight too large to copy": (
        [("MatMul", "x w", "y", {})],
        ("batch", 2),
        {"w": np.zeros((2, LARGEST), np.float32)},
    ),
    "noise": (
        [("Shape", "x", "all", {}), ("RandomNormalLike", "x", "noise", {}), ("Add", "x noise", "y", {})],
        ("batch", 4),
        {},
    ),
}


def shapes_at_run_time(model, x):
    """The shape of every value that a node computes, by onnxruntime."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    names = [name for node in model.graph.node for name in node.output]
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, (array.shape for array in session.run(None, {"x": x})), strict=True))


@pytest.mark.parametrize(("batch", "tokens"), [(1, 2), (3, 5)])
@pytest.mark.parametrize(("nodes", "shape", "stored"), GRAPHS.values(), ids=GRAPHS)
def test_shapes_are_those_of_a_run(nodes, shape, stored, batch, tokens):
    model = graph(nodes, shape, stored)
    before = model.SerializeToString()
    x = np.zeros([{"batch": batch, "tokens": tokens}.get(axis, axis) for axis in shape], np.float32)
    found = sized(model, batch, {"tokens": tokens})
    computed = shapes_at_run_time(model, x)
    assert {name: found.values[name].shape for name in computed} == computed
    assert found.values["x"] == Value(x.shape, FLOAT)
    assert found.stored == set(stored)
    assert {name: found.values[name].shape for name in stored} == {k: np.shape(v) for k, v in stored.items()}
    assert model.SerializeToString() == before


def test_known_values_are_those_that_depend_on_sizes_only():
    found = sized(graph(FLATTENED, ("batch", "tokens", 4), NUMBERS), 3, {"tokens": 5})
    assert {name: value.tolist() for name, value in found.known.items()} == {
        "all": [3, 5, 4],
        "rows": 3,
        "left": 5,
        "last": [4],
        "right": 4,
        "both": 20,
        "rows1": [3],
        "both1": [20],
        "target": [3, 20],
    }
    assert found.values["both"] == Value((), INT64)


@pytest.mark.parametrize(
    ("name", "given", "length"), [("tokens", {}, 2), ("9*faces", {}, 18), ("9*faces", {"9*faces": 27}, 27), ("", {}, 2)]
)
def test_an_open_axis_without_a_length_gets_twice_its_multiple(name, given, length):
    found = sized(graph([("Relu", "x", "y", {})], ("batch", name or None, 4)), 7, given)
    assert found.values["y"].shape == (7, length, 4)


def test_results_of_unknown_operators_are_unknown_unless_told():
    nodes = [("Mystery", "x", "h", {"domain": "custom"}), ("Relu", "h", "y", {})]
    model = graph(nodes, ("batch", 4))
    assert set(sized(model, 3).values) == {"x"}
    told = sized(model, 3, also={"h": Value((3, 9), FLOAT), "x": Value((1, 1), FLOAT)})
    assert {name: value.shape for name, value in told.values.items()} == {"x": (3, 4), "h": (3, 9), "y": (3, 9)}


def test_what_is_told_holds_through_every_round_of_arithmetic():
    nodes = [
        ("Mystery", "x", "h", {"domain": "custom"}),
        ("Shape", "h", "s", {}),
        ("Gather", "s one", "n", {"axis": 0}),
        ("Unsqueeze", "n first", "n1", {}),
        ("Concat", "n1 rest", "target", {"axis": 0}),
        ("Reshape", "h target", "y", {}),
    ]
    model = graph(nodes, ("batch", 4), {**NUMBERS, "rest": np.array([-1])})
    assert sized(model, 3, also={"h": Value((3, 9), FLOAT)}).values["y"].shape == (9, 3)


def test_arithmetic_follows_the_rules_of_the_graphs_opset():
    nodes = [
        ("Shape", "x", "s", {}),
        ("Gather", "s one", "n", {"axis": 0}),
        ("Unsqueeze", "n", "n1", {"axes": [0]}),  # an attribute before opset 13
        ("Concat", "n1 rest", "target", {"axis": 0}),
        ("Reshape", "x target", "y", {}),
    ]
    found = sized(graph(nodes, ("batch", 4), {"one": np.array(1), "rest": np.array([-1])}, opset=11), 3)
    assert found.known["target"].tolist() == [4, -1]
    assert found.values["y"].shape == (4, 3)


@pytest.mark.parametrize("length", [LARGEST, LARGEST + 1])
def test_a_constant_is_known_up_to_the_largest_size_of_a_shape(length):
    constant = numpy_helper.from_array(np.zeros(length, np.float32))
    found = sized(graph([("Constant", "", "c", {"value": constant}), ("Add", "x c", "y", {})], ("batch", length)), 2)
    assert found.values["y"].shape == (2, length)
    assert ("c" in found.known) == (length <= LARGEST)


def test_a_random_result_and_a_branch_are_never_constants():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["b"])], "b", [], [helper.make_tensor_value_info("b", FLOAT, (2,))]
    )
    nodes = [
        ("RandomNormal", "", "c", {"shape": [2]}),
        ("If", "yes", "d", {"then_branch": branch, "else_branch": branch}),
        ("Add", "x d", "y", {}),
    ]
    found = sized(graph(nodes, ("batch", 2), {"yes": np.array(True)}), 3)
    assert found.known == {}
    assert (found.values["c"].shape, found.values["y"].shape) == ((2,), (3, 2))


@pytest.mark.parametrize(
    ("dtype", "each"),
    [
        (FLOAT, 4),
        (INT64, 8),
        (TensorProto.FLOAT16, 2),
        (TensorProto.BOOL, 1),
        (TensorProto.INT8, 1),
        (TensorProto.INT4, 0.5),
        (TensorProto.UINT4, 0.5),
        (TensorProto.STRING, 16),
    ],
)
def test_bytes_of_a_value(dtype, each):
    assert item_bytes(dtype) == each
    assert (Value((3, 5), dtype).count, Value((3, 5), dtype).bytes) == (15, 15 * each)
    assert Value((), dtype).count == 1
