"""A bundle's network gives the outputs that the manifest names."""

from types import SimpleNamespace

import pytest
import torch

from edgekit.bundle.format import Manifest
from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from edgekit.graph.network import Network


def bundle(*names):
    outputs = tuple(TensorSpec(name, ("batch", 3)) for name in names)
    manifest = Manifest("x", "module", {}, (TensorSpec("x", ("batch", 3)),), outputs)
    return SimpleNamespace(manifest=manifest, model=lambda: torch.nn.Identity())


def test_only_probabilities_are_softmaxed_and_one_output_is_a_tuple_too():
    x = torch.tensor([[[1.0, 2.0, 4.0], [0.0, 0.0, 1.0]]])
    (kept,) = Network(bundle("logits"))(x)
    assert torch.equal(kept, x)
    for made in Network(bundle("probabilities"))(x), Network(bundle("probabilities"), torch.nn.Identity())(x):
        (softmaxed,) = made
        torch.testing.assert_close(softmaxed, x.exp() / x.exp().sum(dim=2, keepdim=True))


class Two(torch.nn.Module):
    def forward(self, x):
        return x, x + 1


def test_outputs_keep_the_order_of_the_manifest():
    x = torch.zeros(2, 3)
    first, second = Network(bundle("features", "probabilities"), Two())(x)
    assert torch.equal(first, x)
    torch.testing.assert_close(second, torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize(("names", "network"), [(("a", "b"), None), (("a",), Two())])
def test_another_number_of_outputs_is_refused(names, network):
    given = 1 if network is None else 2
    with pytest.raises(EdgekitError, match=f"the network gives {given} outputs, its manifest names {len(names)}"):
        Network(bundle(*names), network)(torch.zeros(1, 3))
