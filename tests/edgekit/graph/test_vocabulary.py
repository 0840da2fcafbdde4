"""The number of ids that an input may hold, from the table that it reads."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.graph.vocabulary import vocabularies


def model_of(*nodes, **tensors):
    ids = helper.make_tensor_value_info("ids", TensorProto.INT32, ["batch", "tokens"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    return helper.make_model(helper.make_graph(list(nodes), "g", [ids], [y], stored))


TABLE = np.ones((50, 4), np.float32)
GATHER = helper.make_node("Gather", ["table", "ids"], ["y"])
CAST = helper.make_node("Cast", ["ids"], ["wide"], to=7)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (model_of(GATHER, table=TABLE), 50),
        (model_of(CAST, helper.make_node("Gather", ["table", "wide"], ["y"]), table=TABLE), 50),
        (
            model_of(
                helper.make_node("DequantizeLinear", ["codes", "scale"], ["table"]),
                GATHER,
                codes=TABLE.astype(np.int8),
                scale=np.array(0.1, np.float32),
            ),
            50,
        ),
        (
            model_of(
                CAST,
                helper.make_node("OneHot", ["wide", "depth", "values"], ["y"]),
                depth=np.array(257, np.int64),
                values=np.array([0, 1], np.float32),
            ),
            257,
        ),
        (model_of(GATHER, helper.make_node("Gather", ["small", "ids"], ["z"]), table=TABLE, small=TABLE[:7]), 7),
        (model_of(helper.make_node("Add", ["ids", "ids"], ["y"])), None),
        (model_of(helper.make_node("Gather", ["ids", "one"], ["y"]), one=np.array([0], np.int64)), None),
    ],
    ids=["gather", "cast", "codes", "one hot", "the smaller table", "no table", "gathered itself"],
)
def test_the_vocabulary_of_an_input(model, expected):
    assert vocabularies(model).get("ids") == expected


def test_a_long_chain_and_odd_tables_are_no_error():
    """A stranger's graph: 20,000 nodes in a row, a table along an axis that it lacks, and a depth without a number."""
    chain = [helper.make_node("Identity", [f"v{k}" if k else "x"], [f"v{k + 1}"]) for k in range(20_000)]
    tables = [
        numpy_helper.from_array(np.zeros((5, 2), np.float32), "table"),
        numpy_helper.from_array(np.zeros(0, np.float32), "depth"),
    ]
    odd = [
        helper.make_node("Gather", ["table", "x"], ["far"], axis=1 << 40),
        helper.make_node("OneHot", ["x", "depth", "depth"], ["hot"]),
        helper.make_node("Gather", ["table", "v20000"], ["row"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.INT64, [None, 4])
    graph = helper.make_graph([*chain, *odd], "g", [given], [], tables)
    assert vocabularies(helper.make_model(graph)) == {"x": 5}
