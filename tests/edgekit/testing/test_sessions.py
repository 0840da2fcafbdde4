"""The check of sessions: edgekit's own keep the contract, and each planted violation is caught."""

import numpy as np
import pytest

from edgekit.testing import check_session
from runtimes.sessions.onnxruntime_session import OnnxRuntimeSession
from runtimes.sessions.torch_session import TorchSession


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
