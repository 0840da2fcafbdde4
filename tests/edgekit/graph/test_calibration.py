"""Statistics of activations, batch by batch, against numpy on all rows at once."""

import sys

import numpy as np
import pytest

from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError
from edgekit.graph.calibration import (
    BATCH,
    BINS,
    LEVELS,
    activations,
    batches,
    calibration_rows,
    least_divergent,
    moments,
    ranges,
)
from tests.edgekit.passes.graphs import block, graph, normal, run

ROWS = 2 * BATCH + 5


def data(*shape, rows=ROWS, seed=0):
    return Dataset({"x": normal(seed, rows, *shape)}, np.arange(rows))


@pytest.fixture(scope="module")
def candidate():
    return block()


def test_rows_are_drawn_by_the_seed_in_their_order(candidate):
    drawn = [calibration_rows(candidate.model, data(6, 32), 10, seed).labels.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(rows == sorted(set(rows)) and len(rows) == 10 for rows in drawn)
    assert len(calibration_rows(candidate.model, data(6, 32), 1000, 0)) == ROWS
    assert len(calibration_rows(candidate.model, data(6, 32, rows=1), 10, 0)) == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [(data(6, 32, rows=0), "the training data has no rows"), (data(6, 31), "calibration data does not fit the graph")],
)
def test_rows_that_do_not_fit_are_refused(rows, words, candidate):
    with pytest.raises(EdgekitError, match=words):
        calibration_rows(candidate.model, rows, 10, 0)


def test_batches_hold_every_row_once():
    found = [len(part["x"]) for part in batches(data(3))]
    assert found == [BATCH, BATCH, 5]
    assert np.array_equal(np.concatenate([part["x"] for part in batches(data(3))]), data(3).inputs["x"])


def test_activations_are_the_graphs_values_and_its_inputs(candidate):
    rows, before = data(6, 32), candidate.model.SerializeToString()
    parts = list(activations(candidate.model, ["h2", "x", "y", "h2"], rows))
    assert [list(part) for part in parts] == [["h2", "x", "y"]] * 3
    h2, y = run(candidate, rows.inputs["x"], "h2", "y")
    for name, expected in {"h2": h2, "y": y, "x": rows.inputs["x"]}.items():
        np.testing.assert_allclose(np.concatenate([part[name] for part in parts]), expected, atol=1e-5)
    assert [list(part) for part in activations(candidate.model, ["x"], rows)] == [["x"]] * 3
    assert candidate.model.SerializeToString() == before


def test_moments_against_numpy(candidate):
    rows = data(6, 32)
    found = moments(candidate.model, ["h1", "x"], rows)
    assert set(found) == {"h1", "x"}
    for name, values in {"h1": run(candidate, rows.inputs["x"], "h1"), "x": rows.inputs["x"]}.items():
        vectors = values.reshape(-1, values.shape[-1]).astype(np.float64)
        assert found[name].count == ROWS * 6
        np.testing.assert_allclose(found[name].second, vectors.T @ vectors, atol=1e-3)
        np.testing.assert_allclose(found[name].largest, np.abs(vectors).max(axis=0), rtol=1e-5)
        np.testing.assert_allclose(found[name].norms, np.linalg.norm(vectors, axis=0), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("statistic", [moments, lambda *given: ranges(*given, "minmax", 99.9)])
def test_values_that_are_no_numbers_are_named(bad, statistic, candidate):
    rows = data(6, 32)
    rows.inputs["x"][BATCH + 1, 2, 3] = bad
    with pytest.raises(EdgekitError, match="calibration: 'x' is NaN or infinite"):
        statistic(candidate.model, ["x"], rows)


def relu():
    return graph([("Relu", "x", "y", {})], {}, {"x": ("batch", 50)}, {"y": ("batch", 50)}).model


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_the_whole_range(scale):
    rows = data(50)
    rows.inputs["x"][...] = scale * (rows.inputs["x"] + 1)
    x = rows.inputs["x"]
    found = ranges(relu(), iter(["x", "y"]), rows, "minmax", 99.9)
    assert found == {"x": (x.min(), x.max()), "y": (0.0, max(x.max(), 0.0))}


@pytest.mark.parametrize("percentile", [90.0, 99.0, 100.0])
def test_a_percentile_of_the_nonzero_magnitudes(percentile):
    rows = data(50)
    rows.inputs["x"][-1, 0] = -9.0  # in the last batch; the lowest value is the largest magnitude
    x = rows.inputs["x"]
    found = ranges(relu(), ["x", "y"], rows, "percentile", percentile)
    for name, values in {"x": np.abs(x), "y": x[x > 0]}.items():
        low, high = found[name]
        threshold, width = max(-low, high), values.max() / BINS
        assert (values <= threshold).mean() >= percentile / 100, "the bins that are kept hold the share"
        assert (values <= threshold - width).mean() < percentile / 100, "one bin less does not"
    assert found["x"][1] == pytest.approx(min(-found["x"][0], x.max()))
    assert found["y"][0] == 0.0


def test_the_entropy_clips_an_outlier_and_keeps_the_rest():
    rows = data(50)
    plain = ranges(relu(), ["x"], rows, "entropy", 0.0)["x"]
    rows.inputs["x"][3, 3] = 30.0
    low, high = ranges(relu(), ["x"], rows, "entropy", 0.0)["x"]
    x = np.delete(rows.inputs["x"], 3, axis=0)
    assert np.quantile(x, 0.97) < high < 6.0
    assert low == pytest.approx(max(x.min(), -high), abs=1e-6)
    assert plain[1] <= x.max()
    assert plain[0] >= x.min()


def divergence(counts, kept):
    """Relative entropy of the clipped histogram and its levels, bin by bin."""
    p = counts[:kept].copy()
    p[-1] += counts[kept:].sum()
    q = np.zeros(kept)
    for level in range(LEVELS):
        inside = [i for i in range(kept) if i * LEVELS // kept == level]
        filled = [i for i in inside if counts[i] > 0]
        for i in filled:
            q[i] = sum(counts[i] for i in inside) / len(filled)
    p, q = p / p.sum(), q / q.sum()
    return sum(a * np.log(a / max(b, 1e-12)) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("seed", range(8))
def test_the_entropy_threshold_against_a_plain_loop(seed):
    bins = LEVELS + 24
    tail = np.abs(np.random.default_rng(seed).standard_t(2, 4000))
    counts = np.histogram(tail, bins, (0, np.quantile(tail, 0.999)))[0].astype(float)
    found = [divergence(counts, kept) for kept in range(LEVELS, bins + 1)]
    assert least_divergent(counts) == LEVELS + int(np.argmin(found))
    assert max(found) > 1.05 * min(found), "every threshold is as good: the histogram tests nothing"


def test_a_missing_runtime_is_named_with_its_extra(candidate, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EdgekitError, match=r"calibration.*onnxruntime.*edgekit\[onnx\]"):
        next(activations(candidate.model, ["y"], data(6, 32)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_zeros_have_the_range_of_zero(method):
    rows = Dataset({"x": np.zeros((ROWS, 50), np.float32)}, np.arange(ROWS))
    assert ranges(relu(), ["x"], rows, method, 99.0) == {"x": (0.0, 0.0)}
