"""Every session that runs here against the golden outputs, and what it refuses."""

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.session import open_session
from runtimes.sessions import onnxruntime_session
from runtimes.sessions.onnxruntime_session import OnnxRuntimeSession
from runtimes.sessions.torch_session import TorchSession
from tests.toys import toy_bundle

SESSIONS = [OnnxRuntimeSession, TorchSession]
MODELS = {
    "plain": toy_bundle(),
    "context": toy_bundle(context=2),
    "layers": toy_bundle(layers=2),
    "pruned heads": toy_bundle(heads=3, context=1),
    "affine": toy_bundle("affine rows"),
    "palette": toy_bundle("palette"),
    "logits": toy_bundle(output="logits"),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short trials, and no plan remembered from another test."""
    monkeypatch.setattr(onnxruntime_session, "TRIAL_SECONDS", 0.001)
    monkeypatch.setattr(onnxruntime_session, "_measured", {})


@pytest.mark.parametrize("session_class", SESSIONS)
@pytest.mark.parametrize("bundle", MODELS.values(), ids=MODELS)
def test_golden_outputs(session_class, bundle):
    session = session_class(bundle)
    inputs, expected = bundle.golden()
    got = session.run(inputs)
    assert list(got) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, atol=2e-6)


@pytest.mark.parametrize("session_class", SESSIONS)
def test_no_rows_give_empty_outputs(session_class):
    bundle = MODELS["context"]
    empty = {name: array[:0] for name, array in bundle.golden()[0].items()}
    assert session_class(bundle).run(empty)["probabilities"].shape == (0, 5)


@pytest.mark.parametrize("session_class", SESSIONS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"light_curves": a["light_curve"]}, "unknown input 'light_curves'.*did you mean 'light_curve'"),
        (lambda a: {}, "'light_curve' is missing"),
        (lambda a: {"light_curve": a["light_curve"][:, :5]}, r"shape \(6, 5, 2\); expected \(batch, 12, 2\)"),
        (lambda a: {"light_curve": a["light_curve"].astype(float)}, "dtype float64; expected float32"),
        (lambda a: {"light_curve": a["light_curve"] * np.float32("nan")}, "NaN"),
    ],
)
def test_wrong_inputs_are_named(session_class, change, message):
    """By a session's first run and by the shorter ways of later ones."""
    inputs = change(MODELS["plain"].golden()[0])
    session = session_class(MODELS["plain"])
    for _ in range(2):
        with pytest.raises(EdgekitError, match=message):
            session.run(inputs)
        session.warmup(1)


@pytest.mark.parametrize("session_class", SESSIONS)
def test_inputs_must_agree_on_the_batch(session_class):
    inputs = MODELS["context"].golden()[0]
    session = session_class(MODELS["context"])
    for rows in (1, 3):
        with pytest.raises(EdgekitError, match="differ in batch size"):
            session.run(inputs | {"context": inputs["context"][:rows]})
        session.warmup(1)


@pytest.mark.parametrize("session_class", SESSIONS)
def test_sessions_say_what_they_are(session_class):
    session = session_class(MODELS["plain"], threads=1)
    assert session.device == "cpu (1 thread)"
    assert session.provider == {OnnxRuntimeSession: "CPUExecutionProvider", TorchSession: "torch"}[session_class]
    with pytest.raises(EdgekitError, match="threads = 0; expected at least 1"):
        session_class(MODELS["plain"], threads=0)


def test_both_open_by_name():
    for name in ("onnxruntime", "torch"):
        open_session(MODELS["plain"], name, threads=1).warmup(3)
    with pytest.raises(EdgekitError, match=r"unknown runtime 'onnxruntme'.*did you mean 'onnxruntime'"):
        open_session(MODELS["plain"], "onnxruntme")
