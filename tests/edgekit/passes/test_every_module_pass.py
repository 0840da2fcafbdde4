"""What holds for every pass on networks that a Python function builds. A new one joins by a line in MODULE_PASSES."""

import numpy as np
import pytest
import torch

from edgekit.bundle.family import build
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.nn.training import probabilities
from edgekit.passes.base import Candidate, Context
from edgekit.passes.cluster import Cluster
from edgekit.passes.dependency_prune import DependencyPrune
from edgekit.passes.distill import Distill
from edgekit.passes.magnitude_prune import MagnitudePrune
from edgekit.passes.quantize import Quantize
from edgekit.passes.remove_layers import RemoveLayers
from tests.edgekit.passes.networks import arguments_of, bundled, sequences

MODULE_PASSES = {
    "dependency_prune": DependencyPrune(sparsity=0.5, epochs=2),
    "remove_layers": RemoveLayers(count=1, epochs=2),
    "magnitude_prune": MagnitudePrune(pattern="2:4", epochs=2),
    "cluster": Cluster(bits=4, epochs=2),
    "quantize": Quantize(bits=8, epochs=2),
    "distill": Distill(student={"depth": 1}, epochs=2),
}
every_pass = pytest.mark.parametrize("compression", MODULE_PASSES.values(), ids=MODULE_PASSES)


@pytest.fixture(scope="module")
def data():
    return sequences(96, 0)


@pytest.fixture
def candidate():
    torch.manual_seed(0)
    return Candidate("module", arguments_of("transformer"), build("module", arguments_of("transformer")))


def snapshot(candidate: Candidate) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in candidate.weights().items()}


@every_pass
def test_it_leaves_its_candidate_alone_repeats_itself_and_reports(compression, candidate, data):
    if compression.name == "dependency_prune":
        pytest.importorskip("torch_pruning")
    before, arguments = snapshot(candidate), str(candidate.arguments)
    seen = []
    context = Context(data, candidate.model, 0, lambda *step: seen.append(step))
    assert compression.plan(candidate)
    first, second = (compression.apply(candidate, context) for _ in range(2))
    assert seen == 2 * [(compression.name, 1, 2), (compression.name, 2, 2)]
    assert snapshot(candidate) == before
    assert str(candidate.arguments) == arguments
    assert snapshot(first) == snapshot(second)
    assert snapshot(first) != before
    assert not first.model.training
    assert not any("parametrizations" in name for name in first.model.state_dict())


@every_pass
def test_the_bundle_alone_gives_its_result_again(compression, candidate, data, tmp_path):
    if compression.name == "dependency_prune":
        pytest.importorskip("torch_pruning")
    after = compression.apply(candidate, Context(data, candidate.model, 0))
    write_bundle(bundled("transformer", after.arguments, after.model, data), tmp_path / "it.edge")
    opened = open_bundle(tmp_path / "it.edge").model()
    assert np.array_equal(probabilities(opened, data), probabilities(after.model, data))
