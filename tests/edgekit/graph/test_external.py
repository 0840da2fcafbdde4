"""Weights in a second file: the same tensors, and onnxruntime finds them from memory and from disk."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.graph.external import ALIGNED, LEAST, files
from edgekit.graph.lower import lower
from exporters.onnx_export import OnnxExporter
from exporters.verify import on_onnxruntime


def test_a_small_graph_is_one_file(toy):
    model = lower(toy())
    assert files(model, "model.onnx") == {"model.onnx": model.SerializeToString(deterministic=True)}


def test_a_large_one_is_two_and_the_same(toy, tmp_path):
    bundle = toy(embed_dim=32, ff_dim=128)
    model = lower(bundle)
    before = model.SerializeToString(deterministic=True)
    made = files(model, "model.onnx", largest=1000)
    assert model.SerializeToString(deterministic=True) == before
    assert set(made) == {"model.onnx", "model.onnx.data"}
    assert len(made["model.onnx"]) < len(before) / 4
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    read = {item.name: numpy_helper.to_array(item) for item in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for tensor in model.graph.initializer:
        assert np.array_equal(read[tensor.name], numpy_helper.to_array(tensor)), tensor.name
    outside = [
        t for t in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer if t.external_data
    ]
    assert {t.name for t in outside} == {t.name for t in model.graph.initializer if len(t.raw_data) >= LEAST}
    offsets = [int(item.value) for tensor in outside for item in tensor.external_data if item.key == "offset"]
    assert all(offset % ALIGNED == 0 for offset in offsets)
    inputs, expected = bundle.golden()
    on_disk = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    in_memory = on_onnxruntime(made["model.onnx"], {"model.onnx.data": made["model.onnx.data"]})
    for session in (on_disk, in_memory):
        np.testing.assert_allclose(session.run(None, inputs)[0], expected["probabilities"], atol=1e-6)
    damaged = bytearray(made["model.onnx.data"])
    damaged[offsets[-1] : offsets[-1] + 64] = bytes(64)
    wrong = on_onnxruntime(made["model.onnx"], {"model.onnx.data": bytes(damaged)})
    assert np.abs(wrong.run(None, inputs)[0] - expected["probabilities"]).max() > 1e-5


def test_an_export_with_two_files_proves_itself(toy, tmp_path):
    import json
    import subprocess
    import sys

    result = OnnxExporter(largest=1000).export(toy(), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest["models"]) == {"model.onnx"}
    assert "model.onnx.data" in manifest["files"]
    assert manifest["models"]["model.onnx"]["bytes"] == result.files["model.onnx"] + result.files["model.onnx.data"]
    command = [sys.executable, "-I", str(tmp_path / "out" / "verify.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "out" / "model.onnx.data").unlink()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "model.onnx.data: missing" in done.stdout


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(("numbers", "outside"), [(LEAST // 4 - 1, False), (LEAST // 4, True)])
def test_tensors_of_the_least_size_and_in_either_form_go_to_the_second_file(numbers, outside, raw):
    array = np.arange(numbers, dtype=np.float32)
    tensor = (
        numpy_helper.from_array(array, "w") if raw else helper.make_tensor("w", TensorProto.FLOAT, [numbers], array)
    )
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    size = max(len(tensor.raw_data), tensor.ByteSize())
    assert list(files(model, "m.onnx", largest=size)) == ["m.onnx"]
    made = files(model, "m.onnx", largest=size - 1)
    assert made["m.onnx.data"] == (array.tobytes() if outside else b"")
    (stored,) = onnx.load_from_string(made["m.onnx"]).graph.initializer
    assert (stored.data_location == TensorProto.EXTERNAL) == outside
    assert list(stored.dims) == [numbers]
