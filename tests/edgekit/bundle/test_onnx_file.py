"""The file `graph.onnx`: what is refused, which numbers count as learnt, and weights that leave and come back."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.onnx_file import (
    LEAST,
    expanded_nodes,
    learnt,
    load,
    parameters,
    serialized,
    tensors,
    with_weights,
    without_weights,
)
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
        (external, "g.onnx: the weights of .weight. are in another file; save the model as one file"),
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


def outside(name="secret"):
    """A tensor whose numbers are in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="secret.bin")
    return tensor


def inside(name="secret"):
    return numpy_helper.from_array(np.ones(1, np.float32), name)


def sparse(tensor):
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    found = onnx.SparseTensorProto(dims=[3])
    found.values.CopyFrom(tensor)
    found.indices.CopyFrom(indices)
    return found


def constant(**attribute):
    return helper.make_node("Constant", [], ["c"], **attribute)


def branch(node=None, stored=()):
    """A graph with one output, computed by the node or stored."""
    output = helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])
    return helper.make_graph([node] if node else [], "branch", [], [output], list(stored))


def if_node(then):
    return helper.make_node("If", ["flag"], ["out"], then_branch=then, else_branch=branch(constant(value=inside("c"))))


def with_flag(model, *nodes):
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    model.graph.node.extend(nodes)


def in_function(model, tensor):
    model.functions.add(name="f", domain="own").node.append(constant(value=tensor))


def in_default(model, tensor):
    model.functions.add(name="f", domain="own").attribute_proto.append(helper.make_attribute("w", tensor))


def in_training(model, tensor):
    model.training_info.add().algorithm.initializer.append(tensor)


PLACES = {
    "the graph": lambda model, tensor: model.graph.initializer.append(tensor),
    "a sparse tensor of the graph": lambda model, tensor: model.graph.sparse_initializer.append(sparse(tensor)),
    "a constant": lambda model, tensor: model.graph.node.append(constant(value=tensor)),
    "a sparse constant": lambda model, tensor: model.graph.node.append(constant(sparse_value=sparse(tensor))),
    "a list of tensors": lambda model, tensor: model.graph.node.append(constant(values=[tensor, tensor])),
    "a branch": lambda model, tensor: with_flag(model, if_node(branch(stored=[tensor]))),
    "a constant of a branch": lambda model, tensor: with_flag(model, if_node(branch(constant(value=tensor)))),
    "a branch of a branch": lambda model, tensor: with_flag(model, if_node(branch(if_node(branch(stored=[tensor]))))),
    "a function": in_function,
    "a default of a function": in_default,
    "a training graph": in_training,
}


@pytest.mark.parametrize("put", PLACES.values(), ids=PLACES)
def test_numbers_in_another_file_are_found_wherever_the_tensor_is(put):
    for tensor in (inside(), outside()):
        model = graph_of([])
        put(model, tensor)
        assert [item.name for item in tensors(model)].count("secret") == (
            2 if put is PLACES["a list of tensors"] else 1
        )
        if tensor.external_data:
            with pytest.raises(EdgekitError, match=r"g\.onnx: the weights of 'secret' are in another file"):
                load(serialized(model), "g.onnx")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.dims.append(1 << 40),
        lambda tensor: tensor.dims.__setitem__(0, -1),
        lambda tensor: setattr(tensor, "data_type", 77),
        lambda tensor: setattr(tensor, "data_type", 0),
        lambda tensor: setattr(tensor, "data_type", TensorProto.STRING),
        lambda tensor: setattr(tensor, "raw_data", tensor.raw_data[:-1]),
        lambda tensor: setattr(tensor, "raw_data", b""),
        lambda tensor: (setattr(tensor, "raw_data", b""), tensor.float_data.append(1.0)),
    ],
)
def test_a_tensor_that_does_not_hold_the_numbers_of_its_shape_is_refused(change):
    model = graph_of([])
    change(model.graph.initializer[0])
    with pytest.raises(EdgekitError, match=r"g\.onnx: the tensor 'weight' of type \d+ does not hold"):
        load(serialized(model), "g.onnx")


@pytest.mark.parametrize(
    ("name", "length"), [("INT4", 3), ("UINT4", 4), ("FLOAT8E4M3FN", 3), ("BFLOAT16", 3), ("BOOL", 5), ("STRING", 2)]
)
def test_a_tensor_of_any_type_that_onnx_writes_is_read(name, length):
    number = getattr(TensorProto, name)
    values = [b"a"] * length if name == "STRING" else [1] * length
    load(serialized(graph_of([helper.make_tensor("other", number, [length], values)])), "g.onnx")


def calling(chain):
    """A graph that calls the first of some functions; each calls the names that the chain gives for it."""
    model = graph_of([])
    model.opset_import.append(helper.make_opsetid("own", 1))
    for name, called in chain.items():
        nodes = [helper.make_node(other, ["a"], ["b"], domain="own") for other in called]
        nodes = nodes or [helper.make_node("Relu", ["a"], ["b"])]
        model.functions.append(
            helper.make_function(
                "own",
                name,
                ["a"],
                ["b"],
                nodes[-1:] + nodes[:-1],
                [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)],
            )
        )
    model.graph.node[0].output[0] = "first"
    model.graph.node.append(helper.make_node(next(iter(chain)), ["first"], ["y"], domain="own"))
    return model


def test_functions_that_double_one_another_are_counted():
    chain = {f"f{n}": [f"f{n + 1}"] * 2 for n in range(25)} | {"f25": []}
    assert expanded_nodes(calling(chain)) == 1 + 2**25
    with pytest.raises(EdgekitError, match="the graph has 33,554,433 nodes; edgekit reads up to 1,000,000"):
        load(serialized(calling(chain)), "g.onnx")
    assert expanded_nodes(calling({"f0": ["f1", "f1"], "f1": []})) == 3, "the twin: two calls are two nodes"


@pytest.mark.parametrize("chain", [{"f": ["f"]}, {"f": ["g"], "g": ["h"], "h": ["f"]}])
def test_functions_that_call_themselves_are_refused(chain):
    with pytest.raises(EdgekitError, match="edgekit reads up to 1,000,000"):
        load(serialized(calling(chain)), "g.onnx")


def test_a_long_chain_of_functions_is_refused():
    chain = {f"f{n}": [f"f{n + 1}"] for n in range(2000)} | {"f2000": []}
    with pytest.raises(EdgekitError, match="edgekit reads up to 1,000,000"):
        load(serialized(calling(chain)), "g.onnx")
