"""Low rank: the error is the least there is, by Eckart and Young in the whitened space."""

import numpy as np
import onnx
import pytest
from scipy.linalg import sqrtm

from edgekit.errors import EdgekitError
from edgekit.passes.low_rank import LowRank, factors
from tests.edgekit.passes.graphs import (
    block,
    context,
    dictionary,
    graph,
    mlp,
    normal,
    operators,
    relative,
    run,
    size,
    stored,
)


def inputs(rows, features, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, features)) @ (rng.normal(size=(features, features)) * np.geomspace(4, 0.2, features))


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_output_error_is_the_least_of_that_rank(rank):
    weight, x = normal(1, 24, 30).astype(np.float64), inputs(500, 24)
    left, right, _ = factors(weight, x.T @ x)
    error = np.linalg.norm(x @ (weight - left[:, :rank] @ right[:rank]))
    # the same optimum by another way: the symmetric root whitens, singular values alone say what is lost
    lost = np.linalg.svd(sqrtm(x.T @ x).real @ weight, compute_uv=False)[rank:]
    assert error == pytest.approx(np.sqrt(np.sum(lost**2)), rel=1e-4)
    plain_left, plain_right, _ = factors(weight, None)
    assert np.linalg.norm(x @ (weight - plain_left[:, :rank] @ plain_right[:rank])) > 1.02 * error
    # and of the weights themselves, the plain one loses least
    lost = np.linalg.svd(weight, compute_uv=False)[rank:]
    assert np.linalg.norm(weight - plain_left[:, :rank] @ plain_right[:rank]) == pytest.approx(np.sqrt(np.sum(lost**2)))


def test_inputs_that_never_vary():
    weight = normal(1, 16, 16).astype(np.float64)
    for second in (np.zeros((16, 16)), np.diag([1.0] * 3 + [0.0] * 13)):
        left, right, _ = factors(weight, second)
        assert np.isfinite(left @ right).all()


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize(("make", "shape"), [(mlp, (32,)), (block, (6, 32))])
def test_the_graph_computes_the_product_of_the_factors(make, shape, activations):
    candidate, calibration = make(), context(*shape)
    after = LowRank(rank=6, activations=activations).apply(candidate, calibration)
    onnx.checker.check_model(after.model, full_check=True)
    assert size(after) < 0.62 * size(candidate)
    tensors = stored(after)
    whole = candidate.copy_model()
    for item in whole.graph.initializer:
        if f"{item.name}.left" in tensors:
            left, right = tensors[f"{item.name}.left"].astype(np.float64), tensors[f"{item.name}.right"]
            transposed = item.name == "down" and make is mlp
            product = (left @ (right.T if transposed else right)).astype(np.float32)
            item.CopyFrom(onnx.numpy_helper.from_array(product.T if transposed else product, item.name))
    x = normal(9, 20, *shape)
    expected = run(type(candidate)(whole), x)
    assert np.abs(run(after, x) - expected).max() < 1e-4
    assert relative(run(after, x), run(candidate, x)) > 0.05, "rank 6 loses nothing, so the test says nothing"


def test_full_energy_of_a_matrix_that_is_thin_already_loses_nothing():
    thin = normal(1, 32, 5) @ normal(2, 5, 40)
    candidate = graph([("MatMul", "x w", "y", {})], {"w": thin}, {"x": ("batch", 32)}, {"y": ("batch", 40)})
    after = LowRank(energy=0.99999).apply(candidate, context(32))
    assert stored(after)["w.left"].shape == (32, 5)
    x = normal(3, 20, 32)
    assert relative(run(after, x), run(candidate, x)) < 1e-4
    less = LowRank(energy=0.5).apply(candidate, context(32))
    assert stored(less)["w.left"].shape[1] < 5


def test_only_where_it_saves():
    with pytest.raises(EdgekitError, match=r"no matrix gets smaller at energy = 1"):
        LowRank(energy=1.0).apply(block(), context(6, 32))
    plan = {change.tensor: change.after for change in LowRank(rank=8).plan(mlp())}
    assert plan == {"up": "rank 8", "down": "rank 8"}
    with pytest.raises(EdgekitError, match="rank 40 makes it no smaller"):
        LowRank(rank=40).plan(mlp())


def test_a_tied_dictionary_is_left_whole():
    candidate = dictionary()
    plan = {change.tensor: change.after for change in LowRank(rank=4).plan(candidate)}
    assert plan["D"] == "left as it is: tied or behind a Transpose, read by a.MatMul, b.MatMul (transposed)"
    after = LowRank(rank=4).apply(candidate, context(32))
    assert np.array_equal(stored(after)["D"], stored(candidate)["D"])


def test_two_products_with_one_matrix_share_its_factors():
    candidate = graph(
        [("MatMul", "x w", "a", {}), ("Relu", "a", "b", {}), ("MatMul", "b w", "y", {})],
        {"w": normal(1, 32, 32)},
        {"x": ("batch", 32)},
        {"y": ("batch", 32)},
    )
    after = LowRank(rank=8).apply(candidate, context(32))
    assert sorted(stored(after)) == ["w.left", "w.right"]
    assert operators(after) == ["MatMul", "MatMul", "Relu", "MatMul", "MatMul"]


def test_factors_are_not_factorised_again():
    once = LowRank(rank=8).apply(block(), context(6, 32))
    with pytest.raises(EdgekitError, match="one of two factors already"):
        LowRank(rank=2).apply(once, context(6, 32))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LowRank(energy=0.0), "energy = 0"),
        (lambda: LowRank(rank=-1), "rank = -1"),
        (lambda: LowRank(rank=4).apply(mlp(), context(31)), "does not fit the graph"),
    ],
)
def test_mistakes_name_what_is_allowed(make, words):
    with pytest.raises(EdgekitError, match=words):
        make()
