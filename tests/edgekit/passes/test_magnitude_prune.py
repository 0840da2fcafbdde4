"""Magnitude pruning: the smallest weights over all matrices together, and the zeros held."""

import numpy as np
import pytest
import torch

from edgekit.passes.magnitude_prune import MagnitudePrune, two_of_four


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_the_smallest_weights_of_all_matrices_become_zero(sparsity, tiny_candidate, tiny_context):
    after = MagnitudePrune(sparsity=sparsity, epochs=0).apply(tiny_candidate, tiny_context).weights()
    before = {name: value for name, value in tiny_candidate.weights().items() if value.ndim == 2}
    together = np.concatenate([np.abs(value).ravel() for value in before.values()])
    limit = np.sort(together)[round(sparsity * together.size) - 1]
    for name, value in before.items():
        assert np.array_equal(after[name], np.where(np.abs(value) > limit, value, 0.0)), name
    zeros = sum(np.count_nonzero(after[name] == 0) for name in before)
    assert zeros == pytest.approx(sparsity * together.size, abs=1)
    # the planted failure: the smallest of each matrix would be another set
    per_matrix = [np.count_nonzero(after[name] == 0) / value.size for name, value in before.items()]
    assert max(per_matrix) - min(per_matrix) > 0.02


def test_zeros_hold_through_training_and_are_positive(tiny_candidate, tiny_context):
    untrained = MagnitudePrune(sparsity=0.5, epochs=0).apply(tiny_candidate, tiny_context).weights()
    trained = MagnitudePrune(sparsity=0.5, epochs=3, learning_rate=1e-2).apply(tiny_candidate, tiny_context).weights()
    moved = 0
    for name, value in untrained.items():
        if value.ndim == 2:
            assert np.array_equal(value == 0, trained[name] == 0), name
            assert not np.signbit(trained[name][trained[name] == 0]).any(), "-0.0 takes more bytes to pack"
            moved += np.count_nonzero(trained[name] != value)
    assert moved > 100


def test_the_plan_and_what_happened(tiny_candidate, tiny_context):
    compression = MagnitudePrune(sparsity=0.5, epochs=2, include=("blocks.*",))
    plan = compression.plan(tiny_candidate)
    after = compression.apply(tiny_candidate, tiny_context)
    assert {change.tensor for change in plan} == {
        name for name, value in tiny_candidate.weights().items() if value.ndim == 2 and name.startswith("blocks.")
    }
    for change in plan:
        weight = after.weights()[change.tensor]
        left = np.count_nonzero(weight)
        assert change.before == f"{weight.size} weights"
        assert change.after == f"{left} left, {1 - left / weight.size:.0%} zeros"
    assert np.count_nonzero(after.weights()["classifier.weight"] == 0) == 0


def test_an_encoding_does_not_outlive_the_weights_it_described(tiny_candidate, tiny_context):
    from edgekit.passes.cluster import Cluster

    clustered = Cluster(bits=4, epochs=0).apply(tiny_candidate, tiny_context)
    assert MagnitudePrune(sparsity=0.5, epochs=1).apply(clustered, tiny_context).encodings == {}


def test_recovery_restores_what_pruning_cost(tiny_candidate, tiny_context, tiny_data):
    from edgekit.nn.training import probabilities

    def accuracy(candidate):
        return (probabilities(candidate.model, tiny_data[1]).argmax(axis=1) == tiny_data[1].labels).mean()

    def pruned(epochs):
        return MagnitudePrune(sparsity=0.8, epochs=epochs, learning_rate=1e-2).apply(tiny_candidate, tiny_context)

    cut, recovered = accuracy(pruned(0)), accuracy(pruned(8))
    assert cut < accuracy(tiny_candidate) - 0.04, "pruning costs nothing here, so there is nothing to recover"
    assert recovered > cut + 0.03


def test_two_of_four_neighbours_stay(tiny_candidate, tiny_context):
    after = MagnitudePrune(pattern="2:4", epochs=2, learning_rate=1e-2).apply(tiny_candidate, tiny_context).weights()
    plan = {change.tensor: change.after for change in MagnitudePrune(pattern="2:4").plan(tiny_candidate)}
    for name, value in tiny_candidate.weights().items():
        if value.ndim < 2:
            continue
        if value.shape[1] % 4:
            assert "no multiple of 4" in plan[name]
            assert np.count_nonzero(after[name]) == value.size
            continue
        for row, kept in zip(value, after[name], strict=True):
            for four, left in zip(row.reshape(-1, 4), kept.reshape(-1, 4), strict=True):
                assert set(np.flatnonzero(left)) == set(np.argsort(np.abs(four))[2:]), name
    # the planted failure: half of the weights over all matrices is another pattern
    usual = MagnitudePrune(sparsity=0.5, epochs=0).apply(tiny_candidate, tiny_context).weights()["classifier.weight"]
    assert set(np.count_nonzero(usual.reshape(-1, 4), axis=1)) != {2}


def test_two_of_four_input_channels_of_a_convolution():
    """At each place of the kernel, as sparse tensor cores read it; neighbours within the kernel are no such pattern."""
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 8, 2, 2)).astype(np.float32))
    kept = two_of_four(weight)
    for out in range(3):
        for y, x in np.ndindex(2, 2):
            for first in (0, 4):
                four = weight[out, first : first + 4, y, x].abs()
                assert set(four.argsort()[2:].tolist()) == set(
                    kept[out, first : first + 4, y, x].nonzero().flatten().tolist()
                )
    assert not (kept.reshape(3, -1, 4).sum(dim=-1) == 2).all(), "four places of one kernel are another pattern"


def test_a_tied_weight_stays_tied_and_pruned():
    from edgekit.bundle.family import build, tied
    from edgekit.data.dataset import Dataset
    from edgekit.nn.module import trust
    from edgekit.passes.base import Candidate, Context

    factory = "tests.conformance.models:llama_block"
    trust(factory)
    candidate = Candidate("module", {"factory": factory}, build("module", {"factory": factory}))
    data = Dataset({"ids": np.arange(64).reshape(8, 8) % 64}, np.full(8, -1))
    context = Context(data, candidate.model, 0)
    after = MagnitudePrune(sparsity=0.5, epochs=1).apply(candidate, context)
    assert tied(after.model) == {"head.weight": "embed.weight"}
    weights = after.copy_model().state_dict()
    assert np.array_equal(weights["head.weight"], weights["embed.weight"])
    assert (weights["head.weight"] == 0).float().mean() > 0.05
    assert not np.array_equal(weights["head.weight"], candidate.weights()["embed.weight"])
