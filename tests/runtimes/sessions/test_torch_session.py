"""PyTorch as a session: rows in pieces, threads that are given back, and errors with the shapes that caused them."""

import numpy as np
import pytest
import torch

from edgekit.bundle.tensors import golden_inputs
from edgekit.errors import EdgekitError
from runtimes.sessions.torch_session import TorchSession
from tests.toys import toy_bundle

MODELS = {"plain": toy_bundle(), "context": toy_bundle(context=2)}


def test_torch_leaves_the_process_threads_alone():
    before = torch.get_num_threads()
    TorchSession(MODELS["plain"], threads=before + 1).warmup(2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("device", ["cuda:7", "tpu"])
def test_unknown_torch_device_is_refused(device):
    with pytest.raises(EdgekitError, match=f"no device '{device}'.*it has cpu"):
        TorchSession(MODELS["plain"], device=device)


@pytest.mark.parametrize("chunk", [1, 2, 7, 13, 100])
@pytest.mark.parametrize("model", MODELS)
def test_pieces_do_not_change_the_rows_or_their_order(model, chunk):
    bundle = MODELS[model]
    rows = golden_inputs(bundle.manifest.inputs, 13)
    whole, pieces = (TorchSession(bundle, chunk=size).run(rows)["probabilities"] for size in (None, chunk))
    np.testing.assert_allclose(pieces, whole, atol=1e-6)
    assert np.abs(pieces - pieces[::-1]).max() > 1e-4, "rows that are exchanged would be seen"


def test_threads_are_given_back_although_the_network_fails():
    session = TorchSession(MODELS["plain"], threads=torch.get_num_threads() + 1)
    before = torch.get_num_threads()
    seen = []

    def fails(*arguments):
        seen.append(torch.get_num_threads())
        raise ValueError

    session._network = fails
    with pytest.raises(EdgekitError, match=r"torch cannot run this model on inputs of shapes .*: ValueError$"):
        session.warmup(2)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("option", ["threads", "chunk"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one_are_refused(option, value):
    with pytest.raises(EdgekitError, match=f"torch: {option} = {value}; expected at least 1"):
        TorchSession(MODELS["plain"], **{option: value})


def test_arrays_in_any_memory_order_are_read_and_left_as_they_are():
    bundle = MODELS["plain"]
    (spec,) = bundle.manifest.inputs
    rows = golden_inputs(bundle.manifest.inputs, 4)[spec.name]
    session = TorchSession(bundle)
    expected = session.run({spec.name: rows})["probabilities"]
    strided = np.repeat(rows, 2, axis=0)[::2]
    strided.flags.writeable = False
    for form in (np.asfortranarray(rows), strided):
        given = form.copy(order="K")
        np.testing.assert_array_equal(session.run({spec.name: form})["probabilities"], expected)
        np.testing.assert_array_equal(form, given)


def test_no_gradient_is_kept():
    bundle = MODELS["plain"]
    session = TorchSession(bundle)
    seen = []
    network = session._network
    session._network = lambda *tensors: seen.append(torch.is_grad_enabled()) or network(*tensors)
    session.warmup(1)
    assert seen == [False]
