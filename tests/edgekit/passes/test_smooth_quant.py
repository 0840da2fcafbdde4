"""SmoothQuant: equation 4 by numpy, the same function, a smaller int8 error where a feature stands out."""

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.passes.smooth_quant import SmoothQuant, smoothing
from edgekit.passes.static_int8 import StaticInt8
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
    stored,
)

OUTLIERS = np.ones(32, np.float32)
OUTLIERS[[3, 17]] = 60


def attention(shared=False):
    """A normalization with two outlying features, three products that read it, one that reads their sum."""
    names = ("q", "k", "v")
    weights = {name: normal(number, 32, 24, scale=0.2) for number, name in enumerate(names)}
    if shared:
        weights["other"] = weights.pop("v")
    return graph(
        [
            ("LayerNormalization", "x gamma beta", "n", {}),
            ("MatMul", "n q", "a", {}),
            ("MatMul", "n k", "b", {}),
            ("Gemm", "n other" if shared else "n v", "c", {}),
            ("Add", "a b", "d", {}),
            ("Add", "d c", "y", {}),
        ],
        {**weights, "gamma": normal(7, 32) * OUTLIERS, "beta": normal(8, 32, scale=0.1)},
        {"x": ("batch", 32)},
        {"y": ("batch", 24)},
    )


def scaled(beta=True):
    """Mul and Add of their own instead of a normalization."""
    return graph(
        [("Relu", "x", "r", {}), ("Mul", "r gamma", "s", {}), ("Add", "beta s", "n", {}), ("MatMul", "n w", "y", {})],
        {"gamma": normal(1, 32) * OUTLIERS, "beta": normal(2, 32), "w": normal(3, 32, 16)},
        {"x": ("batch", 32)},
        {"y": ("batch", 16)},
    )


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
@pytest.mark.parametrize(("make", "shape"), [(attention, (32,)), (scaled, (32,)), (block, (6, 32))])
def test_the_function_stays_as_it_is(make, shape, alpha):
    candidate, calibration = make(), context(*shape)
    after = SmoothQuant(alpha=alpha).apply(candidate, calibration)
    x = normal(9, 50, *shape)
    assert np.abs(run(after, x) - run(candidate, x)).max() < 1e-5 * np.abs(run(candidate, x)).max()
    assert operators(after) == operators(candidate)
    before = stored(candidate)
    moved = [
        name for name, value in stored(after).items() if name not in before or not np.array_equal(value, before[name])
    ]
    assert moved, "nothing was moved, so nothing was tested"


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_the_scales_are_those_of_equation_4(alpha):
    candidate, calibration = attention(), context(32, rows=100)
    after = stored(SmoothQuant(alpha=alpha, samples=100).apply(candidate, calibration))
    before = stored(candidate)
    x = calibration.train.inputs["x"].astype(np.float64)
    normalized = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    seen = np.abs(normalized * before["gamma"] + before["beta"]).max(axis=0)
    largest = np.abs(np.hstack([before[name] for name in "qkv"])).max(axis=1)
    expected = seen**alpha / largest ** (1 - alpha)
    assert np.allclose(after["q"] / before["q"], expected[:, None], rtol=1e-4)
    assert np.allclose(before["gamma"] / after["gamma.smoothed"], expected, rtol=1e-4)
    assert np.allclose(before["beta"] / after["beta.smoothed"], expected, rtol=1e-4)
    # with alpha a half, features and weights end up with the same largest magnitude
    if alpha == 0.5:
        assert np.allclose(seen / expected, largest * expected, rtol=1e-4)
    else:
        assert not np.allclose(seen / expected, largest * expected, rtol=0.1)


def test_int8_loses_less_after_it():
    candidate, calibration = attention(), context(32)
    x = calibration.train.inputs["x"]
    expected = run(candidate, x)
    errors = []
    for model in (candidate, SmoothQuant().apply(candidate, calibration)):
        errors.append(relative(run(StaticInt8(weight_bits=8).apply(model, calibration), x, optimized=False), expected))
    assert errors[1] < 0.5 * errors[0], errors


def test_smoothing_twice_is_smoothing_once():
    calibration = context(32)
    once = SmoothQuant(alpha=0.7).apply(attention(), calibration)
    twice = SmoothQuant(alpha=0.7).apply(once, calibration)
    for name in "qkv":
        assert np.allclose(stored(twice)[name], stored(once)[name], rtol=1e-4)


def test_features_that_are_zero_are_left():
    assert smoothing(np.array([0.0, 4.0, 4.0]), np.array([1.0, 0.0, 1.0]), 0.5).tolist() == [1.0, 1.0, 2.0]


def test_a_normalization_with_another_reader_is_left_and_named():
    candidate = graph(
        [("LayerNormalization", "x g b", "n", {}), ("MatMul", "n w", "a", {}), ("Add", "a n", "y", {})],
        {"g": normal(1, 16), "b": normal(2, 16), "w": normal(3, 16, 16)},
        {"x": ("batch", 16)},
        {"y": ("batch", 16)},
    )
    with pytest.raises(EdgekitError, match=r"n.LayerNormalization: left as it is: also read by y\.Add"):
        SmoothQuant().plan(candidate)


def test_a_tied_weight_is_left_and_named():
    candidate = graph(
        [("LayerNormalization", "x g b", "n", {}), ("MatMul", "n w", "a", {}), ("MatMul", "a w", "y", {})],
        {"g": normal(1, 16), "b": normal(2, 16), "w": normal(3, 16, 16)},
        {"x": ("batch", 16)},
        {"y": ("batch", 16)},
    )
    with pytest.raises(EdgekitError, match=r"w is tied or behind a Transpose, read by a\.MatMul, y\.MatMul"):
        SmoothQuant().plan(candidate)


def test_a_weight_that_two_consumers_of_one_activation_share_is_scaled_once():
    candidate = graph(
        [
            ("LayerNormalization", "x g", "n", {}),
            ("MatMul", "n w", "a", {}),
            ("MatMul", "n w", "b", {}),
            ("Mul", "a b", "y", {}),
        ],
        {"g": normal(1, 16) * 9, "w": normal(3, 16, 16)},
        {"x": ("batch", 16)},
        {"y": ("batch", 16)},
    )
    after = SmoothQuant().apply(candidate, context(16))
    x = normal(5, 9, 16)
    assert relative(run(after, x), run(candidate, x)) < 1e-5


def test_a_scale_that_two_normalizations_share_is_parted():
    candidate = graph(
        [
            ("LayerNormalization", "x g", "n", {}),
            ("MatMul", "n w", "a", {}),
            ("LayerNormalization", "a g", "m", {}),
            ("MatMul", "m v", "y", {}),
        ],
        {"g": normal(1, 16) * 9, "w": normal(3, 16, 16), "v": normal(4, 16, 16)},
        {"x": ("batch", 16)},
        {"y": ("batch", 16)},
    )
    after = SmoothQuant().apply(candidate, context(16))
    x = normal(5, 9, 16)
    assert relative(run(after, x), run(candidate, x)) < 1e-5


def test_the_plan_and_what_has_no_place_for_it():
    candidate = attention()
    before = candidate.model.SerializeToString()
    assert [change.after for change in SmoothQuant().plan(candidate)] == ["features balanced with q, k, v"]
    assert candidate.model.SerializeToString() == before
    for other in (mlp(), dictionary()):
        with pytest.raises(EdgekitError, match="no product directly follows a normalization"):
            SmoothQuant().plan(other)
    with pytest.raises(EdgekitError, match="alpha = 2"):
        SmoothQuant(alpha=2.0)
    with pytest.raises(EdgekitError, match="does not fit the graph"):
        SmoothQuant().apply(candidate, context(31))
