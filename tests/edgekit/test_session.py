"""The session protocol: inputs are checked by name, shape, type and value."""

import numpy as np
import pytest

from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from edgekit.session import check_inputs, open_session

SPECS = (TensorSpec("light_curve", ("batch", 3, 2)), TensorSpec("context", ("batch", 2)))


def arrays(batch=4):
    return {"light_curve": np.zeros((batch, 3, 2), np.float32), "context": np.zeros((batch, 2), np.float32)}


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_good_inputs_give_their_batch_size(batch):
    assert check_inputs(SPECS, arrays(batch)) == batch


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("context"), "'context' is missing.*light_curve, context"),
        (lambda a: a.update(contxt=a["context"]), "unknown input 'contxt'.*did you mean 'context'"),
        (lambda a: a.update(context=np.zeros((4, 3), np.float32)), r"context.*\(4, 3\).*\(batch, 2\)"),
        (lambda a: a.update(context=np.zeros(2, np.float32)), "context.*shape"),
        (lambda a: a.update(context=np.zeros((4, 2))), "context.*float64.*float32"),
        (lambda a: a["context"].__setitem__((1, 1), np.nan), "context.*NaN"),
        (lambda a: a["light_curve"].__setitem__((0, 0, 0), np.inf), "light_curve.*NaN or infinite"),
        (lambda a: a.update(context=np.zeros((5, 2), np.float32)), "differ in batch size"),
    ],
)
def test_bad_inputs_are_errors_that_name_them(change, words):
    given = arrays()
    change(given)
    with pytest.raises(EdgekitError, match=words):
        check_inputs(SPECS, given)


def test_a_session_by_name(tiny_bundle, fake_runtime):
    session = open_session(tiny_bundle, "fake", threads=1)
    inputs, outputs = tiny_bundle.golden()
    assert np.abs(session.run(inputs)["probabilities"] - outputs["probabilities"]).max() < 1e-6
    with pytest.raises(EdgekitError, match=r"unknown runtime 'fke'.*did you mean 'fake'"):
        open_session(tiny_bundle, "fke")


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_the_guards_options_fit_every_runtime_of_ours(runtime, tiny_bundle):
    pytest.importorskip(runtime)
    session = open_session(tiny_bundle, runtime, threads=1)
    inputs, outputs = tiny_bundle.golden()
    assert np.abs(session.run(inputs)["probabilities"] - outputs["probabilities"]).max() < 1e-4
