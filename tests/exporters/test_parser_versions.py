"""Each parser version of TensorRT accepts certain graphs; the error for another graph names the node and the reason."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import EdgekitError
from edgekit.graph.opset import to_opset
from edgekit.targets import profile
from exporters.parser_versions import RTX, parser_version, parser_versions

NAMES = ("8.2", "8.5", "8.6", "10", "11", RTX)


def graph(*nodes, opset=17, **stored):
    """Return a graph from 'x' to 'y', (batch, 8)."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in ("x", "y"))
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
    domains = {node.domain for node in nodes} | {""}
    imports = [helper.make_opsetid(domain, opset if not domain else 1) for domain in sorted(domains)]
    return helper.make_model(helper.make_graph(list(nodes), "g", [x], [y], tensors), opset_imports=imports)


def node(operator, inputs, outputs=("y",), **attributes):
    """Return a node with a unique name: TensorRT refuses two nodes of one name."""
    name = f"{'layer' if outputs[0] == 'y' else outputs[0]}.{operator}"
    return helper.make_node(operator, list(inputs), list(outputs), name, **attributes)


def test_parser_versions_are_in_order_and_have_titles():
    assert tuple(parser_versions()) == NAMES
    opsets = [item.opset for item in parser_versions().values()]
    assert opsets == [13, 17, 17, 21, 24, 24]
    for item in parser_versions().values():
        assert item.typing in ("weak", "strong", "either")
        for operator in item.operators:
            assert any(s.name == operator and s.domain == "" for s in onnx.defs.get_all_schemas()), operator
        assert set(item.dialect.values()) <= item.flags


def test_every_target_with_tensorrt_has_a_parser_version():
    found = {}
    for name in profile.names():
        for stack in profile.find(name).stacks:
            if stack.runtime.startswith("tensorrt"):
                found[name, stack.tensorrt] = parser_version(stack).name
                assert stack.opset <= parser_version(stack).opset
    assert found["jetson-nano", "8.2.1"] == "8.2"
    assert found["jetson-xavier-nx", "8.5.2"] == "8.5"
    assert found["tesla-p40", "8.6.1"] == "8.6"
    assert found["jetson-orin-nano-8gb", "10.3"] == "10"
    assert found["rtx-3060-12gb", "1.7.1.116"] == RTX
    assert parser_version(profile.find("x86-avx2").stack) is None


def test_an_unknown_parser_version_lists_those_that_are_known():
    stack = profile.Stack("TensorRT 9", "tensorrt", "a test", tensorrt="9.3.0")
    with pytest.raises(EdgekitError, match=r"unknown TensorRT parser version '9\.3\.0'.*8\.2, 8\.5, 8\.6, 10, 11"):
        parser_version(stack)


def test_what_the_parser_versions_brought():
    """Exporting depends on these facts, which come from the documents of the releases."""
    has = {name: item.operators for name, item in parser_versions().items()}
    assert [name for name in NAMES if "LayerNormalization" in has[name]] == ["8.6", "10", "11", RTX]
    assert [name for name in NAMES if "Trilu" in has[name]] == ["8.5", "8.6", "10", "11", RTX]
    assert [name for name in NAMES if "Gelu" in has[name]] == ["10", "11", RTX]
    assert "DeformConv" in has["11"] - has[RTX]
    for lacking in ("QLinearMatMul", "MatMulInteger", "DynamicQuantizeLinear", "Unique", "SkipLayerNormalization"):
        assert not any(lacking in operators for operators in has.values())
    flags = {name: item.flags for name, item in parser_versions().items()}
    assert [name for name in NAMES[:5] if "stronglyTyped" in flags[name]] == ["10"]
    assert [name for name in NAMES[:5] if "fp16" in flags[name]] == ["8.2", "8.5", "8.6", "10"]
    assert [name for name in NAMES[:5] if "builderOptimizationLevel" in flags[name]] == ["8.6", "10", "11"]
    assert [name for name in NAMES[:5] if "workspace" in flags[name]] == ["8.2", "8.5", "8.6"]
    assert [name for name in NAMES[:5] if "buildOnly" in flags[name]] == ["8.2", "8.5"]


CODES, SCALES = np.ones((8, 8), np.int8), np.ones(8, np.float32)
ZEROS, ONE = np.zeros(8, np.int8), np.float32(1)


def quantized(zero, *, bias=None):
    """Return a product of x and a weight, both in codes; with a bias in codes, if one is given."""
    nodes = [
        node("QuantizeLinear", ("x", "one", "zero"), ("codes",)),
        node("DequantizeLinear", ("codes", "one", "zero"), ("rounded",)),
        node("DequantizeLinear", ("weight", "scales", "zeros"), ("wide",), axis=1),
        node("MatMul", ("rounded", "wide"), ("product" if bias is not None else "y",)),
    ]
    stored = {"one": ONE, "zero": zero, "weight": CODES, "scales": SCALES, "zeros": ZEROS}
    if bias is not None:
        nodes += [node("DequantizeLinear", ("bias", "one"), ("offset",)), node("Add", ("product", "offset"))]
        stored["bias"] = bias
    return graph(*nodes, **stored)


BAD = {
    "contrib operator": (
        graph(
            helper.make_node("SkipLayerNormalization", ["x", "x", "g"], ["y"], "skip", domain="com.microsoft"), g=SCALES
        ),
        "'skip' .SkipLayerNormalization.: domain 'com.microsoft' is a runtime's own",
    ),
    "unknown operator": (graph(node("Unique", ("x",))), "'layer.Unique' .Unique.: no such operator"),
    "dynamic int8": (
        graph(node("DynamicQuantizeLinear", ("x",), ("y", "s", "z"))),
        "quantize with the pass static_int8, scheme = 's8s8'",
    ),
    "uint8": (quantized(np.uint8(0)), "codes are uint8, which must be int8"),
    "zero point": (quantized(np.int8(3)), "its zero point is not 0"),
    "int32 bias": (quantized(np.int8(0), bias=np.ones(8, np.int32)), "an int32 bias"),
    "no zero point": (graph(node("QuantizeLinear", ("x", "one")), one=ONE), "without a zero point its codes are uint8"),
    "second output": (
        graph(node("MaxPool", ("x",), ("y", "where"), kernel_shape=[2])), "only the first output of this operator",
    ),
    "mode": (
        graph(node("Resize", ("x", "", "s"), mode="cubic"), s=SCALES[:2]), "mode 'cubic'; expected linear or nearest",
    ),
    "computed axis": (graph(node("CumSum", ("x", "x"))), "input 'x' must be stored in the graph"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_graphs_are_refused_with_node_and_reason(name, case):
    model, reason = case
    model.opset_import[0].version = 13
    with pytest.raises(EdgekitError, match=f"does not take node .*{reason}"):
        parser_versions()[name].refuse(model)


@pytest.mark.parametrize("name", NAMES)
def test_symmetric_int8_is_taken(name):
    model = quantized(np.int8(0))
    model.opset_import[0].version = 13
    parser_versions()[name].refuse(model)


def test_a_newer_opset_is_refused():
    with pytest.raises(EdgekitError, match=r"TensorRT 8\.2 reads ONNX opsets up to 13; the graph is in 17"):
        parser_versions()["8.2"].refuse(graph(node("Relu", ("x",))))


def test_an_operator_inside_a_branch_is_seen():
    inner = helper.make_graph(
        [node("Unique", ("x",), ("z",))], "then", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    model = graph(node("If", ("flag",), then_branch=inner, else_branch=inner), flag=np.array(True))
    with pytest.raises(EdgekitError, match="Unique"):
        parser_versions()["11"].refuse(model)


@pytest.mark.parametrize("name", NAMES)
def test_layer_normalization_reaches_every_parser_version(name):
    item = parser_versions()[name]
    model = graph(node("LayerNormalization", ("x", "scale", "bias")), scale=SCALES, bias=SCALES)
    lowered = to_opset(model, min(17, item.opset), item.operators)
    item.refuse(lowered.model)
    whole = "LayerNormalization" in {node.op_type for node in lowered.model.graph.node}
    assert whole == ("LayerNormalization" in item.operators)
