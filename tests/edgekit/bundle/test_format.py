"""The bundle: what is written comes back, and nothing else is accepted."""

import contextlib
import errno
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.bundle import files
from edgekit.bundle.encoding import Affine, Palette
from edgekit.bundle.format import (
    GOLDEN,
    MANIFEST,
    WEIGHTS,
    Bundle,
    Manifest,
    assemble,
    model_key,
    replace_golden,
    with_files,
)
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.bundle.tensors import TensorSpec, arrays_to_bytes
from edgekit.errors import EdgekitError

FILES = (WEIGHTS, GOLDEN)


def edit_manifest(path: Path, **changes) -> None:
    values = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(values | changes))


def replace_file(path: Path, name: str, content: bytes) -> None:
    """Change a file and its hash, as somebody would who has read the format."""
    (path / name).write_bytes(content)
    files = json.loads((path / MANIFEST).read_text())["files"]
    edit_manifest(path, files=files | {name: hashlib.sha256(content).hexdigest()})


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def one_line(error: EdgekitError) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.fixture
def encoded(tiny_bundle):
    """The tiny bundle with one weight on a codebook and one on a grid."""
    weights = tiny_bundle.weights()
    rng = np.random.default_rng(0)
    encodings = {
        "classifier.weight": Palette(2, rng.integers(0, 4, (3, 16)).astype(np.uint8), np.float32([-1, 0, 0.5, 2])),
        "embed.weight": Affine(4, rng.integers(-7, 8, (16, 2)).astype(np.int8), np.full((16, 1), 0.1, np.float32)),
    }
    weights |= {name: encoding.decode() for name, encoding in encodings.items()}
    return assemble(tiny_bundle.manifest, weights, encodings, tiny_bundle.golden(), {"report.html": b"<p>"})


def test_what_is_written_comes_back(encoded, tmp_path):
    written = write_bundle(encoded, tmp_path / "deep" / "er" / "x.edge")
    opened = open_bundle(tmp_path / "deep" / "er" / "x.edge")
    assert opened.manifest == encoded.manifest
    assert dict(opened.contents) == dict(encoded.contents)
    assert opened.digest == encoded.digest == written.digest
    assert opened.size == sum(map(len, contents(tmp_path / "deep" / "er" / "x.edge").values()))
    assert set(opened.encodings()) == {"classifier.weight", "embed.weight"}
    for name, encoding in encoded.encodings().items():
        assert opened.encodings()[name].decode().tobytes() == encoding.decode().tobytes()
        assert opened.encodings()[name].bits == encoding.bits
    for first, second in zip(opened.golden(), encoded.golden(), strict=True):
        assert all(np.array_equal(first[name], second[name]) for name in second)


def test_golden_outputs_are_those_of_the_model(tiny_bundle):
    from edgekit.data.dataset import Dataset
    from edgekit.nn.training import probabilities

    inputs, outputs = tiny_bundle.golden()
    again = probabilities(tiny_bundle.model(), Dataset(inputs, np.zeros(8, np.int64)))
    assert np.abs(again - outputs["probabilities"]).max() < 1e-6


def test_writing_is_reproducible_and_the_digest_tells_bundles_apart(encoded, tmp_path):
    for name in ("a.edge", "b.edge"):
        write_bundle(encoded, tmp_path / name)
    assert contents(tmp_path / "a.edge") == contents(tmp_path / "b.edge")
    assert with_files(encoded, {"report.html": b"<p>"}).digest == encoded.digest
    assert with_files(encoded, {"report.html": b"<b>"}).digest != encoded.digest
    assert replace(encoded, manifest=replace(encoded.manifest, name="other")).digest != encoded.digest


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"name": "other", "metrics": {"loss": 1}, "classes": (), "seed": 3}, True),
        ({"arguments": {"b": 2, "a": 1}}, True),  # the order of the keys says nothing
        ({"arguments": {"a": 1, "b": 3}}, False),
        ({"family": "module"}, False),
        ({"inputs": (TensorSpec("x", ("batch", 3)),)}, False),
        ({"outputs": (TensorSpec("logits", ("batch", 2)),)}, False),
        ({"bits": {"w": 4}}, False),
    ],
)
def test_the_key_of_a_model_covers_what_determines_its_outputs(changes, same):
    inputs, outputs = (TensorSpec("x", ("batch", 2)),), (TensorSpec("y", ("batch", 2)),)
    manifest = Manifest("m", "t2", {"a": 1, "b": 2}, inputs, outputs)
    bundle = Bundle(manifest, {WEIGHTS: b"weights"})
    assert (model_key(replace(bundle, manifest=replace(manifest, **changes))) == model_key(bundle)) == same
    assert model_key(replace(bundle, contents={WEIGHTS: b"others"})) != model_key(bundle)


def test_other_golden_data_changes_only_that_file(encoded):
    inputs, outputs = encoded.golden()
    less = replace_golden(encoded, ({k: v[:1] for k, v in inputs.items()}, {k: v[:1] for k, v in outputs.items()}))
    assert [len(value) for part in less.golden() for value in part.values()] == [1, 1]
    changed = {name for name in encoded.contents if less.contents[name] != encoded.contents[name]}
    assert (
        changed
        == {GOLDEN}
        == {name for name, sha in less.manifest.files.items() if sha != encoded.manifest.files[name]}
    )
    with pytest.raises(EdgekitError, match=f"tiny/{GOLDEN}: holds no array"):
        replace_golden(encoded, ({}, {})).golden()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_a_changed_file_is_named(name, damage, tiny_file):
    content = bytearray((tiny_file / name).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        (tiny_file / name).unlink()
    else:
        changed = {"flip": bytes(content), "cut": bytes(content[:-1]), "empty": b""}[damage]
        (tiny_file / name).write_bytes(changed)
    with pytest.raises(EdgekitError, match=name) as caught:
        open_bundle(tiny_file)
    assert str(tiny_file) in one_line(caught.value)


@pytest.mark.parametrize("length", [0, 1, 100, -2])
def test_a_truncated_manifest_is_named(length, tiny_file):
    text = (tiny_file / MANIFEST).read_bytes()
    (tiny_file / MANIFEST).write_bytes(text[:length])
    with pytest.raises(EdgekitError, match=MANIFEST) as caught:
        open_bundle(tiny_file)
    one_line(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "bundle format 2, but its content is of format 1"),
        ({"format": 3}, "bundle format 3; this edgekit reads formats 1 and 2"),
        ({"rows_per_call": 0}, "rows_per_call = 0; expected 1 to"),
        ({"rows_per_call": True}, "rows_per_call = "),
        ({"rows_per_call": 4}, "bundle format 1, but its content is of format 2"),
        ({"inputs": [{"name": "x", "shape": ["batch", 4], "axes": [5]}]}, r"axes \(5\) are not those of rows"),
        ({"inputs": [{"name": "x", "shape": [], "axes": []}]}, "are not those of rows"),
        ({"inputs": [{"name": "x", "shape": ["batch", 4], "axes": "ab"}]}, "inputs = "),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"name": 7}, "name = '7'"),
        ({"files": ["weights.safetensors"]}, "files = "),
        ({"files": {}}, "lists no weights.safetensors"),
        ({"inputs": []}, "no inputs"),
        ({"inputs": [{"name": "x"}]}, "inputs = "),
        ({"inputs": [{"name": "x", "shape": ["batch"], "colour": "red"}]}, "inputs = "),
        ({"outputs": [{"name": "x", "shape": [1.5]}]}, "outputs = "),
        ({"bits": {"embed.weight": True}}, "bits = "),
        ({"classes": "abc"}, "classes = "),
        ({"seed": "lucky"}, "seed = "),
        ({"records": [1]}, "records = "),
    ],
)
def test_a_manifest_that_says_nonsense_is_an_error_that_names_the_key(changes, words, tiny_file):
    edit_manifest(tiny_file, **changes)
    with pytest.raises(EdgekitError, match=words) as caught:
        open_bundle(tiny_file)
    assert str(tiny_file) in one_line(caught.value)


def test_a_manifest_that_is_no_object_is_refused_by_its_type():
    with pytest.raises(EdgekitError, match="x: bundle format 'list'; this edgekit reads formats 1 and 2"):
        Manifest.from_json(b"[]", "x")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_file_name_that_leaves_the_bundle_is_refused(name, tiny_file):
    secret = tiny_file.parent / "secret"
    secret.write_bytes(b"x")
    files = json.loads((tiny_file / MANIFEST).read_text())["files"]
    edit_manifest(tiny_file, files=files | {name: hashlib.sha256(b"x").hexdigest()})
    with pytest.raises(EdgekitError, match="points outside the bundle"):
        open_bundle(tiny_file)


def test_a_link_that_leaves_the_bundle_is_refused(tiny_file):
    outside = tiny_file.parent / "outside"
    (tiny_file / WEIGHTS).rename(outside)
    (tiny_file / WEIGHTS).symlink_to(outside)
    with pytest.raises(EdgekitError, match="points outside the bundle"):
        open_bundle(tiny_file)


@pytest.mark.parametrize("path", ["no.edge", "folder", "file.txt"])
def test_what_is_no_bundle(path, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(EdgekitError, match=path) as caught:
        open_bundle(tmp_path / path)
    one_line(caught.value)


def test_nan_weights_are_refused_by_name_when_they_are_used(tiny_bundle, tmp_path):
    weights = tiny_bundle.weights()
    weights["embed.bias"][2] = np.nan
    write_bundle(assemble(tiny_bundle.manifest, weights, {}, tiny_bundle.golden()), tmp_path / "nan.edge")
    opened = open_bundle(tmp_path / "nan.edge")
    for use in (opened.weights, opened.model, opened.encodings):
        with pytest.raises(EdgekitError, match=r"embed\.bias.*NaN"):
            use()


@pytest.mark.parametrize(
    "change",
    [
        lambda encoded: {"bits": {}},  # the width of an encoded weight is gone
        lambda encoded: {"arguments": {**encoded.manifest.arguments, "heads": 3}},
        lambda encoded: {"arguments": {"tails": 1}},
        lambda encoded: {"family": "t3"},
    ],
)
def test_weights_that_the_manifest_does_not_fit_are_an_error(change, encoded, tmp_path):
    path = tmp_path / "x.edge"
    write_bundle(encoded, path)
    edit_manifest(path, **change(encoded))
    with pytest.raises(EdgekitError) as caught:
        open_bundle(path).model()
    one_line(caught.value)


def test_codes_outside_their_codebook_are_an_error(encoded, tmp_path):
    from safetensors.numpy import load, save

    write_bundle(encoded, tmp_path / "x.edge")
    arrays = load(encoded.contents[WEIGHTS])
    arrays["classifier.weight"][0, 0] = 200
    replace_file(tmp_path / "x.edge", WEIGHTS, save(arrays))
    with pytest.raises(EdgekitError, match=WEIGHTS):
        open_bundle(tmp_path / "x.edge").weights()


def test_golden_data_without_an_input_is_an_error_that_names_it(tiny_file):
    replace_file(tiny_file, GOLDEN, arrays_to_bytes({"out.probabilities": np.zeros((1, 3), np.float32)}))
    with pytest.raises(EdgekitError, match=r"in\.light_curve"):
        open_bundle(tiny_file).golden()


def test_writing_over_something(tiny_bundle, tiny_file, tmp_path):
    with pytest.raises(EdgekitError, match="--force"):
        write_bundle(tiny_bundle, tiny_file)
    other = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, name="other"))
    write_bundle(other, tiny_file, force=True)
    assert open_bundle(tiny_file).manifest.name == "other"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.edge"], "nothing is left beside it"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("...")
    for path in (precious, precious / "thesis.tex"):
        with pytest.raises(EdgekitError, match="not a bundle"):
            write_bundle(tiny_bundle, path, force=True)
    assert contents(precious) == {"thesis.tex": b"..."}


@pytest.mark.parametrize("moment", ["first file", "last file", "old moved away", "new moved in"])
def test_a_crash_while_writing_leaves_the_old_bundle(moment, tiny_bundle, tiny_file, tmp_path, monkeypatch):
    before = contents(tiny_file)
    full = OSError(errno.ENOSPC, "No space left on device")
    real_write, real_rename = Path.write_bytes, Path.rename

    def write_bytes(self, content):
        if (moment, self.name) in {("first file", WEIGHTS), ("last file", MANIFEST)}:
            raise full
        return real_write(self, content)

    def rename(self, target):
        if (moment == "old moved away" and self == tiny_file) or (
            moment == "new moved in" and self.name.endswith("new")
        ):
            raise full
        return real_rename(self, target)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    monkeypatch.setattr(Path, "rename", rename)
    other = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, name="other"))
    with pytest.raises(OSError, match="No space"):
        write_bundle(other, tiny_file, force=True)
    assert contents(tiny_file) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.edge"]


def test_what_a_killed_process_left_is_not_mixed_in(tiny_bundle, tmp_path, monkeypatch):
    left = tmp_path / ".x.edge.42-7.new"
    monkeypatch.setattr(files.os, "getpid", lambda: 42)
    monkeypatch.setattr(files.threading, "get_ident", lambda: 7)
    left.mkdir()
    (left / "stranger").write_text("")
    write_bundle(tiny_bundle, tmp_path / "x.edge")
    assert not left.exists()
    assert set(contents(tmp_path / "x.edge")) == {MANIFEST, WEIGHTS, GOLDEN}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(Manifest.__dataclass_fields__)), value=json_values)
def test_any_value_under_any_key_is_read_or_refused(key, value, tiny_bundle):
    values = json.loads(tiny_bundle.manifest.to_json()) | {key: value}
    with contextlib.suppress(EdgekitError):  # and nothing else
        manifest = Manifest.from_json(json.dumps(values).encode(), "x")
        assert json.loads(manifest.to_json())[key] == values[key]


BAD_NAMES = {
    "a null": {"name": "a\0b"},
    "half a letter": {"name": "a\ud800b"},
    "half a letter deep inside": {"metrics": {"a": [{"b": "\udfff"}]}},
    "a line end in a class": {"classes": ["a", "b\nc", "d"]},
    "an escape in a family": {"family": "t2\x1b[31m"},
    "letters in reverse": {"target": "a\u202eb"},
    "two classes of one name": {"classes": ["a", "b", "a"]},
    "a control character in an input": {"inputs": [{"name": "x\r", "shape": ["batch"]}]},
    "one in a unit": {"outputs": [{"name": "y", "shape": ["batch"], "unit": "m\x07"}]},
    "one in an axis": {"outputs": [{"name": "y", "shape": ["ba\x07tch"]}]},
    "two inputs of one name": {"inputs": [{"name": "x", "shape": ["batch"]}] * 2},
    "text as numbers": {"inputs": [{"name": "x", "shape": ["batch"], "dtype": "O"}]},
    "no dtype": {"inputs": [{"name": "x", "shape": ["batch"], "dtype": "float33"}]},
    "a dtype that numpy parses": {"inputs": [{"name": "x", "shape": ["batch"], "dtype": "(9,)f4,"}]},
    "a huge axis": {"inputs": [{"name": "x", "shape": ["batch", 1 << 40]}]},
    "a huge multiple": {"inputs": [{"name": "x", "shape": ["batch", "99999999999*a"]}]},
    "a negative axis": {"inputs": [{"name": "x", "shape": ["batch", -1]}]},
}


@pytest.mark.parametrize("changes", BAD_NAMES.values(), ids=BAD_NAMES)
def test_names_and_sizes_that_break_what_uses_them_are_refused_in_one_line(changes, tiny_file):
    edit_manifest(tiny_file, **changes)
    with pytest.raises(EdgekitError) as caught:
        open_bundle(tiny_file)
    assert one_line(caught.value)
    assert str(caught.value).startswith(f"{tiny_file}/{MANIFEST}: "), "the error names the file"


@pytest.mark.parametrize("name", ["a/../b", "./a", "a//b", "/a", "a\\b", "a/..", "", "a\0b"])
def test_a_file_name_that_is_not_plain_is_never_read_or_written(name, tiny_file, tiny_bundle, tmp_path):
    files_now = json.loads((tiny_file / MANIFEST).read_text())["files"]
    edit_manifest(tiny_file, files=files_now | {name: hashlib.sha256(b"x").hexdigest()})
    with pytest.raises(EdgekitError) as caught:
        open_bundle(tiny_file)
    assert one_line(caught.value)
    with pytest.raises(EdgekitError, match="outside the folder"):
        write_bundle(with_files(tiny_bundle, {name: b"x"}), tmp_path / "new.edge")
    assert not (tmp_path / "new.edge").exists()


def test_a_link_inside_a_bundle_does_not_make_the_copy_leave_its_folder(tiny_file, tmp_path):
    """`link/../../x` is inside the bundle where `link` leads two folders down, and outside of a copy of it."""
    (tiny_file / "deep" / "er").mkdir(parents=True)
    (tiny_file / "deep" / "er" / "est").mkdir()
    (tiny_file / "link").symlink_to("deep/er/est")
    (tiny_file / "deep" / "x").write_bytes(b"x")
    files_now = json.loads((tiny_file / MANIFEST).read_text())["files"]
    edit_manifest(tiny_file, files=files_now | {"link/../../x": hashlib.sha256(b"x").hexdigest()})
    assert (tiny_file / "link/../../x").resolve().is_relative_to(tiny_file), "the twin: the path alone is inside"
    with pytest.raises(EdgekitError, match="points outside the bundle"):
        write_bundle(open_bundle(tiny_file), tmp_path / "copies" / "copy.edge")
    assert not (tmp_path / "copies").exists()
