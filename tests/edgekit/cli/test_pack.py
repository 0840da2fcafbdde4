"""edgekit pack"""

import json

import pytest

from edgekit.bundle.format import WEIGHTS
from edgekit.bundle.pack import unpack
from edgekit.bundle.store import open_bundle


def test_pack_writes_one_file_that_is_a_bundle(edgekit, tiny_file, tmp_path):
    target = tmp_path / "deep" / "t.edgepack"
    done = edgekit("pack", tiny_file, "-o", target)
    assert done.status == 0
    size = target.stat().st_size
    assert f"{size:,} bytes" in done.out
    packed = unpack(target.read_bytes(), "t")
    source = open_bundle(tiny_file)
    assert all(packed.weights()[name].tobytes() == value.tobytes() for name, value in source.weights().items())
    assert edgekit("pack", target, "-o", tmp_path / "again.edgepack").status == 0, "a packed file is a bundle too"


def test_json(edgekit, tiny_file, tmp_path):
    target = tmp_path / "t.edgepack"
    found = json.loads(edgekit("pack", tiny_file, "-o", target, "--json").out)
    assert found["bytes"] == target.stat().st_size
    assert found["float32_bytes"] == 4 * found["parameters"]


def test_force(edgekit, tiny_file, tmp_path):
    target = tmp_path / "t.edgepack"
    target.write_text("precious")
    assert edgekit("pack", tiny_file, "-o", target).failed_with(1, "t.edgepack", "--force")
    assert target.read_text() == "precious"
    assert edgekit("pack", tiny_file, "-o", target, "--force").status == 0
    assert edgekit("pack", tiny_file, "-o", tmp_path, "--force").failed_with(1, "directory")


@pytest.mark.parametrize("spoil", ["missing", "tampered", "damaged pack"])
def test_bad_input(spoil, edgekit, tiny_file, tmp_path):
    source, words = tiny_file, ""
    if spoil == "missing":
        source, words = tmp_path / "none.edge", "no such bundle"
    elif spoil == "tampered":
        (tiny_file / WEIGHTS).write_bytes(b"x")
        words = "SHA-256"
    else:
        source, words = tmp_path / "bad.edgepack", "damaged"
        edgekit("pack", tiny_file, "-o", source)
        source.write_bytes(source.read_bytes()[:-1])
    assert edgekit("pack", source, "-o", tmp_path / "out").failed_with(1, str(source), words)
    assert not (tmp_path / "out").exists()
