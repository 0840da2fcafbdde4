"""Hugging Face folders: the import reads all that transformers saved, and runs none of the folder's code."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.errors import EdgekitError
from edgekit.importers.hugging_face import from_hugging_face, load_network, safe_config
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


def test_transformers_draws_no_bar_on_standard_error(vit, capsys):
    before = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    from_hugging_face(vit[0])
    assert capsys.readouterr().err == ""
    assert before == (transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled())
    from_hugging_face.__wrapped__(vit[0])  # planted: as transformers is
    assert "Loading weights" in capsys.readouterr().err


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


LOADING = {
    "a kernel of the hub": {"_attn_implementation": "evil/kernel"},
    "the same under its public name": {"attn_implementation": "evil/kernel"},
    "experts of the hub": {"_experts_implementation": "evil/kernel"},
    "inside another value": {"id2label": {"_attn_implementation": "evil/kernel"}},
    "inside a list": {"id2label": [[{"backbone": "evil/model"}]]},
    "a quantizer": {"quantization_config": {"quant_method": "bitsandbytes"}},
    "another model": {"backbone": "evil/model"},
    "pretrained parts": {"use_pretrained_backbone": True},
    "a pipeline": {"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}},
}


@pytest.mark.parametrize("changes", LOADING.values(), ids=LOADING)
def test_a_key_that_makes_transformers_load_something_is_refused(changes, vit, tmp_path):
    with pytest.raises(EdgekitError, match="which edgekit does not do") as caught:
        from_hugging_face(edited(vit[0], tmp_path / "copy", **changes))
    assert "\n" not in str(caught.value)


opened: list[str] = []  # files that Python opens while `watching` is set
watching = False


def watch(event, arguments):
    if watching and event == "open":
        opened.append(str(arguments[0]))


@pytest.fixture
def gpt2(tmp_path):
    """A small model that can generate, in a folder with files of a stranger."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    (tmp_path / "gpt2" / "custom_generate").mkdir()
    (tmp_path / "gpt2" / "custom_generate" / "generate.py").write_text("raise SystemExit")
    return tmp_path / "gpt2"


def test_transformers_opens_no_file_of_the_folder(gpt2, monkeypatch):
    sys.addaudithook(watch)
    for load, names in (
        (lambda folder: load_network(folder, safe_config(folder)), {"config.json"}),
        (transformers.GPT2LMHeadModel.from_pretrained, {"config.json", "generation_config.json"}),
    ):
        opened.clear()
        monkeypatch.setitem(globals(), "watching", True)
        load(gpt2)
        monkeypatch.setitem(globals(), "watching", False)
        found = {Path(path).name for path in opened if str(gpt2) in path}
        assert found - {"model.safetensors"} == names


def test_a_task_that_is_not_imported_is_named(gpt2):
    with pytest.raises(EdgekitError, match=r"does not import the task of GPT2LMHeadModel; .* edgekit llm"):
        from_hugging_face(gpt2)


def shards(folder, **files):
    """Write the index of a model in several files."""
    index = {"metadata": {}, "weight_map": dict.fromkeys(("a", "b"), "part.safetensors") | files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_model_in_several_files(vit, tmp_path):
    folder, model = vit
    copy = edited(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="4KB")
    assert len(list(copy.glob("*.safetensors"))) > 1
    assert from_hugging_face(copy).parameters == sum(value.numel() for value in model.parameters())
    for name in ("../small-vit/model.safetensors", "absent.safetensors", "config.json", "/etc/passwd"):
        shards(copy, c=name)
        with pytest.raises(EdgekitError, match="is no safetensors file of the folder"):
            from_hugging_face(copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(EdgekitError, match="do not hold"):
        from_hugging_face(copy)


def test_a_key_that_the_class_does_not_declare_is_refused(vit, tmp_path):
    with pytest.raises(EdgekitError, match="the key 'colour' is not one that transformers"):
        from_hugging_face(edited(vit[0], tmp_path / "copy", colour="red"))


def test_the_attention_of_a_saved_model_is_replaced_by_the_eager_one(vit, tmp_path):
    from edgekit.nn.hugging_face import configuration

    folder = edited(vit[0], tmp_path / "copy", _attn_implementation="sdpa", _name_or_path="x/y", torch_dtype="float16")
    assert configuration(json.loads((folder / "config.json").read_text()))._attn_implementation == "eager"
    from_hugging_face(folder)


ODD = {
    "no list of classes": {"architectures": "ViTForImageClassification"},
    "a number as class": {"architectures": [7]},
    "a path as class": {"architectures": ["models.vit"]},
    "an object as class": {"architectures": {"0": "ViTForImageClassification"}},
    "no type": {"model_type": None},
    "a list as type": {"model_type": ["vit"]},
    "text for a size": {"hidden_size": "many"},
    "no heads": {"num_attention_heads": 0},
    "heads that do not divide": {"num_attention_heads": 3},
    "a list of layers": {"num_hidden_layers": [1]},
    "an unknown activation": {"hidden_act": "__import__('os')"},
    "an image of text": {"image_size": "big"},
    "an image of three sides": {"image_size": [16, 16, 16]},
    "an image of no size": {"image_size": -16},
    "half a patch": {"patch_size": 0},
    "classes without numbers": {"id2label": {"a": "b"}},
    "a list of classes": {"id2label": ["a", "b"]},
    "a layer more than the file has": {"num_hidden_layers": 3},
    "wider layers than the file has": {"intermediate_size": 64},
    "a huge image": {"image_size": 1 << 30},
    "a huge layer": {"hidden_size": 1 << 40},
    "a huge number": {"intermediate_size": 10**30},
    "no number": {"layer_norm_eps": float("nan")},
    "an infinite number": {"layer_norm_eps": float("inf")},
}


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_an_odd_value_is_one_line(changes, vit, tmp_path):
    with pytest.raises(EdgekitError) as caught:
        from_hugging_face(edited(vit[0], tmp_path / "copy", **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 1000}, "more than 2,000 modules"),
        ({"num_hidden_layers": 1001}, "num_hidden_layers = 1001; edgekit builds networks of up to 1,000 layers"),
        ({"num_hidden_layers": (1 << 63) - 1}, "up to 1,000 layers"),
        ({"intermediate_size": 1 << 29}, "which take"),
    ],
)
def test_a_network_that_is_too_large_is_refused_before_it_is_built(changes, words, vit, tmp_path, monkeypatch):
    from edgekit.nn import hugging_face
    from edgekit.nn.hugging_face import FACTORY
    from edgekit.nn.module import build

    monkeypatch.setattr(hugging_face, "MOST_MODULES", 2_000)  # 100,000 take ten seconds to count
    folder = edited(vit[0], tmp_path / "copy", **changes)
    with pytest.raises(EdgekitError, match=words):
        from_hugging_face(folder)
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(EdgekitError, match=words):  # as a bundle builds it
        build(FACTORY, {"config": config, "inputs": ["pixel_values"]})
