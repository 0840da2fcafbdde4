"""The check of passes: edgekit's own keep the contract, and each planted violation is caught."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from edgekit.bundle.encoding import Palette
from edgekit.passes.base import Candidate, Change, Pass
from edgekit.passes.cluster import Cluster
from edgekit.passes.half import Half
from edgekit.testing import check_pass
from tests.edgekit.passes import graphs


@dataclass(frozen=True, slots=True)
class Halves(Pass[Candidate]):
    """A pass that keeps the contract: it halves the classifier."""

    name: ClassVar[str] = "halves"
    summary: ClassVar[str] = "halve the classifier"

    def plan(self, candidate):
        return [Change("classifier.weight", "w", "w / 2")]

    def apply(self, candidate, context):
        model = candidate.copy_model()
        with torch.no_grad():
            model.classifier.weight.mul_(0.5)
        return Candidate(candidate.family, candidate.arguments, model)


class PlanChanges(Halves):
    def plan(self, candidate):
        with torch.no_grad():
            candidate.model.classifier.weight.mul_(0.5)
        return super().plan(candidate)


class ApplyChanges(Halves):
    def apply(self, candidate, context):
        with torch.no_grad():
            candidate.model.classifier.weight.mul_(0.5)
        return candidate


class SpoilsTheTeacher(Halves):
    def apply(self, candidate, context):
        with torch.no_grad():
            context.teacher.classifier.weight.mul_(0.5)
        return super().apply(candidate, context)


class Rolls(Halves):
    def apply(self, candidate, context):
        after = super().apply(candidate, context)
        with torch.no_grad():
            after.model.classifier.weight.add_(torch.rand(1))
        return after


class Lies(Halves):
    """Its codebook does not hold the weights."""

    def apply(self, candidate, context):
        after = super().apply(candidate, context)
        codes = np.zeros(tuple(after.model.classifier.weight.shape), np.uint8)
        return replace(after, encodings={"classifier.weight": Palette(2, codes, np.array([0.25], np.float32))})


class DoesNothing(Halves):
    def apply(self, candidate, context):
        return Candidate(candidate.family, candidate.arguments, candidate.copy_model())


class StaysInTraining(Halves):
    def apply(self, candidate, context):
        after = super().apply(candidate, context)
        after.model.train()
        return after


class PlansNothing(Halves):
    def plan(self, candidate):
        return []


class GivesTheNetwork(Halves):
    def apply(self, candidate, context):
        return candidate.copy_model()


PASSES = {
    PlanChanges: "plan has changed its candidate",
    ApplyChanges: "apply has changed its candidate",
    SpoilsTheTeacher: "changed the network that it learns from",
    Rolls: "the same seed gave two results",
    Lies: "does not decode to the weight",
    DoesNothing: "apply has changed nothing",
    StaysInTraining: "in training mode",
    PlansNothing: "its plan is empty",
    GivesTheNetwork: "apply gave a T2; expected a Candidate",
}


@pytest.mark.parametrize("compression", [Halves(), Cluster(bits=4, epochs=1)], ids=["halves", "cluster"])
def test_passes_that_keep_the_contract(compression, tiny_candidate, tiny_context):
    check_pass(compression, tiny_candidate, tiny_context)


def test_a_pass_on_graphs_that_keeps_the_contract():
    check_pass(Half(), graphs.mlp(), graphs.context(32))
    with pytest.raises(AssertionError, match="half works on a GraphCandidate"):
        check_pass(Half(), object(), graphs.context(32))


@pytest.mark.parametrize(("kind", "words"), PASSES.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_a_planted_violation_of_a_pass_is_caught(kind, words, tiny_candidate, tiny_context):
    with pytest.raises(AssertionError, match=words):
        check_pass(kind(), tiny_candidate, tiny_context)
