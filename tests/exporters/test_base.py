"""What every export says of its model, and directories that are whole or not there."""

import hashlib
import json
from dataclasses import replace

import pytest

from edgekit.bundle.format import KEY, model_key
from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from exporters.base import MANIFEST, check_destination, described, hashes, manifest_bytes, publish

FILES = {MANIFEST: b"{}\n", "model.onnx": b"weights"}


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_free_axes_are_listed_with_their_places_and_multiples(toy):
    bundle = toy()
    specs = (
        TensorSpec("a", ("batch", 3, "9*faces")),
        TensorSpec("b", ("batch", "9*faces", "9*faces"), "int64"),
    )
    changed = replace(bundle, manifest=replace(bundle.manifest, inputs=specs, outputs=(TensorSpec("y", ("batch", 1)),)))
    assert described(changed)["axes"] == {
        "batch": {"multiple_of": 1, "at": {"a": [0], "b": [0], "y": [0]}},
        "9*faces": {"multiple_of": 9, "at": {"a": [2], "b": [1, 2]}},
    }


def test_an_export_names_the_bundle_and_the_model_in_it(toy):
    """Another name or record is another bundle, and the same model; other weights are another model."""
    bundle, other = toy(), toy(layers=2)
    renamed = replace(bundle, manifest=replace(bundle.manifest, name="renamed"))
    said = described(bundle)
    assert (said["model"], said["bundle"], said[KEY]) == ("toy", bundle.digest, model_key(bundle))
    assert described(renamed)[KEY] == said[KEY]
    assert described(renamed)["bundle"] != said["bundle"]
    assert described(other)[KEY] != said[KEY]


def test_hashes_are_those_of_the_bytes():
    assert hashes(FILES) == {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert hashes({}) == {}


def test_a_manifest_is_json_that_any_reader_takes(toy):
    assert json.loads(manifest_bytes(described(toy()))) == json.loads(json.dumps(described(toy())))
    with pytest.raises(ValueError, match="JSON compliant"):
        manifest_bytes({"error": float("nan")})


def test_files_are_all_there_or_none(tmp_path, monkeypatch):
    publish(FILES, tmp_path / "a" / "out", force=False)
    assert tree(tmp_path / "a" / "out") == FILES
    with pytest.raises(TypeError):
        publish({MANIFEST: b"", "model.onnx": 5}, tmp_path / "b", force=False)
    assert not (tmp_path / "b").exists()
    with pytest.raises(TypeError):
        publish({MANIFEST: b"", "model.onnx": 5}, tmp_path / "a" / "out", force=True)
    assert tree(tmp_path) == {f"a/out/{name}": content for name, content in FILES.items()}


def test_a_replaced_export_keeps_nothing_of_the_old_one(tmp_path):
    out = tmp_path / "out"
    publish({**FILES, "old.txt": b"x"}, out, force=False)
    publish(FILES, out, force=True)
    assert tree(tmp_path) == {f"out/{name}": content for name, content in FILES.items()}


def test_only_an_export_is_replaced_and_only_if_asked(tmp_path):
    out = tmp_path / "out"
    check_destination(out, force=False)
    out.mkdir()
    check_destination(out, force=False)
    (out / "thesis.tex").write_text("x")
    with pytest.raises(EdgekitError, match="already exists; choose another directory or pass --force"):
        check_destination(out, force=False)
    with pytest.raises(EdgekitError, match=f"not an export .it holds no {MANIFEST}.*--force will not replace"):
        check_destination(out, force=True)
    (out / MANIFEST).mkdir()
    with pytest.raises(EdgekitError, match="not an export"):
        check_destination(out, force=True)
    assert (out / "thesis.tex").read_text() == "x"
    (tmp_path / "file").write_text("x")
    with pytest.raises(EdgekitError, match="file exists and is not an export"):
        check_destination(tmp_path / "file", force=True)
