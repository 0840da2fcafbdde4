"""What a file says about a model, and what it must not say."""

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.importers.gguf import read_gguf
from runtimes.llm.architecture import from_gguf
from runtimes.llm.rope import Rope
from tests.gguf_files import encoded, gguf, toy_metadata, toy_weights


def model(tmp_path, metadata=(), weights=(), family="llama", without=()):
    path = tmp_path / "model.gguf"
    every = toy_weights(family) | dict(weights)
    tensors = {
        name: ("F32", value.shape, encoded(value, "F32")) for name, value in every.items() if name not in without
    }
    given = toy_metadata(family) | dict(metadata)
    path.write_bytes(gguf({key: value for key, value in given.items() if value is not None}, tensors))
    return from_gguf(read_gguf(path))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_sizes_and_weights_of_each_family(tmp_path, family):
    of = model(tmp_path, family=family).architecture
    assert (of.layers, of.width, of.heads, of.kv_heads, of.head_size) == (2, 64, 4, 2, 32)
    assert of.rope.pairs == ("adjacent" if family == "llama" else "halves")
    assert of.vocabulary == 307


def test_an_output_matrix_of_its_own_is_used(tmp_path):
    assert (found := model(tmp_path)).head is found.embedding
    untied = model(tmp_path, weights={"output.weight": toy_weights("llama", tied=False)["output.weight"]})
    assert untied.head.name == "output.weight"


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"general.architecture": "mamba"}, "unknown family of language models 'mamba'"),
        ({"general.architecture": 3}, "is a int; expected str"),
        ({"llama.block_count": 1_000_000}, "declares 1000000 layers"),
        ({"llama.block_count": 3}, "no tensor 'blk.2.attn_norm.weight'"),
        ({"llama.block_count": 1}, "belong to no known role"),
        ({"llama.attention.head_count": 3}, "do not fit together"),
        ({"llama.attention.head_count": 0}, "expected 1 or more"),
        ({"llama.embedding_length": 32}, "expected"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "expected a positive number"),
        ({"llama.context_length": None}, "has no 'llama.context_length'"),
        ({"llama.rope.scaling.type": "strange"}, "unknown scaling"),
        ({"llama.rope.dimension_count": 34}, "an even number up to 32"),
        ({"llama.rope.dimension_count": 1 << 30}, "an even number up to 32"),
        ({"llama.rope.dimension_count": 15}, "an even number up to 32"),
        ({"llama.rope.freq_base": 0.0}, "not positive"),
        ({"llama.attention.scale": 0.5}, r"llama\.attention\.scale = 0\.5; edgekit does not run this variant"),
        ({"llama.attention.causal": False}, "does not run this variant"),
        ({"llama.expert_count": 8}, "does not run this variant"),
        ({"llama.rope.dimension_sections": [1, 2]}, "does not run this variant"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tmp_path, metadata, problem):
    with pytest.raises(EdgekitError, match=problem):
        model(tmp_path, metadata)


def test_metadata_that_change_nothing_are_accepted(tmp_path):
    given = {"attention.sliding_window": 2048, "attention.causal": True, "expert_count": 0, "vocab_size": 307}
    found = model(tmp_path, {f"llama.{key}": value for key, value in given.items()})
    assert found.architecture.context == 2048


@pytest.mark.parametrize(
    ("family", "name"), [("qwen2", "attn_k.bias"), ("qwen3", "attn_k_norm.weight"), ("llama", "attn_k.weight")]
)
def test_a_family_has_all_its_weights(tmp_path, family, name):
    with pytest.raises(EdgekitError, match=f"no tensor 'blk.1.{name}'"):
        model(tmp_path, family=family, without=[f"blk.1.{name}"])


def test_a_weight_of_another_family_is_refused(tmp_path):
    with pytest.raises(EdgekitError, match="belong to no known role of llama"):
        model(tmp_path, weights={"blk.0.attn_q_norm.weight": np.ones(32, np.float32)})


def test_a_missing_and_an_unknown_tensor_are_named(tmp_path):
    with pytest.raises(EdgekitError, match=r"no tensor 'blk\.1\.ffn_up\.weight'"):
        model(tmp_path, without=["blk.1.ffn_up.weight"])
    with pytest.raises(EdgekitError, match=r"such as 'blk\.0\.ssm\.weight'"):
        model(tmp_path, weights={"blk.0.ssm.weight": np.ones((4, 4), np.float32)})


def test_angles_are_the_formula_of_the_paper():
    rope = Rope(8, 100.0, "halves", np.array([1.0, 1, 1, 2]))
    expected = [5 * 100.0 ** (-2 * i / 8) / (2 if i == 3 else 1) for i in range(4)]
    assert np.allclose(rope.angles(np.array([5]))[0], expected, rtol=1e-15)


def test_linear_scaling_and_own_factors_divide_the_frequencies(tmp_path):
    scaled = model(tmp_path, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert (scaled.architecture.rope.factors == 4).all()
    for key in ("scaling.factor", "scale_linear"):  # as old files say it
        assert (model(tmp_path, {f"llama.rope.{key}": 4.0}).architecture.rope.factors == 4).all()
    unscaled = model(tmp_path, {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0})
    assert (unscaled.architecture.rope.factors == 1).all()
    factors = np.linspace(1, 8, 16, dtype=np.float32)
    assert np.allclose(model(tmp_path, weights={"rope_freqs.weight": factors}).architecture.rope.factors, factors)
    with pytest.raises(EdgekitError, match="not positive"):
        model(tmp_path, weights={"rope_freqs.weight": factors - 1})
