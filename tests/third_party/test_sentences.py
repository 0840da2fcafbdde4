"""MiniLM's sentences: the bundle gives the embeddings that its folder describes, on batches with padding."""

import numpy as np
import pytest
import torch

import edgekit
from edgekit.session import open_session

pytestmark = pytest.mark.models
SENTENCES = (
    "A supernova brightens within days and fades over months.",
    "The cat sat on the mat.",
    "Rain.",
    "Engineers measure the latency of a network on the device that will run it, because an estimate can be wrong.",
)


def test_embeddings_of_a_padded_batch_are_those_of_transformers(third_party):
    transformers = pytest.importorskip("transformers")
    folder = third_party("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bundle = edgekit.import_hugging_face(folder)
    assert "tokenizer.json" in bundle.contents
    rows = dict(tokenizer(list(SENTENCES), padding=True, return_tensors="np"))
    rows = {spec.name: rows[spec.name].astype(np.int64) for spec in bundle.manifest.inputs}
    assert rows["attention_mask"].min() == 0
    found = open_session(bundle, "onnxruntime", threads=1).run(rows)["sentence_embedding"]
    network = transformers.BertModel.from_pretrained(folder).eval()
    for sentence, vector in zip(SENTENCES, found, strict=True):
        with torch.no_grad():  # alone, so without any padding
            tokens = network(**tokenizer([sentence], return_tensors="pt")).last_hidden_state[0].numpy()
        expected = tokens.mean(axis=0) / np.linalg.norm(tokens.mean(axis=0))
        assert float(vector @ expected) > 0.99999
