"""Embeddings by OpenAI's client, from a bundle of which every number is known."""

import numpy as np
import pytest

from edgekit.bundle.tensors import TensorSpec
from runtimes.daemon.config import ModelSettings

WORDS = {"[UNK]": 0, "red": 1, "green": 2, "blue": 3}
TABLE = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


class Embedder:
    """Gives a row of a table for each token."""

    device = provider = "fake"
    inputs = (
        TensorSpec("input_ids", ("batch", "tokens"), "int64"),
        TensorSpec("attention_mask", ("batch", "tokens"), "int64"),
    )
    outputs = (TensorSpec("vectors", ("batch", "tokens", 6)),)

    def __init__(self, bundle, *, threads=None, chunk=None):
        pass

    def run(self, arrays):
        assert (arrays["attention_mask"] == 1).all()
        return {"vectors": TABLE[arrays["input_ids"]]}

    def warmup(self, batch):
        pass


@pytest.fixture
def running(start, register, model_files, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install 'edgekit[llm]'")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    register("edgekit.sessions", "embedder", Embedder)
    settings = {"path": str(model_files[1]), "runtime": "embedder"}
    models = {"texts": ModelSettings(**settings, tokenizer=str(tmp_path)), "ids": ModelSettings(**settings)}
    models["broken"] = ModelSettings(**settings, tokenizer=str(tmp_path / "none.json"))
    with start(models=models) as found:
        yield found


def expected(*ids):
    vector = TABLE[list(ids)].mean(axis=0)
    return vector / np.linalg.norm(vector)


def test_the_client_gets_the_mean_of_the_tokens(running):
    openai = pytest.importorskip("openai", reason="pip install openai")
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):  # the client decodes base64
            answer = client.embeddings.create(model="texts", input=["red green", "blue"], **form)
            found = answer.data if form.get("encoding_format") != "base64" else None
            if found is not None:
                assert np.allclose(found[0].embedding, expected(1, 2), atol=1e-6)
                assert np.allclose(found[1].embedding, expected(3), atol=1e-6)
            assert answer.usage.prompt_tokens == 3
        ids = client.embeddings.create(model="ids", input=[[1, 2], [3]]).data
        assert np.allclose(ids[0].embedding, expected(1, 2), atol=1e-6)
    assert np.isclose(np.linalg.norm(ids[0].embedding), 1, atol=1e-6)


def test_what_is_wrong_is_named(running):
    def ask(**change):
        return running.post("/v1/embeddings", {"model": "texts", "input": "red", **change})

    assert ask().status == 200
    assert ask(model="ids").refused(400, "models.ids.tokenizer")
    assert ask(model="tiny", input=[1]).refused(400, "is no embedding model", "light_curve")
    assert ask(model="toy").refused(400, "/v1/chat/completions")
    assert ask(model="broken").refused(503, "none.json cannot be read")
    assert ask(input=[]).refused(400, "input has 0")
    assert ask(input="").refused(400, "1 to")
    assert ask(input=["a"] * 300).refused(400, "expected 1 to 256")
    assert ask(input=[2**40]).refused(400, "input")
    assert ask(input="\ud800").refused(400, "surrogate")
    assert ask(dimensions=3).refused(400, "dimensions is not supported")
    assert ask(encoding_format="hex").refused(400, "float, base64")
