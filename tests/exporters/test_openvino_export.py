"""OpenVINO's format: OpenVINO itself runs the proof, and an export carries its proof."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from edgekit.bundle import zoo
from edgekit.bundle.format import GOLDEN, with_files
from edgekit.bundle.store import write_bundle
from edgekit.bundle.tensors import arrays_to_bytes
from edgekit.errors import EdgekitError
from edgekit.graph.lower import lower
from edgekit.importers.files import resolve
from edgekit.importers.onnx import from_onnx

module = pytest.importorskip("exporters.openvino_export", exc_type=EdgekitError)
MODEL, WEIGHTS = module.MODEL, module.WEIGHTS
Exporter = module.OpenVinoExporter


def another(bundle):
    """Return the same network with one weight changed, and golden outputs that match it."""
    from edgekit.bundle.format import assemble
    from edgekit.graph.network import Network
    from exporters.verify import _outputs

    weights = bundle.weights()
    weights["classifier.bias"] = weights["classifier.bias"] + np.float32([1, 0, 0, 0, 0])
    inputs, _ = bundle.golden()
    changed = assemble(bundle.manifest, weights, {}, bundle.golden())
    return assemble(bundle.manifest, weights, {}, (inputs, _outputs(Network(changed), inputs, ["probabilities"])))


def check_device(out, *options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, out / "verify.py", *options], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("encoding", [None, "affine rows", "palette"])
@pytest.mark.parametrize("arguments", [{"context": 2}, {"layers": 2, "heads": 3}], ids=["context", "two layers"])
def test_an_export_is_within_tolerance_at_every_batch_size(toy, tmp_path, encoding, arguments):
    bundle = toy(encoding, **arguments)
    export = Exporter().export(bundle, tmp_path / "out")
    assert set(export.files) == {path.name for path in (tmp_path / "out").iterdir()}
    assert [(check["batch"], check["changed"]) for check in export.checks] == [(1, 0), (16, 0), (1000, 0)]
    for check in export.checks:
        assert check["difference"] < 2e-6
        assert check["bytes"] == export.files[MODEL] + export.files[WEIGHTS]
    assert export.manifest["models"][MODEL]["precision"] == "f32"


def test_the_zoo_can_be_exported(tmp_path):
    for name in zoo.folders():
        export = Exporter().export(resolve(name), tmp_path / name)
        assert max(check["difference"] for check in export.checks) <= export.checks[0]["allowed"] <= 2e-5


def test_codes_make_the_file_smaller_and_change_nothing(toy, tmp_path):
    bundle = toy("affine rows", ff_dim=256)
    exports = [Exporter(weights=weights).export(bundle, tmp_path / weights) for weights in ("float32", "encoded")]
    codes = sum(encoding.codes.size for encoding in bundle.encodings().values())
    assert exports[0].files[WEIGHTS] - exports[1].files[WEIGHTS] > 2.5 * codes
    inputs, _ = bundle.golden()
    core = module.openvino.Core()
    found = [
        module.Model(core, (tmp_path / name / MODEL).read_bytes(), (tmp_path / name / WEIGHTS).read_bytes()).run(
            ["probabilities"], inputs
        )[0]
        for name in ("float32", "encoded")
    ]
    np.testing.assert_allclose(*found, atol=1e-6)


def test_the_device_check_passes_and_a_changed_weight_fails_it(toy, tmp_path):
    out = tmp_path / "out"
    Exporter().export(toy(), out)
    done = check_device(out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok") == 2
    assert "model.xml on OpenVINO CPU, batch 1" in done.stdout
    done = check_device(out, "--provider", "GPU.7")
    assert done.returncode == 1
    assert "device GPU.7 is not available; choose from" in done.stdout

    Exporter().export(another(toy()), tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, out / WEIGHTS)
    done = check_device(out)
    assert done.returncode == 1
    assert "model.bin: missing, or not the file that was exported" in done.stdout
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["files"][WEIGHTS]  # even when the hash is not there to tell
    (out / "manifest.json").write_text(json.dumps(manifest))
    done = check_device(out)
    assert done.returncode == 1
    assert done.stdout.count("WRONG") == 2


def test_wrong_numbers_are_not_exported(toy, tmp_path, monkeypatch):
    bundle = toy()
    inputs, expected = bundle.golden()
    named = {f"in.{name}": array for name, array in inputs.items()}
    content = arrays_to_bytes(named | {"out.probabilities": expected["probabilities"][::-1]})
    with pytest.raises(EdgekitError, match=r"batch 1: .* golden outputs by [1-9].*Nothing was written"):
        Exporter().export(with_files(bundle, {GOLDEN: content}), tmp_path / "out")
    real = module.Model.run

    def wrong_from_64_rows_on(self, names, arrays):
        return [value[::-1] if len(value) >= 64 else value for value in real(self, names, arrays)]

    monkeypatch.setattr(module.Model, "run", wrong_from_64_rows_on)
    with pytest.raises(EdgekitError, match="the same row differs from one batch size to another"):
        Exporter().export(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_can_be_exported_and_a_mistake_is_named(toy, tmp_path):
    bundle = toy(context=2)
    inputs, _ = bundle.golden()
    graph = from_onnx(lower(bundle).SerializeToString(), "graph", "a test", golden=inputs)
    assert max(check["difference"] for check in Exporter().export(graph, tmp_path / "out").checks) < 2e-6
    with pytest.raises(EdgekitError, match="'float16'; expected 'encoded' or 'float32'"):
        Exporter(weights="float16")


def test_the_command_line_writes_it(edgekit, toy, tmp_path):
    write_bundle(toy(), tmp_path / "toy.edge")
    export = ("export", tmp_path / "toy.edge", "--to", "openvino", "-o", tmp_path / "out")
    done = edgekit(*export, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["manifest"]["format"] == "edgekit-openvino-1"
    assert edgekit(*export, "--json").failed_with(1, "already exists", "--force")
    assert edgekit(*export, "--opset", "17", "--force").failed_with(2, "--opset means nothing to the format openvino")
