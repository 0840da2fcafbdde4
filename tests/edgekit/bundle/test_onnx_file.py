"""The file `graph.onnx`: what is refused, which numbers count as learnt, and weights that leave and come back."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.onnx_file import LEAST, learnt, load, parameters, serialized, with_weights, without_weights
from edgekit.errors import EdgekitError

DTYPES = ("float32", "float16", "int8", "uint8", "int32", "float64", "int64", "bool")
COUNTED = {name for name in DTYPES if name != "int64"}  # int64 is for shapes and axes
PACKED = {"float32", "float16", "int8", "uint8", "int32"}


def graph_of(tensors) -> onnx.ModelProto:
    """A valid graph that stores these tensors beside the weight of its one product."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 2))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("batch", 4))
    stored = [numpy_helper.from_array(np.arange(8, dtype=np.float32).reshape(2, 4), "weight"), *tensors]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")], "g", [x], [y], stored
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def tensors_of(length):
    rng = np.random.default_rng(length)
    return [numpy_helper.from_array(rng.integers(0, 2, length).astype(dtype), f"{dtype}_{length}") for dtype in DTYPES]


def test_learnt_is_what_has_enough_numbers_of_a_type_that_is_not_for_shapes():
    model = graph_of([*tensors_of(LEAST - 1), *tensors_of(LEAST), numpy_helper.from_array(np.float32(3), "scalar")])
    assert {tensor.name for tensor in learnt(model)} == {"weight"} | {f"{dtype}_{LEAST}" for dtype in COUNTED}
    assert parameters(model) == 8 + LEAST * len(COUNTED)


def test_weights_leave_the_file_and_come_back_bit_for_bit():
    content = serialized(graph_of([*tensors_of(5000), *tensors_of(3)]))
    skeleton, arrays = without_weights(content)
    assert set(arrays) == {"weight"} | {f"{dtype}_5000" for dtype in PACKED}
    assert len(content) - len(skeleton) > sum(array.nbytes for array in arrays.values())
    assert with_weights(skeleton, arrays) == content
    arrays["weight"] = arrays["weight"] + np.float32(1)  # planted: other weights
    assert with_weights(skeleton, arrays) != content


def test_weights_in_another_memory_order_come_back_as_their_numbers():
    content = serialized(graph_of([]))
    skeleton, arrays = without_weights(content)
    arrays["weight"] = np.asfortranarray(arrays["weight"])
    assert with_weights(skeleton, arrays) == content


def test_the_same_graph_gives_the_same_bytes():
    model = load(serialized(graph_of(tensors_of(20))), "g.onnx")
    assert serialized(model) == serialized(graph_of(tensors_of(20)))
    model.graph.node[0].name = "other"
    assert serialized(model) != serialized(graph_of(tensors_of(20)))


def external(model):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (external, "g.onnx: its weights are in other files; save it as one"),
        (lambda model: model.graph.ClearField("output"), "g.onnx: not an ONNX model, it has no outputs"),
        (
            lambda model: model.graph.node.append(helper.make_node("Bogus", ["y"], ["z"])),
            "g.onnx: not a valid ONNX model: .*Bogus",
        ),
        (lambda model: model.graph.node[0].input.append("nowhere"), "g.onnx: not a valid ONNX model"),
    ],
)
def test_a_file_that_a_bundle_cannot_hold_is_refused_in_one_line(damage, words):
    model = graph_of([])
    load(serialized(model), "g.onnx")
    damage(model)
    with pytest.raises(EdgekitError, match=words) as caught:
        load(serialized(model), "g.onnx")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_short_is_refused():
    content = serialized(graph_of([]))
    for length in range(1, len(content)):
        with pytest.raises(EdgekitError, match=r"g\.onnx"):
            load(content[:length], "g.onnx")
