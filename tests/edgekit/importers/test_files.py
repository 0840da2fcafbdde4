"""Models from elsewhere: what comes in computes what it computed, and nothing that could run code is read."""

import contextlib
import io
import json
import pickle
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from torch import nn

from edgekit.bundle.pack import pack, unpack
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.bundle.tensors import TensorSpec, parse_spec
from edgekit.errors import EdgekitError
from edgekit.importers.factory import from_factory
from edgekit.importers.files import from_file, resolve
from edgekit.importers.onnx import from_onnx
from edgekit.session import open_session

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(0, 1, (6, 4)).astype(np.float32)


def affine(*, batch="n", weight=WEIGHT):
    """y = x W"""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "affine",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (batch, 6))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (batch, 4))],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Net(nn.Module):
    def __init__(self, width=5):
        super().__init__()
        self.layer = nn.Linear(6, width)

    def forward(self, x):
        return self.layer(x)


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """my_nets:build, importable from the current directory."""
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, width):\n        super().__init__()\n        self.layer = nn.Linear(6, width)\n"
        "    def forward(self, x):\n        return self.layer(x)\n"
        "def build(width=5):\n    return Net(width)\n"
        "def number():\n    return 5\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("edgekit.nn.module._trusted", set())
    monkeypatch.delenv("EDGEKIT_TRUST", raising=False)
    import sys

    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield "my_nets:build"
    sys.modules.pop("my_nets", None)


def test_an_onnx_file_computes_what_it_did(tmp_path):
    onnx.save(affine(), tmp_path / "affine.onnx")
    bundle = write_bundle(from_file(tmp_path / "affine.onnx"), tmp_path / "a.edge")
    x = RNG.normal(0, 1, (3, 6)).astype(np.float32)
    for source in (
        bundle,
        open_bundle(tmp_path / "a.edge"),
        unpack(pack(bundle), "p"),
        resolve(str(tmp_path / "affine.onnx")),
    ):
        assert np.allclose(open_session(source, "onnxruntime", threads=1).run({"x": x})["y"], x @ WEIGHT, atol=1e-6)
    assert bundle.parameters == 24
    inputs, outputs = bundle.golden()
    assert np.allclose(outputs["y"], inputs["x"] @ WEIGHT, atol=1e-6)


def test_packing_a_graph_is_lossless_and_smaller(tmp_path):
    sparse = np.where(RNG.random((6, 4000)) < 0.9, 0, RNG.normal(0, 1, (6, 4000))).astype(np.float32)
    model = affine(weight=sparse)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4000
    bundle = from_onnx(model.SerializeToString(), "sparse", "here")
    packed = pack(bundle)
    assert len(packed) < 0.45 * sparse.nbytes
    assert unpack(packed, "p").contents["graph.onnx"] == bundle.contents["graph.onnx"]


BAD_GRAPHS = {
    "not ONNX": (lambda: b"hello", "not an ONNX model"),
    "empty": (lambda: b"", "no outputs"),
    "cut short": (lambda: affine().SerializeToString()[:-30], "not a"),
}


@pytest.mark.parametrize(("content", "words"), BAD_GRAPHS.values(), ids=BAD_GRAPHS)
def test_a_bad_graph_is_an_error_that_says_so(content, words):
    with pytest.raises(EdgekitError, match=words):
        from_onnx(content(), "x", "x.onnx")


def test_a_graph_that_does_not_run_says_why_and_that_the_inputs_were_made_up():
    """Its table has seven rows, and the graph adds a number to the ids, so the importer does not know their limit."""
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", 4])
    table = numpy_helper.from_array(np.ones((7, 4), np.float32), "table")
    one = numpy_helper.from_array(np.array(1, np.int64), "one")
    nodes = [helper.make_node("Add", ["ids", "one"], ["more"]), helper.make_node("Gather", ["table", "more"], ["y"])]
    graph = helper.make_graph(nodes, "g", [ids], [out], [table, one])
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    with pytest.raises(EdgekitError, match=r"x\.onnx: .*idx=[78] must be within.*made up.*--data FILE\.npz"):
        from_onnx(content, "x", "x.onnx")
    assert from_onnx(content, "x", "x.onnx", golden={"ids": np.zeros((2, 3), np.int64)}).golden()[1]["y"].all()


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.ckpt", "pytorch_model.bin", "m.pkl"])
def test_a_pickle_is_never_read(name, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(EdgekitError, match=r"pickle.*safetensors"):
        resolve(str(tmp_path / name))
    assert not (tmp_path / "sprung").exists()
    pickle.loads((tmp_path / name).read_bytes()).close()  # the trap works: reading it would have been seen
    assert (tmp_path / "sprung").exists()


def test_an_exported_program_computes_what_it_did(tmp_path):
    torch.manual_seed(0)
    net = Net().eval()
    rows = torch.export.Dim("rows")
    torch.export.save(
        torch.export.export(net, (torch.zeros(2, 6),), dynamic_shapes={"x": {0: rows}}), tmp_path / "net.pt2"
    )
    bundle = from_file(tmp_path / "net.pt2")
    x = RNG.normal(0, 1, (5, 6)).astype(np.float32)
    found = next(iter(open_session(bundle, "onnxruntime", threads=1).run({"x": x}).values()))
    assert np.allclose(found, net(torch.from_numpy(x)).detach().numpy(), atol=1e-5)


def opened(parts, **entry):
    """Change what the archive says about its weights."""
    config = next(name for name in parts if name.endswith("weights_config.json"))
    values = json.loads(parts[config])
    next(iter(values["config"].values())).update(entry)
    parts[config] = json.dumps(values).encode()


def trapped(parts, sprung):
    class Trap:
        def __reduce__(self):
            return (open, (str(sprung), "w"))

    buffer = io.BytesIO()
    torch.save(((Trap(),), {}), buffer)
    parts[next(name for name in parts if "sample_inputs" in name)] = buffer.getvalue()


ARCHIVES = {
    "a weight that is pickled": (lambda parts, _: opened(parts, use_pickle=True), "pickle, which is never read"),
    "no word on pickling": (lambda parts, _: opened(parts, use_pickle=None), "pickle, which is never read"),
    "a constant that is an object": (lambda parts, _: opened(parts, path_name="opaque_obj_/../x"), "never read"),
    "a compiled library": (lambda parts, _: parts.update({"x/data/aotinductor/m/m.so": b""}), "which torch would run"),
    "an object beside the tensors": (
        lambda parts, _: parts.update({"x/data/constants/custom_obj_0": b""}),
        "would run",
    ),
    "sample inputs with a trap": (trapped, "more than tensors"),
}


@pytest.mark.parametrize(("change", "words"), ARCHIVES.values(), ids=ARCHIVES)
def test_a_program_with_more_than_tensors_in_it_is_refused(change, words, tmp_path):
    path, sprung = tmp_path / "net.pt2", tmp_path / "sprung"
    torch.export.save(torch.export.export(Net().eval(), (torch.zeros(2, 6),)), path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts, sprung)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(EdgekitError, match=words):
        from_file(path)
    assert not sprung.exists()
    if change is trapped:
        with contextlib.suppress(Exception):  # planted: torch alone walks into it, whatever it says afterwards
            torch.export.load(path)
        assert sprung.exists()


def test_what_is_no_archive_is_an_error(tmp_path):
    (tmp_path / "x.pt2").write_bytes(b"hello")
    with pytest.raises(EdgekitError, match="not a readable zip archive"):
        from_file(tmp_path / "x.pt2")


def imported_net(factory, **options):
    given = {"arguments": {"width": 3}, "weights": None, "inputs": [parse_spec("x:float32:batch,6")], "outputs": []}
    return from_factory(factory, **{**given, **options})


def test_a_function_with_weights_becomes_a_bundle(factory, tmp_path):
    layer = {"layer.weight": WEIGHT[:, :3].T.copy(), "layer.bias": np.ones(3, np.float32)}
    save_file(layer, tmp_path / "w.safetensors")
    bundle = imported_net(factory, weights=tmp_path / "w.safetensors", outputs=["score"])
    inputs, outputs = bundle.golden()
    assert np.allclose(outputs["score"], inputs["x"] @ WEIGHT[:, :3] + 1, atol=1e-6)
    assert bundle.manifest.outputs == (TensorSpec("score", ("batch", 3)),)


def test_a_bundle_runs_no_function_that_its_reader_did_not_name(factory, monkeypatch, tmp_path):
    bundle = write_bundle(imported_net(factory), tmp_path / "net.edge")
    monkeypatch.setattr("edgekit.nn.module._trusted", set())
    with pytest.raises(EdgekitError, match="--trust my_nets:build"):
        open_bundle(tmp_path / "net.edge").model()
    monkeypatch.setenv("EDGEKIT_TRUST", "other:one,my_nets:build")
    assert bundle.parameters == sum(p.numel() for p in open_bundle(tmp_path / "net.edge").model().parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": []}, "pass --input"),
        ({"weights": "w.pt"}, "pickle"),
        ({"arguments": {"wide": 3}}, "wide"),
        ({"inputs": [TensorSpec("x", ("batch", 7))]}, "does not run on inputs"),
    ],
)
def test_what_does_not_fit_the_function_is_an_error(change, words, factory, tmp_path):
    if "weights" in change:
        change = {"weights": tmp_path / change["weights"]}
        change["weights"].touch()
    with pytest.raises(EdgekitError, match=words):
        imported_net(factory, **change)


def test_a_function_that_gives_no_network(factory):
    with pytest.raises(EdgekitError, match=r"gives a int; expected a torch.nn.Module"):
        imported_net("my_nets:number", arguments={})
    with pytest.raises(EdgekitError, match="my_nets:nothing"):
        imported_net("my_nets:nothing", arguments={})


@pytest.mark.parametrize("text", ["x", "x:float32", "x:float33:batch,2", "x:float32:", "x:float32:1,3,8,8"])
def test_a_spec_that_is_none(text):
    with pytest.raises(EdgekitError, match="--input"):
        parse_spec(text)


def test_a_length_that_is_no_multiple_is_refused_with_the_nearest_that_are():
    spec = parse_spec("ids:int64:batch,9*faces")
    spec.check(np.zeros((2, 18), np.int64))
    with pytest.raises(EdgekitError, match=r"'ids' has length 20 along axis 1.*multiple of 9 \(18 or 27\)"):
        spec.check(np.zeros((2, 20), np.int64))
    for length in (5, 0):
        with pytest.raises(EdgekitError, match=rf"length {length} .*\(9\)"):
            spec.check(np.zeros((2, length), np.int64))
