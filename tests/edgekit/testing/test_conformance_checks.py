"""The conformance checks: edgekit's own plug-ins keep the contracts, and each planted violation is caught."""

import shutil
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from edgekit.bundle.encoding import Palette
from edgekit.errors import EdgekitError
from edgekit.passes.base import Candidate, Change, Pass
from edgekit.passes.cluster import Cluster
from edgekit.passes.half import Half
from edgekit.testing import check_exporter, check_pass, check_session
from exporters.c_export import CExporter
from exporters.onnx_export import OnnxExporter
from runtimes.sessions.onnxruntime_session import OnnxRuntimeSession
from runtimes.sessions.torch_session import TorchSession
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


@pytest.mark.parametrize("exporter", [OnnxExporter(), CExporter()], ids=["onnx", "c"])
def test_exporters_that_keep_the_contract(exporter, toy, tmp_path):
    check_exporter(exporter, toy(), tmp_path)


class Overwrites(OnnxExporter):
    def export(self, bundle, directory, *, force=False):
        return super().export(bundle, directory, force=directory.exists())


class LeavesFiles(OnnxExporter):
    def export(self, bundle, directory, *, force=False):
        if not directory.exists():
            directory.mkdir()
        try:
            return super().export(bundle, directory, force=force)
        except EdgekitError:
            (directory / "half.onnx").write_bytes(b"half an export")
            raise


class ProvesNothing(OnnxExporter):
    """Writes whatever the bundle says."""

    def export(self, bundle, directory, *, force=False):
        try:
            return super().export(bundle, directory, force=force)
        except EdgekitError:
            if directory.exists():
                raise
            directory.mkdir()
            (directory / "model.onnx").write_bytes(bundle.digest.encode())


class SpoilsWhenRefused(OnnxExporter):
    def export(self, bundle, directory, *, force=False):
        if directory.exists() and not force:
            (directory / "model.onnx").write_bytes(b"")
        return super().export(bundle, directory, force=force)


class Miscounts(OnnxExporter):
    def export(self, bundle, directory, *, force=False):
        made = super().export(bundle, directory, force=force)
        return replace(made, files={"model.onnx": 1})


class NoChecks(OnnxExporter):
    def export(self, bundle, directory, *, force=False):
        return replace(super().export(bundle, directory, force=force), checks=[])


EXPORTERS = {
    Overwrites: "took an existing folder without force",
    LeavesFiles: "has left 'damaged' behind",
    ProvesNothing: "took a bundle whose golden outputs",
    SpoilsWhenRefused: "has changed the files",
    Miscounts: "Export.files says",
    NoChecks: "Export.checks is empty",
}


@pytest.mark.parametrize(("kind", "words"), EXPORTERS.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_a_planted_violation_of_an_exporter_is_caught(kind, words, toy, tmp_path):
    with pytest.raises(AssertionError, match=words):
        check_exporter(kind(), toy(), tmp_path)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("opener", [OnnxRuntimeSession, TorchSession])
def test_sessions_that_keep_the_contract(opener, toy):
    check_session(opener, toy())


class Reorders(TorchSession):
    def run(self, arrays):
        return {name: array[::-1] if len(array) > 1 else array for name, array in super().run(arrays).items()}


class NoProvider(TorchSession):
    provider = ""


class TakesAnything(TorchSession):
    def run(self, arrays):
        plain = {spec.name: np.nan_to_num(np.asarray(arrays[spec.name], np.float32)) for spec in self.inputs}
        return super().run(plain)


class Doubles(TorchSession):
    def run(self, arrays):
        return {name: array.astype(np.float64) for name, array in super().run(arrays).items()}


class Drifts(TorchSession):
    def run(self, arrays):
        return {name: array + np.float32(1e-3) for name, array in super().run(arrays).items()}


class ChangesInputs(TorchSession):
    def run(self, arrays):
        found = super().run(arrays)
        next(iter(arrays.values()))[...] = 0
        return found


class OtherInputs(TorchSession):
    def __init__(self, bundle, **options):
        super().__init__(bundle, **options)
        self.inputs = ()


SESSIONS = {
    Reorders: "from the golden outputs",
    NoProvider: "provider is ''",
    TakesAnything: "run took an input of another dtype",
    Doubles: "is float64; expected float32",
    Drifts: "from the golden outputs",
    ChangesInputs: "changed the input",
    OtherInputs: "its inputs are not the bundle's",
}


@pytest.mark.parametrize(("opener", "words"), SESSIONS.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_a_planted_violation_of_a_session_is_caught(opener, words, toy):
    with pytest.raises(AssertionError, match=words):
        check_session(opener, toy())
