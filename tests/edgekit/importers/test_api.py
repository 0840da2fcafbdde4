"""Models from Python: every form that a model, its inputs and its examples may have, and sessions."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.bundle.store import write_bundle
from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from edgekit.importers import api
from edgekit.importers.api import check_state, described, import_any, import_module, import_onnx, open_model

WEIGHT = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)


@pytest.fixture
def graph():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 3))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 2))
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    made = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(WEIGHT, "w")])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def test_a_model_is_opened_by_path_text_or_as_it_is(tiny_bundle, tmp_path):
    path = write_bundle(tiny_bundle, tmp_path / "tiny.edge").path
    assert open_model(tiny_bundle) is tiny_bundle
    assert open_model(path).digest == open_model(str(path)).digest == tiny_bundle.digest


def test_a_graph_as_file_text_bytes_or_object_is_one_model(graph, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(graph.SerializeToString())
    forms = [path, str(path), path.read_bytes(), graph]
    assert len({import_onnx(form, name="m").digest for form in forms}) == 1
    assert import_onnx(path).manifest.name == "model"
    with pytest.raises(EdgekitError, match="no such file"):
        import_onnx(tmp_path / "other.onnx")


FORMS = {
    "arrays": {"x": np.zeros((4, 3), np.float32)},
    "tensors": {"x": torch.zeros(4, 3)},
    "texts": ["x:float32:batch,3"],
    "specs": [TensorSpec("x", ("batch", 3))],
}


@pytest.mark.parametrize("form", ["arrays", "tensors", "texts", "specs"])
def test_inputs_in_every_form_are_the_same_inputs(network, form):
    bundle = import_module(network, inputs=FORMS[form])
    assert bundle.manifest.inputs == (TensorSpec("x", ("batch", 3)),)
    inputs, outputs = bundle.golden()
    with torch.no_grad():
        expected = network(torch.from_numpy(inputs["x"])).numpy()
    np.testing.assert_allclose(outputs["output"], expected, atol=1e-6)


def test_examples_become_golden_rows_unless_others_are_given_or_they_are_empty(network):
    example = {"x": np.ones((2, 3), np.float32)}
    own = {"x": np.full((5, 3), 7, np.float32)}
    assert import_module(network, inputs=example).golden()[0]["x"].tolist() == example["x"].tolist()
    assert import_module(network, inputs=example, golden=own).golden()[0]["x"].tolist() == own["x"].tolist()
    empty = import_module(network, inputs={"x": np.zeros((0, 3), np.float32)}).golden()[0]["x"]
    assert len(empty) > 0
    assert len(np.unique(empty)) == empty.size, "made up"


def test_any_source_is_told_by_its_form(graph, tmp_path, monkeypatch):
    called = []
    for name in ("import_factory", "import_hugging_face", "from_file"):
        monkeypatch.setattr(api, name, lambda source, name=name, **options: called.append((name, str(source))))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "odd:name.onnx").write_bytes(b"")
    for source in ("package.module:build", "folder", "model.onnx", "odd:name.onnx"):
        import_any(source)
    assert called == [
        ("import_factory", "package.module:build"),
        ("import_hugging_face", "folder"),
        ("from_file", "model.onnx"),
        ("from_file", "odd:name.onnx"),
    ]


def test_descriptions_go_over_what_the_bundle_has(tiny_bundle):
    manifest = tiny_bundle.manifest
    same = described(tiny_bundle, name="other").manifest
    assert (same.name, same.classes, same.preprocessing) == ("other", manifest.classes, manifest.preprocessing)
    changed = described(tiny_bundle, name="o", classes=["a", "b", "c"], preprocessing={"id": "p"}, versions={"x": "1"})
    assert changed.manifest.classes == ("a", "b", "c")
    assert (changed.manifest.preprocessing, changed.manifest.versions) == ({"id": "p"}, {"x": "1"})
    assert changed.weights().keys() == tiny_bundle.weights().keys()
    assert tiny_bundle.manifest == manifest


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"light_curve": "nothing"}, "'light_curve=nothing': expected INPUT=OUTPUT, of light_curve and probabilities"),
        ({"probabilities": "light_curve"}, "expected INPUT=OUTPUT"),
        ({"light_curve": "probabilities"}, r"\(batch, 12, 2\) float32 cannot be fed with \(batch, 3\) float32"),
    ],
)
def test_a_state_that_cannot_be_handed_back_is_refused(tiny_bundle, state, words):
    with pytest.raises(EdgekitError, match=words):
        check_state(tiny_bundle.manifest, state)
    check_state(tiny_bundle.manifest, {})


def test_a_session_is_the_runtimes_own(tiny_bundle, fake_runtime):
    session = edgekit.Session(tiny_bundle, "fake")
    inputs, expected = tiny_bundle.golden()
    np.testing.assert_allclose(session.run(inputs)["probabilities"], expected["probabilities"], atol=1e-6)
    assert (session.device, session.provider) == ("fake", "fake")
    assert (session.inputs, session.outputs) == (tiny_bundle.manifest.inputs, tiny_bundle.manifest.outputs)
    session.warmup(2)


def test_threads_are_told_to_the_runtime_only_if_they_were_given(tiny_bundle, register):
    from tests.conftest import FakeSession

    asked = []

    class Asked(FakeSession):
        def __init__(self, bundle, **options):
            asked.append(options)
            super().__init__(bundle)

    register("edgekit.sessions", "asked", Asked)
    edgekit.Session(tiny_bundle, "asked")
    edgekit.Session(tiny_bundle, "asked", threads=3)
    assert asked == [{}, {"threads": 3}]


def test_only_networks_are_networks(network, graph):
    assert api.is_network(network)
    assert not any(map(api.is_network, (graph, None, torch.nn.Linear, "t2-gr", np.zeros(2))))
