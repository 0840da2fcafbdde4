"""Folders that transformers saved, against transformers itself."""

import json
import shutil
import zlib
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.importers.safetensors_files import read_safetensors, tensors_of
from runtimes.llm.engine import Item
from runtimes.llm.hugging_face import from_folder
from runtimes.llm.model import load
from runtimes.llm.native_engine import NativeEngine
from runtimes.llm.source import open_source
from runtimes.llm.torch_engine import TorchEngine
from tests.runtimes.llm.conftest import compiler
from tests.runtimes.llm.hugging_face_folders import (
    CLASSES,
    logits_of,
    network_of,
    save,
    tokenizer_json,
    write_tokenizer,
)
from tests.runtimes.llm.kivi import KiviEngine
from tests.runtimes.llm.test_engines import check_schedules

pytest.importorskip("transformers", reason="pip install 'edgekit[transformers]'")
IDS = np.random.default_rng(7).integers(0, 300, 90)
# of the largest logit, between two implementations in float64: in transformers the angles, and the norms of Gemma, are
# float32
NEAR = 2e-5
FAR = 1e-2  # what a planted defect must exceed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that returns a network of transformers and the folder that it was saved to."""
    made = {}

    def find(model_type="llama", dtype="float32", **options):
        key = json.dumps([model_type, dtype, options])
        if key not in made:
            network = network_of(model_type, seed=zlib.crc32(key.encode()), **options)
            made[key] = network, save(network, tmp_path_factory.mktemp(model_type), dtype)
        return made[key]

    return find


def logits(model, **options):
    engine = TorchEngine(model, blocks=8, dtype="float64", **options)
    return engine.step([Item(0, IDS, logits="all")])[0]


def away(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


# --- the same numbers as transformers


@pytest.mark.parametrize("model_type", CLASSES)
def test_each_family_computes_what_transformers_does(saved, model_type):
    network, folder = saved(model_type)
    assert away(logits(from_folder(folder)), logits_of(network, IDS)) < NEAR


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(saved, model_type, tied):
    network, folder = saved(model_type, tie_word_embeddings=tied)
    model = from_folder(folder)
    assert (model.head is model.embedding) is tied
    assert away(logits(model), logits_of(network, IDS)) < NEAR


def test_biases_of_attention_are_read_if_the_config_has_them(saved):
    network, folder = saved("llama", attention_bias=True)
    model = from_folder(folder)
    assert model.layers[0].attention_output_bias is not None
    assert away(logits(model), logits_of(network, IDS)) < NEAR


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    "yarn with its own options": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
    },
    "yarn by two scales": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 128,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 16 for i in range(16)],
        "long_factor": [2.0 + i for i in range(16)],
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_each_scaling_of_the_rotary_embedding(saved, name):
    given = {"rope_theta": 10_000.0, **SCALINGS[name]}
    network, folder = saved("llama", rope_parameters=given)
    model = from_folder(folder)
    expected = logits_of(network, IDS)
    assert away(logits(model), expected) < NEAR
    assert model.architecture.context == (128 if name == "longrope" else 512)
    if name != "dynamic":  # which changes nothing within the context
        plain = from_folder(saved("llama")[1]).architecture.rope
        planted = replace(model, architecture=replace(model.architecture, rope=plain))
        assert away(logits(planted), expected) > FAR


def test_configs_of_older_versions_mean_the_same(saved, tmp_path):
    for model_type, given in (("llama", SCALINGS["yarn"]), ("gemma3_text", {"rope_type": "linear", "factor": 8.0})):
        full = {"rope_theta": 20_000.0, **given}
        both = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
        _, folder = saved(model_type, rope_parameters=both if model_type == "gemma3_text" else full)
        config = json.loads((folder / "config.json").read_text())
        del config["rope_parameters"]
        scaling = {"type" if key == "rope_type" else key: value for key, value in given.items()}
        config |= {"rope_theta": 20_000.0, "rope_scaling": scaling}
        if model_type == "gemma3_text":
            config |= {"rope_local_base_freq": 500.0}
        other = shutil.copytree(folder, tmp_path / model_type)
        (other / "config.json").write_text(json.dumps(config))
        new, old = from_folder(folder).architecture, from_folder(other).architecture
        assert [rope.divisors.tolist() for rope in old.ropes] == [rope.divisors.tolist() for rope in new.ropes]
        assert [rope.magnitude for rope in old.ropes] == [rope.magnitude for rope in new.ropes]


# --- the comparison sees what is wrong


def swapped_pairs(model):
    return replace(
        model, architecture=replace(model.architecture, rope=replace(model.architecture.rope, pairs="adjacent"))
    )


def changed(**fields):
    return lambda model: replace(model, architecture=replace(model.architecture, **fields))


def without(*roles):
    return lambda model: replace(model, layers=[replace(layer, **dict.fromkeys(roles)) for layer in model.layers])


@pytest.mark.parametrize(
    ("model_type", "damage"),
    [
        ("llama", swapped_pairs),
        ("mistral", changed(windows=())),
        ("mistral", changed(windows=(21, 21, 21))),
        ("qwen2", without("query_bias")),
        ("qwen3", without("key_norm")),
        ("gemma", changed(embedding_scale=1.0)),
        ("gemma2", changed(windows=(0, 20, 0))),
        ("gemma2", changed(query_scale=32**-0.5)),
        ("gemma2", changed(score_cap=0.0)),
        ("gemma2", changed(logit_cap=0.0)),
        ("gemma2", without("post_mlp_norm")),
        ("gemma3_text", changed(local_rope=None)),
        ("gemma3_text", without("post_attention_norm")),
        ("phi", changed(activation="silu")),
        ("phi", without("down_bias")),
        ("phi", lambda model: replace(model, head_bias=None)),
        (
            "phi3",
            lambda model: replace(
                model, layers=[replace(layer, gate=layer.up, up=layer.gate) for layer in model.layers]
            ),
        ),
    ],
)
def test_planted_damage_is_seen(saved, model_type, damage):
    network, folder = saved(model_type)
    assert away(logits(damage(from_folder(folder))), logits_of(network, IDS)) > 100 * NEAR


def test_norms_of_gemma_are_stored_less_one(saved, monkeypatch):
    network, folder = saved("gemma")
    monkeypatch.setattr("runtimes.llm.hugging_face._plus", lambda tensor, offset: tensor)
    assert away(logits(from_folder(folder)), logits_of(network, IDS)) > FAR


# --- formats and files


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_are_read(saved, dtype):
    network, folder = saved("qwen2", dtype)
    assert away(logits(from_folder(folder)), logits_of(network, IDS)) < NEAR


def test_several_files_give_the_same_as_one(saved, tmp_path):
    network, folder = saved("llama")
    save(network, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    one, several = tensors_of(folder), tensors_of(tmp_path)
    assert one.keys() == several.keys()
    assert all(np.array_equal(one[name].values(), several[name].values()) for name in one)
    assert np.array_equal(logits(from_folder(tmp_path)), logits(from_folder(folder)))
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    for change, problem in (
        ({"model.norm.weight": "../model.safetensors"}, "no safetensors file of the folder"),
        ({"model.norm.weight": "model.bin"}, "no safetensors file of the folder"),
        ({"model.other.weight": "FIRST"}, "do not hold 'model.other.weight'"),
        ({"model.norm.weight": "model-9.safetensors"}, "not a readable file"),
        ({"model.norm.weight": 5}, "weight_map does not name a file"),
    ):
        first = names["weight_map"]["model.norm.weight"]
        change = {name: first if file == "FIRST" else file for name, file in change.items()}
        index.write_text(json.dumps(names | {"weight_map": names["weight_map"] | change}))
        with pytest.raises(EdgekitError, match=problem):
            from_folder(tmp_path)
    shutil.copy(tmp_path / names["weight_map"]["model.norm.weight"], tmp_path / "twice.safetensors")
    index.write_text(json.dumps(names | {"weight_map": names["weight_map"] | {"a": "twice.safetensors"}}))
    with pytest.raises(EdgekitError, match="two of its files hold"):
        from_folder(tmp_path)


# --- the native engine

Q8_0_AWAY = 0.1  # of the largest logit, weights and activations in 8 bits, on weights of noise
# weights and activations in float32; by the format of keys and values
KEPT_AWAY = {"f16": 0.01, "int8": 0.05, "int4": 0.1}


@compiler
@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
def test_the_native_engine_reads_folders_within_the_error_of_8_bits(saved, model_type, kv):
    network, folder = saved(model_type)
    model = from_folder(folder)
    expected = KiviEngine(model, blocks=8, dtype="float64").step([Item(0, IDS, logits="all")])[0]
    if kv != "int4":
        expected = logits_of(network, IDS)
    for weights in ("q8_0", "kept"):
        with closing(NativeEngine(model, blocks=8, kv=kv, threads=2, weights=weights)) as engine:
            found = engine.step([Item(0, IDS, logits="all")])[0]
        most = KEPT_AWAY[kv] if weights == "kept" else (3 if kv == "int4" else 1) * Q8_0_AWAY
        assert away(found, expected) < most
        assert away(found[1:], expected[:-1]) > 5 * Q8_0_AWAY  # another token's are far


@compiler
@pytest.mark.parametrize(
    ("model_type", "damage"),
    [
        ("mistral", changed(windows=())),
        ("gemma", changed(embedding_scale=1.0)),
        ("gemma2", changed(windows=(0, 20, 0))),
        ("gemma2", changed(score_cap=0.0)),
        ("gemma2", changed(logit_cap=0.0)),
        ("gemma2", changed(query_scale=0.3)),
        ("gemma2", without("post_mlp_norm")),
        ("gemma3_text", changed(local_rope=None)),
        ("gemma3_text", without("post_attention_norm")),
        ("phi", changed(activation="silu")),
        ("phi", without("down_bias")),
        ("phi", without("attention_output_bias")),
        ("phi", without("attention_norm_bias")),
        ("phi", lambda model: replace(model, head_bias=None)),
        ("phi", lambda model: replace(model, norm_bias=None)),
    ],
)
def test_planted_damage_is_seen_in_the_native_engine(saved, model_type, damage):
    """The damaged model in the native engine is far from the whole one in torch, and near the damaged one there."""
    model = from_folder(saved(model_type)[1])
    with closing(NativeEngine(damage(model), blocks=8, weights="kept")) as engine:
        found = engine.step([Item(0, IDS, logits="all")])[0]
    assert away(found, logits(damage(model))) < KEPT_AWAY["f16"]
    assert away(found, logits(model)) > 2 * KEPT_AWAY["f16"]


@compiler
@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text", "phi", "phi3"])
@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
def test_logits_are_the_same_bits_under_every_schedule(saved, model_type, kv):
    model, found = from_folder(saved(model_type)[1]), []
    for threads in (1, 3):
        with closing(NativeEngine(model, blocks=80, kv=kv, threads=threads)) as engine:
            found.append(check_schedules(engine, np.array_equal))
    assert np.array_equal(*found)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 64, 65, 89, 90])
@compiler
def test_windows_of_every_length_are_the_same_bits_in_chunks(saved, window):
    model = from_folder(saved("mistral")[1])
    model = replace(model, architecture=replace(model.architecture, windows=(window,) * 3))
    expected = logits(model)
    for kv in ("f16", "int8", "int4"):
        with closing(NativeEngine(model, blocks=40, kv=kv, weights="kept")) as engine:
            whole = engine.step([Item(0, IDS, logits="all")])[0]
            for sequence, size in ((1, 1), (2, 7), (3, 33)):
                parts = [
                    engine.step([Item(sequence, IDS[at : at + size], logits="all")])[0] for at in range(0, 90, size)
                ]
                assert np.array_equal(np.concatenate(parts), whole)
        if kv != "int4":
            assert away(whole, expected) < KEPT_AWAY[kv]


@compiler
def test_a_folder_is_loaded_in_8_bits_unless_the_option_says_otherwise(saved):
    network, folder = saved("llama")
    with load(folder, context=256) as model:
        found = model.engine.step([Item(0, IDS, logits="all")])[0]
        small = model.engine.bytes
    with load(folder, context=256, weights="kept") as model:
        kept = model.engine.step([Item(0, IDS, logits="all")])[0]
        assert model.engine.bytes > 1.5 * small
    assert not np.array_equal(kept, found)
    assert away(kept, logits_of(network, IDS)) < away(found, logits_of(network, IDS)) < Q8_0_AWAY


@compiler
def test_weights_are_stored_in_one_of_two_ways(saved):
    with pytest.raises(EdgekitError, match="unknown way to store weights 'q3'"):
        load(saved("llama")[1], weights="q3")
    with pytest.raises(EdgekitError, match="does not take these options"):
        load(saved("llama")[1], engine="torch", weights="kept")


# --- tokenizers

CORPUS = [
    "then an in there",
    "12,345.67 été 日本語 🌌\n\n\tend",
    "",
    " ",
    "   two  spaces ",
    "<|0|>",
    "a<|1|>b",
    "the\ufdd0re",
    "x = y**2  # 100%",
    "\u0000\u0007",
    "ＡＢＣ１２３",
    "İstanbul ǅ",
    "I'm, they'll, IT'S",
]


@pytest.mark.parametrize("rule", ["smollm", "gpt-2"])
def test_the_tokenizer_of_a_folder_is_that_of_the_gguf_file(saved, tmp_path, rule):
    from edgekit.importers.gguf import read_gguf
    from runtimes.llm import vocabulary
    from runtimes.llm.tokenizer import Tokenizer
    from tests.gguf_files import gguf, toy_metadata

    _, folder = saved("llama")
    other = shutil.copytree(folder, tmp_path / "folder")
    write_tokenizer(other, rule)
    (tmp_path / "t.gguf").write_bytes(gguf(toy_metadata("llama") | {"tokenizer.ggml.pre": rule}, {}))
    one = Tokenizer(vocabulary.from_gguf(read_gguf(tmp_path / "t.gguf")))
    two = Tokenizer(vocabulary.from_folder(other, 307))
    for text in CORPUS:
        for special in (False, True):
            assert one.encode(text, special=special).tolist() == two.encode(text, special=special).tolist()
        ids = one.encode(text).tolist()
        assert one.decode(ids) == two.decode(ids) == text
        assert one.guard(text) == two.guard(text)
    assert (one.bos, one.eos, one.ends, one.control) == (two.bos, two.eos, two.ends, two.control)
    assert one.encode("<|0|>", special=True).tolist() == [261]
    merges = tokenizer_json(rule)["model"]["merges"]
    write_tokenizer(other, rule, model=tokenizer_json(rule)["model"] | {"merges": merges[:-1]})
    three = Tokenizer(vocabulary.from_folder(other, 307))
    assert any(one.encode(text).tolist() != three.encode(text).tolist() for text in CORPUS)  # a merge less is seen


def test_a_folder_answers_as_a_model_does(saved, edgekit):
    _, folder = saved("llama")
    with load(folder, engine="torch", context=128) as model:
        assert model.name == folder.name
        text = "".join(model.complete("in the", most_tokens=8))
        chat = "".join(model.chat([{"role": "user", "content": "<|1|> a night"}], most_tokens=5))
    assert text
    assert chat
    done = edgekit(
        "llm", "complete", str(folder), "in the", "--engine", "torch", "--max-tokens", "8", "--context", "128"
    )
    assert done.out.strip() == text.strip()


def test_tokenizers_that_add_bos_are_followed(saved, tmp_path):
    from runtimes.llm import vocabulary
    from runtimes.llm.tokenizer import Tokenizer

    _, folder = saved("llama")
    other = shutil.copytree(folder, tmp_path / "folder")
    single = [{"SpecialToken": {"id": "<|0|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    adds = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": {"<|0|>": {"id": "<|0|>", "ids": [261], "tokens": ["<|0|>"]}},
    }
    write_tokenizer(other, post_processor=adds)
    with pytest.raises(EdgekitError, match=r"adds the tokens \[261\] to every text"):  # which no file calls bos
        vocabulary.from_folder(other, 307)
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": {"content": "<|0|>"}}))
    tokenizer = Tokenizer(vocabulary.from_folder(other, 307))
    assert tokenizer.encode("a").tolist()[0] == 261
    assert tokenizer.encode("a", begin=False).tolist()[0] != 261


def test_answers_end_at_all_the_tokens_that_the_folder_names(saved, tmp_path):
    from runtimes.llm import vocabulary

    other = shutil.copytree(saved("llama")[1], tmp_path / "folder")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [270, 271]}))
    found = vocabulary.from_folder(other, 307)
    assert {270, 271, 306} <= found.ends
    assert found.eos == 306
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(EdgekitError, match="expected token ids"):
        vocabulary.from_folder(other, 307)


def test_an_embedding_with_more_rows_than_there_are_tokens_is_accepted(saved, tmp_path):
    network = network_of("llama", vocab_size=320)
    source = open_source(save(network, tmp_path))
    assert len(source.tokenizer) == 320
    assert source.tokenizer.decode([310]) == ""


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "mamba"}, "unknown model_type of a language model 'mamba'"),
        ({"model_type": {"a": 1}}, "unknown model_type of a language model \"{'a': 1}\""),
        ({"hidden_act": ["silu"]}, "unknown activation"),
        ({"rope_parameters": {"rope_type": {}, "rope_theta": 1e4}}, "unknown scaling"),
        ({"auto_map": {"AutoConfig": "a.B"}}, "needs code of its author"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = .*does not run this variant"),
        ({"num_experts": 8}, "does not run this variant"),
        ({"mlp_bias": True}, "mlp_bias = True; edgekit does not run this variant of llama"),
        ({"num_attention_heads": 3}, "do not fit together"),
        ({"num_hidden_layers": 4}, "holds no tensor 'model.layers.3"),
        ({"num_hidden_layers": 2}, "belong to no known role"),
        ({"num_hidden_layers": 10**9}, "at most 10,000"),
        ({"hidden_size": 32}, "has shape"),
        ({"hidden_size": "64"}, "hidden_size = '64'; expected a whole number"),
        ({"vocab_size": 999}, "has shape"),
        ({"rms_norm_eps": -1}, "expected a positive number"),
        ({"hidden_act": "relu"}, "unknown activation 'relu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "a"}}, "factor = 'a'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "need 'factor'"),
        ({"rope_parameters": {"rope_type": "strange"}}, "unknown scaling"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "spin": 2}}, "spin = 2 is no parameter"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta = 0 of the rotary embedding is not positive"),
        ({"rope_parameters": 3}, "are no JSON object"),
        ({"partial_rotary_factor": 2.0}, "expected a number up to 1"),
        ({"partial_rotary_factor": 0.1}, "3 dimensions of a head are rotated"),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types does not name"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(saved, tmp_path, changes, problem):
    other = shutil.copytree(saved("llama")[1], tmp_path / "folder")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(EdgekitError, match=problem) as caught:
        from_folder(other)
    assert "\n" not in str(caught.value)


def header(entries):
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not a readable file"),
        (b"abc", "declares a header of"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "declares a header of"),
        ((4).to_bytes(8, "little") + b"nope", "no JSON"),
        ((4).to_bytes(8, "little") + b"[[]]", "no JSON object"),
        (header({"a": 5}), "by no JSON object"),
        (header({"a": ENTRY | {"dtype": "I64"}}) + bytes(8), "has the format 'I64'; edgekit reads F32, F16, BF16"),
        (header({"a": ENTRY | {"dtype": ["F32"]}}) + bytes(8), "has the format"),
        (header({"a": ENTRY | {"shape": [2.0]}}) + bytes(8), "where whole numbers belong"),
        (header({"a": ENTRY | {"shape": [1 << 61, 1 << 61]}}) + bytes(8), "8 bytes for 'a'"),
        (header({"a": ENTRY | {"shape": []}}) + bytes(8), r"of shape \[\]"),
        (header({"a": ENTRY}) + bytes(4), "at bytes"),
        (header({"a": ENTRY | {"data_offsets": [8, 0]}}) + bytes(8), "at bytes"),
        (header({"a": ENTRY, "b": ENTRY}) + bytes(8), "or shares some"),
        (header({"a": ENTRY | {"data_offsets": [4, 12]}}) + bytes(12), "other bytes between"),
    ],
)
def test_a_damaged_safetensors_file_is_one_line(tmp_path, content, problem):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(EdgekitError, match=problem) as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)


def test_safetensors_are_read_as_the_library_reads_them(saved):
    from safetensors.numpy import load_file

    _, folder = saved("llama")
    expected, found = load_file(folder / "model.safetensors"), read_safetensors(folder / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(found[name].values(), value) for name, value in expected.items())
    part = found["model.embed_tokens.weight"].part(3, 9)
    assert np.array_equal(part.values(), expected["model.embed_tokens.weight"][3:9])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "unknown type of tokenizer 'WordPiece'"),
        ({"model": 3}, "no model with a vocabulary"),
        ({"model": tokenizer_json()["model"] | {"dropout": 0.1}}, r"dropout = 0\.1 would make tokens random"),
        ({"added_tokens": [{"id": 5}]}, "an added token is"),
        ({"added_tokens": [{"id": 9999, "content": "<x>", "special": True}]}, "has the id 9999"),
        ({"added_tokens": [{"id": 5, "content": "<x>", "special": True}]}, "share an id"),
        ({"decoder": None}, "the decoder is missing"),
        ({"decoder": {"type": "WordPiece"}}, "unknown type of decoder 'WordPiece'"),
        ({"pre_tokenizer": {"type": "Strange"}}, "unknown type of pre_tokenizer 'Strange'"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "X"}]}}, "unknown type of normalizer 'X'"),
        ({"post_processor": {"type": ["X"]}}, "unknown type of post_processor"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}},
            "cannot be built",
        ),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
            "unknown type of normalizer 'Precompiled'",
        ),
    ],
)
def test_a_damaged_tokenizer_is_one_line(saved, tmp_path, changes, problem):
    other = shutil.copytree(saved("llama")[1], tmp_path / "folder")
    (other / "tokenizer.json").write_text(json.dumps(tokenizer_json() | changes))
    with pytest.raises(EdgekitError, match=problem) as caught:
        open_source(other)
    assert "\n" not in str(caught.value)


def test_folders_without_their_parts_are_refused(saved, tmp_path):
    other = shutil.copytree(saved("llama")[1], tmp_path / "folder")
    (other / "tokenizer.json").unlink()
    with pytest.raises(EdgekitError, match=r"holds no tokenizer\.json"):
        open_source(other)
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    with pytest.raises(EdgekitError, match="is a pickle"):
        open_source(other)
    (other / "config.json").unlink()
    with pytest.raises(EdgekitError, match=r"holds no config\.json"):
        load(other)
