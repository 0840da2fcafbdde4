"""Bundles on disk: the packed file, what is not overwritten, and names."""

from dataclasses import replace

import pytest

from edgekit.bundle import store
from edgekit.bundle.store import default_name, open_bundle, write_bundle, write_packed
from edgekit.errors import EdgekitError


def test_a_packed_file_is_written_read_back_and_not_overwritten(tiny_bundle, tmp_path):
    path = tmp_path / "tiny.edgepack"
    size = write_packed(tiny_bundle, path)
    assert path.stat().st_size == size
    opened = open_bundle(str(path))
    assert (opened.path, opened.manifest.name) == (path, "tiny")
    before = path.read_bytes()
    other = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, name="other"))
    with pytest.raises(EdgekitError, match=r"tiny\.edgepack already exists; .* --force"):
        write_packed(other, path)
    assert path.read_bytes() == before
    write_packed(other, path, force=True)
    assert open_bundle(path).manifest.name == "other"


def test_a_packed_file_that_cannot_be_read_is_not_written(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "pack", lambda bundle: b"EDGEPACK spoilt")
    with pytest.raises(EdgekitError, match=r"tiny\.edgepack: "):
        write_packed(tiny_bundle, tmp_path / "tiny.edgepack")
    assert list(tmp_path.iterdir()) == []


def test_a_written_bundle_knows_its_path(tiny_bundle, tmp_path):
    assert write_bundle(tiny_bundle, str(tmp_path / "x.edge")).path == tmp_path / "x.edge"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/t2-gr.edge", "t2-gr"),
        ("t2.onnx", "t2.onnx"),
        ("a.edge/b", "b"),
        ("x.edge.edge", "x.edge"),
        ("größe.edge", "größe"),
        (b"gr\xc3\xb6\xc3\x9fe".decode("ascii", "surrogateescape") + ".edge", "größe"),  # as the C locale reads it
        (b"\xff.edge".decode(errors="surrogateescape"), "\ufffd"),
    ],
)
def test_the_name_that_a_path_suggests_is_valid_text(path, name):
    assert default_name(path) == name
