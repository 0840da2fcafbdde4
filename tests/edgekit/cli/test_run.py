"""edgekit run: named arrays in and out, in order, and errors before anything is written."""

import json

import numpy as np
import onnx
import pytest

from edgekit.bundle.store import open_bundle
from tests.edgekit.signature_graphs import gru


@pytest.fixture
def curves(tmp_path, tiny_file):
    """Return a file of inputs and the outputs that the bundle must give."""
    inputs, expected = open_bundle(tiny_file).golden()
    np.savez(tmp_path / "in.npz", **inputs)
    return tmp_path / "in.npz", expected["probabilities"]


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_outputs_are_the_models_in_order(edgekit, tiny_file, tmp_path, curves, runtime, batch):
    out = tmp_path / "out.npz"
    options = ("--inputs", curves[0], "--outputs", out, "--runtime", runtime, "--batch", batch, "--json")
    done = edgekit("run", tiny_file, *options)
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert report["rows"] == len(curves[1])
    with np.load(out) as written:
        assert written.files == ["probabilities"]
        np.testing.assert_allclose(written["probabilities"], curves[1], atol=2e-6)


def test_no_rows_are_no_error(edgekit, tiny_file, tmp_path):
    np.savez(tmp_path / "none.npz", light_curve=np.zeros((0, 12, 2), np.float32))
    done = edgekit("run", tiny_file, "--inputs", tmp_path / "none.npz", "--outputs", tmp_path / "out.npz")
    assert done.status == 0, done.err
    with np.load(tmp_path / "out.npz") as written:
        assert written["probabilities"].shape == (0, 3)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"lightcurve": np.zeros((2, 12, 2), np.float32)},
            ["unknown input 'lightcurve'", "did you mean 'light_curve'"],
        ),
        ({"light_curve": np.zeros((2, 12, 6), np.float32)}, ["(2, 12, 6)", "expected (batch, 12, 2)"]),
        ({"light_curve": np.zeros((2, 12, 2))}, ["float64", "expected float32"]),
        ({"light_curve": np.full((2, 12, 2), np.nan, np.float32)}, ["NaN"]),
    ],
)
def test_wrong_arrays_are_named_and_nothing_is_written(edgekit, tiny_file, tmp_path, arrays, words):
    np.savez(tmp_path / "in.npz", **arrays)
    done = edgekit("run", tiny_file, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz")
    assert done.failed_with(1, *words)
    assert not (tmp_path / "out.npz").exists()


def test_files_are_respected(edgekit, tiny_file, tmp_path, curves):
    run = ("run", tiny_file, "--inputs", curves[0], "--outputs", tmp_path / "out.npz")
    (tmp_path / "out.npz").write_text("mine")
    assert edgekit(*run).failed_with(1, "already exists", "--force")
    assert (tmp_path / "out.npz").read_text() == "mine"
    assert edgekit(*run, "--force").status == 0
    missing = ("run", tiny_file, "--inputs", tmp_path / "no.npz", "--outputs", tmp_path / "new.npz")
    assert edgekit(*missing).failed_with(1, "no such file")
    (tmp_path / "text.npz").write_text("not an archive")
    text = ("run", tiny_file, "--inputs", tmp_path / "text.npz", "--outputs", tmp_path / "new.npz")
    assert edgekit(*text).failed_with(1, "not an .npz archive")
    assert edgekit(*run, "--force", "--runtime", "tensorrt").failed_with(1, "unknown runtime 'tensorrt'")
    assert edgekit(*run, "--force", "--batch", "0").failed_with(2, "--batch")


@pytest.fixture
def recurrent(edgekit, tmp_path):
    """Return the bundle of a GRU over (time, batch, features), imported by the command."""
    onnx.save(gru(), tmp_path / "gru.onnx")
    done = edgekit("import", tmp_path / "gru.onnx", "--state", "before=after", "-o", tmp_path / "gru.edge")
    assert done.status == 0, done.err
    assert "before (batch, 1, 6), of its own (1, batch, 6)" in " ".join(done.out.split())
    return tmp_path / "gru.edge"


def test_a_stream_gives_what_the_whole_sequence_gives(edgekit, tmp_path, recurrent):
    sequences = np.random.default_rng(0).standard_normal((2, 12, 4)).astype(np.float32)
    zero = np.zeros((2, 1, 6), np.float32)
    np.savez(tmp_path / "x.npz", x=sequences)
    np.savez(tmp_path / "whole.npz", x=sequences, before=zero)
    np.savez(tmp_path / "own.npz", x=sequences.transpose(1, 0, 2), before=zero.transpose(1, 0, 2))
    found = {}
    for name, options in {
        "x": ("--stream", "--chunk", 5),
        "whole": (),
        "own": ("--own",),
    }.items():
        arguments = ("--inputs", tmp_path / f"{name}.npz", "--outputs", tmp_path / f"{name}.out.npz", *options)
        done = edgekit("run", recurrent, *arguments, "--runtime", "onnxruntime")
        assert done.status == 0, done.err
        with np.load(tmp_path / f"{name}.out.npz") as written:
            found[name] = dict(written)
    assert found["x"].keys() == found["whole"].keys() == {"y", "after"}
    for name in ("y", "after"):
        np.testing.assert_allclose(found["x"][name], found["whole"][name], atol=1e-6)
        np.testing.assert_allclose(found["own"][name].transpose(1, 0, 2), found["whole"][name], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--own", "--stream"), 2, "--own and --stream exclude each other"),
        (("--chunk", 4), 2, "--chunk and --overlap go with --stream"),
        (("--stream",), 1, "the length of a chunk is not known; give --chunk LENGTH"),
    ],
)
def test_options_that_make_no_sense_for_a_stream_are_refused(edgekit, tmp_path, recurrent, options, status, words):
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 12, 4), np.float32))
    arguments = ("--inputs", tmp_path / "x.npz", "--outputs", tmp_path / "y.npz", *options)
    assert edgekit("run", recurrent, *arguments).failed_with(status, words)
    assert not (tmp_path / "y.npz").exists()
