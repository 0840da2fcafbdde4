"""A searched network whose head has weights for each position; arguments of a strange bundle are refused."""

import numpy as np
import pytest
import torch

from alert_broker.cutouts.bundle import placed_bundle
from alert_broker.cutouts.placed import build
from alert_broker.cutouts.tensors import CutoutTensors
from edgekit.errors import EdgekitError
from edgekit.nn import hiera
from edgekit.session import open_session

NETWORK = {
    "depths": [1, 1], "kinds": ["rep", "separable"], "ratios": [1, 1], "pools": [True], "width": 8, "head_dim": 1,
    "mask_unit": 1, "stem": "patch4", "image": 32, "channels": 3, "classes": 2,
}  # fmt: skip


def network(**changes):
    torch.manual_seed(0)
    return build(network=NETWORK, **changes).eval()


def test_each_position_has_weights_of_its_own():
    images = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (3, 3, 32, 32)).astype(np.float32))
    model = network()
    with torch.no_grad():
        features = model.convolutions(model.stem(images)).numpy()
        weights, bias = model.head.weight.numpy(), model.head.bias.numpy()
        naive = np.array([[(image * kernel).sum() for kernel in weights] for image in features]) + bias
        np.testing.assert_allclose(model(images), naive, atol=1e-5)
        mirrored = np.array([[(image[..., ::-1] * kernel).sum() for kernel in weights] for image in features]) + bias
        assert np.abs(model(images).numpy() - mirrored).max() > 1e-3


def test_fused_convolutions_give_the_same():
    images = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (3, 3, 32, 32)).astype(np.float32))
    model = network().train()
    with torch.no_grad():
        model(images)  # the normalizations have statistics
        expected = model.eval()(images)
        fused = build(network=NETWORK, fused=True).eval()
        fused.load_state_dict(hiera.fuse(model).state_dict())
        np.testing.assert_allclose(fused(images), expected, atol=1e-5)


def test_the_bundle_runs_in_onnxruntime():
    tensors = CutoutTensors(63, "rows", channels="first", crop=32)
    bundle = placed_bundle(network(fused=True), {"network": NETWORK, "fused": True}, "toy", tensors)
    inputs, expected = bundle.golden()
    found = open_session(bundle, "onnxruntime", threads=1).run(inputs)
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=1e-6)
    assert bundle.manifest.classes == ("bogus", "real")
    assert CutoutTensors.from_bundle(bundle.manifest.preprocessing, "toy") == tensors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "network = None"),
        ({"network": [1]}, r"network = \[1\]"),
        ({"network": NETWORK, "fused": 1}, "fused = 1; expected true or false"),
        ({"network": {**NETWORK, "fused": True}}, "network = "),
        ({"network": {**NETWORK, "width": 1 << 40}}, "width = "),
        ({"network": {**NETWORK, "more": 1}}, "more"),
        ({"network": {**NETWORK, "kinds": ["rep", "global"], "mask_unit": 4}}, "expected convolutional stages alone"),
        ({"network": {**NETWORK, "image": 1024, "classes": 4096}}, "a head of .* weights"),
        ({"network": NETWORK, "more": 1}, "unknown argument 'more'"),
    ],
)
def test_arguments_of_a_strange_bundle_are_refused(arguments, message):
    with pytest.raises(EdgekitError, match=message):
        build(**arguments)
