"""Shapes of engines: they are the user's, they follow the model's constraints, and the golden data fits in them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.format import Manifest, assemble
from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from edgekit.importers.onnx import from_onnx
from exporters.shapes import for_shapes, shapes_text
from exporters.tensorrt_export import TensorRtExporter


def profile_of(bundle, axes, shapes=()):
    return for_shapes(bundle, axes, shapes, "")[1]


def bundle(length=18, *, synthetic=False):
    inputs = (TensorSpec("ids", ("batch", "9*faces"), "int64"), TensorSpec("time", ("batch", 1)))
    golden = {"ids": np.zeros((4, length), np.int64), "time": np.zeros((4, 1), np.float32)}
    manifest = Manifest("toy", "t2", {}, inputs, (TensorSpec("y", ("batch", 1)),), synthetic=synthetic)
    return assemble(manifest, {}, {}, (golden, {"y": np.zeros((4, 1), np.float32)}))


def test_shapes_are_the_real_golden_datas():
    assert profile_of(bundle(), ()) == {
        "ids": {"min": [1, 18], "opt": [16, 18], "max": [64, 18]},
        "time": {"min": [1, 1], "opt": [16, 1], "max": [64, 1]},
    }


def test_axes_can_be_given_with_or_without_their_multiple():
    given = profile_of(bundle(), ("batch=2:4:8", "faces=9:18:90"))
    assert given["ids"] == {"min": [2, 9], "opt": [4, 18], "max": [8, 90]}
    assert given == profile_of(bundle(), ("batch=2:4:8", "9*faces=9:18:90"))


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("batch", "expected NAME=LEAST:BEST:LARGEST"),
        ("bath=1:2:3", "unknown axis 'bath'.*did you mean 'batch'"),
        ("batch=3:2:1", "expected three rising lengths"),
        ("batch=0:2:4", "at least 1"),
        ("faces=9:18:100", "multiples of 9"),
        ("faces=27:36:45", "leaves out the golden data's 18"),
    ],
)
def test_wrong_axes_are_named(axis, message):
    with pytest.raises(EdgekitError, match=message):
        profile_of(bundle(), (axis,))


def test_lengths_that_nobody_gave_are_asked_for():
    with pytest.raises(
        EdgekitError, match=r"input 'ids' takes any length of axis '9\*faces', .*--shapes ids=MIN.*--data"
    ):
        profile_of(bundle(synthetic=True), ())


def test_whole_shapes_give_the_lengths_of_free_axes():
    found = profile_of(bundle(), (), ("ids=1x9:4x18:8x90",))
    assert found["ids"] == {"min": [1, 9], "opt": [4, 18], "max": [8, 90]}
    assert found["time"] == {"min": [1, 1], "opt": [4, 1], "max": [8, 1]}
    assert shapes_text(found)[0] == "ids: from 1x9 to 8x90, fastest at 4x18"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (("ids=1x9",), "expected INPUT=MIN:OPT:MAX"),
        (("idz=1x9:1x9:1x9",), "unknown input 'idz'.*did you mean 'ids'"),
        (("ids=1:1:1",), "expected 2 lengths each, as in"),
        (("time=1x2:1x2:1x2",), "this axis always has length 1"),
        (("ids=1x9:1x18:1x20",), "multiples of 9"),
        (("ids=1x18:1x18:1x18", "time=2x1:2x1:2x1"), "axis 'batch' has .* elsewhere"),
        (("ids=1x27:1x27:1x27",), "leaves out the golden data's 18.*--data"),
    ],
)
def test_wrong_shapes_are_named(shapes, message):
    with pytest.raises(EdgekitError, match=message):
        profile_of(bundle(), (), shapes)


def convolution(tmp_path):
    """An imported network that takes pictures of any size, so that its golden rows are synthetic."""
    random = np.random.default_rng(0)
    weight = numpy_helper.from_array(random.normal(0, 0.2, (4, 3, 3, 3)).astype(np.float32), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w_"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, "h", "w_"])
    node = helper.make_node("Conv", ["x", "w"], ["y"], "Conv", pads=[1, 1, 1, 1])
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return from_onnx(model.SerializeToString(), "conv", "conv.onnx")


def test_a_detector_of_any_size_is_refused_and_then_built_for_the_shapes_of_its_data(tmp_path):
    source = convolution(tmp_path)
    assert source.manifest.synthetic
    with pytest.raises(EdgekitError, match="input 'x' takes any length of axis 'h'"):
        TensorRtExporter(target="jetson-nano").export(source, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    pictures = np.random.default_rng(1).normal(size=(5, 3, 40, 56)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=pictures)
    TensorRtExporter(target="jetson-nano", data=str(tmp_path / "data.npz")).export(source, tmp_path / "kit")
    shapes = json.loads((tmp_path / "kit" / "profile.json").read_text())
    assert shapes == {"x": {"min": [1, 3, 40, 56], "opt": [16, 3, 40, 56], "max": [64, 3, 40, 56]}}
    with np.load(tmp_path / "kit" / "golden.npz") as golden:
        np.testing.assert_array_equal(golden["in.x"], pictures)
    text = "x: from 1x3x40x56 to 64x3x40x56, fastest at 16x3x40x56"
    assert text in (tmp_path / "kit" / "README.md").read_text()
    assert "--maxShapes=x:64x3x40x56" in (tmp_path / "kit" / "build.sh").read_text()
    command = [sys.executable, "-I", str(tmp_path / "kit" / "verify.py"), "--runtime", "onnxruntime", "--runs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "x: the engine takes 1x3x40x56 to 64x3x40x56, and is fastest at 16x3x40x56" in done.stdout


def test_synthetic_golden_rows_are_made_again_at_the_best_shape(tmp_path):
    found, profile = for_shapes(convolution(tmp_path), (), ("x=1x3x32x32:2x3x48x64:4x3x96x96",), "")
    inputs, outputs = found.golden()
    assert inputs["x"].shape[1:] == (3, 48, 64)
    assert outputs["y"].shape[1:] == (4, 48, 64)
    assert profile["x"]["max"] == [4, 3, 96, 96]
    assert found.manifest.synthetic


def test_data_without_an_input_is_refused(tmp_path):
    np.savez(tmp_path / "data.npz", other=np.zeros((2, 3, 8, 8), np.float32))
    with pytest.raises(EdgekitError, match="input 'x' is missing"):
        for_shapes(convolution(tmp_path), (), (), str(tmp_path / "data.npz"))
