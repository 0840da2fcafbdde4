"""The exported graph: names, operators, opset, codes, and the directory that carries its own proof."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from edgekit.bundle.format import KEY, WEIGHTS, model_key, with_files
from edgekit.errors import EdgekitError
from edgekit.graph import lower as lowering
from edgekit.graph.cleanup import shapes
from edgekit.graph.lower import lower
from exporters.onnx_export import FLOAT, QUANTISED, OnnxExporter

MODELS = {
    "plain": {},
    "context": {"context": 2},
    "three layers": {"layers": 3},
    "pruned heads": {"heads": 3, "head_dim": 2, "context": 1},
}


def outputs(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@pytest.mark.parametrize("encoding", [None, "affine rows", "affine", "palette"])
@pytest.mark.parametrize("arguments", MODELS.values(), ids=MODELS)
def test_graph_gives_the_golden_outputs(toy, arguments, encoding):
    bundle = toy(encoding, **arguments)
    inputs, expected = bundle.golden()
    got = outputs(lower(bundle), inputs)
    np.testing.assert_allclose(got, expected["probabilities"], atol=1e-6)


@pytest.mark.parametrize("opset", lowering.OPSETS)
def test_every_allowed_opset_is_the_one_obtained(toy, opset):
    bundle = toy(context=2)
    model = lower(bundle, opset=opset)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    inputs, expected = bundle.golden()
    np.testing.assert_allclose(outputs(model, inputs), expected["probabilities"], atol=1e-6)


@pytest.mark.parametrize("opset", [12, 21])
def test_other_opsets_are_refused(opset):
    with pytest.raises(EdgekitError, match=rf"opset {opset} cannot be written; expected 13 to 20"):
        OnnxExporter(opset=opset)


@pytest.mark.parametrize("arguments", MODELS.values(), ids=MODELS)
def test_initializers_carry_the_names_and_values_of_parameters(toy, arguments):
    bundle = toy(**arguments)
    stored = {item.name: numpy_helper.to_array(item) for item in lower(bundle).graph.initializer}
    for name, weight in bundle.weights().items():
        assert np.array_equal(stored[name], weight) or np.array_equal(stored[name], weight.T), name
    assert "positions" in stored
    rest = set(stored) - set(bundle.weights()) - {"positions"}
    assert all(stored[name].size <= 4 for name in rest), rest  # shapes and the softmax's divisor


def test_graph_is_free_of_litter(toy):
    bundle = toy(context=2)
    model = lower(bundle)
    text = onnx.printer.to_text(model)
    assert "_output_0" not in text
    assert "Constant" not in text
    assert "onnx::" not in text
    assert {node.op_type for node in model.graph.node}.isdisjoint({"Shape", "Gather", "Unsqueeze", "Identity"})
    assert [entry.key for entry in model.metadata_props] == [KEY]
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert "blocks.0.attention.query.MatMul" in {node.name for node in model.graph.node}


def test_published_size_of_t2(toy):
    """13,262 parameters are 53 kB, the positional encoding 13 kB; names and nodes may add a tenth."""
    bundle = toy(sequence=100, embed_dim=32, heads=16, ff_dim=128, classes=14)
    assert 66_000 < lower(bundle).ByteSize() < 73_000


def test_shapes_and_names_come_from_the_manifest(toy):
    bundle = toy(context=2, output="logits")
    found = shapes(lower(bundle))
    assert found["light_curve"] == ("batch", 12, 2)
    assert found["context"] == ("batch", 2)
    assert found["logits"] == ("batch", 5)
    promised = replace(bundle.manifest.outputs[0], shape=("batch", 9))
    wrong = replace(bundle, manifest=replace(bundle.manifest, outputs=(promised,)))
    with pytest.raises(EdgekitError, match=r"'logits' has shape .*5.*; the manifest says \(batch, 9\)"):
        lower(wrong)


def test_codes_that_save_nothing_are_not_written(toy, tmp_path):
    tiny = toy("palette", embed_dim=8, ff_dim=8)
    assert set(OnnxExporter().export(tiny, tmp_path / "out").files).isdisjoint({QUANTISED})


def test_decoding_is_exact(toy):
    """The outputs must be equal, not only close: ONNX Runtime must not quantize activations because it saw quantized
    weights."""
    bundle = toy("affine rows", context=2)
    inputs, _ = bundle.golden()
    exact = outputs(lower(bundle, weights="float32"), inputs)
    assert np.array_equal(outputs(lower(bundle), inputs), exact)


def test_same_bundle_same_bytes(toy, tmp_path):
    for name in ("one", "two"):
        OnnxExporter().export(toy("palette"), tmp_path / name)
    for name in (FLOAT, QUANTISED, "golden.npz", "verify.py", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def run_check(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-I", str(folder / "verify.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_export_writes_a_directory_that_proves_itself(toy, tmp_path):
    bundle = toy("palette", context=2)
    result = OnnxExporter().export(bundle, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(result.files)
    assert set(result.files) == {FLOAT, QUANTISED, "golden.npz", "verify.py", "manifest.json"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["bundle"] == bundle.digest
    assert manifest[KEY] == model_key(bundle)
    assert manifest["opset"] == 17
    assert "LayerNormalization" in manifest["models"][FLOAT]["operators"]
    assert [(check["file"], check["batch"]) for check in manifest["checks"]] == [
        (file, batch) for file in (FLOAT, QUANTISED) for batch in (1, 16, 1000)
    ]
    done = run_check(tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok") == 4
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_existing_directories_are_respected(toy, tmp_path):
    out = tmp_path / "out"
    OnnxExporter().export(toy(), out)
    with pytest.raises(EdgekitError, match="already exists"):
        OnnxExporter().export(toy(), out)
    (out / "left.over").touch()
    OnnxExporter().export(toy("palette"), out, force=True)
    assert (out / QUANTISED).is_file()
    assert not (out / "left.over").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(EdgekitError, match="not an export"):
        OnnxExporter().export(toy(), other, force=True)
    assert (other / "thesis.tex").exists()


def test_nan_weights_are_refused(toy, tmp_path):
    bundle = toy()
    damaged = bytearray(bundle.contents[WEIGHTS])
    damaged[-4:] = np.float32("nan").tobytes()
    with pytest.raises(EdgekitError, match="NaN"):
        OnnxExporter().export(with_files(bundle, {WEIGHTS: bytes(damaged)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
