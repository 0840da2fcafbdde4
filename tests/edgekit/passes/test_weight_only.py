"""Group-wise weights: codes against numpy, error-compensating rounding against the optimal brain surgeon."""

import numpy as np
import onnx
import pytest

from edgekit.errors import EdgekitError
from edgekit.passes.weight_only import WeightOnly, gptq, nearest
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
    size,
    stored,
)


def correlated(rows, features, seed=0):
    """(rows, features) inputs of which a few directions explain most, as activations are."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(features, features)) * np.geomspace(3, 0.05, features)[:, None]
    return rng.normal(size=(rows, features)) @ mixing


def surgeon(weight, second, bits, group, damping):
    """Round one input after another; each time move the others by the optimal brain surgeon's formula with the explicit
    inverse of what is left of the Hessian (Frantar et al. 2023, equation 2)."""
    inputs = len(weight)
    hessian = second + damping * np.mean(np.diag(second)) * np.eye(inputs)
    left, limit = weight.astype(np.float64).copy(), 2 ** (bits - 1) - 1
    result = np.zeros_like(left)
    for i in range(inputs):
        if i % group == 0:
            scale = np.float64(np.float32(np.abs(left[i : i + group]).max(axis=0) / limit))
        inverse = np.linalg.inv(hessian[i:, i:])
        result[i] = np.clip(np.round(left[i] / scale), -limit, limit) * scale
        left[i:] -= np.outer(inverse[:, 0] / inverse[0, 0], left[i] - result[i])
    return result


def decoded(codes, scale, inputs):
    return (codes * scale).reshape(-1, codes.shape[2])[:inputs]


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_is_the_optimal_brain_surgeon_column_by_column(bits):
    weight = normal(1, 64, 20).astype(np.float64)
    x = correlated(300, 64)
    codes, scale = gptq(weight, x.T @ x, bits, 32, 0.01)
    expected = surgeon(weight, x.T @ x, bits, 32, 0.01)
    assert np.abs(decoded(codes, scale, 64) - expected).max() < 1e-6
    elsewhere = surgeon(weight, np.eye(64), bits, 32, 0.01)
    assert np.abs(decoded(codes, scale, 64) - elsewhere).max() > 1e-3, "the inputs make no difference"


@pytest.mark.parametrize("seed", range(4))
def test_gptq_loses_less_of_the_outputs_than_rounding_to_nearest(seed):
    weight, x = normal(seed, 96, 30).astype(np.float64), correlated(400, 96, seed)
    codes, scale = gptq(weight, x.T @ x, 4, 32, 0.01)
    simple = nearest(weight, 4, 32)
    errors = [relative(x @ decoded(*coded, 96), x @ weight) for coded in ((codes, scale), simple)]
    assert errors[0] < 0.7 * errors[1]
    # of the weights it loses more: the gain is in the outputs, where it was looked for
    assert relative(decoded(codes, scale, 96), weight) > relative(decoded(*simple, 96), weight)


def test_inputs_that_are_always_zero():
    weight, x = normal(1, 32, 8).astype(np.float64), correlated(50, 32)
    x[:, 5] = 0
    assert np.isfinite(decoded(*gptq(weight, x.T @ x, 4, 32, 0.01), 32)).all()
    assert np.isfinite(decoded(*gptq(weight, np.zeros((32, 32)), 4, 32, 0.01), 32)).all()


CASES = {"mlp": (mlp, (32,)), "block": (block, (6, 32)), "dictionary": (dictionary, (32,))}


def expected_weights(candidate, bits, group):
    """The candidate with every matrix on its grid, groups along the axis that its first product sums over."""
    copied = candidate.copy_model()
    for item in copied.graph.initializer:
        value = onnx.numpy_helper.to_array(item)
        if value.ndim == 2 and value.size >= 256:
            transposed = item.name == "down" and value.shape[0] == 10  # read by a Gemm with transB
            rows = (value.T if transposed else value).astype(np.float64)
            padded = np.pad(rows, ((0, -len(rows) % group), (0, 0))).reshape(-1, group, rows.shape[1])
            scale = np.abs(padded).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
            grid = (np.round(padded / scale) * scale).reshape(-1, rows.shape[1])[: len(rows)]
            item.CopyFrom(onnx.numpy_helper.from_array(np.float32(grid.T if transposed else grid), item.name))
    return type(candidate)(copied)


@pytest.mark.parametrize("form", ["portable", "matmulnbits"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES)
def test_the_graph_computes_with_the_rounded_weights(make, shape, bits, form):
    candidate = make()
    after = WeightOnly(bits=bits, layout=form, smallest=256).apply(candidate, context(*shape))
    onnx.checker.check_model(after.model)
    x = normal(9, 30, *shape)
    reference = expected_weights(candidate, bits, 32)
    if make is dictionary and form == "matmulnbits":  # the tied matrix stays in float32
        for item in reference.model.graph.initializer:
            if item.name == "D":
                item.CopyFrom(next(t for t in candidate.model.graph.initializer if t.name == "D"))
    assert np.abs(run(after, x) - run(reference, x)).max() < 2e-5
    other = expected_weights(candidate, 12 - bits, 32)
    assert np.abs(run(after, x) - run(other, x)).max() > 1e-3, "4 and 8 bits cannot be told apart"


@pytest.mark.parametrize("bits", [8, 4])
def test_the_portable_form_is_exact_and_of_the_standard_alone(bits):
    after = WeightOnly(bits=bits, smallest=256).apply(mlp(), context(32))
    assert {entry.domain for entry in after.model.opset_import} == {""}
    onnx.checker.check_model(after.model, full_check=True)
    weights = run(after, normal(1, 2, 32), "up", optimized=False)
    expected = stored(expected_weights(mlp(), bits, 32))["up"]
    assert np.abs(weights - expected).max() <= 1e-6 * np.abs(expected).max()


def test_bytes():
    sizes = {bits: size(WeightOnly(bits=bits).apply(block(), context(6, 32))) for bits in (8, 4)}
    matrices = 2 * 32 * 64
    assert size(block()) - sizes[8] == pytest.approx(3 * matrices - 4 * matrices / 32, rel=0.12)
    assert sizes[8] - sizes[4] == pytest.approx(matrices / 2, rel=0.5)


def test_gptq_in_a_graph_loses_less_than_nearest():
    candidate = block()
    x = correlated(300, 32)[:, None].repeat(6, axis=1).astype(np.float32)
    calibration = context(6, 32, rows=300)
    calibration.train.inputs["x"][:] = x
    before = run(candidate, x, "h0")
    errors = {
        rounding: relative(run(WeightOnly(bits=4, rounding=rounding).apply(candidate, calibration), x, "h0"), before)
        for rounding in ("nearest", "gptq")
    }
    assert errors["gptq"] < 0.8 * errors["nearest"]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_tied_dictionary_has_one_set_of_codes(rounding):
    compression = WeightOnly(rounding=rounding)
    plan = {change.tensor: change.after for change in compression.plan(dictionary())}
    assert plan["D"].endswith("tied, one set of codes for a.MatMul, b.MatMul (transposed)")
    after = compression.apply(dictionary(), context(32))
    x = normal(1, 2, 32)
    assert np.array_equal(run(after, x, "D"), run(after, x, "Dt").T)
    assert sum(value.size == 32 * 32 for value in stored(after).values()) == 2
    left = {c.tensor: c.after for c in WeightOnly(layout="matmulnbits").plan(dictionary())}
    assert left["D"].startswith("left in float32: tied")


def test_small_matrices_stay_and_are_named():
    plan = {change.tensor: change.after for change in WeightOnly().plan(mlp())}
    assert plan == {"up": "8 bit, one scale per 32 inputs", "down": "left in float32: it has fewer than 1024 numbers"}


def test_planning_changes_nothing_and_the_same_again_gives_the_same():
    candidate = mlp()
    before = candidate.model.SerializeToString()
    compression = WeightOnly(rounding="gptq", smallest=256)
    compression.plan(candidate)
    first, second = (compression.apply(candidate, context(32)) for _ in range(2))
    assert candidate.model.SerializeToString() == before
    assert first.model.SerializeToString() == second.model.SerializeToString()
    with pytest.raises(EdgekitError, match="no product with a float32 weight that this pass could change"):
        compression.apply(first, context(32))


def test_matmulnbits_takes_gemm_apart_and_leaves_its_bias():
    after = WeightOnly(layout="matmulnbits", smallest=256).apply(mlp(), context(32))
    assert operators(after) == ["MatMulNBits", "Add", "Relu", "MatMulNBits", "Add"]


def test_a_gemm_with_alpha_is_left_alone_by_matmulnbits():
    candidate = graph(
        [("Gemm", "x w b", "a", {"alpha": 0.5}), ("MatMul", "a v", "y", {})],
        {"w": normal(1, 32, 32), "b": normal(2, 32), "v": normal(3, 32, 32)},
        {"x": ("batch", 32)},
        {"y": ("batch", 32)},
    )
    after = {c.tensor: c.after for c in WeightOnly(layout="matmulnbits").plan(candidate)}
    assert after["w"].startswith("left in float32: a.Gemm has alpha")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WeightOnly(bits=3), "bits = 3; expected 8 or 4"),
        (lambda: WeightOnly(group=48), "group = 48; expected 32 or 64 or 128"),
        (lambda: WeightOnly(rounding="up"), "unknown rounding 'up'"),
        (lambda: WeightOnly(layout="gguf"), "unknown layout 'gguf'"),
        (lambda: WeightOnly(include=("head*",)).plan(mlp()), r"no weight matches head\*; the graph has up, down"),
        (lambda: WeightOnly(smallest=10**6).plan(mlp()), "no matrix is left .*fewer than 1000000"),
        (lambda: WeightOnly(rounding="gptq").apply(mlp(), context(31)), "does not fit the graph"),
    ],
)
def test_mistakes_name_what_is_allowed(make, words):
    with pytest.raises(EdgekitError, match=words):
        make()


def test_convolutions_are_not_touched():
    after = WeightOnly(smallest=64).apply(convolutional(), context(3, 8, 8))
    assert np.array_equal(stored(after)["c1"], stored(convolutional())["c1"])
