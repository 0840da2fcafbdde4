"""The families that edgekit has: the functions and the runtimes that they name exist."""

import importlib
from dataclasses import replace

import pytest

from edgekit import plugins
from edgekit.bundle.family import Family, PrunableGroup, find_family
from edgekit.nn import families

OWN = [families.T2, families.MODULE, families.GRAPH]


def missing(family: Family) -> list[str]:
    """Return the names in a family that nothing provides."""
    found = [name for name in family.runtimes if name not in plugins.names("edgekit.sessions")]
    for text in filter(None, (family.builder, family.groups)):
        module, _, name = text.partition(":")
        if not callable(getattr(importlib.import_module(module), name, None)):
            found.append(text)
    return found


@pytest.mark.parametrize("family", OWN, ids=lambda family: family.name)
def test_a_family_is_found_by_its_name_and_all_that_it_names_exists(family):
    assert find_family(family.name) is family
    assert missing(family) == []


def test_a_planted_wrong_function_and_runtime_are_missing():
    wrong = replace(families.T2, groups="edgekit.nn.t2:prunable_group", runtimes=("torch", "tourch"))
    assert missing(wrong) == ["tourch", "edgekit.nn.t2:prunable_group"]


def test_only_a_graph_has_no_network():
    assert [family.name for family in OWN if not family.builder] == ["onnx"]
    assert "torch" not in families.GRAPH.runtimes


def test_the_groups_of_a_t2_name_parameters_that_it_has(tiny_bundle):
    from edgekit.bundle.family import prunable_groups

    model = tiny_bundle.model()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    groups = prunable_groups("t2", model)
    assert {group.argument for group in groups} <= set(tiny_bundle.manifest.arguments)
    for group in groups:
        assert isinstance(group, PrunableGroup)
        assert {shapes[name][0] for name in group.rows} == {group.size * group.width}
        assert {shapes[name][1] for name in group.columns} == {group.size * group.width}
