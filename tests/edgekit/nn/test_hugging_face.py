"""Hugging Face folders: the import reads all that transformers saved, and runs none of the folder's code."""

import json

import numpy as np
import pytest
import torch

from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.errors import EdgekitError
from edgekit.importers.hugging_face import from_hugging_face
from edgekit.session import open_session

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Save a small ViT with random weights with transformers, and return its folder."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    model = transformers.ViTForImageClassification(config).eval()
    folder = tmp_path_factory.mktemp("hf") / "small-vit"
    model.save_pretrained(folder)
    scaling = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(scaling))
    return folder, model


def test_a_folder_computes_what_it_did(vit, tmp_path):
    folder, model = vit
    bundle = write_bundle(from_hugging_face(folder), tmp_path / "vit.edge")
    pixels = np.random.default_rng(0).normal(0, 1, (5, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).logits.numpy()
    opened = open_bundle(tmp_path / "vit.edge")
    for runtime in ("torch", "onnxruntime"):
        found = open_session(opened, runtime, threads=1).run({"pixel_values": pixels})["logits"]
        assert np.abs(found - expected).max() < 1e-5
    assert bundle.manifest.classes == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert bundle.manifest.preprocessing == {"id": "image/1", "mean": [0.5] * 3, "std": [0.5] * 3}
    assert bundle.parameters == sum(value.numel() for value in model.parameters())


def edited(folder, target, **changes):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "code of its author"),
        ({"architectures": ["os"]}, "expected one class of transformers"),
        ({"architectures": ["ViTConfig"]}, "expected one class of transformers"),
        ({"model_type": "no-such"}, "cannot read it"),
    ],
)
def test_a_folder_that_would_run_code_or_names_none_of_its_classes(changes, words, vit, tmp_path):
    with pytest.raises(EdgekitError, match=words):
        from_hugging_face(edited(vit[0], tmp_path / "copy", **changes))


def test_pickled_weights_are_refused(vit, tmp_path):
    copy = edited(vit[0], tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(EdgekitError, match="pickle"):
        from_hugging_face(copy)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(EdgekitError, match=r"config.json: cannot be read as JSON"):
        from_hugging_face(tmp_path)
