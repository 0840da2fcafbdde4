"""Folders that transformers saved with a Hiera of random weights."""

import json

import numpy as np
import pytest
import torch
from transformers import HieraConfig, HieraForImageClassification

import edgekit
from edgekit.errors import EdgekitError
from edgekit.session import open_session

SIZES = {"depths": [1, 1, 2, 1], "embed_dim": 16, "num_heads": [2, 4, 8, 16], "num_labels": 7, "image_size": [64, 64]}


def saved(folder, **changes):
    """Save a network, and return its inputs and outputs."""
    torch.manual_seed(0)
    model = HieraForImageClassification(HieraConfig(**{**SIZES, **changes})).eval()
    for value in model.parameters():
        value.data = torch.randn_like(value) * 0.2
    model.save_pretrained(folder)
    images = torch.randn(3, 3, *model.config.image_size)
    with torch.no_grad():
        return images.numpy(), model(images).logits.numpy()


def test_a_folder_becomes_a_network_of_our_own_with_the_same_outputs(tmp_path):
    images, expected = saved(tmp_path / "hiera-toy")
    bundle = edgekit.import_hugging_face(tmp_path / "hiera-toy")
    assert (bundle.manifest.family, bundle.manifest.name) == ("hiera", "hiera-toy")
    assert len(bundle.manifest.classes) == 7
    assert expected.std() > 1e-2
    for runtime in ("torch", "onnxruntime"):
        found = open_session(bundle, runtime, threads=1).run({"pixel_values": images})["logits"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(expected).max(), err_msg=runtime)
    weights = bundle.weights()
    assert abs(weights["head.bias"]).max() > 0
    given = edgekit.import_hugging_face(tmp_path / "hiera-toy", golden={"pixel_values": images})
    np.testing.assert_allclose(given.golden()[1]["logits"], expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize(
    "change", [{"num_query_pool": 2}, {"layer_norm_eps": 1e-5}, {"hidden_act": "relu"}, {"mlp_ratio": 1.5}]
)
def test_a_network_that_ours_is_not_remains_that_of_transformers(tmp_path, change):
    images, expected = saved(tmp_path, **change)
    bundle = edgekit.import_hugging_face(tmp_path)
    assert bundle.manifest.family == "module"
    found = open_session(bundle, "torch").run({"pixel_values": images})["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_a_folder_whose_weights_are_of_another_size_is_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "embed_dim": 32, "hidden_size": 256}))
    with pytest.raises(EdgekitError, match=r"the safetensors are not those of config.json: size mismatch"):
        edgekit.import_hugging_face(tmp_path)
    with_wrong_size = {**json.loads(path.read_text()), "hidden_size": 255}
    path.write_text(json.dumps({**with_wrong_size, "embed_dim": 16, "hidden_size": 128, "depths": [1, 1, 1, 1]}))
    with pytest.raises(EdgekitError, match="is no weight of a Hiera classifier with depths"):
        edgekit.import_hugging_face(tmp_path)
    path.write_text(json.dumps(with_wrong_size))
    with pytest.raises(EdgekitError, match="the key 'hidden_size' is not one that transformers"):
        edgekit.import_hugging_face(tmp_path)
