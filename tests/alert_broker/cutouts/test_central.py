"""A searched network sees the central part of the cutouts; arguments of a strange bundle are refused."""

import numpy as np
import pytest
import torch

from alert_broker.cutouts.bundle import central_bundle
from alert_broker.cutouts.central import build
from alert_broker.cutouts.tensors import CutoutTensors
from edgekit.errors import EdgekitError
from edgekit.session import open_session

NETWORK = {
    "depths": [1, 1], "kinds": ["rep", "separable"], "ratios": [1, 1], "pools": [True], "width": 8, "head_dim": 1,
    "mask_unit": 1, "stem": "patch4", "image": 32, "channels": 3, "classes": 2, "fused": True,
}  # fmt: skip


def network(**changes):
    torch.manual_seed(0)
    return build(size=63, network={**NETWORK, **changes}).eval()


def test_it_sees_the_central_part_alone():
    images = np.random.default_rng(0).normal(0, 1, (3, 3, 63, 63)).astype(np.float32)
    model = network()
    with torch.no_grad():
        found = model(torch.from_numpy(images))
        assert torch.equal(found, model.network(torch.from_numpy(images[:, :, 15:47, 15:47])))
        other = images.copy()
        other[:, :, :15], other[:, :, 47:], other[..., :15], other[..., 47:] = 7, 7, 7, 7
        assert torch.equal(found, model(torch.from_numpy(other)))
        other[0, 0, 46, 46] += 5  # the twin changes a pixel that it sees
        assert not torch.equal(found[0], model(torch.from_numpy(other))[0])


def test_the_bundle_runs_in_onnxruntime():
    tensors = CutoutTensors(63, "rows", channels="first")
    bundle = central_bundle(network(), {"size": 63, "network": NETWORK}, "toy", tensors)
    inputs, expected = bundle.golden()
    found = open_session(bundle, "onnxruntime", threads=1).run(inputs)
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=1e-6)
    assert bundle.manifest.classes == ("bogus", "real")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "size = None"),
        ({"size": 1 << 40, "network": NETWORK}, "size = "),
        ({"size": 63, "network": [1]}, r"network = \[1\]"),
        ({"size": 31, "network": NETWORK}, "32 pixels along a side; expected 3 images of at most size = 31"),
        ({"size": 63, "network": {**NETWORK, "channels": 1}}, "the network takes 1 images"),
        ({"size": 63, "network": {**NETWORK, "width": 1 << 40}}, "width = "),
        ({"size": 63, "network": {**NETWORK, "more": 1}}, "more"),
        ({"size": 63, "network": NETWORK, "more": 1}, "unknown argument 'more'"),
    ],
)
def test_arguments_of_a_strange_bundle_are_refused(arguments, message):
    with pytest.raises(EdgekitError, match=message):
        build(**arguments)
