"""From a bundle to a checked graph: weights stored as codes give the same numbers, and what does not fit is refused."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit import __version__
from edgekit.bundle.encoding import Affine, Palette
from edgekit.bundle.format import KEY, Manifest, assemble_graph, model_key
from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from edgekit.graph import lower as lowering
from edgekit.graph.lower import lower, quantized_graph, stored_graph
from tests.edgekit.passes.graphs import GraphCandidate, graph, mlp, normal, run, stored


def codes(shape, affine, seed=0):
    rng = np.random.default_rng(seed)
    if affine:
        return Affine(8, rng.integers(-127, 128, shape).astype(np.int8), rng.random((shape[0], 1)).astype(np.float32))
    return Palette(4, rng.integers(0, 16, shape).astype(np.uint8), normal(seed, 16))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("name", "transposed"), [("up", True), ("down", False)])
def test_codes_decode_to_the_weight_bit_for_bit_in_either_layout(name, transposed, affine):
    candidate = mlp()
    tensor = next(item for item in candidate.model.graph.initializer if item.name == name)
    shape = tuple(tensor.dims)[::-1] if transposed else tuple(tensor.dims)
    encoding = codes(shape, affine)
    weight = encoding.decode().T if transposed else encoding.decode()
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weight), name))
    before = candidate.model.SerializeToString()
    made = GraphCandidate(quantized_graph(candidate.model, {name: encoding}))
    assert candidate.model.SerializeToString() == before
    x = normal(7, 5, 32)
    assert np.array_equal(run(made, x, name, optimized=False), weight)
    np.testing.assert_allclose(run(made, x), run(candidate, x), rtol=1e-5, atol=1e-5)
    held = stored(made)
    table = "scale" if affine else "palette"
    assert set(held) == {"up", "up.bias", "down", "down.bias"} - {name} | {f"{name}.codes", f"{name}.{table}"}
    assert held[f"{name}.codes"].dtype == (np.int8 if affine else np.uint8)
    assert held[f"{name}.codes"].shape == weight.shape
    assert [node.name for node in made.model.graph.node][:2] == [
        f"{name}.Cast",
        f"{name}.{'Mul' if affine else 'Gather'}",
    ]


def test_codes_of_a_weight_that_the_graph_has_not_are_refused():
    encodings = {"up": codes((48, 32), True), "side": codes((2, 2), True)}
    with pytest.raises(
        EdgekitError, match=r"encoded weight .side. is not in the exported graph, which holds up, up\.bias"
    ):
        quantized_graph(mlp().model, encodings)
    with pytest.raises(AssertionError, match="up: codes do not give the weight"):
        quantized_graph(mlp().model, {"up": codes((48, 32), True)})


def other_shape(model):
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 11


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda model: model.opset_import.append(helper.make_opsetid("custom", 1)),
            r"asked for opset 17, .*'custom': 1",
        ),
        (lambda model: setattr(model.opset_import[0], "version", 18), r"wrote \{'ai.onnx': 18\}; expected 13 to 20 of"),
        (lambda model: setattr(model.graph.node[2], "op_type", "Softsign"), "'h2.Relu' is a Softsign, which not every"),
        (lambda model: setattr(model.graph.node[2], "domain", "custom"), "'h2.Relu' is a Relu"),
        (lambda model: model.graph.node[0].input.append("x"), "the exported graph is not valid"),
        (other_shape, "the exported graph is not valid"),
    ],
)
def test_a_graph_that_not_every_runtime_reads_is_refused(damage, words):
    model = mlp().model
    lowering._check_graph(model, 17)
    damage(model)
    with pytest.raises(EdgekitError, match=f"ONNX: .*{words}") as caught:
        lowering._check_graph(model, 17)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "fits"),
    [
        ("x", ("batch", 32), True),
        ("x", ("batch", "features"), True),
        ("y", ("batch", 10), True),
        ("x", (1, 32), True),
        ("x", ("batch", 31), False),
        ("x", ("batch", 32, 1), False),
        ("x", ("batch",), False),
        ("z", ("batch", 32), False),
    ],
)
def test_shapes_are_those_of_the_manifest(name, shape, fits):
    specs = (TensorSpec("x", ("batch", 32)), TensorSpec(name, shape))
    if fits:
        lowering._check(mlp().model, 17, specs)
    else:
        with pytest.raises(EdgekitError, match=f"ONNX: '{name}' has shape .* the manifest says"):
            lowering._check(mlp().model, 17, specs)


def test_a_stored_graph_carries_its_key_and_keeps_other_metadata():
    model = graph([("Relu", "x", "y", {})], {}, {"x": ("batch", 4)}, {"y": ("batch", 4)}).model
    helper.set_model_props(model, {"author": "me", KEY: "old"})
    x = np.float32([[-1, 2, 3, 4]])
    manifest = Manifest("g", "", {}, (TensorSpec("x", ("batch", 4)),), (TensorSpec("y", ("batch", 4)),))
    bundle = assemble_graph(manifest, model.SerializeToString(), ({"x": x}, {"y": np.maximum(x, 0)}))
    for found in (stored_graph(bundle), lower(bundle)):
        assert {item.key: item.value for item in found.metadata_props} == {"author": "me", KEY: model_key(bundle)}
        assert list(found.graph.node) == list(model.graph.node)


@pytest.fixture(scope="module")
def encoded():
    from tests.toys import toy_bundle

    return toy_bundle("affine rows")


def test_a_network_is_traced_once_named_and_signed(encoded):
    floats, integers = lower(encoded, weights="float32"), lower(encoded)
    for model in (floats, integers):
        assert (model.producer_name, model.producer_version, model.graph.name) == ("edgekit", __version__, "toy")
        assert [(item.key, item.value) for item in model.metadata_props] == [(KEY, model_key(encoded))]
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    types = [{item.data_type for item in model.graph.initializer} for model in (floats, integers)]
    assert TensorProto.INT8 not in types[0]
    assert TensorProto.INT8 in types[1]
    inputs, expected = encoded.golden()
    older, newer = lower(encoded, opset=13), lower(encoded, opset=18)
    assert [model.opset_import[0].version for model in (older, newer)] == [13, 18]
    for model in (floats, integers, older, newer):
        onnx.checker.check_model(model, full_check=True)
        assert np.abs(run(GraphCandidate(model), inputs) - expected["probabilities"]).max() < 1e-6


def test_the_dynamo_exporter_is_asked_for_names_open_axes_and_an_opset_that_it_has(encoded, monkeypatch):
    asked, made = {}, lower(encoded, weights="float32", opset=18)

    def export(network, inputs, **options):
        asked.update(options, shapes=[tuple(value.shape[1:]) for value in inputs])
        return SimpleNamespace(model_proto=made)

    monkeypatch.setattr(lowering.torch.onnx, "export", export)
    assert lower(encoded, weights="float32", exporter="dynamo", opset=17) is made
    assert (asked["dynamo"], asked["opset_version"], asked["shapes"]) == (True, 18, [(12, 2)])
    assert (asked["input_names"], asked["output_names"]) == (["light_curve"], ["probabilities"])
    ((open_axes,),) = asked["dynamic_shapes"]
    assert set(open_axes) == {0}
    assert [item.key for item in made.metadata_props] == [KEY]


def test_an_opset_that_torch_cannot_write_is_an_error_with_its_reason(encoded, monkeypatch):
    def export(*given, **options):
        raise RuntimeError("\n\nno such layer\nmore")

    monkeypatch.setattr(lowering.torch.onnx, "export", export)
    with pytest.raises(EdgekitError, match=r"torch cannot write t2 as ONNX opset 17: no such layer; try .*16 to 20"):
        lower(encoded)
    with pytest.raises(EdgekitError, match="torch's dynamo exporter cannot write t2: RuntimeError"):
        lower(encoded, exporter="dynamo")
