"""Each family in a GGUF file, written as llama.cpp's converter writes it, and in the folder that it comes from."""

import math
import struct
from dataclasses import replace

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.importers.gguf import read_gguf
from runtimes.llm import families
from runtimes.llm.architecture import from_gguf, shapes
from runtimes.llm.engine import Item
from runtimes.llm.hugging_face import from_folder
from runtimes.llm.torch_engine import TorchEngine
from tests.gguf_files import encoded, gguf, toy_metadata
from tests.runtimes.llm.hugging_face_folders import CLASSES, network_of, save

pytest.importorskip("transformers", reason="pip install 'edgekit[transformers]'")
IDS = np.random.default_rng(3).integers(0, 300, 60)
NEAR = 1e-6  # of the largest logit: the same formulas with constants that GGUF rounds to float32
# what a file cannot say otherwise: the converter knows the query scale and the pattern of windows of the real models
OPTIONS = {
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32, "num_hidden_layers": 6, "layer_types": None},
}


def adjacent(values, heads):
    """Rows of each head from halves to neighbours, as the files of the Llama family have them."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def metadata_of(of):
    sizes = {
        "layers": of.layers,
        "width": of.width,
        "heads": of.heads,
        "kv_heads": of.kv_heads,
        "head_size": of.head_size,
        "hidden": of.hidden,
        "vocabulary": of.vocabulary,
        "rope_size": of.rope.size,
    }
    found = toy_metadata(of.family, **sizes)
    norm = "layer_norm_epsilon" if of.family == "phi2" else "layer_norm_rms_epsilon"
    found |= {f"{of.family}.attention.{norm}": of.epsilon, f"{of.family}.rope.freq_base": of.rope.base}
    found |= {f"{of.family}.context_length": of.context}
    if any(of.windows):
        found[f"{of.family}.attention.sliding_window"] = max(of.windows)
    for key, value in (("attn_logit_softcapping", of.score_cap), ("final_logit_softcapping", of.logit_cap)):
        if value:
            found[f"{of.family}.{key}"] = value
    return found


def tensors_of(model):
    """The weights by the names of the file, those that it stacks stacked."""
    of, found = model.architecture, {}
    for role in ("embedding", "norm", "norm_bias", "head", "head_bias"):
        tensor = getattr(model, role)
        if tensor is not None and not (role == "head" and tensor is model.embedding):
            found[families.GGUF_NAMES[role]] = tensor.values()
    for number, layer in enumerate(model.layers):
        for role in shapes(of):
            if (tensor := getattr(layer, role)) is not None:
                heads = {"query": of.heads, "key": of.kv_heads}.get(role.removesuffix("_bias"))
                values = tensor.values()
                turned = of.family == "llama" and heads and not role.endswith("norm")
                found[families.GGUF_NAMES[role].format(number)] = adjacent(values, heads) if turned else values
        if of.family.startswith("phi"):
            for name, roles in families.GGUF_STACKS.items():
                parts = [found.pop(families.GGUF_NAMES[role].format(number), None) for role in roles]
                if all(part is not None for part in parts):
                    found[name.format(number)] = np.concatenate(parts)
                elif parts[-1] is not None:  # a feed-forward without a gate
                    found[families.GGUF_NAMES[roles[-1]].format(number)] = parts[-1]
    return {name: ("F32", value.shape, encoded(value, "F32")) for name, value in found.items()}


def written(path, model, metadata=(), tensors=()):
    path.write_bytes(gguf(metadata_of(model.architecture) | dict(metadata), tensors_of(model) | dict(tensors)))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def find(model_type):
        if model_type not in made:
            network = network_of(model_type, **OPTIONS.get(model_type, {}))
            made[model_type] = from_folder(save(network, tmp_path_factory.mktemp(model_type)))
        return made[model_type]

    return find


def logits(model):
    return TorchEngine(model, blocks=8, dtype="float64").step([Item(0, IDS, logits="all")])[0]


def away(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_file_computes_what_its_folder_does(folders, tmp_path, model_type):
    model = folders(model_type)
    found = from_gguf(read_gguf(written(tmp_path / "m.gguf", model)))
    assert found.architecture.windows == model.architecture.windows
    assert away(logits(found), logits(model)) < NEAR
    if model_type == "llama":  # the other order of dimensions is seen
        wrong = replace(found, architecture=replace(found.architecture, rope=model.architecture.rope))
        assert away(logits(wrong), logits(model)) > 1e4 * NEAR


def test_the_largest_model_of_gemma_2_scales_queries_by_its_width(folders, tmp_path, monkeypatch):
    path = written(tmp_path / "m.gguf", folders("gemma2"))
    assert from_gguf(read_gguf(path)).architecture.query_scale == 32**-0.5
    monkeypatch.setitem(families.FAMILIES, "gemma2", replace(families.FAMILIES["gemma2"], large=3))
    assert from_gguf(read_gguf(path)).architecture.query_scale == (64 // 4) ** -0.5
    assert (families.FAMILIES["gemma3"].large, families.FAMILIES["gemma2"].full_every) == (62, 2)


def test_yarn_in_a_file_is_that_of_a_folder(folders, tmp_path):
    from runtimes.llm.rope import rope_of

    given = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    expected = rope_of(32, "adjacent", {"rope_theta": 10_000.0, **given}, "")
    keys = {"type": "yarn", "factor": 8.0, "original_context_length": 64}
    metadata = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    found = from_gguf(read_gguf(written(tmp_path / "m.gguf", folders("llama"), metadata))).architecture.rope
    assert np.allclose(found.divisors, expected.divisors, rtol=1e-7)
    assert found.magnitude == pytest.approx(0.1 * math.log(8) + 1)
    metadata |= {"llama.rope.scaling.yarn_beta_slow": 0.01, "llama.rope.scaling.attn_factor": 2.0}
    other = from_gguf(read_gguf(written(tmp_path / "m.gguf", folders("llama"), metadata))).architecture.rope
    assert not np.allclose(other.divisors, expected.divisors, rtol=1e-3)
    assert other.magnitude == pytest.approx(2 * (0.1 * math.log(8) + 1))


def test_longrope_takes_the_short_factors_and_ends_the_context_where_they_do(folders, tmp_path):
    short, long = np.linspace(1, 2, 8, dtype=np.float32), np.linspace(3, 9, 8, dtype=np.float32)
    tensors = {
        f"rope_factors_{name}.weight": ("F32", values.shape, encoded(values, "F32"))
        for name, values in (("short", short), ("long", long))
    }
    metadata = {"phi3.rope.scaling.original_context_length": 128}
    of = from_gguf(read_gguf(written(tmp_path / "m.gguf", folders("phi3"), metadata, tensors))).architecture
    assert np.allclose(of.rope.factors, short)
    assert of.context == 128
    assert of.rope.magnitude == pytest.approx(math.sqrt(1 + math.log(512 / 128) / math.log(128)))


@pytest.mark.parametrize(
    ("model_type", "metadata", "problem"),
    [
        ("gemma2", {"gemma2.attn_logit_softcapping": None}, r"has no 'gemma2\.attn_logit_softcapping'"),
        ("gemma2", {"gemma2.attention.sliding_window": None}, r"has no 'gemma2\.attention\.sliding_window'"),
        (
            "gemma2",
            {"gemma2.attention.sliding_window": struct.pack("<Ii", 5, -1)},
            "sliding_window = -1; expected 0 or more",
        ),
        ("gemma2", {"gemma2.final_logit_softcapping": 0.0}, "expected a positive number"),
        ("gemma3_text", {"gemma3.rope.freq_base_swa": -1.0}, "not positive"),
        ("qwen2", {"qwen2.attention.sliding_window": 20}, "does not run this variant"),
        ("phi3", {"phi3.rope.scaling.type": "longrope"}, "has no 'phi3.rope.scaling.original_context_length'"),
        ("phi", {"phi2.attention.layer_norm_epsilon": None}, "has no 'phi2.attention.layer_norm_epsilon'"),
    ],
)
def test_files_that_cannot_be_are_refused(folders, tmp_path, model_type, metadata, problem):
    model = folders(model_type)
    given = metadata_of(model.architecture) | metadata
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf({key: value for key, value in given.items() if value is not None}, tensors_of(model)))
    with pytest.raises(EdgekitError, match=problem) as caught:
        from_gguf(read_gguf(path))
    assert "\n" not in str(caught.value)
