"""Families: networks by name."""

import subprocess
import sys

import numpy as np
import pytest

from edgekit.bundle.family import Family, build, countable_units, find_family, prunable_groups
from edgekit.errors import EdgekitError


def test_weights_arrive_and_the_network_is_in_evaluation_mode(tiny_bundle, tiny):
    weights = tiny_bundle.weights()
    model = build("t2", tiny.arguments, weights)
    assert not model.training
    for name, value in model.state_dict().items():
        assert np.array_equal(value.numpy(), weights[name])
    model.embed.weight.data += 1
    assert not np.array_equal(model.embed.weight.detach().numpy(), weights["embed.weight"]), "the weights are its own"


@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("t3", {}, "model family 't3'; expected one of: braai, hiera, module, onnx, placed, t2"),
        ("t2", {"bands": 3}, r"^weights do not fit t2 \{'bands': 3\}: size mismatch for .*"),
        ("t2", {"bnads": 2}, "bnads"),
    ],
)
def test_what_cannot_be_built(family, arguments, words, tiny_bundle):
    with pytest.raises(EdgekitError, match=words) as caught:
        build(family, arguments, tiny_bundle.weights())
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EdgekitError, match=r"^building a t2 network needs torch, .*edgekit\[compress\]'$"):
        build("t2", {"bands": 2})


def test_a_family_without_prunable_units_says_so(register):
    register("edgekit.families", "solid", Family("solid", "edgekit.nn.module:build"))
    words = "^a solid names no units that can be removed; leave structured_prune out of the recipe$"
    with pytest.raises(EdgekitError, match=words):
        prunable_groups("solid", None)
    assert countable_units("solid", None) == {}


def test_a_graph_has_no_network_to_build():
    with pytest.raises(
        EdgekitError, match=r"^a bundle of the family 'onnx' holds a graph; there is no network to build$"
    ):
        build("onnx", {})


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (object(), "it is a object; expected an edgekit.bundle.family.Family;"),
        (Family("other"), "its name is 'other', and it is registered as 'solid';"),
    ],
)
def test_a_family_that_is_none_is_refused(family, words, register):
    register("edgekit.families", "solid", family)
    with pytest.raises(EdgekitError, match=rf"the model family 'solid' cannot be used: {words}"):
        find_family("solid")


def test_looking_at_a_family_imports_no_torch():
    code = (
        "import sys; from edgekit.bundle.family import find_family; find_family('t2'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_units_of_a_t2_that_can_be_removed(tiny_bundle):
    model = tiny_bundle.model()
    assert countable_units("t2", model) == {"heads": 4, "ff_dim": 16}
    groups = prunable_groups("t2", model)
    assert {(group.argument, group.size) for group in groups} == {("heads", 4), ("ff_dim", 16)}
    names = set(tiny_bundle.weights())
    assert all(set(group.rows) | set(group.columns) <= names for group in groups)
    assert countable_units("module", model) == {}
    with pytest.raises(EdgekitError, match="a module names no units"):
        prunable_groups("module", model)
