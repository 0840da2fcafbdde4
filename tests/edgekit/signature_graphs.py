"""Small graphs of every signature: batch in the middle, fixed, absent or unnamed; scalars; recurrent state."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
HIDDEN, FEATURES = 6, 4


def numbers(seed: int, *shape: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def model(nodes, inputs, outputs, stored=(), opset=17):
    made = [[helper.make_tensor_value_info(*item) for item in part] for part in (inputs, outputs)]
    tensors = [numpy_helper.from_array(array, name) for name, array in stored]
    graph = helper.make_graph(nodes, "g", *made, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def gru(batch="batch", time="time", *, state=True):
    """A GRU over x (time, batch, features) with its state (1, batch, hidden), as torch writes it: `after` is the state
    that follows. batch: a name, None for no name, or a length. state: whether it is an input, or zero at first."""
    stored = [
        ("W", numbers(1, 1, 3 * HIDDEN, FEATURES)),
        ("R", numbers(2, 1, 3 * HIDDEN, HIDDEN)),
        ("B", numbers(3, 1, 6 * HIDDEN)),
        ("axes", np.array([1], np.int64)),
    ]
    nodes = [
        helper.make_node(
            "GRU", ["x", "W", "R", "B", *(["", "before"] if state else [])], ["all", "after"], "gru", hidden_size=HIDDEN
        ),
        helper.make_node("Squeeze", ["all", "axes"], ["y"], "squeeze"),
    ]
    shape = (1, batch, HIDDEN)
    unnamed = (None, None, None) if batch is None else shape
    return model(
        nodes,
        [("x", FLOAT, (time, batch, FEATURES)), ("before", FLOAT, shape)][: 1 + state],
        [("y", FLOAT, (time, batch, HIDDEN)), ("after", FLOAT, unnamed)][: 1 + state],
        stored,
    )


def classifying_gru():
    """The GRU, and classes of its last step: logits (batch, 256)."""
    graph = gru()
    graph.graph.node.extend(
        [
            helper.make_node("Gather", ["y", "last"], ["final"], "final", axis=0),
            helper.make_node("MatMul", ["final", "dense"], ["logits"], "dense"),
        ]
    )
    tensors = (("last", np.array(-1, np.int64)), ("dense", 8 * numbers(15, HIDDEN, 256)))
    graph.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tensors)
    graph.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", FLOAT, ("batch", 256)))
    return graph


def gain(shape=("batch", FEATURES)):
    """x times a scalar input, through a weight."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "matmul"),
        helper.make_node("Mul", ["h", "gain"], ["y"], "mul"),
    ]
    out = (*shape[:-1], HIDDEN)
    return model(
        nodes, [("x", FLOAT, shape), ("gain", FLOAT, ())], [("y", FLOAT, out)], [("w", numbers(4, FEATURES, HIDDEN))]
    )


def linear(shape, out):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")]
    return model(nodes, [("x", FLOAT, shape)], [("y", FLOAT, out)], [("w", numbers(5, FEATURES, HIDDEN))])


def two_sequences():
    """Scores of queries (batch, q, features) against keys (batch, k, features): two free lengths."""
    nodes = [
        helper.make_node("MatMul", ["query", "w"], ["projected"], "project"),
        helper.make_node("Transpose", ["keys"], ["turned"], "transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["projected", "turned"], ["scores"], "scores"),
    ]
    return model(
        nodes,
        [("query", FLOAT, ("batch", "q", FEATURES)), ("keys", FLOAT, ("batch", "k", FEATURES))],
        [("scores", FLOAT, ("batch", "q", "k"))],
        [("w", numbers(6, FEATURES, FEATURES))],
    )


def branching():
    """A rate chooses between two layers whose weights are in the branches of an If, under the same names."""

    def branch(name, seed):
        weight = numpy_helper.from_array(numbers(seed, FEATURES, HIDDEN), "value")
        nodes = [
            helper.make_node("Constant", [], ["w"], value=weight),
            helper.make_node("MatMul", ["x", "w"], ["out"], "matmul"),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info("out", FLOAT, None)])

    nodes = [
        helper.make_node("Equal", ["rate", "high"], ["is_high"], "equal"),
        helper.make_node("If", ["is_high"], ["y"], "if", then_branch=branch("t", 7), else_branch=branch("e", 8)),
    ]
    return model(
        nodes,
        [("x", FLOAT, ("batch", FEATURES)), ("rate", INT64, ())],
        [("y", FLOAT, ("batch", HIDDEN))],
        [("high", np.array(16000, np.int64))],
    )


def growing():
    """The state is the cosine of four times itself and of the input: small differences grow with every call."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "matmul"),
        helper.make_node("Mul", ["before", "rate"], ["faster"], "mul"),
        helper.make_node("Add", ["h", "faster"], ["angle"], "add"),
        helper.make_node("Cos", ["angle"], ["after"], "cos"),
        helper.make_node("Sin", ["angle"], ["y"], "sin"),
    ]
    state = ("batch", HIDDEN)
    stored = [("w", numbers(9, FEATURES, HIDDEN)), ("rate", np.full(HIDDEN, 4, np.float32))]
    inputs = [("x", FLOAT, ("batch", FEATURES)), ("before", FLOAT, state)]
    return model(nodes, inputs, [("y", FLOAT, state), ("after", FLOAT, state)], stored)


def power():
    """The square of a projection, as in a spectrum: another sign of the projection changes nothing."""
    nodes = [
        helper.make_node("MatMul", ["x", "basis"], ["spectrum"], "project"),
        helper.make_node("Mul", ["spectrum", "spectrum"], ["power"], "square"),
        helper.make_node("MatMul", ["power", "w"], ["y"], "matmul"),
    ]
    stored = [("basis", numbers(10, FEATURES, HIDDEN)), ("w", numbers(11, HIDDEN, 3))]
    return model(nodes, [("x", FLOAT, ("batch", FEATURES))], [("y", FLOAT, ("batch", 3))], stored)


def running_sum():
    """Sums of x along its first axis, times a scalar."""
    nodes = [
        helper.make_node("CumSum", ["x", "axis"], ["sums"], "sums"),
        helper.make_node("MatMul", ["sums", "w"], ["h"], "matmul"),
        helper.make_node("Mul", ["h", "gain"], ["y"], "mul"),
    ]
    stored = [("axis", np.array(0, np.int64)), ("w", numbers(12, FEATURES, HIDDEN))]
    inputs = [("x", FLOAT, ("n", FEATURES)), ("gain", FLOAT, ())]
    return model(nodes, inputs, [("y", FLOAT, ("n", HIDDEN))], stored)
