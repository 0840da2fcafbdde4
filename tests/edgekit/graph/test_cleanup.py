"""A traced graph becomes readable and computes the same: small traces, each with one thing to clean."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.graph.cleanup import shapes, strip, tidy

FLOAT = TensorProto.FLOAT
W = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
SQUARE = np.arange(16, dtype=np.float32).reshape(4, 4) / 9
BIAS = np.float32([1, 2, 3])
CUBE = np.arange(8, dtype=np.float32).reshape(2, 2, 2)


def traced(lines, stored, shape, output):
    """A graph as torch's tracer writes it. lines: MODULE Operator inputs -> outputs {attributes}, with "." for the
    network itself. Stored values called network.NAME are parameters; the others come from Constant nodes."""
    parameters = [numpy_helper.from_array(value, name) for name, value in stored.items() if name.startswith("network.")]
    constants = [
        helper.make_node("Constant", [], [name], f"/network/Constant_{name}", value=numpy_helper.from_array(value))
        for name, value in stored.items()
        if not name.startswith("network.")
    ]
    nodes = []
    for number, line in enumerate(lines):
        text, _, attributes = line.partition("{")
        (module, op, *reads), writes = (part.split() for part in text.split("->"))
        name = "/network/" + f"{module}/" * (module != ".") + f"{op}_{number}"
        reads = [name.strip("-") for name in reads]
        nodes.append(helper.make_node(op, reads, writes, name, **json.loads("{" + attributes if attributes else "{}")))
    x = helper.make_tensor_value_info("x", FLOAT, shape)
    ys = [helper.make_tensor_value_info(name, FLOAT, axes) for name, axes in output.items()]
    graph = helper.make_graph([*constants, *nodes], "trace", [x], ys, parameters)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


SIX = np.ones(6, np.float32)
PAIR = [
    ". Identity network.a.weight -> network.b.weight",
    "a MatMul x network.a.weight -> h",
    "b MatMul h network.b.weight -> y",
]
# name: the trace's lines, stored values, shapes of x and y; the nodes and stored tensors expected; options of tidy
CASES = {
    "a linear layer stores its weight transposed": (
        [
            'fc Transpose network.fc.weight -> t {"perm": [1, 0]}',
            "fc MatMul x t -> m",
            "fc Add m network.fc.bias -> y",
        ],
        {"network.fc.weight": W, "network.fc.bias": BIAS},
        (("batch", 4), ("batch", 3)),
        ["fc.MatMul: x, fc.weight -> fc.MatMul", "fc.Add: fc.MatMul, fc.bias -> y"],
        {"fc.weight": W.T, "fc.bias": BIAS},
        {},
    ),
    "a matrix that is read both ways is stored once": (
        [". MatMul x network.D -> a", '. Transpose network.D -> t {"perm": [1, 0]}', ". MatMul a t -> y"],
        {"network.D": SQUARE},
        (("batch", 4), ("batch", 4)),
        ["MatMul_0: x, D -> MatMul_0", "Transpose: D -> Transpose", "MatMul_1: MatMul_0, Transpose -> y"],
        {"D": SQUARE},
        {},
    ),
    "a parameter in two other layouts is stored in both": (
        [
            '. Transpose network.w -> t {"perm": [0, 2, 1]}',
            ". MatMul x t -> a",
            '. Transpose network.w -> u {"perm": [2, 1, 0]}',
            ". MatMul a u -> y",
        ],
        {"network.w": CUBE},
        (("batch", 2, 2, 2), ("batch", 2, 2, 2)),
        ["MatMul_0: x, w -> MatMul_0", "MatMul_1: MatMul_0, w.transposed -> y"],
        {"w": CUBE.transpose(0, 2, 1), "w.transposed": CUBE.transpose(2, 1, 0)},
        {},
    ),
    "equal parameters, which the tracer merges, keep their names": (
        PAIR,
        {"network.a.weight": SQUARE},
        (("batch", 4), ("batch", 4)),
        ["a.MatMul: x, a.weight -> a.MatMul", "b.MatMul: a.MatMul, b.weight -> y"],
        {"a.weight": SQUARE, "b.weight": SQUARE},
        {},
    ),
    "tied parameters are one": (
        PAIR,
        {"network.a.weight": SQUARE},
        (("batch", 4), ("batch", 4)),
        ["a.MatMul: x, a.weight -> a.MatMul", "b.MatMul: a.MatMul, a.weight -> y"],
        {"a.weight": SQUARE},
        {"tied": {"b.weight": "a.weight"}},
    ),
    "a target with one unknown axis is a constant": (
        [
            ". Shape x -> s",
            '. Gather s zero -> n {"axis": 0}',
            ". Unsqueeze n first -> n1",
            '. Concat n1 rest -> t {"axis": 0}',
            ". Reshape x t -> y",
        ],
        {"zero": np.array(0), "first": np.array([0]), "rest": np.array([12])},
        (("batch", 3, 4), ("batch", 12)),
        ["Reshape: x, Reshape.shape -> y"],
        {"Reshape.shape": np.array([-1, 12])},
        {},
    ),
    "a target with two unknown axes is computed": (
        [". Shape x -> s", ". Reshape network.w s -> y"],
        {"network.w": SIX},
        (("batch", "tokens"), ("batch", "tokens")),
        ["Shape: x -> Shape", "Reshape: w, Shape -> y"],
        {"w": SIX},
        {},
    ),
    "what does nothing and what nobody reads disappears": (
        [
            ". Identity x -> i",
            ". Shape x -> s",
            ". Expand i s -> e",
            ". Relu e -> y",
            ". Exp y -> dead",
            ". Neg dead -> deader",
        ],
        {},
        (("batch", 4), ("batch", 4)),
        ["Relu: x -> y"],
        {},
        {},
    ),
    "an output keeps its Identity, and an Expand that repeats stays": (
        [". Expand x to -> e", ". Identity e -> y"],
        {"to": np.array([1, 3, 4])},
        (("batch", 1, 4), ("batch", 3, 4)),
        ["Expand: x, Expand.operand1 -> Expand", "Identity: Expand -> y"],
        {"Expand.operand1": np.array([1, 3, 4])},
        {},
    ),
    "constants are named after buffers or their first consumers, and shapes are shared": (
        [
            ". Mul two x -> a",
            ". Add a pe -> b",
            "q Reshape b t1 -> c",
            "k Reshape c t2 -> d",
            ". Tile d repeats -> e",
            ". Unsqueeze e axes -> y",
        ],
        {
            "two": np.array(2, np.float32),
            "pe": BIAS,
            "t1": np.array([-1, 3]),
            "t2": np.array([-1, 3]),
            "repeats": np.array([1, 2]),
            "axes": np.array([1]),
        },
        (("batch", 3), ("batch", 1, 6)),
        [
            "Mul: Mul.operand0, x -> Mul",
            "Add: Mul, embed.positions -> Add",
            "q.Reshape: Add, q.Reshape.shape -> q.Reshape",
            "k.Reshape: q.Reshape, q.Reshape.shape -> k.Reshape",
            "Tile: k.Reshape, Tile.repeats -> Tile",
            "Unsqueeze: Tile, Unsqueeze.axes -> y",
        ],
        {
            "Mul.operand0": np.array(2, np.float32),
            "embed.positions": BIAS,
            "q.Reshape.shape": np.array([-1, 3]),
            "Tile.repeats": np.array([1, 2]),
            "Unsqueeze.axes": np.array([1]),
        },
        {"buffers": {"scale": np.array(2, np.float32), "whole": np.array([1, 2, 3]), "embed.positions": BIAS}},
    ),
    "several nodes of a module are numbered, and so are further outputs": (
        [
            "m.0 Add x x -> a",
            "m.0 Add a x -> b",
            "m.1 Add b x -> c",
            'm.1 Split c -> d e {"axis": 1}',
            "m.1 Clip d - network.top -> f",
            ". Mul f e -> y",
        ],
        {"network.top": np.array(3, np.float32)},
        (("batch", 4), ("batch", 2)),
        [
            "m.0.Add_0: x, x -> m.0.Add_0",
            "m.0.Add_1: m.0.Add_0, x -> m.0.Add_1",
            "m.1.Add: m.0.Add_1, x -> m.1.Add",
            "m.1.Split: m.1.Add -> m.1.Split, m.1.Split:1",
            "m.1.Clip: m.1.Split, , top -> m.1.Clip",
            "Mul: m.1.Clip, m.1.Split:1 -> y",
        ],
        {"top": np.array(3, np.float32)},
        {},
    ),
    "arithmetic on parameters is folded": (
        ["n Mul network.n.g two -> g2", "n Exp g2 -> g3", "n Mul x g3 -> y"],
        {"network.n.g": BIAS, "two": np.array(2, np.float32)},
        (("batch", 3), ("batch", 3)),
        ["n.Mul: x, n.Mul.operand1 -> y"],
        {"n.Mul.operand1": np.exp(BIAS * 2)},
        {},
    ),
}


def trace(case):
    lines, stored, (before, after), *_ = CASES[case]
    return traced(lines, stored, before, {"y": after})


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("case", CASES)
def test_a_trace_becomes_readable_and_computes_the_same(case):
    model, (*_, nodes, stored, options) = trace(case), CASES[case]
    tidied = onnx.ModelProto()
    tidied.CopyFrom(model)
    tidy(tidied, "network", options.get("buffers", {}), options.get("tied", {}))
    assert [f"{n.name}: {', '.join(n.input)} -> {', '.join(n.output)}" for n in tidied.graph.node] == nodes
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in tidied.graph.initializer}
    assert list(found) == list(stored)
    for name, array in stored.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    onnx.checker.check_model(tidied, full_check=True)
    axes = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim][1:]
    rows = 6 if axes == [0] else 5  # six numbers are reshaped to x's shape
    x = np.random.default_rng(0).normal(size=(rows, *(axis or 1 for axis in axes))).astype(np.float32)
    np.testing.assert_allclose(run(tidied, x), run(model, x), rtol=1e-6)


def test_a_stripped_graph_keeps_no_trace_of_its_source():
    model = trace("tied parameters are one")
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    graph = stripped.graph
    everything = [stripped, graph, *graph.node, *graph.input, *graph.output, *graph.initializer]
    for item in everything:
        item.doc_string = "train.py:3"
        item.metadata_props.add(key="stack", value="train.py")
    strip(stripped)
    assert "train" not in str(stripped)
    assert [node.name for node in graph.node] == [node.name for node in model.graph.node]


def test_shapes_of_open_named_and_unknown_axes():
    model = traced([". Relu x -> h", ". Neg h -> y"], {}, ("batch", None, 4), {"y": (None, 2, 4)})
    assert {name: shapes(model)[name] for name in "xy"} == {"x": ("batch", None, 4), "y": ("batch", 2, 4)}
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 5
    with pytest.raises(onnx.shape_inference.InferenceError, match="5"):
        shapes(model)
