"""What each pass does to each graph and network: how many lines its plan has, or with which reason it refuses.

A pass that starts to refuse, or stops to, changes its line in a table; so does one that leaves a tensor out.
"""

import pytest
import torch

from edgekit.bundle.family import build
from edgekit.errors import EdgekitError
from edgekit.passes.base import Candidate
from tests.edgekit.passes import test_every_graph_pass as on_graphs
from tests.edgekit.passes import test_every_pass as on_networks
from tests.edgekit.passes.networks import arguments_of
from tests.edgekit.passes.test_every_module_pass import MODULE_PASSES

SMALL = r"no matrix is left to compress \(out: left in float32: it has fewer than 256 numbers\)"
NOTHING = "there is nothing to fold in this graph"
NO_NORM = "no product directly follows a normalization or a stored scale"
THIN = r"no matrix is left to factorise \(out: left as it is: rank 14 makes it no smaller\)"
# pass: changes, or the reason of a refusal, for mlp, convolutional, block, dictionary
ON_GRAPHS = {
    "dynamic_int8": (2, 1, 2, 3),
    "static_int8 for CPUs": (2, 3, 2, 3),
    "static_int8 for TensorRT": (2, 3, 2, 3),
    "half": (8, 15, 6, 10),
    "half, stored": (2, 3, 3, 2),
    "weight_only 8": (2, SMALL, 2, 2),
    "weight_only 4, gptq": (2, SMALL, 2, 2),
    "weight_only 4, matmulnbits": (2, SMALL, 2, 2),
    "fold": (NOTHING, 1, NOTHING, NOTHING),
    "smooth_quant": (NO_NORM, NO_NORM, 1, NO_NORM),
    "low_rank": (2, THIN, 2, 2),
    "sparsify": (2, 1, 2, 2),
    "sparsify 2:4": (2, 1, 2, 2),
}
NO_UNITS = "names no such units; use dependency_prune"
# pass: for the transformer, the convolutional network
ON_NETWORKS = {
    "dependency_prune": (39, 33),
    "remove_layers": (1, 1),
    "magnitude_prune": (11, 9),
    "cluster": (11, 9),
    "quantize": (11, 9),
    "distill": (1, r"does not take the arguments \{'depth': 1\}"),
    "qat": (10, 9),
    "structured_prune": (NO_UNITS, NO_UNITS),
}


def check(compression, candidate, expected):
    """The plan has so many lines, or is refused with this reason."""
    if isinstance(expected, int):
        assert len(compression.plan(candidate)) == expected
    else:
        with pytest.raises(EdgekitError, match=expected):
            compression.plan(candidate)


def test_the_tables_have_a_line_for_every_pass():
    assert set(ON_GRAPHS) == set(on_graphs.PASSES)
    assert {len(line) for line in ON_GRAPHS.values()} == {len(on_graphs.GRAPHS)}
    assert set(ON_NETWORKS) == {*MODULE_PASSES, "qat", "structured_prune"}


@pytest.mark.parametrize("name", ON_GRAPHS)
def test_passes_on_graphs(name):
    for (make, _), expected in zip(on_graphs.GRAPHS.values(), ON_GRAPHS[name], strict=True):
        check(on_graphs.PASSES[name], make(), expected)


@pytest.mark.parametrize("name", ON_NETWORKS)
def test_passes_on_networks(name):
    if name == "dependency_prune":
        pytest.importorskip("torch_pruning")
    compression = MODULE_PASSES.get(name) or on_networks.PASSES[name]
    for kind, expected in zip(("transformer", "convnet"), ON_NETWORKS[name], strict=True):
        torch.manual_seed(0)
        arguments = arguments_of(kind)
        check(compression, Candidate("module", arguments, build("module", arguments)), expected)


def test_another_outcome_is_noticed():
    fold, (make, _) = on_graphs.PASSES["fold"], on_graphs.GRAPHS["convolutional"]
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):  # planted: expected to refuse, and it plans
        check(fold, make(), NOTHING)
    with pytest.raises(AssertionError):
        check(fold, make(), 2)
