"""The essentials in under ten seconds, for pre-commit: a model in, a smaller verified bundle out."""

import math

import numpy as np
import pytest
import torch

from edgekit.bundle.format import WEIGHTS
from edgekit.bundle.pack import pack, unpack
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.cli import FIRST
from edgekit.compression.metrics import metric
from edgekit.errors import EdgekitError
from edgekit.nn.attention import TinyHeadAttention
from edgekit.nn.training import probabilities
from edgekit.passes.base import Candidate, Context
from edgekit.passes.cluster import Cluster


def test_the_tiny_model_has_learned(tiny_bundle, tiny_data):
    test = tiny_data[1]
    loss = metric("log-loss").value(probabilities(tiny_bundle.model(), test), test.labels)
    assert loss < 0.2 < math.log(3)


def test_attention_is_softmax_attention():
    query, key, value = torch.randn(3, 4, 2, 30, generator=torch.Generator().manual_seed(0))
    scores = query.double().transpose(1, 2) @ key.double() / math.sqrt(2)
    expected = (torch.softmax(scores, -1) @ value.double().transpose(1, 2)).transpose(1, 2)
    assert (TinyHeadAttention.apply(query, key, value) - expected).abs().max() < 1e-5


def test_a_bundle_round_trip_and_a_tampered_one(tiny_bundle, tmp_path):
    write_bundle(tiny_bundle, tmp_path / "t.edge")
    assert open_bundle(tmp_path / "t.edge").digest == tiny_bundle.digest
    (tmp_path / "t.edge" / WEIGHTS).write_bytes(b"x")
    with pytest.raises(EdgekitError, match="SHA-256"):
        open_bundle(tmp_path / "t.edge")


def test_clustered_weights_pack_bit_for_bit(tiny_bundle, tiny_data, tiny):
    candidate = Candidate("t2", tiny.arguments, tiny_bundle.model())
    after = Cluster(bits=4, epochs=1).apply(candidate, Context(tiny_data[0], tiny_bundle.model(), 0))
    from edgekit.bundle.format import assemble

    bundle = assemble(tiny_bundle.manifest, after.weights(), after.encodings, tiny_bundle.golden())
    back = unpack(pack(bundle), "x")
    assert all(back.weights()[name].tobytes() == value.tobytes() for name, value in after.weights().items())
    assert np.mean([len(np.unique(back.weights()[name])) for name in after.encodings]) <= 16
    assert len(pack(bundle)) < 0.8 * len(pack(tiny_bundle))


def test_help_names_every_command(edgekit):
    printed = edgekit("--help").out
    assert all(name in printed for name in FIRST)
