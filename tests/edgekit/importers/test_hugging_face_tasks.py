"""Hugging Face folders by task: on padded batches, the bundle computes what transformers computes with the mask."""

import json

import numpy as np
import pytest
import torch

from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.errors import EdgekitError
from edgekit.importers.hugging_face import from_hugging_face
from edgekit.session import open_session

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "num_labels": 3,
}  # fmt: skip
CLASSES = {
    "BertModel": "last_hidden_state",
    "BertForSequenceClassification": "logits",
    "BertForTokenClassification": "logits",
    "BertForMaskedLM": "logits",
    "RobertaForSequenceClassification": "logits",
    "DistilBertModel": "last_hidden_state",
}
LENGTHS = (12, 7, 3, 1)


def saved(class_name, folder):
    torch.manual_seed(0)
    found = getattr(transformers, class_name)
    keys = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    distil = class_name.startswith("DistilBert")
    sizes = {keys.get(key, key) if distil else key: value for key, value in SIZES.items()}
    if distil:
        sizes["hidden_dim"] = sizes.pop("intermediate_size")
    model = found(found.config_class(**sizes)).eval()
    with torch.no_grad():  # the tiny weights of a new model would hide a wrong mask
        for name, value in model.named_parameters():
            if value.ndim > 1 and "embedding" not in name:
                value.mul_(10)
    model.save_pretrained(folder)
    return model


def batch(names):
    """Texts of several lengths in one batch, filled up with the padding's id."""
    random = np.random.default_rng(0)
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    rows = {
        "input_ids": np.where(mask == 1, random.integers(5, 60, mask.shape), 1),
        "attention_mask": mask,
        "token_type_ids": np.where(np.arange(max(LENGTHS)) > 2, 1, 0) * mask,
    }
    return {name: rows[name].astype(np.int64) for name in names}


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_padded_batch_computes_what_transformers_computes(class_name, tmp_path):
    model = saved(class_name, tmp_path / "folder")
    bundle = write_bundle(from_hugging_face(tmp_path / "folder"), tmp_path / "model.edge")
    output = CLASSES[class_name]
    assert [spec.name for spec in bundle.manifest.outputs] == [output]
    names = [spec.name for spec in bundle.manifest.inputs]
    types = [] if class_name.startswith("Distil") else ["token_type_ids"]
    assert names == ["input_ids", "attention_mask", *types]
    rows = batch(names)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in rows.items()}
        expected = model(**tensors)[output].numpy()
        unmasked = model(**{**tensors, "attention_mask": torch.ones_like(tensors["attention_mask"])})[output].numpy()
    for runtime in ("torch", "onnxruntime"):
        found = open_session(open_bundle(tmp_path / "model.edge"), runtime, threads=1).run(rows)[output]
        assert np.abs(found - expected).max() < 1e-4
        assert np.abs(found - unmasked).max() > 1e-2, "the mask makes no difference: this test could not fail"


POOLINGS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}


def sentence_folder(folder, mode="mean", *, normalize=True, kinds=("Transformer", "Pooling", "Normalize")):
    model = saved("BertModel", folder)
    kinds = kinds if normalize else kinds[:2]
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    modules = [
        {"idx": n, "path": paths[kind], "type": f"sentence_transformers.models.{kind}"} for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    settings = {key: key == POOLINGS[mode] for key in POOLINGS.values()} | {"word_embedding_dimension": 16}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    return model


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", POOLINGS)
def test_a_sentence_model_pools_real_tokens_only(mode, normalize, tmp_path):
    model = sentence_folder(tmp_path / "folder", mode, normalize=normalize)
    bundle = from_hugging_face(tmp_path / "folder")
    rows = batch([spec.name for spec in bundle.manifest.inputs])
    with torch.no_grad():
        tokens = model(**{name: torch.from_numpy(array) for name, array in rows.items()}).last_hidden_state.numpy()
    for number, length in enumerate(LENGTHS):
        real = tokens[number, :length]
        expected = {"mean": real.mean(axis=0), "cls": real[0], "max": real.max(axis=0)}[mode]
        expected = expected / np.linalg.norm(expected) if normalize else expected
        found = open_session(bundle, "onnxruntime", threads=1).run(rows)["sentence_embedding"][number]
        assert np.abs(found - expected).max() < 1e-5 * max(1, np.abs(expected).max())
        everything = {"mean": tokens[number].mean(axis=0), "max": tokens[number].max(axis=0)}.get(mode)
        if everything is not None and length < 8 and not normalize:
            assert np.abs(found - everything).max() > 1e-2, "the padding makes no difference"


def test_the_tokenizers_files_travel_with_the_bundle(tmp_path):
    sentence_folder(tmp_path / "folder")
    write_bundle(from_hugging_face(tmp_path / "folder"), tmp_path / "model.edge")
    opened = open_bundle(tmp_path / "model.edge")
    assert opened.contents["tokenizer.json"] == b'{"version": "1.0"}'
    assert {"tokenizer_config.json", "golden.npz"} <= opened.contents.keys()


def test_the_tokenizer_says_which_inputs_there_are(tmp_path):
    saved("BertModel", tmp_path / "folder")
    settings = tmp_path / "folder" / "tokenizer_config.json"
    settings.write_text('{"model_input_names": ["attention_mask", "input_ids", "position_ids"]}')
    bundle = from_hugging_face(tmp_path / "folder")
    assert [spec.name for spec in bundle.manifest.inputs] == ["input_ids", "attention_mask", "position_ids"]
    settings.write_text('{"model_input_names": ["bbox"]}')
    with pytest.raises(EdgekitError, match="model_input_names lists 'bbox'; expected input_ids"):
        from_hugging_face(tmp_path / "folder")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda f: sentence_folder(f, kinds=("Transformer", "Pooling", "Dense")),
            "modules Transformer, Pooling, Dense",
        ),
        (lambda f: saved("BertForQuestionAnswering", f), "does not import the task of BertForQuestionAnswering"),
        (lambda f: saved("BertForMultipleChoice", f), "does not import the task of BertForMultipleChoice"),
    ],
)
def test_other_tasks_are_refused_by_name(change, words, tmp_path):
    change(tmp_path / "folder")
    with pytest.raises(EdgekitError, match=words) as caught:
        from_hugging_face(tmp_path / "folder")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("modules.json", "{}", "expected a list of modules"),
        ("modules.json", "[1]", "expected a list of modules"),
        ("modules.json", '[{"type": "a.Transformer"}, {"type": "a.Pooling", "path": "../x"}]', "leaves the folder"),
        ("1_Pooling/config.json", "{}", "pooling none"),
        ("1_Pooling/config.json", '{"pooling_mode_lasttoken": true}', "pooling pooling_mode_lasttoken"),
        ("1_Pooling/config.json", '{"pooling_mode_cls_token": true, "include_prompt": false}', "with prompts included"),
    ],
)
def test_a_pooling_that_is_none_of_ours_is_refused(file, content, words, tmp_path):
    sentence_folder(tmp_path / "folder")
    (tmp_path / "folder" / file).write_text(content)
    with pytest.raises(EdgekitError, match=words):
        from_hugging_face(tmp_path / "folder")


def test_golden_rows_of_a_text_model_have_padding_and_fill_the_vocabulary(tmp_path):
    sentence_folder(tmp_path / "folder")
    inputs, _ = from_hugging_face(tmp_path / "folder").golden()
    assert inputs["attention_mask"].min() == 0
    assert inputs["input_ids"].max() > 50
    assert inputs["input_ids"].shape[1] == 48


def test_a_key_that_newer_releases_do_not_declare_is_taken_with_the_value_that_is_left(tmp_path):
    saved("BertModel", tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "position_embedding_type": "absolute"}))
    from_hugging_face(tmp_path / "folder")
    path.write_text(json.dumps({**config, "position_embedding_type": "relative_key"}))
    with pytest.raises(EdgekitError, match="position_embedding_type"):
        from_hugging_face(tmp_path / "folder")
