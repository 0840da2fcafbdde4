"""Networks of this process: each use is a copy, names are never given twice, and no bundle's text can forge one."""

import pytest
import torch

from edgekit.errors import EdgekitError
from edgekit.nn import live
from edgekit.nn.module import build


@pytest.fixture(autouse=True)
def own_networks(monkeypatch):
    monkeypatch.setattr(live, "_networks", {})
    monkeypatch.setattr("edgekit.nn.module._trusted", set())
    monkeypatch.delenv("EDGEKIT_TRUST", raising=False)


def linear(value):
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(layer.weight, value)
    return layer


def test_what_is_built_is_a_copy_of_what_was_registered():
    network = linear(2.0).train()
    name = live.register(network)
    torch.nn.init.constant_(network.weight, 5.0)  # training goes on
    first, second = build(name), build(name)
    assert first.weight.item() == second.weight.item() == 2.0
    torch.nn.init.constant_(first.weight, 7.0)  # a pass changes its own
    assert build(name).weight.item() == 2.0
    assert not first.training
    assert network.training, "the caller's own stays as it was"


def test_each_network_has_a_name_of_its_own():
    names = [live.register(linear(float(value))) for value in range(3)]
    assert len(set(names)) == 3
    assert [build(name).weight.item() for name in names] == [0.0, 1.0, 2.0]
    assert all(map(live.is_live, names))


@pytest.mark.parametrize("factory", ["", None, "my.module:build", "edgekit.nn.live", "edgekit.nn.live2:network_1"])
def test_other_factories_are_not_live(factory):
    assert not live.is_live(factory)


def test_a_name_from_another_process_builds_nothing():
    live.register(linear(1.0))
    with pytest.raises(EdgekitError, match="if you trust it"):
        build(f"{live.PREFIX}network_2")
    from edgekit.nn.module import trust

    trust(f"{live.PREFIX}network_2")
    with pytest.raises(EdgekitError, match="only the process that registered it can build"):
        build(f"{live.PREFIX}network_2")


def test_the_module_has_no_other_surprises():
    with pytest.raises(AttributeError, match="'network_9'"):
        _ = live.network_9
    assert not hasattr(live, "__wrapped__")
