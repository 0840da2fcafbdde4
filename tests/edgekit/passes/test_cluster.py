"""Clustering: against the optimal one-dimensional k-means, found by dynamic programming."""

from itertools import pairwise

import numpy as np
import pytest

from edgekit.passes import cluster
from edgekit.passes.cluster import Cluster, kmeans
from edgekit.passes.magnitude_prune import MagnitudePrune


def squared_error(weight, codes, palette) -> float:
    return float(((palette.astype(np.float64)[codes] - weight) ** 2).sum())


def optimal_error(values, clusters: int) -> float:
    """The least squared error of any clustering (Wang & Song 2011): the last cluster is a run of the sorted values."""
    values = np.sort(values.astype(np.float64))
    sums, squares = (np.concatenate([[0.0], np.cumsum(values**power)]) for power in (1, 2))
    first, last = np.ix_(range(len(sums)), range(len(sums)))
    length = np.maximum(last - first, 1)
    run = squares[last] - squares[first] - (sums[last] - sums[first]) ** 2 / length  # error of values[first:last]
    run[last < first] = np.inf
    best = run[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + run).min(axis=0)
    return float(best[-1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clusters", [2, 4, 16])
@pytest.mark.parametrize("shape", ["normal", "uniform", "heavy"])
def test_kmeans_is_near_the_optimum(seed, clusters, shape):
    rng = np.random.default_rng(seed)
    draw = {"normal": rng.standard_normal, "uniform": rng.random, "heavy": lambda size: rng.standard_t(3, size)}[shape]
    weight = draw((20, 30)).astype(np.float32)
    codes, palette = kmeans(weight, clusters)
    assert codes.shape == weight.shape
    assert len(palette) <= clusters
    assert squared_error(weight, codes, palette) <= 1.35 * optimal_error(weight.ravel(), clusters)


def test_evenly_spaced_values_would_fail_that_test():
    weight = np.random.default_rng(0).normal(size=600).astype(np.float32)
    palette = np.linspace(weight.min(), weight.max(), 4).astype(np.float32)
    codes = np.abs(weight[:, None] - palette).argmin(axis=1)
    assert squared_error(weight, codes, palette) > 1.35 * optimal_error(weight, 4)


def test_the_optimum_is_the_optimum():
    """The reference against brute force: all ways to cut nine sorted values into three runs."""
    values = np.random.default_rng(1).normal(size=9)
    ordered = np.sort(values)
    cuts = [(i, j) for i in range(1, 8) for j in range(i + 1, 9)]
    errors = [sum(((part - part.mean()) ** 2).sum() for part in np.split(ordered, cut)) for cut in cuts]
    assert optimal_error(values, 3) == pytest.approx(min(errors))


def test_each_iteration_lowers_the_error(monkeypatch):
    weight = np.random.default_rng(2).normal(size=400).astype(np.float32)
    errors = []
    for iterations in range(12):
        monkeypatch.setattr(cluster, "ITERATIONS", iterations)
        errors.append(squared_error(weight, *kmeans(weight, 8)))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < errors[1] < errors[0]


def test_zeros_have_a_cluster_of_their_own():
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(20, 20)).astype(np.float32)
    weight[rng.random((20, 20)) < 0.6] = 0
    weight[0, :5] = [1e-6, -1e-6, 1e-30, 0.0, -0.0]  # small is not pruned
    codes, palette = kmeans(weight, 8)
    assert np.array_equal(palette[codes] == 0, weight == 0)
    assert np.count_nonzero(palette == 0) == 1


@pytest.mark.parametrize(
    "weight",
    [
        np.zeros((3, 4)),
        np.full((3, 4), 2.5),
        np.eye(1, 2),
        np.array([[-1.0, 0.0, 1.0]]),
        np.arange(12.0)[None],
    ],
    ids=["zeros", "constant", "zero and one", "three", "few values"],
)
@pytest.mark.parametrize("clusters", [2, 16, 256])
def test_few_different_values(weight, clusters):
    weight = weight.astype(np.float32)
    codes, palette = kmeans(weight, clusters)
    assert len(palette) <= clusters
    assert not palette[codes][weight == 0].any()
    if len(np.unique(weight)) <= clusters:
        assert np.array_equal(palette[codes], weight)


def test_the_plan_and_what_happened(tiny_candidate, tiny_context):
    compression = Cluster(bits=3, epochs=1, include=("blocks.0.attention.*", "classifier.weight"))
    plan = compression.plan(tiny_candidate)
    after = compression.apply(tiny_candidate, tiny_context)
    assert [change.tensor for change in plan] == list(after.encodings)
    for change in plan:
        encoding = after.encodings[change.tensor]
        assert change.before == f"{encoding.codes.size} x 32 bit"
        assert change.after == f"{encoding.codes.size} x 3 bit + 8 values"
        assert len(encoding.palette) <= 8
        assert encoding.codes.max() < len(encoding.palette)
        assert len(np.unique(after.weights()[change.tensor])) <= 8
    assert len(np.unique(after.weights()["blocks.0.expand.weight"])) > 8


def test_zeros_survive_clustering_and_its_training(tiny_candidate, tiny_context):
    pruned = MagnitudePrune(sparsity=0.6, epochs=1).apply(tiny_candidate, tiny_context)
    clustered = Cluster(bits=4, epochs=4, learning_rate=1e-2).apply(pruned, tiny_context)
    zeros = 0
    for name in clustered.encodings:
        assert np.array_equal(clustered.weights()[name] == 0, pruned.weights()[name] == 0), name
        zeros += np.count_nonzero(clustered.weights()[name] == 0)
    assert zeros > 300


def test_training_moves_the_shared_values_and_not_the_codes(tiny_candidate, tiny_context):
    still = Cluster(bits=3, epochs=0).apply(tiny_candidate, tiny_context)
    trained = Cluster(bits=3, epochs=3).apply(tiny_candidate, tiny_context)
    for name, encoding in trained.encodings.items():
        assert np.array_equal(encoding.codes, still.encodings[name].codes)
        assert not np.array_equal(encoding.palette, still.encodings[name].palette)


def test_a_shared_value_moves_by_the_sum_over_its_weights():
    import torch

    lookup = cluster.Lookup(torch.tensor([[0, 1], [2, 1]]), torch.tensor([-1.0, 0.0, 2.0]))
    palette = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    weight = lookup(palette)
    assert weight.tolist() == [[-1.0, 0.0], [2.0, 0.0]]
    (weight * torch.tensor([[3.0, 5.0], [7.0, 11.0]])).sum().backward()
    assert palette.grad.tolist() == [3.0, 0.0, 7.0]  # a pruned weight has no gradient
