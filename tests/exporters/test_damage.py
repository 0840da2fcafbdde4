"""Every check fails on a damaged copy of the model, and golden rows that show no damage are refused."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgekit.bundle.format import assemble, assemble_graph
from edgekit.errors import EdgekitError
from edgekit.exporter import load_exporter
from edgekit.graph.lower import lower
from edgekit.importers.files import resolve
from edgekit.importers.onnx import from_onnx
from exporters.base import hashes
from exporters.c_export import CExporter
from exporters.damage import BIASES, TOGETHER, check_golden, damages, sensitivity
from exporters.onnx_export import OnnxExporter

SMALL, OTHERS = "t2-gr", ("t2-ugrizy", "t2-ugrizy-z")
ZOO = (SMALL, *(pytest.param(name, marks=pytest.mark.targets) for name in OTHERS))
EXPORTERS = {
    "onnx": {},
    "openvino": {},
    "c": {},
    "tensorrt": {"target": "jetson-nano"},
    "tensorrt-rtx": {"target": "rtx-3060-12gb"},
}


def exporter(name):
    if name == "tensorrt-rtx" and find_spec("tensorrt_rtx") is None:
        pytest.skip("the extra rtx is not installed: pip install 'edgekit[rtx]'")
    return load_exporter(name)(**EXPORTERS[name])


def with_half_of(model: ModelProto, layers: int) -> ModelProto:
    """Return a copy in which the weights of this many of the largest layers are half as large."""
    copy = ModelProto()
    copy.CopyFrom(model)
    matrices = [t for t in copy.graph.initializer if len(t.dims) > 1 and t.data_type in (1, 10)]
    for tensor in sorted(matrices, key=lambda item: -np.prod(item.dims))[:layers]:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(array * array.dtype.type(0.5), tensor.name))
    return copy


def halved(bundle):
    """The bundle with half of its largest weight, and the golden outputs of the whole one."""
    weights = bundle.weights()
    largest = max(weights, key=lambda name: weights[name].size)
    return assemble(bundle.manifest, {**weights, largest: weights[largest] * 0.5}, {}, bundle.golden())


@pytest.mark.parametrize("name", EXPORTERS)
@pytest.mark.parametrize("model", ZOO)
def test_no_exporter_takes_a_damaged_model(name, model, tmp_path):
    """Its golden rows are still those of the whole model."""
    with pytest.raises(EdgekitError, match="golden outputs by"):
        exporter(name).export(halved(resolve(model)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def plant(name, bundle, folder: Path) -> list[str]:
    """Damage the weights in the exported files, correct the hashes, and return the arguments of verify.py."""
    arguments = []
    if name == "openvino":
        damaged = lower(halved(bundle), weights="float32")
        _, weights, _ = load_exporter(name)()._convert(openvino.Core(), bundle, damaged)
        (folder / "model.bin").write_bytes(weights)
    elif name == "c":
        (folder / "model.c").write_text(CExporter().source(halved(bundle)).model)
    else:
        onnx.save(with_half_of(onnx.load(folder / "model.onnx"), 1), folder / "model.onnx")
        arguments = [] if name == "onnx" else ["--runtime", "onnxruntime", "--runs", "1"]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = hashes({file: (folder / file).read_bytes() for file in manifest["files"]})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return arguments


@pytest.mark.parametrize("name", EXPORTERS)
@pytest.mark.parametrize("model", ZOO)
def test_the_check_on_the_device_finds_a_damage(name, model, tmp_path):
    bundle = resolve(model)
    result = exporter(name).export(bundle, tmp_path / "out")
    rows = result.manifest["golden"]["rows"]
    assert (rows["found"], rows["blind"]) == (rows["tried"], ())
    assert result.manifest["golden"]["device"]["unseen"] == ()
    arguments = plant(name, bundle, tmp_path / "out")
    command = [sys.executable, "-I", str(tmp_path / "out" / "verify.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert "FAIL" in done.stdout
    assert "not the file that was exported" not in done.stdout


def saturated(shift: float) -> bytes:
    """A graph whose sigmoid is 0 for all inputs if the shift is large."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), "w")
    bias = numpy_helper.from_array(np.full(4, -shift, np.float32), "b")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "MatMul"),
        helper.make_node("Add", ["h", "b"], ["a"], "Add"),
        helper.make_node("Sigmoid", ["a"], ["y"], "Sigmoid"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [weight, bias])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def test_rows_on_which_a_model_says_nothing_are_refused_with_the_remedy(tmp_path):
    bundle = from_onnx(saturated(200), "silent", "here")
    with pytest.raises(
        EdgekitError,
        match=r"silent: these golden rows cannot tell a damaged model: with the damage 'w halved' no output .*"
        r"edgekit import --data FILE\.npz",
    ):
        OnnxExporter().export(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    told = from_onnx(saturated(1), "speaks", "here")
    assert OnnxExporter().export(told, tmp_path / "out").manifest["golden"]["rows"]["blind"] == ()


def test_the_damages_are_those_that_the_module_names(toy):
    model = lower(toy(), weights="float32")
    found = {damage.name: damage for damage in damages(model)}
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    half, flip = found["classifier.weight halved"], found["classifier.weight sign flipped"]
    np.testing.assert_array_equal(half.tensors["classifier.weight"] * 2, stored["classifier.weight"])
    np.testing.assert_array_equal(-flip.tensors["classifier.weight"], stored["classifier.weight"])
    assert len(found[TOGETHER].tensors) == sum(name.endswith("halved") for name in found if name != TOGETHER)
    assert all(not array.any() for array in found[BIASES].tensors.values())
    assert "classifier.bias" in found[BIASES].tensors


@pytest.mark.parametrize("codes", [np.int8, np.uint8])
def test_codes_are_damaged_within_their_range(codes):
    """An index of a palette must stay one, and the least number of int8 has no opposite."""
    array = np.array([[-128, 3], [5, 127]]).astype(np.int8) if codes == np.int8 else np.array([[0, 3], [15, 7]], codes)
    tensor = numpy_helper.from_array(array, "codes")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    nodes = [helper.make_node("Cast", ["codes"], ["w"], to=1), helper.make_node("MatMul", ["x", "w"], ["y"])]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [tensor]))
    found = {damage.name: damage.tensors["codes"] for damage in damages(model)}
    flipped = found["codes sign flipped"]
    assert flipped.dtype == codes
    assert flipped.tolist() == ([[127, -3], [-5, -127]] if codes == np.int8 else [[15, 12], [0, 8]])
    assert ("codes halved" in found) == (codes == np.int8)


def test_a_tolerance_that_hides_most_layers_is_refused(toy):
    """At a tolerance of 0.5 of a probability the check on the device would let nearly everything pass."""
    bundle = toy()
    model = lower(bundle, weights="float32")
    assert check_golden(model, bundle, 1e-5, 1e-4)["golden"]["device"]["unseen"] == ()
    assert len(sensitivity(model, bundle, 0.9).unseen) > 4
    with pytest.raises(EdgekitError, match=r"cannot tell a damaged model: .* differs by more than 9\.0e-01, nor with"):
        check_golden(model, bundle, 1e-5, 0.9)


def test_the_layer_that_makes_no_difference_is_named():
    """Its weight is multiplied by zero behind it."""
    model = onnx.load_from_string(saturated(1))
    model.graph.node[0].output[0] = "silenced"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.float32), "zero"))
    model.graph.node.insert(1, helper.make_node("Mul", ["silenced", "zero"], ["h"], "Mul"))
    bundle = from_onnx(model.SerializeToString(), "dead", "here")
    found = sensitivity(lower(bundle), bundle, 1e-5)
    assert found.unseen == ("w",)
    assert found.blind == ("w halved", "w sign flipped")
    whole = assemble_graph(replace(bundle.manifest), saturated(1), bundle.golden())
    assert sensitivity(lower(whole), whole, 1e-5).blind == ()


def test_biases_that_hardly_count_are_no_reason_to_refuse(tmp_path):
    """Without its biases of 1e-6 the model computes the same; the manifest says that nobody would see their loss."""
    made = OnnxExporter().export(from_onnx(saturated(1e-6), "faint", "here"), tmp_path / "out")
    assert made.manifest["golden"]["rows"]["blind"] == (BIASES,)
