"""edgekit import, then the same bundle through inspect, compress and replay."""

import json
import sys

import numpy as np
import pytest

from edgekit.bundle.store import open_bundle

NETS = """
import torch
from torch import nn

def build(width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(24, width), nn.ReLU(), nn.Linear(width, 3))
"""


@pytest.fixture
def net(tmp_path, monkeypatch, edgekit, data_file):
    """A bundle of the user's own network, imported on the command line."""
    (tmp_path / "my_mlp.py").write_text(NETS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("edgekit.nn.module._trusted", set())
    monkeypatch.delenv("EDGEKIT_TRUST", raising=False)
    done = edgekit(
        "import",
        "my_mlp:build",
        "--input",
        "light_curve:float32:batch,12,2",
        "--outputs",
        "probabilities",
        "--classes",
        "rises,falls,peaks",
        "--data",
        data_file,
        "-o",
        tmp_path / "mlp.edge",
        "--json",
    )
    assert done.status == 0, done.err
    assert json.loads(done.out)["parameters"] == 24 * 32 + 32 + 32 * 3 + 3
    yield tmp_path / "mlp.edge"
    sys.modules.pop("my_mlp", None)


def test_an_imported_network_is_compressed_replayed_and_traced_back(net, edgekit, data_file, tmp_path):
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "cluster"\nbits = 4\nepochs = 1\n')
    # times are estimated: on a busy machine, two measurements of one network differ by more than the guard allows
    options = ["--data", data_file, "--max-loss", "0.5", "--batch", "1,16", "--target", "x86-avx512"]
    done = edgekit("compress", net, "--recipe", tmp_path / "r.toml", "-o", tmp_path / "small.edge", *options)
    assert done.status == 0, done.err
    assert [record["kept"] for record in open_bundle(tmp_path / "small.edge").manifest.records] == [True], done.out

    again = edgekit("compress", net, "--replay", tmp_path / "small.edge", "-o", tmp_path / "again.edge", *options)
    assert again.status == 0, again.err
    assert "identical to" in again.err
    assert (tmp_path / "again.edge/weights.safetensors").read_bytes() == (
        tmp_path / "small.edge/weights.safetensors"
    ).read_bytes()

    lineage = json.loads(edgekit("inspect", tmp_path / "small.edge", "--lineage", "--json").out)
    assert lineage[0]["digest"] == open_bundle(net).digest
    assert [item["pass"] for item in lineage[0]["passes"]] == ["cluster"]
    assert lineage[0]["passes"][0]["seed"] == 1
    assert lineage[-1]["name"] == "small"
    assert "kept" in edgekit("inspect", tmp_path / "small.edge", "--lineage").out


def test_a_replay_that_gives_other_bytes_fails(net, edgekit, data_file, tmp_path):
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "cluster"\nbits = 4\nepochs = 1\n')
    options = ["--data", data_file, "--max-loss", "0.5", "--batch", "1,16", "--runtime", "torch"]
    assert edgekit("compress", net, "--recipe", tmp_path / "r.toml", "-o", tmp_path / "s.edge", *options).status == 0
    arrays = dict(np.load(data_file))
    arrays["light_curve"] = arrays["light_curve"] + np.float32(0.1)  # planted: other data
    np.savez(data_file, **arrays)
    done = edgekit("compress", net, "--replay", tmp_path / "s.edge", "-o", tmp_path / "again.edge", *options)
    assert done.status == 1
    assert "the replay gave other bytes than" in done.err


def test_a_bundle_is_replayed_on_its_own_parent_only(net, tiny_file, edgekit, data_file, tmp_path):
    done = edgekit("compress", tiny_file, "--replay", net, "-o", tmp_path / "x.edge", "--data", data_file)
    assert done.failed_with(1, "replay it on the bundle that it was made from")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["missing.onnx"], 1, "no such file"),
        (["my_mlp:build"], 1, "pass --input"),
        (["my_mlp:build", "--arguments", "[1]"], 2, "expected a JSON object"),
        (["my_mlp:build", "--arguments", "{"], 2, "not JSON"),
        (["weights.pt"], 1, "pickle"),
    ],
)
def test_bad_input_is_one_line(arguments, status, words, net, edgekit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"x")
    assert edgekit("import", *arguments, "-o", tmp_path / "x.edge").failed_with(status, words)


def test_state_pairs_an_input_with_an_output_of_the_same_shape(edgekit, tmp_path):
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", 2)) for name in ("x", "before", "after")]
    wide = helper.make_tensor_value_info("wide", TensorProto.FLOAT, ("n", 4))
    nodes = [
        helper.make_node("Add", ["x", "before"], ["after"]),
        helper.make_node("Concat", ["x", "before"], ["wide"], axis=1),
    ]
    graph = helper.make_graph(nodes, "sum", values[:2], [values[2], wide])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "sum.onnx")
    source = tmp_path / "sum.onnx"
    assert edgekit("import", source, "--state", "before=after", "-o", tmp_path / "s.edge").status == 0
    assert open_bundle(tmp_path / "s.edge").manifest.state == {"before": "after"}
    for pair, words in (("before=wide", "cannot be fed"), ("after=before", "expected INPUT=OUTPUT"), ("x", "expected")):
        assert edgekit("import", source, "--state", pair, "-o", tmp_path / "t.edge").failed_with(2, words)


def test_what_is_constant_in_a_deployment_is_fixed(edgekit, tmp_path):
    import onnx

    from tests.edgekit.signature_graphs import branching

    onnx.save(branching(), tmp_path / "two.onnx")
    arguments = ("import", tmp_path / "two.onnx", "-o", tmp_path / "one.edge", "--fix", "rate=16000")
    assert edgekit(*arguments).status == 0
    assert [spec.name for spec in open_bundle(tmp_path / "one.edge").manifest.inputs] == ["x"]
    for text, words in (
        ("rate", "expected NAME=NUMBER"),
        ("rate=fast", "expected NAME=NUMBER"),
        ("speed=1", "'speed'"),
    ):
        assert edgekit("import", tmp_path / "two.onnx", "-o", tmp_path / "x.edge", "--fix", text).failed_with(1, words)
