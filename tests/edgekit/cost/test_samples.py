"""The calibration set: valid graphs, each of the family that it is for."""

import onnx

from edgekit.cost.measured import family
from edgekit.cost.operators import work
from edgekit.cost.samples import composites, samples
from edgekit.graph.shapes import sized


def test_every_sample_is_valid_and_holds_an_operator_of_its_family():
    missed = []
    for sample in samples():
        onnx.checker.check_model(sample.model)
        domains = {node.domain for node in sample.model.graph.node}
        families = {family(operator) for operator in work(sample.model, sized(sample.model, 1)).operators}
        if domains == {""} and not sample.family.startswith("int8") and sample.family not in families:
            missed.append((sample.family, families))
    assert missed == []


def test_a_family_has_samples_of_several_sizes():
    sizes = {}
    for sample in samples():
        total = sum(operator.bytes for operator in work(sample.model, sized(sample.model, 1)).operators)
        sizes.setdefault(sample.family, set()).add(total)
    assert len(sizes) > 10
    assert {name for name, found in sizes.items() if len(found) < 2} == set()


def test_composites_are_networks():
    for model in composites():
        onnx.checker.check_model(model)
        assert len(model.graph.node) > 3
