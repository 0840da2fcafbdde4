"""Folding: the same function with fewer operators, and tied weights that stay one tensor."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekit.errors import EdgekitError
from edgekit.passes import fold
from edgekit.passes.fold import Fold
from edgekit.passes.weight_only import WeightOnly
from tests.edgekit.passes.graphs import (
    block,
    context,
    convolutional,
    dictionary,
    graph,
    mlp,
    normal,
    operators,
    run,
    size,
    stored,
)

N = 16
IN, OUT = {"x": ("batch", N)}, {"y": ("batch", N)}
W, V = normal(1, N, N), normal(2, N, N)
VECTOR, OTHER = normal(3, N), normal(4, N)
# nodes, tensors, operators that are left
CASES = {
    "matmul, mul": ([("MatMul", "x w", "a", {}), ("Mul", "a v", "y", {})], {"w": W, "v": VECTOR}, ["MatMul"]),
    "matmul, mul by a number": (
        [("MatMul", "x w", "a", {}), ("Mul", "two a", "y", {})], {"w": W, "two": np.float32(2)}, ["MatMul"],
    ),
    "matmul, add keeps its add": (
        [("MatMul", "x w", "a", {}), ("Add", "a v", "b", {}), ("Identity", "b", "y", {})], {"w": W, "v": VECTOR},
        ["MatMul", "Add"],
    ),
    "gemm, mul, add": (
        [("Gemm", "x w b", "a", {"transB": 1}), ("Mul", "a v", "c", {}), ("Add", "c u", "y", {})],
        {"w": W, "b": OTHER, "v": VECTOR, "u": VECTOR[None]}, ["Gemm"],
    ),
    "gemm without bias, add": ([("Gemm", "x w", "a", {}), ("Add", "a v", "y", {})], {"w": W, "v": VECTOR}, ["Gemm"]),
    "gemm with alpha and beta": (
        [("Gemm", "x w b", "y", {"alpha": 0.5, "beta": 3.0})], {"w": W, "b": VECTOR}, ["Gemm"],
    ),
    "normalization, mul, add": (
        [("LayerNormalization", "x g b", "a", {}), ("Mul", "a v", "c", {}), ("Add", "u c", "y", {})],
        {"g": OTHER, "b": VECTOR, "v": OTHER, "u": VECTOR}, ["LayerNormalization"],
    ),
    "mul, matmul": ([("Mul", "v x", "a", {}), ("MatMul", "a w", "y", {})], {"w": W, "v": VECTOR}, ["MatMul"]),
    "mul, gemm with transB": (
        [("Mul", "x v", "a", {}), ("Gemm", "a w", "y", {"transB": 1})], {"w": W, "v": VECTOR}, ["Gemm"],
    ),
    "add, add, mul, mul": (
        [("Add", "x u", "a", {}), ("Add", "v a", "b", {}), ("Mul", "b u", "c", {}), ("Mul", "c two", "y", {})],
        {"u": OTHER, "v": VECTOR, "two": np.full((1, 1), 2, np.float32)}, ["Add", "Mul"],
    ),
    "identity and dropout": (
        [("Identity", "x", "a", {}), ("Relu", "a", "b", {}), ("Dropout", "b", "c", {}), ("Identity", "c", "y", {})], {},
        ["Relu"],
    ),
    "a transpose of its own": (
        [("Transpose", "w", "t", {"perm": [1, 0]}), ("MatMul", "x t", "y", {})], {"w": normal(5, N, N)}, ["MatMul"],
    ),
    "two transposes of one": (
        [("Transpose", "w", "t", {"perm": [1, 0]}), ("MatMul", "x t", "a", {}),
         ("Transpose", "w", "u", {"perm": [1, 0]}), ("MatMul", "a u", "y", {})],
        {"w": normal(5, N, N, scale=0.3)}, ["MatMul", "MatMul"],
    ),
    "constants": (
        [("Concat", "one two", "shape", {"axis": 0}), ("Reshape", "x shape", "a", {}), ("Relu", "a", "y", {})],
        {"one": np.array([-1]), "two": np.array([N])}, ["Reshape", "Relu"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "tensors", "left"), CASES.values(), ids=CASES)
def test_each_rule_leaves_the_function_as_it_is(nodes, tensors, left):
    candidate = graph(nodes, tensors, IN, OUT)
    after = Fold().apply(candidate, context(N))
    onnx.checker.check_model(after.model, full_check=True)
    assert operators(after) == left
    x = normal(9, 10, N)
    expected = run(candidate, x, optimized=False)
    assert np.abs(run(after, x, optimized=False) - expected).max() < 1e-5 * (1 + np.abs(expected).max())


def test_a_wrong_rule_would_be_seen(monkeypatch):
    """The twin: scale a weight along the wrong axis, and the outputs differ."""
    monkeypatch.setattr(fold, "_per_feature", lambda constant, features, rank: np.roll(constant.reshape(-1), 1))
    nodes, tensors, _ = CASES["matmul, mul"]
    candidate = graph(nodes, tensors, IN, OUT)
    x = normal(9, 10, N)
    assert np.abs(run(Fold().apply(candidate, context(N)), x) - run(candidate, x)).max() > 0.1


@pytest.mark.parametrize("bias", [True, False])
def test_batch_normalization_goes_into_the_convolution(bias):
    candidate = convolutional()
    if not bias:
        candidate.model.graph.node[0].input.pop()
    after = Fold().apply(candidate, context(3, 8, 8))
    assert "BatchNormalization" not in operators(after)
    x = normal(9, 10, 3, 8, 8)
    assert np.abs(run(after, x) - run(candidate, x)).max() < 1e-4
    weights, old = stored(after), stored(candidate)
    factor = old["gamma"] / np.sqrt(old["variance"] + 1e-3)
    assert np.allclose(weights["c1.folded"], old["c1"] * factor[:, None, None, None], atol=1e-6)
    wrong = old["c1"] * (old["gamma"] / np.sqrt(old["variance"] + 1e-5))[:, None, None, None]
    assert not np.allclose(weights["c1.folded"], wrong, atol=1e-6), "epsilon makes no difference here"


def test_a_tied_dictionary_stays_one_tensor_behind_its_transpose():
    candidate = dictionary()
    with pytest.raises(EdgekitError, match="nothing to fold"):
        Fold().plan(candidate)
    # with something to fold beside it
    copied = candidate.copy_model()
    copied.graph.node.insert(0, helper.make_node("Identity", ["x"], ["same"]))
    copied.graph.node[2].input[0] = "same"
    after = Fold().apply(type(candidate)(copied), context(32))
    assert np.array_equal(stored(after)["D"], stored(candidate)["D"])
    assert sum(value.size == 32 * 32 for value in stored(after).values()) == 2
    assert operators(after).count("Transpose") == 1


@pytest.mark.parametrize(
    "nodes",
    [
        [("MatMul", "x w", "a", {}), ("Mul", "a v", "b", {}), ("MatMul", "b w", "y", {})],
        [("Mul", "x v", "a", {}), ("MatMul", "a w", "b", {}), ("MatMul", "b w", "y", {})],
    ],
)
def test_a_weight_with_two_consumers_is_not_scaled_for_one(nodes):
    with pytest.raises(EdgekitError, match="nothing to fold"):
        Fold().plan(graph(nodes, {"w": W, "v": VECTOR}, IN, OUT))


def test_what_looks_alike_and_is_not():
    wide = graph(  # the constant makes a column into a row
        [("Mul", "x v", "a", {}), ("MatMul", "a w", "y", {})], {"w": W, "v": VECTOR}, {"x": ("batch", 1)}, OUT
    )
    rows = graph(  # the constant differs from row to row
        [("MatMul", "x w", "a", {}), ("Mul", "a v", "y", {})],
        {"w": W, "v": normal(1, 4, 1)},
        {"x": ("batch", 4, N)},
        {"y": ("batch", 4, N)},
    )
    for candidate in (wide, rows):
        with pytest.raises(EdgekitError, match="nothing to fold"):
            Fold().plan(candidate)


def test_codes_are_not_decoded_into_the_file():
    coded = WeightOnly(bits=4).apply(block(), context(6, 32))
    with pytest.raises(EdgekitError, match="nothing to fold"):
        Fold().plan(coded)


def test_equal_tensors_become_one():
    candidate = graph(
        [("MatMul", "x w", "a", {}), ("Relu", "a", "b", {}), ("MatMul", "b v", "c", {}), ("Add", "c z", "y", {})],
        {"w": W, "v": W.copy(), "z": -W[0] * 0},
        IN,
        OUT,
    )
    after = Fold().apply(candidate, context(N))
    assert sorted(stored(after)) == ["w", "z"]
    assert size(candidate) - size(after) > W.nbytes
    x = normal(9, 10, N)
    assert np.array_equal(run(after, x), run(candidate, x))
    nearly = graph(
        [("MatMul", "x w", "a", {}), ("Relu", "a", "b", {}), ("MatMul", "b v", "y", {})],
        {"w": W, "v": np.nextafter(W, 9)},
        IN,
        OUT,
    )
    with pytest.raises(EdgekitError, match="nothing to fold"):
        Fold().plan(nearly)


def test_constant_nodes_and_unread_tensors():
    candidate = graph(
        [("Constant", "", "c", {"value": onnx.numpy_helper.from_array(VECTOR)}), ("Mul", "x c", "y", {})],
        {"nobody": W},
        IN,
        OUT,
    )
    after = Fold().apply(candidate, context(N))
    assert operators(after) == ["Mul"]
    assert list(stored(after)) == ["c"]


def test_random_numbers_are_not_constants():
    candidate = graph([("RandomNormalLike", "v", "r", {"seed": 1.0}), ("Add", "x r", "y", {})], {"v": VECTOR}, IN, OUT)
    with pytest.raises(EdgekitError, match="nothing to fold"):
        Fold().plan(candidate)


def test_the_plan_names_what_goes_and_changes_nothing():
    candidate = convolutional()
    before = candidate.model.SerializeToString()
    plan = Fold().plan(candidate)
    assert [(change.tensor, change.after) for change in plan] == [("b.BatchNormalization", "folded into a.Conv")]
    once = Fold().apply(candidate, context(3, 8, 8))
    assert candidate.model.SerializeToString() == before
    with pytest.raises(EdgekitError, match="nothing to fold"):
        Fold().apply(once, context(3, 8, 8))


def test_branches_are_refused():
    candidate = graph([("Relu", "x", "y", {})], {}, IN, OUT)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])],
        "b",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    candidate.model.graph.node.append(
        helper.make_node("If", ["x"], ["q"], "if", then_branch=branch, else_branch=branch)
    )
    with pytest.raises(EdgekitError, match="branches"):
        Fold().plan(candidate)


def test_a_multilayer_perceptron_has_nothing_to_fold():
    with pytest.raises(EdgekitError, match="nothing to fold"):
        Fold().plan(mlp())
