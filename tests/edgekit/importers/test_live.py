"""Networks of this process as bundles, and as graphs that another process can open: proved equal, or refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from edgekit.importers import live
from edgekit.importers.live import TOLERANCE, from_network, portable
from edgekit.nn.live import is_live

INPUTS = [TensorSpec("x", ("batch", 3))]


@pytest.fixture
def bundle():
    torch.manual_seed(0)
    return from_network(torch.nn.Linear(3, 2), inputs=INPUTS, outputs=["y"])


def test_a_bundle_has_the_networks_weights_and_class_name(bundle):
    assert bundle.manifest.name == "linear"
    assert is_live(bundle.manifest.arguments["factory"])
    weights = bundle.weights()
    inputs, outputs = bundle.golden()
    np.testing.assert_allclose(outputs["y"], inputs["x"] @ weights["weight"].T + weights["bias"], atol=1e-6)


def test_a_network_with_a_factory_is_named_after_it_and_travels_as_it_is(monkeypatch):
    monkeypatch.setattr("edgekit.nn.module._trusted", set())
    arguments = {"in_features": 3, "out_features": 2}
    network = torch.nn.Linear(**arguments)
    bundle = from_network(network, inputs=INPUTS, outputs=["y"], factory="torch.nn:Linear", arguments=arguments)
    assert bundle.manifest.name == "linear"
    assert portable(bundle) is bundle
    assert np.array_equal(bundle.model().weight.detach().numpy(), network.weight.detach().numpy())


def test_a_live_bundle_travels_as_a_graph_with_the_same_outputs(bundle):
    graph = portable(bundle)
    assert graph.is_graph
    assert graph.manifest.arguments == {}
    np.testing.assert_array_equal(graph.golden()[0]["x"], bundle.golden()[0]["x"])
    np.testing.assert_allclose(graph.golden()[1]["y"], bundle.golden()[1]["y"], atol=1e-6)
    assert portable(graph) is graph


class Shifted:
    """A runtime whose outputs are off by a share of their largest value."""

    def __init__(self, bundle, share):
        self.expected, self.share = bundle.golden()[1], share

    def run(self, arrays):
        (y,) = self.expected.values()
        return {"y": y + self.share * max(1.0, float(np.abs(y).max()))}


@pytest.mark.parametrize(("share", "fine"), [(0.9 * TOLERANCE, True), (1.1 * TOLERANCE, False), (np.nan, False)])
def test_a_graph_that_computes_something_else_is_refused(bundle, monkeypatch, share, fine):
    monkeypatch.setattr(live, "open_session", lambda made, runtime, threads: Shifted(bundle, share))
    if fine:
        assert portable(bundle).is_graph
        return
    with pytest.raises(EdgekitError, match=r"linear: output 'y' of its ONNX graph differs .*name factory="):
        portable(bundle)


def test_the_codes_of_passes_are_in_the_graph(bundle):
    from edgekit.bundle.encoding import Affine
    from edgekit.bundle.format import assemble

    codes = np.array([[1, -2, 3], [4, -5, 6]], np.int8)
    encoding = Affine(4, codes, np.array([[0.5]], np.float32))
    weights = bundle.weights() | {"weight": encoding.decode()}
    inputs = bundle.golden()[0]
    outputs = {"y": inputs["x"] @ weights["weight"].T + weights["bias"]}
    coded = assemble(bundle.manifest, weights, {"weight": encoding}, (inputs, outputs))
    graph = portable(coded)
    assert graph.manifest.bits == {}
    assert len(graph.contents["graph.onnx"]) > 0
    np.testing.assert_allclose(graph.golden()[1]["y"], outputs["y"], atol=1e-5)
    with pytest.raises(EdgekitError, match="differs from the network's"):
        portable(replace_outputs(coded, outputs["y"] + 1))


def replace_outputs(bundle, y):
    from edgekit.bundle.format import replace_golden

    return replace(replace_golden(bundle, (bundle.golden()[0], {"y": y})), path=None)
