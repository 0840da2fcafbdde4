"""What stays in float32 under weak typing, against the types that the graph's values really have when it runs."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from edgekit.graph.lower import float_graph
from edgekit.passes.half import Half
from exporters.float32_pinned import MOVING, TYPED, Float32Pinned, float32_pinned
from exporters.target_graph import deployment_target, target_graph
from exporters.tensorrt_export import options
from tests.exporters.test_parser_versions import graph, node, quantized


def types(model, inputs):
    """Return the type of every value, from a run of the reference implementation."""
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    names = [name for item in model.graph.node for name in item.output]
    seen.graph.ClearField("output")
    seen.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    found = dict(zip(names, ReferenceEvaluator(seen).run(None, inputs), strict=True))
    found |= inputs | {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name: value.dtype for name, value in found.items()}


@pytest.fixture(scope="module")
def written():
    """Return a network for the Xavier NX, whose TensorRT 8.5 has no LayerNormalization: the graph has nine nodes
    instead."""
    from tests.toys import toy_bundle

    bundle = toy_bundle(context=2)
    got = target_graph(float_graph(bundle), deployment_target("jetson-xavier-nx", "tensorrt"))
    return got, bundle.golden()[0]


def test_what_computes_in_float32_is_what_is_named(written):
    got, inputs = written
    assert got.precision == "float16"
    dtypes = types(got.model, inputs)
    alone = {
        item.name
        for item in got.model.graph.node
        if item.op_type not in MOVING | TYPED
        and dtypes[item.output[0]] == np.float32
        and any(dtypes[name] == np.float32 for name in item.input if name)
    }
    operators = {item.name: item.op_type for item in got.model.graph.node}
    named = {name for name in got.pinned.layers if operators[name] not in MOVING}
    assert named == alone
    assert {"Softmax", "ReduceMean", "Sqrt", "Div"} <= {operators[name] for name in named}
    assert not {"MatMul", "Gemm"} & {operators[name] for name in got.pinned.layers}
    assert len(named) < len(operators) / 2


def test_results_that_are_narrowed_at_once_are_not_held(written):
    """A softmax that returns half precision computes in float32; its result need not be pinned to float32."""
    got, _ = written
    assert "blocks.0.attention.Softmax" in set(got.pinned.layers) - set(got.pinned.outputs)
    assert {"blocks.0.norm1.LayerNormalization.Sub", "blocks.0.norm1.LayerNormalization.Sqrt"} <= set(
        got.pinned.outputs
    )


def test_a_softmax_that_the_graph_has_in_half_is_not_named():
    model = graph(node("Softmax", ("x",), ("s",)), node("Relu", ("s",)))
    assert float32_pinned(model).layers == ("s.Softmax", "layer.Relu")
    assert float32_pinned(Half(keep=()).converted(model)).layers == ()


def test_moving_is_held_only_between_layers_that_are():
    turn = node("Transpose", ("e",), ("t",), perm=[0, 1])
    held = graph(node("Exp", ("x",), ("e",)), turn, node("Softmax", ("t",)))
    assert "t.Transpose" in float32_pinned(held).layers
    half = helper.make_node("Cast", ["t"], ["h"], "h.Cast", to=onnx.TensorProto.FLOAT16)
    back = helper.make_node("Cast", ["h"], ["y"], "y.Cast", to=onnx.TensorProto.FLOAT)
    assert float32_pinned(graph(node("Exp", ("x",), ("e",)), turn, half, back)) == Float32Pinned(("e.Exp",), ("e.Exp",))


def test_beside_int8_sums_are_held_and_products_are_not():
    """The graph is float32 where it is not int8, and the Xavier's plan lets the builder put that into half."""
    model = quantized(np.int8(0))
    last = model.graph.node[-1]
    assert last.output[0] == "y"
    last.output[0] = "products"
    model.graph.node.append(node("Softmax", ("products",)))
    got = target_graph(model, deployment_target("jetson-xavier-nx", "tensorrt"))
    assert (got.precision, got.pinned.layers) == ("int8", ("layer.Softmax",))
    assert (
        target_graph(model, deployment_target("tesla-p40", "tensorrt")).pinned == Float32Pinned()
    )  # whose plan has no half


@pytest.mark.parametrize(("name", "stack"), [("rtx-3060-12gb", "TensorRT 10"), ("jetson-orin-nano-8gb", "")])
def test_strong_typing_needs_no_list(written, name, stack):
    got, _ = written
    assert target_graph(got.model, deployment_target(name, "tensorrt", stack)).pinned == Float32Pinned()


def test_tensorrt_10_is_told_the_same_where_a_stack_asks_for_weak_typing(written):
    """TensorRT 10 supports both; a device file of the user may choose flags."""
    got, _ = written
    where = deployment_target("rtx-3060-12gb", "tensorrt", "TensorRT 10")
    weak = replace(where, stack=replace(where.stack, typing="weak"))
    found = options(weak, "float16", {}, 512, 3, target_graph(got.model, weak).pinned)
    assert {"--fp16", "--precisionConstraints=prefer"} <= set(found)
    assert "--stronglyTyped" not in found
    assert {option[2:].partition("=")[0] for option in found} <= weak.parser_version.flags


def test_options_are_what_trtexec_reads():
    kept = Float32Pinned(("b:0", "a"), ("a",))
    assert kept.options() == [
        "--precisionConstraints=prefer",
        "--layerPrecisions=a:fp32,b:0:fp32",
        "--layerOutputTypes=a:fp32",
    ]
    assert Float32Pinned().options() == []
    assert Float32Pinned(("a,b", "it's")).options() == []
