"""A sequence fed in chunks, with the state carried, gives what the whole sequence gives."""

import numpy as np
import pytest

import edgekit
from edgekit.data.stream import Stream, run_stream
from edgekit.errors import EdgekitError
from edgekit.session import open_session
from tests.edgekit.signature_graphs import FEATURES, HIDDEN, gru, linear

STATE = {"before": "after"}
TOLERANCE = 1e-6  # chunks round as the whole does, up to the order of sums


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def session(request):
    bundle = edgekit.import_onnx(gru(), name="gru", state=STATE)
    return open_session(bundle, request.param, threads=1)


@pytest.fixture(scope="module")
def sequences():
    return np.random.default_rng(0).standard_normal((3, 20, FEATURES)).astype(np.float32)


def whole(session, sequences):
    return session.run({"x": sequences, "before": np.zeros((len(sequences), 1, HIDDEN), np.float32)})


@pytest.mark.parametrize("chunk", [1, 6, 20, 50])
def test_chunks_equal_the_whole(session, sequences, chunk):
    found = run_stream(session, STATE, {"x": sequences}, chunk=chunk)
    expected = whole(session, sequences)
    assert found["y"].shape == (3, 20, HIDDEN)
    for name, array in expected.items():
        assert np.abs(found[name] - array).max() < TOLERANCE


def test_without_the_state_the_chunks_differ_from_the_whole(session, sequences):
    zero = np.zeros((3, 1, HIDDEN), np.float32)
    parts = [session.run({"x": sequences[:, at : at + 5], "before": zero})["y"] for at in range(0, 20, 5)]
    assert np.abs(np.concatenate(parts, axis=1) - whole(session, sequences)["y"]).max() > 0.1


def test_a_state_may_be_given_for_the_first_chunk(session, sequences):
    state = np.full((3, 1, HIDDEN), 0.5, np.float32)
    found = run_stream(session, STATE, {"x": sequences, "before": state}, chunk=7)
    assert np.abs(found["y"] - session.run({"x": sequences, "before": state})["y"]).max() < TOLERANCE
    assert np.abs(found["y"] - whole(session, sequences)["y"]).max() > 0.01


def test_a_model_of_fixed_chunks_and_their_overlap():
    bundle = edgekit.import_onnx(gru(batch=1, time=4), name="fixed", state=STATE)
    session = edgekit.Session(bundle, "onnxruntime", threads=1)
    sequences = np.random.default_rng(1).standard_normal((2, 10, 1, FEATURES)).astype(np.float32)
    found = session.run_stream({"x": sequences}, overlap=1)
    stream, parts = session.stream(), []
    for start in (0, 3, 6):
        parts.append(stream.feed({"x": np.ascontiguousarray(sequences[:, start : start + 4])})["y"])
    assert found["y"].shape[:2] == (2, 3)
    assert np.array_equal(found["y"], np.stack(parts, axis=1))
    with pytest.raises(EdgekitError, match="do not fill; pad them to 13"):
        session.run_stream({"x": np.concatenate([sequences, sequences[:, :1]], axis=1)}, overlap=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "the length of a chunk is not known; give --chunk"),
        ({"chunk": 4, "overlap": 4}, "overlap = 4; expected 0 to 3"),
    ],
)
def test_chunks_that_make_no_sense_are_refused(session, sequences, options, words):
    with pytest.raises(EdgekitError, match=words):
        run_stream(session, STATE, {"x": sequences}, **options)


def test_a_model_without_a_state_needs_no_stream():
    session = open_session(edgekit.import_onnx(linear(("batch", 4), ("batch", 6))), "onnxruntime", threads=1)
    with pytest.raises(EdgekitError, match="the model has no state"):
        Stream(session, {})


def test_one_call_in_the_models_own_axes():
    session = edgekit.Session(edgekit.import_onnx(gru(), state=STATE), "onnxruntime", threads=1)
    x = np.random.default_rng(2).standard_normal((5, 2, FEATURES)).astype(np.float32)
    found = session.call({"x": x, "before": np.zeros((1, 2, HIDDEN), np.float32)})
    assert {name: array.shape for name, array in found.items()} == {"y": (5, 2, HIDDEN), "after": (1, 2, HIDDEN)}
    rows = session.run({"x": x.transpose(1, 0, 2), "before": np.zeros((2, 1, HIDDEN), np.float32)})
    assert np.array_equal(found["y"].transpose(1, 0, 2), rows["y"])
