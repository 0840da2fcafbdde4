"""Graphs in an older opset: every rewriting against ONNX's own reference implementation of the operator it replaces."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgekit.errors import EdgekitError
from edgekit.graph import opset as rewriting
from edgekit.graph.model import opset
from edgekit.graph.opset import to_opset


def single(operator, opset, shape, *, stored=(), outputs=1, rank=None, **attributes):
    """A graph of one node that reads 'x' (batch, ...) and stored arrays; None stands for an input left out."""
    arrays = [np.asarray(value) if value is not None else None for value in stored]
    names = ["x", *(f"stored{number}" if array is not None else "" for number, array in enumerate(arrays))]
    made = [f"y{number}" for number in range(outputs)]
    node = helper.make_node(operator, names, made, f"layer.{operator}", **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape[1:]])
    ys = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made]
    tensors = [
        numpy_helper.from_array(array, name) for array, name in zip(arrays, names[1:], strict=True) if array is not None
    ]
    graph = helper.make_graph([node], "single", [x], ys, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for value in model.graph.output:
        if not value.type.tensor_type.HasField("shape"):  # GroupNormalization's is not inferred
            value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [None] * len(shape)))
    return model


def in_onnxruntime(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


RNG = np.random.default_rng(0)
SCALE, BIAS = RNG.normal(size=6).astype(np.float32), RNG.normal(size=6).astype(np.float32)
PLANE = RNG.normal(size=(4, 6)).astype(np.float32)
AXES = np.array([-1], np.int64)
# name: operator, its opset, the one to write, shape of x, the rest
CASES = {
    "layer norm": ("LayerNormalization", 17, 13, (3, 4, 6), {"stored": [SCALE, BIAS], "epsilon": 1e-3}),
    "layer norm, no bias": ("LayerNormalization", 17, 16, (3, 4, 6), {"stored": [SCALE]}),
    "layer norm of a plane": ("LayerNormalization", 17, 13, (3, 4, 6), {"stored": [PLANE, PLANE], "axis": 1}),
    "rms norm": ("RMSNormalization", 23, 17, (3, 4, 6), {"stored": [SCALE], "epsilon": 1e-2}),
    "rms norm of a plane, default epsilon": ("RMSNormalization", 23, 18, (3, 4, 6), {"stored": [PLANE], "axis": 1}),
    "group norm, large epsilon": (
        "GroupNormalization", 21, 18, (2, 6, 5), {"stored": [SCALE, BIAS], "num_groups": 3, "epsilon": 0.5},
    ),
    "group norm": ("GroupNormalization", 21, 17, (2, 6, 5, 5), {"stored": [SCALE, BIAS], "num_groups": 3}),
    "group norm, one axis": ("GroupNormalization", 21, 13, (2, 6, 7), {"stored": [SCALE, BIAS], "num_groups": 2}),
    "gelu": ("Gelu", 20, 17, (3, 50), {}),
    "gelu, tanh": ("Gelu", 20, 13, (3, 50), {"approximate": "tanh"}),
    "hard swish": ("HardSwish", 14, 13, (3, 50), {}),
    "mish": ("Mish", 18, 17, (3, 50), {}),
    "swish": ("Swish", 24, 17, (3, 50), {"alpha": 1.5}),
    **{
        f"reduce {name}": (f"Reduce{name}", 18, 13, (3, 4, 6), {"stored": [AXES], "keepdims": number % 2})
        for number, name in enumerate(("Mean", "L1", "L2", "Max", "Min", "Prod", "SumSquare", "LogSumExp"))
    },
    "reduce all": ("ReduceMean", 18, 17, (3, 4, 6), {}),
    "reduce none": ("ReduceMean", 18, 17, (3, 4, 6), {"stored": [np.array([], np.int64)], "noop_with_empty_axes": 1}),
    "split in equal parts": ("Split", 18, 13, (3, 4, 6), {"outputs": 3, "num_outputs": 3, "axis": -1}),
    "split, the last shorter": ("Split", 18, 17, (3, 4, 5), {"outputs": 2, "num_outputs": 2, "axis": 2}),
    "pad two axes": (
        "Pad", 18, 13, (3, 4, 6),
        {"stored": [np.array([1, 0, 2, 3], np.int64), np.float32(7), np.array([2, -2], np.int64)]},
    ),
    "pad one axis with zeros": (
        "Pad", 18, 13, (3, 4, 6), {"stored": [np.array([1, 2], np.int64), None, np.array([1], np.int64)]},
    ),
    "pad by reflection": (
        "Pad", 18, 13, (3, 4, 6), {"stored": [np.array([0, 0, 1, 0, 0, 2], np.int64)], "mode": "reflect"},
    ),
    "resize": (
        "Resize", 19, 13, (1, 2, 3, 3),
        {"stored": [None, np.array([1, 1, 2, 2], np.float32)], "mode": "linear", "antialias": 0},
    ),
    "reshape": ("Reshape", 21, 13, (3, 4, 6), {"stored": [np.array([0, -1], np.int64)], "allowzero": 0}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_older_opset_computes_the_same(case):
    operator, opset, wanted, shape, rest = case
    model = single(operator, opset, shape, **rest)
    x = np.random.default_rng(1).normal(1, 2, shape).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"x": x})
    written = to_opset(model, wanted).model
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", wanted)]
    onnx.checker.check_model(written, full_check=True)
    for got, want in zip(in_onnxruntime(written, x), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(
    ("rule", "case", "wrong"),
    [
        ("Gelu", "gelu", rewriting._mish),
        ("LayerNormalization", "layer norm", rewriting._rms_normalization),
        ("HardSwish", "hard swish", rewriting._swish),
        ("GroupNormalization", "group norm", rewriting._layer_normalization),
    ],
)
def test_a_wrong_rewriting_would_be_seen(monkeypatch, rule, case, wrong):
    monkeypatch.setitem(rewriting.RULES, rule, wrong)
    with pytest.raises((AssertionError, EdgekitError)):
        test_older_opset_computes_the_same(CASES[case])


def test_operators_that_a_parser_lacks_are_written_out_in_the_same_opset():
    model = single("LayerNormalization", 17, (3, 4, 6), stored=[SCALE, BIAS])
    lowered = to_opset(model, 17, {"ReduceMean", "Sub", "Mul", "Add", "Sqrt", "Div"})
    op_types = [node.op_type for node in lowered.model.graph.node]
    assert op_types == ["ReduceMean", "Sub", "Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"]
    assert lowered.sums == tuple(node.name for node in lowered.model.graph.node)
    assert len(set(lowered.sums)) == len(op_types)
    assert all(name.startswith("layer.LayerNormalization.") for name in lowered.sums)
    assert "LayerNormalization" in [node.op_type for node in to_opset(model, 17).model.graph.node]
    assert [node.op_type for node in to_opset(single("Reciprocal", 17, (3, 4)), 13, {"Div"}).model.graph.node] == [
        "Div"
    ]


def test_the_original_is_left_alone():
    model = single("Gelu", 20, (3, 5))
    before = model.SerializeToString()
    to_opset(model, 13)
    assert model.SerializeToString() == before


def test_constant_nodes_become_stored_tensors():
    axes = helper.make_node("Constant", [], ["axes"], value=numpy_helper.from_array(AXES))
    mean = helper.make_node("ReduceMean", ["x", "axes"], ["y"], "mean")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([axes, mean], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 18)]
    )
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    written = to_opset(model, 13).model
    assert [node.op_type for node in written.graph.node] == ["ReduceMean"]
    array = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    np.testing.assert_allclose(in_onnxruntime(written, array)[0], array.mean(axis=-1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "opset", "message"),
    [
        (single("Gelu", 20, (3, 5)), 12, "opset 12 cannot be written; expected 13 to 20"),
        (single("Gelu", 20, (3, 5)), 21, "opset 21 cannot be written; expected 13 to 20"),
        (single("Trilu", 17, (3, 5, 5)), 13, "'layer.Trilu': Trilu is not in ONNX opset 13"),
        (single("Pad", 19, (3, 5), stored=[np.array([0, 1, 0, 0], np.int64)], mode="wrap"), 17, "no mode 'wrap'"),
        (
            single("Resize", 19, (1, 2, 3, 3), stored=[None, np.ones(4, np.float32)], mode="linear", antialias=1),
            17, "no option 'antialias' in ONNX opset 17",
        ),
        (
            single("GridSample", 20, (1, 2, 3, 3), stored=[np.zeros((1, 2, 2, 2), np.float32)]),
            17, "GridSample means something else in ONNX opset 17",
        ),
        (single("LayerNormalization", 17, (3, 6), stored=[SCALE], outputs=2), 13, "as outputs cannot be split"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_named(model, opset, message):
    with pytest.raises(EdgekitError, match=message.replace(".", r"\.")):
        to_opset(model, opset)


def test_a_graph_whose_declared_shapes_are_wrong_is_refused_in_one_line():
    """Runtimes only warn about such a graph, so that a bundle may hold it."""
    model = single("Relu", 17, (3, 5))
    axes = [helper.make_tensor_value_info("y0", TensorProto.FLOAT, ["batch", length]) for length in (5, 6)]
    model.graph.output[0].CopyFrom(axes[0])
    assert to_opset(model, 17).model.graph.output[0] == axes[0]
    model.graph.output[0].CopyFrom(axes[1])
    assert in_onnxruntime(model, np.ones((3, 5), np.float32))[0].shape == (3, 5)
    with pytest.raises(EdgekitError, match=r"the graph contradicts itself: .*; export it again") as caught:
        to_opset(model, 17)
    assert "\n" not in str(caught.value)


def test_ir_version_fits_the_opset():
    model = single("Gelu", 20, (3, 5))
    assert to_opset(model, 13).model.ir_version <= 7 < model.ir_version


def test_a_graph_older_than_what_can_be_written_stays_as_it_is():
    """Parsers read older opsets; what comes from elsewhere is not rewritten for its age."""
    old = single("Softmax", 10, (3, 5))
    assert opset(to_opset(old, 10).model) == 10
    with pytest.raises(EdgekitError, match=r"opset 9 cannot be written; expected 10, the graph's own"):
        to_opset(old, 9)


def branched():
    """y = If(condition, Gelu(x), Gelu(-x)); the names in the branches are their own."""
    branches = []
    for name in ("then", "else"):
        negated = [helper.make_node("Neg", ["x"], [f"{name}.n"])] if name == "else" else []
        gelu = helper.make_node("Gelu", [f"{name}.n" if negated else "x"], [f"{name}.y"], f"{name}.gelu")
        out = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)
        branches.append(helper.make_graph([*negated, gelu], name, [], [out]))
    node = helper.make_node("If", ["condition"], ["y"], "choice", then_branch=branches[0], else_branch=branches[1])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    condition = numpy_helper.from_array(np.array(False), "condition")
    graph = helper.make_graph([node], "g", [x], [y], [condition])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize(("version", "known"), [(17, None), (20, {"If", "Neg", "Erf", "Mul", "Add", "Div"})])
def test_branches_are_rewritten_too(version, known):
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    written = to_opset(branched(), version, known).model
    assert "Gelu" not in str(written)
    np.testing.assert_allclose(in_onnxruntime(written, x)[0], in_onnxruntime(branched(), x)[0], atol=1e-6)
