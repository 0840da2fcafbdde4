"""Sparsity: which weights are zero, counted and scored independently."""

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.passes.sparsify import Sparsify
from tests.edgekit.passes.graphs import (
    block,
    context,
    convolutional,
    dictionary,
    graph,
    mlp,
    normal,
    operators,
    relative,
    run,
    stored,
)

UNEVEN = np.geomspace(0.05, 20, 32)


def inputs_first(name, value):
    """(in, out): the multilayer perceptron's second matrix is stored (out, in)."""
    return value.T if name == "down" and value.shape[0] == 10 else value


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_exactly_two_of_every_four_inputs(score):
    candidate = mlp()
    after = stored(Sparsify(pattern="2:4", score=score).apply(candidate, context(32, scale=UNEVEN)))
    for name in ("up", "down"):
        old, new = (inputs_first(name, tensors[name]) for tensors in (stored(candidate), after))
        groups = (new != 0).reshape(-1, 4, new.shape[1]).sum(axis=1)
        assert (groups == 2).all()
        assert np.array_equal(new[new != 0], old[new != 0])
        along_outputs = (new[:, : new.shape[1] // 4 * 4] != 0).reshape(len(new), -1, 4).sum(axis=2)
        assert not (along_outputs == 2).all(), "the axes cannot be told apart"


def test_two_of_four_are_the_larger_ones():
    after = stored(Sparsify(pattern="2:4", score="magnitude").apply(mlp(), context(32)))["up"]
    before = stored(mlp())["up"]
    for start in range(0, 32, 4):
        for column in range(before.shape[1]):
            group = np.abs(before[start : start + 4, column])
            kept = set(np.flatnonzero(after[start : start + 4, column]))
            assert kept == set(np.argsort(group)[2:])


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_wanda_is_the_definition_of_the_paper(sparsity):
    candidate, calibration = mlp(), context(32, scale=UNEVEN, rows=100)
    after = stored(Sparsify(sparsity=sparsity, samples=100).apply(candidate, calibration))["up"]
    before = stored(candidate)["up"].astype(np.float64)
    score = np.abs(before) * np.linalg.norm(calibration.train.inputs["x"].astype(np.float64), axis=0)[:, None]
    for column in range(before.shape[1]):
        dropped = np.argsort(score[:, column])[: round(sparsity * 32)]
        assert set(np.flatnonzero(after[:, column] == 0)) == set(dropped)
    plain = stored(Sparsify(sparsity=sparsity, score="magnitude").apply(candidate, calibration))["up"]
    assert not np.array_equal(plain == 0, after == 0), "the inputs make no difference"


def test_magnitude_over_the_whole_tensor_convolutions_included():
    candidate = convolutional()
    after = stored(Sparsify(sparsity=0.7, score="magnitude").apply(candidate, context(3, 8, 8)))
    for name in ("c1", "c2", "out"):
        old, new = stored(candidate)[name], after[name]
        assert np.count_nonzero(new == 0) == round(0.7 * old.size)
        assert np.abs(old[new == 0]).max() <= np.abs(old[new != 0]).min()
    wanda = stored(Sparsify(sparsity=0.7).apply(candidate, context(3, 8, 8)))
    assert np.array_equal(wanda["c1"], stored(candidate)["c1"])


def test_wanda_loses_less_where_inputs_differ():
    candidate, calibration = block(), context(6, 32)
    copied = candidate.copy_model()
    gamma = next(item for item in copied.graph.initializer if item.name == "gamma")
    gamma.raw_data = UNEVEN.astype(np.float32).tobytes()
    candidate = type(candidate)(copied)
    x = calibration.train.inputs["x"]
    errors = {
        score: relative(
            run(Sparsify(score=score, include=("up",)).apply(candidate, calibration), x, "h0"), run(candidate, x, "h0")
        )
        for score in ("wanda", "magnitude")
    }
    assert errors["wanda"] < 0.7 * errors["magnitude"], errors


def test_a_tied_dictionary_stays_one_tensor_or_is_left():
    candidate = dictionary()
    after = Sparsify(score="magnitude").apply(candidate, context(32))
    assert operators(after) == operators(candidate)
    assert np.count_nonzero(stored(after)["D"] == 0) == 512
    for compression in (Sparsify(), Sparsify(pattern="2:4")):
        plan = {change.tensor: change.after for change in compression.plan(candidate)}
        assert plan["D"] == "left as it is: tied, read plain and transposed by a.MatMul, b.MatMul (transposed)"
        assert np.array_equal(stored(compression.apply(candidate, context(32)))["D"], stored(candidate)["D"])


def test_inputs_that_are_no_multiple_of_four():
    candidate = graph(
        [("MatMul", "x w", "a", {}), ("MatMul", "a v", "y", {})],
        {"w": normal(1, 10, 8), "v": normal(2, 8, 8)},
        {"x": ("batch", 10)},
        {"y": ("batch", 8)},
    )
    plan = {change.tensor: change.after for change in Sparsify(pattern="2:4").plan(candidate)}
    assert plan == {"w": "left as it is: 10 inputs are no multiple of 4", "v": "32 of them zero, 2 of every 4 inputs"}


@pytest.mark.parametrize("compression", [Sparsify(), Sparsify(pattern="2:4"), Sparsify(score="magnitude")])
def test_pruning_twice_is_pruning_once_and_planning_is_nothing(compression):
    candidate = mlp()
    before = candidate.model.SerializeToString()
    compression.plan(candidate)
    once = compression.apply(candidate, context(32))
    assert candidate.model.SerializeToString() == before
    twice = compression.apply(once, context(32))
    assert twice.model.SerializeToString() == once.model.SerializeToString()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sparsify(sparsity=1.0), "sparsity = 1.0"),
        (lambda: Sparsify(pattern="1:4"), "unknown pattern '1:4'; expected one of: any, 2:4"),
        (lambda: Sparsify(pattern="2:4", sparsity=0.7), r"sparsity = 0\.7 with pattern '2:4'"),
        (lambda: Sparsify(score="taylor"), "unknown score 'taylor'"),
        (lambda: Sparsify(include=("z",)).plan(mlp()), "no weight matches z; the graph has up, down"),
        (lambda: Sparsify().apply(mlp(), context(31)), "does not fit the graph"),
    ],
)
def test_mistakes_name_what_is_allowed(make, words):
    with pytest.raises(EdgekitError, match=words):
        make()
